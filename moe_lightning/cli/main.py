"""From a command line to an exit code: picks the verb, and turns errors into messages.

Exit codes: 0 all rows done, 2 bad command line or config, 3 done with some rows in errors.jsonl, 4
bad checkpoint or model, 5 interrupted, 6 workers or ranks lost, 1 anything else.
"""

import logging
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module

from moe_lightning import __version__
from moe_lightning.errors import MoELightningError, StoppedError
from moe_lightning.extras import names_extra, with_extra
from moe_lightning.files import is_disk_full

VERBS = {
    "predict": "Batched inference over a file of prompts.",
    "fit": "Fine-tune a checkpoint.",
    "validate": "Held-out loss of a checkpoint.",
    "verify": "Compare a strategy's results with those of one process, part by part.",
    "export": "Write a training checkpoint as a Hugging Face directory.",
    "plan": "What each strategy would need on some devices; --from: a placement of what was seen.",
    "benchmark": "Strategies side by side on this machine, in numbers.",
    "worker": "Serve experts to a master that predicts with --trainer.strategy moe_rpc.",
}
USAGE = f"""usage: python -m moe_lightning VERB [--config NAME.yaml] [--dotted.option value]

verbs:
{chr(10).join(f"  {verb:<10}{what}" for verb, what in VERBS.items())}

  python -m moe_lightning predict --config single_device.yaml    the shipped demo, as it is
  python -m moe_lightning VERB --help                            the options of a verb
  python -m moe_lightning VERB --print_config=comments           all options as commented YAML
  python -m moe_lightning --env                                  for a bug report; what is wrong
"""
INTERRUPTED = 5


def main(arguments: Sequence[str]) -> int:
    """Run one command line.

    Args:
        arguments: What follows the program's name.

    Returns:
        The exit code.
    """
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if arguments else 2
    if arguments[0] == "--version":
        print(__version__)
        return 0
    if arguments[0] == "--env":
        return import_module("moe_lightning.cli.environment").run()  # type: ignore[no-any-return]
    verb, *options = arguments
    if verb not in VERBS:
        return _fail(f"there is no verb {verb!r}.\n{USAGE}", 2)
    try:
        with _sigterm_interrupts():
            return _run(verb, options)
    except StoppedError as error:
        # All ranks stop, and one message is enough.
        if type(error) is StoppedError and _is_other_rank():
            return error.exit_code
        return _fail(str(error), error.exit_code)
    except MoELightningError as error:
        return _fail(str(error), error.exit_code)
    except KeyboardInterrupt:
        return _fail(_interrupted(verb), INTERRUPTED)
    except OSError as error:
        if not is_disk_full(error):
            raise
        return _fail(_disk_full(verb, error), INTERRUPTED)
    except SystemExit as stop:
        # jsonargparse ends --help with 0; Lightning ends an interrupted run with 1.
        if stop.code == 1:
            return _fail(_interrupted(verb), INTERRUPTED)
        return stop.code if isinstance(stop.code, int) else 0
    except ImportError as error:  # of what only some options need
        message = with_extra(str(error))
        if not names_extra(message):
            raise
        return _fail(f"{message}.", 2)
    except Exception as error:
        if not _is_out_of_memory(error):
            raise
        return _fail(f"memory ran out ({error}). Use a smaller batch, or a narrower dtype.", 1)


def _run(verb: str, options: list[str]) -> int:
    run: Callable[[list[str]], int] = import_module(f"moe_lightning.cli.{verb}").run
    _quieten()  # after the imports, which set their loggers up
    return run(options)


def _is_other_rank() -> bool:
    return any(os.environ.get(name, "0") != "0" for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID"))


def _interrupted(verb: str) -> str:
    return f"interrupted; the same command {_goes_on(verb)}."


def _disk_full(verb: str, error: OSError) -> str:
    where = f"{error.filename}: " if error.filename else ""
    return f"{where}the disk is full. Make room, and the same command {_goes_on(verb)}."


def _goes_on(verb: str) -> str:
    return "continues" if verb == "predict" else "starts again"


def _fail(message: str, code: int) -> int:
    print(f"error: {message}", file=sys.stderr)
    return code


def _is_out_of_memory(error: Exception) -> bool:
    torch = sys.modules.get("torch")  # not imported just for this
    kinds = (MemoryError,) if torch is None else (MemoryError, torch.OutOfMemoryError)
    return isinstance(error, kinds)


@contextmanager
def _sigterm_interrupts() -> Iterator[None]:
    """SIGTERM is an interrupt; Lightning's own handler, which calls this one, only notes it."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _quieten() -> None:
    """Keep to what a user can act on; MOE_LIGHTNING_VERBOSE=1 brings the chatter back."""
    if os.environ.get("MOE_LIGHTNING_VERBOSE"):
        return
    for name in ("lightning.pytorch", "lightning.fabric", "transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")

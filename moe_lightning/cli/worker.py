"""``worker``: serves experts to a ``moe_rpc`` master."""

import argparse
import shlex
import sys
from collections.abc import Sequence

from jsonargparse import ArgumentError, ArgumentParser, Namespace

from moe_lightning.cli.plain_words import plain_words
from moe_lightning.errors import UsageError
from moe_lightning.experts.names import BackendName
from moe_lightning.transport.keys import new_keys
from moe_lightning.workers.worker import WorkerOptions, offer, serve_experts


def run(arguments: Sequence[str]) -> int:
    """Run the verb.

    Args:
        arguments: The command line after the verb.

    Returns:
        0 when told to leave; 6 if the only master that it was to serve is gone.

    Raises:
        UsageError: If an option is wrong.
        CheckpointError: If the checkpoint cannot be used.
    """
    try:
        options = _parser().parse_args(list(arguments))
    except ArgumentError as error:
        raise UsageError(f"{plain_words(str(error))}\nSee all options with --help.") from error
    if options.new_keys is not None:
        new_keys(options.new_keys)
        print(_what_next(options))
        return 0
    worker = WorkerOptions(
        checkpoint=options["model.checkpoint"],
        listen=options.listen,
        keys=options["keys"],
        device=options.device,
        memory_gb=options.memory_gb,
        threads=options.threads,
        experts_backend=options.experts_backend,
        insecure_network=options.insecure_network,
        ends_with_master=options.ends_with_master,
        parent_pipe=options.parent_pipe,
    )

    def say_where(address: str) -> None:
        print(f"listening on {address}, offering {offer(worker)}", file=sys.stderr, flush=True)

    try:
        return serve_experts(worker, on_listening=say_where)
    except KeyboardInterrupt:  # Ctrl-C or SIGTERM: that is how a worker is told to leave
        return 0


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="python -m moe_lightning worker",
        exit_on_error=False,
        description="Serve experts to a master that runs with --trainer.strategy moe_rpc, until "
        "Ctrl-C or SIGTERM. One master at a time.",
    )
    parser.add_argument(
        "--listen",
        type=str,
        default="tcp://127.0.0.1:0",
        metavar="tcp://HOST:PORT",
        help="Address to listen on; the port after it is for signs of life. Port 0 takes two free "
        "ones. Beyond this machine (not 127.0.0.1), --keys is needed.",
    )
    parser.add_argument(
        "--model.checkpoint",
        type=str,
        default="demo",
        help="This machine's copy of the checkpoint: a Hugging Face directory, a hub id, or demo.",
    )
    parser.add_argument(
        "--keys", type=str | None, metavar="DIR", help="The keys, the same directory as the master."
    )
    parser.add_argument(
        *("--new-keys", "--new_keys"),
        type=str | None,
        metavar="DIR",
        help="Make keys in a new directory, and do nothing else.",
    )
    parser.add_argument(
        "--device",
        type=str,
        default="auto",
        help="Where the experts go: cpu, cuda:N, or auto for a GPU where there is one.",
    )
    parser.add_argument(
        *("--memory_gb", "--memory-gb"),
        type=float | None,
        metavar="GB",
        help="Most memory that the experts may take. The default is what is free.",
    )
    parser.add_argument("--threads", type=int | None, help="CPU threads. The default is PyTorch's.")
    parser.add_argument(
        *("--experts_backend", "--experts-backend"),
        type=BackendName | None,
        help="How the experts are computed. The default is what the master says.",
    )
    parser.add_argument(
        *("--insecure-network", "--insecure_network"),
        type=bool,
        nargs="?",
        const=True,
        default=False,
        help="Whether the transport tensorpipe may be used on a private network, where whoever "
        "reaches this worker can execute what they like.",
    )
    # For workers that a master or a launcher starts.
    for name in ("--ends_with_master", "--parent_pipe"):
        parser.add_argument(name, type=bool, default=False, help=argparse.SUPPRESS)
    return parser


def _what_next(options: Namespace) -> str:
    directory = shlex.quote(options.new_keys)
    checkpoint = shlex.quote(options["model.checkpoint"])
    return f"""\
new keys: {options.new_keys}
Whoever has them can use your workers, and pass for one. Next:
  1. Copy them to every machine, as they are: scp -rp {directory} HOST:
  2. On each machine with experts, its own address in place of 192.0.2.11:
     python -m moe_lightning worker --listen tcp://192.0.2.11:7000 --keys {directory} \\
       --model.checkpoint {checkpoint}
  3. On the master:
     python -m moe_lightning predict --config rpc.yaml --trainer.strategy.keys {directory} \\
       --trainer.strategy.workers "[tcp://192.0.2.11:7000]" --model.checkpoint {checkpoint}"""

"""RankLauncher: runs a trainer's function on this rank, and blames others where they are to.

Lightning's own launcher ends rank 0 by SIGKILL, without a word, up to 5 s after a rank that it
started has died. This one lets every rank find out, and ends what it started.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from lightning.fabric.plugins import ClusterEnvironment
from lightning.fabric.utilities.distributed import _set_num_threads_if_needed
from lightning.pytorch import Trainer
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher
from typing_extensions import override

from moe_lightning.errors import WorkersLostError
from moe_lightning.strategies.rank_failures import is_group_failure, shorten

if TYPE_CHECKING:
    from moe_lightning.strategies.rank_watch import RankWatch

_PARENT = "MOE_LIGHTNING_PARENT"  # who started a rank, in its environment
_LOOK_S = 0.5
_GRACE_S = 20.0  # after the death of a rank that was started here, before this one is ended
_END_S = 5.0  # that ranks which were started here have to end by themselves


class RankLauncher(_SubprocessScriptLauncher):
    """Starts this machine's ranks, unless torchrun or SLURM did; private parts of Lightning 2.6.6.

    Args:
        cluster_environment: Who starts ranks.
        num_processes: Ranks of this machine.
        num_nodes: Machines.
        watch: This rank's watch, once the ranks have met.
    """

    def __init__(
        self,
        cluster_environment: ClusterEnvironment,
        num_processes: int,
        num_nodes: int,
        *,
        watch: Callable[[], "RankWatch | None"],
    ) -> None:
        super().__init__(cluster_environment, num_processes, num_nodes)
        self._watch = watch

    @override
    def launch(
        self,
        function: Callable[..., Any],
        *args: Any,
        trainer: Trainer | None = None,
        **kwargs: Any,
    ) -> Any:
        """Run the function on every rank.

        Args:
            function: What the trainer runs.
            *args: Its arguments.
            trainer: The trainer.
            **kwargs: More of its arguments.

        Returns:
            What the function returns on this rank.

        Raises:
            WorkersLostError: If this rank failed because others did; it names them.
            KeyboardInterrupt: If others were interrupted.
        """
        assert trainer is not None, "Lightning's trainer comes along"
        environment = self.cluster_environment
        environment.validate_settings(num_devices=self.num_processes, num_nodes=self.num_nodes)
        starts_others = self.num_processes * self.num_nodes > 1
        if starts_others and not environment.creates_processes_externally:
            os.environ[_PARENT] = str(os.getpid())
            self._call_children_scripts()  # and leaves its address in this process's environment
            del os.environ[_PARENT]
        elif _PARENT in os.environ:
            _end_with(int(os.environ.pop(_PARENT)))
        _set_num_threads_if_needed(num_processes=self.num_processes)
        self._note_sigterm_only(trainer)
        with self._watching_children():
            try:
                return function(*args, **kwargs)
            except BaseException as error:
                with _signals_ignored():
                    cause = self._explain(error, _verb(trainer))
                    self._end_children()
                if cause is None:
                    raise
                raise cause from error

    def kill_children(self) -> None:
        """End the ranks that were started here, at once; SIGKILL ends a stopped one too."""
        for process in self.procs:
            if process.poll() is None:
                process.kill()

    def _explain(self, error: BaseException, what_failed: str) -> BaseException | None:
        watch = self._watch()
        if watch is not None:
            return watch.explain(error, what_failed=what_failed)
        if is_group_failure(error):
            return WorkersLostError(
                f"the ranks did not meet for {what_failed}: {shorten(str(error))}. Look at what "
                "the other ranks say; the same command continues."
            )
        return None

    def _end_children(self) -> None:
        end_s = time.monotonic() + _END_S
        while any(p.poll() is None for p in self.procs) and time.monotonic() < end_s:
            time.sleep(_LOOK_S / 5)
        self.kill_children()

    @contextmanager
    def _watching_children(self) -> Iterator[None]:
        """End this rank if one that it started is dead and the main thread does not notice."""
        is_over = threading.Event()

        def look() -> None:
            while not is_over.wait(_LOOK_S):
                dead = [(r, p) for r, p in enumerate(self.procs, 1) if p.poll()]
                if dead and not is_over.wait(_GRACE_S):
                    rank, process = dead[0]
                    print(
                        f"error: local rank {rank} (process {process.pid}) ended with exit code "
                        f"{process.returncode}, and this one waits for it. The same command "
                        "continues.",
                        file=sys.stderr,
                        flush=True,
                    )
                    self.kill_children()
                    sys.stdout.flush()
                    # The main thread may wait for the dead rank for ever.
                    os._exit(WorkersLostError.exit_code)

        if not self.procs:
            yield
            return
        thread = threading.Thread(target=look, name="child-ranks", daemon=True)
        thread.start()
        try:
            yield
        finally:
            is_over.set()
            thread.join()

    def _note_sigterm_only(self, trainer: Trainer) -> None:
        """Lightning's handler calls a collective, wherever the ranks are: they would not agree."""
        connector = trainer._signal_connector

        def note(signum: Any, _frame: Any) -> None:
            if not connector.received_sigterm:
                self.kill(signum)
            connector.received_sigterm = True

        connector._sigterm_notifier_fn = note  # type: ignore[method-assign, assignment]


def _end_with(parent: int) -> None:
    """End this rank some time after the one that started it, which may have died before the ranks
    met: nobody watches over them until then."""

    def look() -> None:
        while os.getppid() == parent:
            time.sleep(_LOOK_S)
        time.sleep(_GRACE_S)  # a watch, or the end of the run, may come first
        print(
            f"error: the process that started this rank ({parent}) is gone. The same command "
            "continues.",
            file=sys.stderr,
            flush=True,
        )
        sys.stdout.flush()
        os._exit(WorkersLostError.exit_code)

    threading.Thread(target=look, name="parent-rank", daemon=True).start()


def _verb(trainer: Trainer) -> str:
    return "the run" if trainer.state.fn is None else trainer.state.fn.value


@contextmanager
def _signals_ignored() -> Iterator[None]:
    """torchrun ends all ranks by SIGTERM when one has died, while they find out which."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    signals = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, signal.SIG_IGN) for number in signals]
    try:
        yield
    finally:
        for number, handler in zip(signals, before, strict=True):
            signal.signal(number, handler)

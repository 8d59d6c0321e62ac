"""The interface of all transports, as the master sees it: ask a worker, wait for its answer."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

from typing_extensions import Buffer

Frames = Sequence[Buffer]
"""One message: a header and raw bytes, each as anything that has a buffer."""


class WorkerLost(Exception):  # noqa: N818 (the name says what happened)
    """A worker does not answer any more; what it was asked can be asked elsewhere.

    Args:
        worker: Its number.
        reason: How that was noticed, for messages.
    """

    def __init__(self, worker: int, reason: str) -> None:
        super().__init__(f"worker {worker}: {reason}")
        self.worker = worker
        self.reason = reason


class Pending(ABC):
    """A request in flight."""

    @abstractmethod
    def result(self, timeout_s: float) -> list[memoryview]:
        """Wait for the answer, in the thread that asked.

        Args:
            timeout_s: Longest wait.

        Returns:
            The frames of the answer.

        Raises:
            WorkerLost: As soon as the worker is known to be gone.
            TimeoutError: If there is no answer in time; it may be waited for again.
        """


class ExpertTransport(ABC):
    """Carries requests to workers and answers back. Threads may share it.

    A request may reach a worker more than once (after a broken connection), and an answer may come
    late or twice: requests are pure questions, and an answer is taken once, by its request's id.
    """

    @abstractmethod
    def ask(self, worker: int, request: int, frames: Frames) -> Pending:
        """Put a request in flight; does not wait for the network.

        Args:
            worker: The worker's number.
            request: The request's id, unique within the session; the answer carries it too.
            frames: The message. Its memory must stay as it is until the answer is there.

        Returns:
            What the answer is waited for with.

        Raises:
            WorkerLost: If the worker is known to be gone.
        """

    @abstractmethod
    def close(self) -> None:
        """Give up sockets and threads, without waiting for anybody; requests in flight are lost."""

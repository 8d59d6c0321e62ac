"""What PyTorch keeps for each thread: modes, to be taken along into another, and thread counts."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

DEVICE_TYPES = ("cpu", "cuda")


class ThreadModes:
    """Inference mode and autocast of the thread that makes this; never gradients."""

    def __init__(self) -> None:
        self._is_inference = torch.is_inference_mode_enabled()
        self._autocast = {
            kind: torch.get_autocast_dtype(kind)
            for kind in DEVICE_TYPES
            if torch.is_autocast_enabled(kind)
        }

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The same modes during the block, in whatever thread it runs."""
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode(self._is_inference))
            stack.enter_context(torch.no_grad())
            for kind, dtype in self._autocast.items():
                stack.enter_context(torch.autocast(kind, dtype=dtype))
            yield


def use_threads(num_threads: int) -> None:
    """Set how many threads PyTorch uses for the calling thread alone."""
    # The first question in a thread sets its number to the one last set in any thread.
    torch.get_num_threads()
    torch.set_num_threads(num_threads)

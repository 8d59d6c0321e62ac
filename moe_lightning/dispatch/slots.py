"""Slots: the devices of one process that hold experts, and how work is put in flight on them.

    start(compute, rows_RD, index_RK, weights_RK) ──▶ finish() ──▶ weighted sums on the home device

``start`` returns at once; ``finish`` waits. The home device is the one with router and dense
layers; rows come from it and go back to it. A slot on a CPU is a worker thread, a slot on a GPU a
stream.

The GPU classes have not been run on a GPU yet.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor
from typing_extensions import override

from moe_lightning.dispatch.thread_modes import ThreadModes, use_threads

Compute = Callable[[Tensor, Tensor, Tensor], Tensor]
"""``ExpertShard.compute``."""
Finish = Callable[[], Tensor]


class Slot(ABC):
    """A device that holds experts.

    Args:
        name: What users call it, unique among the slots.
        device: Where its weights are.
        home: Where rows come from and go back to.
    """

    def __init__(self, name: str, *, device: torch.device, home: torch.device) -> None:
        self.name = name
        self.device = device
        self.home = home

    @abstractmethod
    def start(
        self, compute: Compute, rows_RD: Tensor, index_RK: Tensor, weights_RK: Tensor
    ) -> Finish:
        """Put one share in flight.

        Args:
            compute: What to do with them on the slot's device.
            rows_RD: Rows on the home device.
            index_RK: Local experts, on the home device.
            weights_RK: Router weights, on the home device.

        Returns:
            A function that waits and returns ``[R, D]`` on the home device.
        """

    def close(self) -> None:  # noqa: B027 (most slots have nothing to give up)
        """Give up threads; the slot cannot be used any more."""


class HomeSlot(Slot):
    """The home device itself: its share is computed while the others' are in flight."""

    @override
    def start(
        self, compute: Compute, rows_RD: Tensor, index_RK: Tensor, weights_RK: Tensor
    ) -> Finish:
        return lambda: compute(rows_RD, index_RK, weights_RK)


class ThreadSlot(Slot):
    """Experts on the host, computed by a thread of their own where their weights are.

    Args:
        name: As for every slot.
        device: As for every slot.
        home: As for every slot.
        num_threads: Threads that its matrix products may use.
    """

    def __init__(
        self, name: str, *, device: torch.device, home: torch.device, num_threads: int
    ) -> None:
        super().__init__(name, device=device, home=home)
        self._pool = ThreadPoolExecutor(
            1,
            thread_name_prefix=name,
            initializer=use_threads,
            initargs=(num_threads,),
        )

    @override
    def start(
        self, compute: Compute, rows_RD: Tensor, index_RK: Tensor, weights_RK: Tensor
    ) -> Finish:
        on_gpu = self.home.type != "cpu"
        tensors: tuple[Tensor, ...] = (rows_RD, index_RK, weights_RK)
        arrived = None
        if on_gpu:
            tensors = tuple(_to_pinned(tensor) for tensor in tensors)
            arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            arrived.record(torch.cuda.current_stream(self.home))
        modes = ThreadModes()

        def work() -> Tensor:
            if arrived is not None:
                arrived.synchronize()  # this thread waits; the home thread goes on
            with modes.applied():
                out_RD = compute(*tensors)
                return out_RD.pin_memory() if on_gpu else out_RD

        future = self._pool.submit(work)
        if not on_gpu:
            return future.result
        return lambda: future.result().to(self.home, non_blocking=True)

    @override
    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)


class StreamSlot(Slot):
    """Experts on a GPU other than home, or on the home GPU beside it, on a stream of their own."""

    def __init__(self, name: str, *, device: torch.device, home: torch.device) -> None:
        super().__init__(name, device=device, home=home)
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        both_are_gpus = home.type == "cuda" and device != home
        # Without peer access the driver copies in small steps; through pinned memory it is one.
        self._is_staged = both_are_gpus and not torch.cuda.can_device_access_peer(device, home)

    @override
    def start(
        self, compute: Compute, rows_RD: Tensor, index_RK: Tensor, weights_RK: Tensor
    ) -> Finish:
        from_home = self.home.type == "cuda"
        tensors: tuple[Tensor, ...] = (rows_RD, index_RK, weights_RK)
        if self._is_staged:
            tensors = tuple(_to_pinned(tensor) for tensor in tensors)
        if from_home:
            ready = torch.cuda.Event()  # type: ignore[no-untyped-call]
            ready.record(torch.cuda.current_stream(self.home))
            self._stream.wait_event(ready)
        with torch.cuda.stream(self._stream):
            if from_home and not self._is_staged:
                for tensor in tensors:
                    tensor.record_stream(self._stream)
            out_RD = compute(*(t.to(self.device, non_blocking=True) for t in tensors))
            if self._is_staged or not from_home:
                out_RD = _to_pinned(out_RD)
            done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            done.record(self._stream)

        def finish() -> Tensor:
            if not from_home:
                done.synchronize()
                return out_RD
            here = torch.cuda.current_stream(self.home)
            here.wait_event(done)
            if not self._is_staged:
                out_RD.record_stream(here)
            return out_RD.to(self.home, non_blocking=True)

        return finish


def _to_pinned(tensor: Tensor) -> Tensor:
    """A copy in pinned host memory, queued on the current stream of the tensor's device."""
    pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return pinned.copy_(tensor, non_blocking=True)


def make_slots(devices: list[torch.device], *, num_threads: int) -> list[Slot]:
    """The slots of a process.

    Args:
        devices: Device of each slot; the first one is home. A device may be named twice.
        num_threads: Threads of each slot on a CPU.

    Returns:
        The slots, in the order of the devices.
    """
    home = devices[0]
    slots: list[Slot] = [HomeSlot(f"0:{home}", device=home, home=home)]
    for number, device in enumerate(devices[1:], start=1):
        name = f"{number}:{device}"
        if device.type == "cpu":
            slots.append(ThreadSlot(name, device=device, home=home, num_threads=num_threads))
        else:
            slots.append(StreamSlot(name, device=device, home=home))
    return slots

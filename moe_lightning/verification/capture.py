"""Capture: looks on while a strategy computes, and writes down what goes in and out of its parts.

    embeddings ─▶ layer 0 ─▶ layer 1 ─▶ ...      every layer's output
                    │ router ─▶ experts          what both get, what the experts give
                    └ which slot computed what   from the routing log

Whatever the strategy does with a batch, its rows are told apart by where a forward's input stands
in the batch: parts of a batch may be in several threads, or go through a pipeline one by one.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from moe_lightning.dispatch import RoutingLog
from moe_lightning.dispatch.bookkeeping import LayerTrace
from moe_lightning.errors import CheckpointError
from moe_lightning.modeling.pipeline import AbsentLayer
from moe_lightning.modeling.runner import PaddedBatch
from moe_lightning.modeling.seam import MoELayer, find_moe_layers
from moe_lightning.verification.folder import RowFolder, experts_name, layer_name


class _Rows(NamedTuple):
    """The rows of the batch that is looked at."""

    folders: Sequence[RowFolder]
    lengths: Sequence[int]
    width: int


class _Forward(threading.local):
    """Where this thread's forward is."""

    def __init__(self) -> None:
        self.is_watched = False
        self.first_row = 0
        self.next_row: dict[str, int] = {}
        self.router_inputs: dict[int, Tensor] = {}
        self.traces: dict[int, LayerTrace] = {}


class Capture:
    """Looks on while a model computes.

    Args:
        parent: Folder of the rows.
        log: Where the model's dispatchers record their work.
        is_writer: Whether this rank writes; others have the same rows and layers.
    """

    def __init__(self, parent: Path, log: RoutingLog, *, is_writer: bool = True) -> None:
        self.parent = parent
        self.is_writer = is_writer
        self._log = log
        self._forward = _Forward()

    @contextmanager
    def over(
        self,
        model: PreTrainedModel,
        rows: Sequence[int],
        lengths: Sequence[int],
        batch: PaddedBatch,
    ) -> Iterator[None]:
        """Write down what one forward of a batch computes.

        Args:
            model: The model, or this rank's part of it.
            rows: Positions in the input of the batch's rows.
            lengths: Their tokens; padding is on the right.
            batch: The batch.
        """
        folders = [RowFolder(self.parent, row) for row in rows]
        watched = _Rows(folders, lengths, batch.input_ids_BS.shape[1])
        with ExitStack() as stack:
            for handle in self._hooks(model, watched):
                stack.callback(handle.remove)
            self._log.subscribe(self._keep, wants_times=False)
            stack.callback(self._log.unsubscribe, self._keep)
            yield

    def _hooks(self, model: PreTrainedModel, rows: _Rows) -> Iterator[Any]:
        yield model.register_forward_pre_hook(self._begin, with_kwargs=True)
        layers: Any = model.base_model.layers
        for index, layer in enumerate(layers):
            if isinstance(layer, AbsentLayer):
                continue
            if index == 0:
                yield layer.register_forward_pre_hook(self._on_embeddings(rows), with_kwargs=True)
            yield layer.register_forward_hook(self._on_layer(index, rows))
        for moe in _moe_layers(model):
            yield moe.router.register_forward_pre_hook(self._on_router(moe.layer), with_kwargs=True)
            yield moe.experts.register_forward_hook(
                self._on_experts(moe.layer, rows), with_kwargs=True
            )

    def _begin(self, model: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        input_ids = kwargs["input_ids"]
        forward = self._forward
        forward.first_row = input_ids.storage_offset() // input_ids.shape[1]
        forward.next_row = {}
        forward.traces = {}

    def _keep(self, trace: LayerTrace) -> None:
        self._forward.traces[trace.layer] = trace

    def _on_embeddings(self, rows: _Rows) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            hidden_BSD = first_input(args, kwargs)
            for row, place in self._rows("embeddings", hidden_BSD.shape[0], rows):
                length = rows.lengths[row]
                rows.folders[row].save("embeddings", hidden_SD=hidden_BSD[place, :length])

        return hook

    def _on_layer(self, layer: int, rows: _Rows) -> Callable[..., None]:
        name = layer_name(layer)

        def hook(module: nn.Module, args: Any, output: Any) -> None:
            hidden_BSD = whole(output if isinstance(output, Tensor) else output[0])
            for row, place in self._rows(name, hidden_BSD.shape[0], rows):
                rows.folders[row].save(name, hidden_SD=hidden_BSD[place, : rows.lengths[row]])

        return hook

    def _on_router(self, layer: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            hidden = first_input(args, kwargs)
            self._forward.router_inputs[layer] = hidden.reshape(-1, hidden.shape[-1])

        return hook

    def _on_experts(self, layer: int, rows: _Rows) -> Callable[..., None]:
        name = experts_name(layer)

        def hook(module: nn.Module, args: Any, kwargs: dict[str, Any], out_TD: Tensor) -> None:
            hidden_TD, index_TK, weights_TK = map(whole, [*args, *kwargs.values()][:3])
            values = {"hidden": hidden_TD, "index": index_TK, "weights": weights_TK}
            values["out"] = whole(out_TD)
            router_TD = self._forward.router_inputs.pop(layer, None)
            if router_TD is not None and router_TD.shape[0] == hidden_TD.shape[0]:
                router_TD = whole(router_TD)
                if router_TD.data_ptr() != hidden_TD.data_ptr():
                    values["router"] = router_TD
            trace = self._forward.traces.pop(layer, None)
            members = list(self._rows(name, hidden_TD.shape[0] // rows.width, rows))
            slots = _slots(trace, [rows.lengths[row] for row, _ in members])
            for number, (row, place) in enumerate(members):
                start, length = place * rows.width, rows.lengths[row]
                parts = {key: value[start : start + length] for key, value in values.items()}
                rows.folders[row].save(name, **parts, **slots[number])

        return hook

    def _rows(self, key: str, num_rows: int, rows: _Rows) -> Iterator[tuple[int, int]]:
        """Which rows of the batch a part's output is of, and where each stands in it."""
        first = self._forward.next_row.get(key, self._forward.first_row)
        self._forward.next_row[key] = first + num_rows
        if self.is_writer:
            for place in range(num_rows):
                yield first + place, place


def first_input(args: Any, kwargs: dict[str, Any]) -> Tensor:
    """The hidden states that a module is called with."""
    return whole(args[0] if args else kwargs["hidden_states"])


def whole(tensor: Tensor) -> Tensor:
    """A tensor that ranks may share, whole; all of them must ask."""
    if isinstance(tensor, DTensor):
        return tensor.full_tensor()
    return tensor


def _moe_layers(model: PreTrainedModel) -> list[MoELayer]:
    try:
        return find_moe_layers(model)
    except CheckpointError:  # a stage of a pipeline without experts
        return []


def _slots(trace: LayerTrace | None, lengths: Sequence[int]) -> list[dict[str, Any]]:
    """For each row, the names of slots, and the slot of each of its pairs."""
    if trace is None or len(trace.slots) == 0:
        return [{}] * len(lengths)
    if trace.slot_TK is None:
        is_rank = dist.is_initialized() and dist.get_world_size() > 1
        name = f"rank {dist.get_rank()}" if is_rank else trace.slots[0]
        slot_TK = torch.zeros_like(trace.index_TK)
        names = [name]
    else:
        slot_TK, names = trace.slot_TK, list(trace.slots)
    if slot_TK.shape[0] != sum(lengths):  # a rank's slice of rows that several hold
        return [{}] * len(lengths)
    parts: Sequence[Tensor] = torch.split(slot_TK, list(lengths))
    return [{"slot": part, "slots": names} for part in parts]

"""The one seam between a model and its experts.

transformers gives (almost) every MoE family the same contract, so that a block never knows where
its experts are:

    router:   gate(hidden) -> (logits, top_k_weights[T, K], top_k_index[T, K])
    experts:  experts(hidden[T, D], top_k_index[T, K], top_k_weights[T, K]) -> [T, D]

We find the experts modules by that contract and route their calls to a Dispatcher. The modelling
code, the names of the parameters and their conversion from and to disk stay as they are. No family
is named here.

Private names of transformers used here, as of 5.23: ``_is_expert_parallel`` (set on every experts
module that follows the contract) and ``_can_record_outputs`` (which says what class the router is).
"""

import re
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from moe_lightning.dispatch import Dispatcher
from moe_lightning.errors import CheckpointError
from moe_lightning.modeling.shared_experts import SharedExperts, find_shared_experts

EXPERTS_IMPLEMENTATION = "moe_lightning"


@dataclass(frozen=True, slots=True)
class MoELayer:
    """One MoE layer of a model.

    Attributes:
        layer: Index of the decoder layer; dense layers leave gaps.
        name: Dotted name of the experts module in the model.
        experts: The family's experts module.
        router: The family's router, which chooses experts for every row.
        block: The module that holds both, and shared experts if the family has them.
    """

    layer: int
    name: str
    experts: nn.Module
    router: nn.Module
    block: nn.Module

    @property
    def num_experts(self) -> int:
        """Logical experts that the module holds."""
        return cast(int, self.experts.num_experts)

    def is_part_of(self, model: nn.Module) -> bool:
        """Whether the layer is still in a model that was cut into parts."""
        return any(module is self.experts for module in model.modules())


def find_moe_layers(model: PreTrainedModel) -> list[MoELayer]:
    """Find every experts module and its router by contract.

    Args:
        model: A causal language model, on any device, the meta device too.

    Returns:
        The MoE layers in the order of the model.

    Raises:
        CheckpointError: If the model is dense, or its experts are outside the contract; the error
            names the class.
    """
    layers = []
    for name, module in model.named_modules():
        if hasattr(module, "_is_expert_parallel"):
            parent = model.get_submodule(name.rpartition(".")[0])
            router = _find_router(model, parent, name)
            layers.append(MoELayer(_layer_index(name), name, module, router, parent))
    if layers:
        return layers
    family = type(model).__name__
    suspects = sorted({type(m).__name__ for m in model.modules() if _looks_like_experts(m)})
    if suspects:
        raise CheckpointError(
            f"{family} is not supported: its experts ({', '.join(suspects)}) do not follow "
            "transformers' experts "
            "contract, so they cannot be placed. Use a family that does (Mixtral, Qwen-MoE, OLMoE, "
            "DeepSeek, gpt-oss, ...)."
        )
    raise CheckpointError(
        f"{family} is a dense model: it has no experts. moe_lightning runs mixture-of-experts "
        "checkpoints; "
        "run a dense one with transformers or Lightning directly."
    )


def _layer_index(name: str) -> int:
    numbers = [part for part in name.split(".") if part.isdigit()]
    assert numbers, f"experts module {name!r} is in no numbered layer"
    return int(numbers[0])


def _looks_like_experts(module: nn.Module) -> bool:
    return re.search(r"experts?|(moe|moeblock|ffn)$", type(module).__name__, re.I) is not None


def _find_router(model: PreTrainedModel, parent: nn.Module, name: str) -> nn.Module:
    recorded = (getattr(model, "_can_record_outputs", None) or {}).get("router_logits")
    router_class = getattr(recorded, "target_class", recorded)
    for child in parent.children():
        if isinstance(router_class, type) and isinstance(child, router_class):
            return child
    for child in parent.children():
        if "router" in type(child).__name__.lower():
            return child
    raise CheckpointError(
        f"{type(model).__name__} is not supported: no router stands beside its experts {name!r} "
        f"({type(parent).__name__} holds {', '.join(type(c).__name__ for c in parent.children())})."
    )


class PaddingMask(threading.local):
    """Which rows of the current forward are padding, so that they never travel to experts.

    One per model; each thread has a current forward of its own. The batch code sets it around a
    forward; it is None for a batch without padding.
    """

    def __init__(self) -> None:
        self.real_rows_R: Tensor | None = None

    @contextmanager
    def over(self, attention_mask_BS: Tensor | None) -> Iterator[None]:
        """Treat the zeros of the mask as padding during the block.

        Args:
            attention_mask_BS: 1 for real tokens, on the host (no synchronisation is needed then);
                None if all are.
        """
        if attention_mask_BS is not None:
            self.real_rows_R = attention_mask_BS.reshape(-1).nonzero().squeeze(1)
        try:
            yield
        finally:
            self.real_rows_R = None


@contextmanager
def padding_within(model: nn.Module, start: int, end: int) -> Iterator[None]:
    """Let some rows of the current forward be all there are during the block.

    Args:
        model: The model, or a part of it; nothing happens if it is attached to no dispatcher.
        start: The first row.
        end: One more than the last.
    """
    found = (getattr(module, "_moe_lightning", None) for module in model.modules())
    attachment = next((one for one in found if one is not None), None)
    padding = PaddingMask() if attachment is None else attachment.padding
    real_R = padding.real_rows_R
    if real_R is not None:
        padding.real_rows_R = real_R[(real_R >= start) & (real_R < end)] - start
    try:
        yield
    finally:
        padding.real_rows_R = real_R


class _Attachment(NamedTuple):
    """What an experts module knows of us."""

    dispatcher: Dispatcher
    padding: PaddingMask
    shared: SharedExperts | None


def attach(
    model: PreTrainedModel,
    make_dispatcher: Callable[[MoELayer], Dispatcher],
    *,
    layers: Sequence[MoELayer] | None = None,
) -> PaddingMask:
    """Route the calls of every experts module of the model to a dispatcher of its own.

    Args:
        model: The model; changed in place.
        make_dispatcher: Called once per MoE layer.
        layers: The model's MoE layers, where it is a part of a model that may have none; None finds
            them.

    Returns:
        The model's padding mask, to be set around forwards of padded batches.
    """
    padding = PaddingMask()
    for layer in find_moe_layers(model) if layers is None else layers:
        dispatcher = make_dispatcher(layer)
        shared = find_shared_experts(layer.block) if dispatcher.sends_rows_away else None
        attachment = _Attachment(
            dispatcher, padding, None if shared is None else SharedExperts(layer.block, shared)
        )
        # A plain attribute, kept out of the module tree: a dispatcher's shards may be on other
        # devices than the model.
        object.__setattr__(layer.experts, "_moe_lightning", attachment)
    model.set_experts_implementation(EXPERTS_IMPLEMENTATION)
    return padding


def dispatcher_of(layer: MoELayer) -> Dispatcher:
    """The dispatcher that :func:`attach` gave to a layer."""
    return cast(_Attachment, layer.experts._moe_lightning).dispatcher


def _dispatch(
    experts: nn.Module, hidden_TD: Tensor, index_TK: Tensor, weights_TK: Tensor
) -> Tensor:
    """What transformers calls in place of the family's experts forward."""
    dispatcher, padding, shared = cast(_Attachment, experts._moe_lightning)
    meanwhile = None if shared is None else shared.ahead(hidden_TD)
    real_R = padding.real_rows_R
    if real_R is None or real_R.numel() == hidden_TD.shape[0]:
        return dispatcher(hidden_TD, index_TK, weights_TK, meanwhile)
    real_R = real_R.to(hidden_TD.device, non_blocking=True)
    out_RD = dispatcher(hidden_TD[real_R], index_TK[real_R], weights_TK[real_R], meanwhile)
    return torch.zeros_like(hidden_TD).index_copy(0, real_R, out_RD)


ALL_EXPERTS_FUNCTIONS.register(EXPERTS_IMPLEMENTATION, _dispatch)

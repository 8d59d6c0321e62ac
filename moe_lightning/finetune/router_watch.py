"""RouterWatch: what the routers of a model gave out during a forward."""

from typing import NamedTuple

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from moe_lightning.modeling.seam import find_moe_layers


class RouterPass(NamedTuple):
    """What one router gave out for the rows of one forward of a rank.

    Attributes:
        layer: Decoder layer.
        logits_TE: The router's logits, with their gradient.
        index_TK: Chosen logical experts, int64.
    """

    layer: int
    logits_TE: Tensor
    index_TK: Tensor


class RouterWatch:
    """Collects the outputs of all routers during a block: ``with watch as passes: model(...)``.

    What runs outside of the block, the recomputed forwards of activation checkpointing in backward
    among it, is not seen. Every family gives logits and choices at the same places (the router's
    contract, see ``modeling/seam``), so families without a load-balancing loss have them too.

    Args:
        model: The model.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._routers = [(layer.layer, layer.router) for layer in find_moe_layers(model)]
        self._hooks: list[RemovableHandle] = []

    def __enter__(self) -> list[RouterPass]:
        assert not self._hooks, "a forward is being watched already"
        passes: list[RouterPass] = []
        for number, router in self._routers:

            def collect(
                module: nn.Module, args: object, output: tuple[Tensor, ...], layer: int = number
            ) -> None:
                logits, _, index_TK = output
                passes.append(RouterPass(layer, logits.flatten(0, -2), index_TK.detach()))

            self._hooks.append(router.register_forward_hook(collect))
        return passes

    def __exit__(self, *exc_info: object) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

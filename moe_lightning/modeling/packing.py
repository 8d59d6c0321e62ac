"""The dense layers of a model on a CPU, packed for inference as its experts are, and back.

Parameters keep their names and shapes; only their memory moves (see experts/packed_weights.py).
"""

import math
from collections import Counter
from typing import cast

import torch
from torch import Tensor, nn
from typing_extensions import override

from moe_lightning.experts.freed_memory import give_back_freed_memory
from moe_lightning.experts.packed_weights import OneDnnWeights, onednn_linear


class PackedLinear(nn.Linear):
    """nn.Linear computed by oneDNN; inference only. A packed layer keeps its class."""

    packed: OneDnnWeights | None

    @override
    def forward(self, input: Tensor) -> Tensor:
        weight = self.weight if self.packed is None else self.packed.packed[0]
        # Under autocast, input may come in another dtype than the weight.
        return onednn_linear(input.to(weight.dtype), weight, self.bias).to(input.dtype)


@torch.inference_mode(False)
def pack_dense(model: nn.Module) -> None:
    """Pack the linear layers of a model that oneDNN can compute; no gradients flow through them.

    Args:
        model: The model; layers on other devices or of other dtypes stay as they are.
    """
    holders = Counter(id(p) for m in model.modules() for p in m.parameters(recurse=False))
    for module in model.modules():
        if type(module) is nn.Linear and OneDnnWeights.why_not(module.weight) is None:
            module.__class__ = PackedLinear  # as torch's own fully_shard does
            linear = cast(PackedLinear, module)
            weight = linear.weight.detach()
            if holders[id(linear.weight)] > 1:  # another module, the embedding, reads it as it is
                linear.packed = None
                continue
            linear.packed = OneDnnWeights(weight[None])
            # One NaN seen as a whole tensor: whoever uses it by mistake will notice.
            linear.weight.data = torch.full((), math.nan, dtype=weight.dtype).expand(weight.shape)
    give_back_freed_memory()


@torch.inference_mode(False)
def unpack_dense(model: nn.Module) -> None:
    """Give all packed layers their weights back, bitwise the same.

    Args:
        model: The model; nothing happens if it is not packed.
    """
    for module in model.modules():
        if isinstance(module, PackedLinear):
            if module.packed is not None:
                module.weight.data = module.packed.unpack()[0]
            del module.packed
            plain: nn.Linear = module
            plain.__class__ = nn.Linear
    give_back_freed_memory()

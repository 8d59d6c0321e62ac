"""Balancing of experts by a bias of the router instead of a loss.

    counts of all rows since the last step, over all data ranks
          │
    bias_E += rate * sign(mean count - count_E), mean-centred          no gradient, no loss

Wang et al., Auxiliary-Loss-Free Load Balancing Strategy for Mixture-of-Experts (2024), as in
DeepSeek-V3. The bias only takes part in the choice of experts, not in their weights.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moe_lightning.collectives import RankGroup
from moe_lightning.errors import UsageError
from moe_lightning.finetune.router_watch import RouterPass
from moe_lightning.modeling.seam import MoELayer, find_moe_layers

_BIAS = "e_score_correction_bias"


class BiasBalancing:
    """Counts what routers choose, and moves their biases against it once per optimizer step.

    The bias is a persistent buffer of the model, so checkpoints and exports have it. Every rank has
    all of it and makes the same updates.

    Args:
        model: The model.
        rate: How far a step moves the bias of an expert; DeepSeek-V3 took 0.001.

    Raises:
        UsageError: If the family's routers have no correction bias; the error names the class.
    """

    def __init__(self, model: PreTrainedModel, *, rate: float) -> None:
        if rate <= 0:
            raise UsageError(f"bias_update_rate is {rate}, but must be above 0. 0.001 is usual.")
        self.rate = rate
        # The modules and not the buffers, which are other tensors after a move to another device.
        self._holders = {
            layer.layer: _find_holder(model, layer) for layer in find_moe_layers(model)
        }
        self._counts = {
            layer: torch.zeros(holder.get_buffer(_BIAS).numel(), dtype=torch.int64)
            for layer, holder in self._holders.items()
        }

    @torch.no_grad()
    def count(self, passes: Sequence[RouterPass], attention_mask_BS: Tensor | None = None) -> None:
        """Add the rows of a micro-batch of this rank.

        Args:
            passes: What the routers chose in the forward.
            attention_mask_BS: 1 for real tokens; None if all are.
        """
        for layer, _, index_TK in passes:
            counts_E = self._counts[layer] = self._counts[layer].to(index_TK.device)
            real_T = torch.ones_like(index_TK[:, 0])
            if attention_mask_BS is not None:
                real_T = attention_mask_BS.flatten().to(index_TK)
            counts_E.index_add_(0, index_TK.flatten(), real_T.repeat_interleave(index_TK.shape[1]))

    @torch.no_grad()
    def update(self, ranks: RankGroup) -> Tensor:
        """Move the biases, and start to count anew; all data ranks call this once per step.

        Centring keeps the biases from drifting together. It changes no choice, and torchtitan does
        it too.

        Args:
            ranks: The data ranks.

        Returns:
            The largest expert's rows over the mean expert's, averaged over the layers; 1 is an even
            load (MaxVio + 1 of Wang et al.).
        """
        counts = [self._counts[layer] for layer in self._holders]
        totals = torch.split(ranks.sum(torch.cat(counts)), [len(counts_E) for counts_E in counts])
        loads = []
        for (layer, holder), counts_E in zip(self._holders.items(), totals, strict=True):
            bias = holder.get_buffer(_BIAS)
            counts_E = counts_E.double().to(bias.device)
            mean = counts_E.mean()
            step_E = self.rate * (mean - counts_E).sign()
            bias += (step_E - step_E.mean()).to(bias.dtype).view_as(bias)
            loads.append(counts_E.max() / mean.clamp(min=1 / len(counts_E)))
            self._counts[layer].zero_()
        return torch.stack(loads).mean()


def _find_holder(model: PreTrainedModel, layer: MoELayer) -> nn.Module:
    """The module of a layer that has the correction bias: the router or the block around it."""
    for module in layer.block.modules():
        if any(name == _BIAS for name, _ in module.named_buffers(recurse=False)):
            return module
    raise UsageError(
        f"bias_update_rate is set, but {type(layer.router).__name__} of {type(model).__name__} has "
        f"no buffer {_BIAS} to balance by. Leave it out, and use aux_loss_weight if the family has "
        "a load-balancing loss."
    )

"""The losses of a causal language model with experts, over all data ranks of a micro-batch.

Gradients are averaged over data ranks (by FSDP, DDP, or nobody on one process). So that the average
is the gradient of one process with all rows, each rank differentiates its *share*:

    share of a rank = number of ranks * its sum / what all ranks sum up to

    mean over ranks of the shares = sum over ranks / sum over ranks = the loss of all rows
"""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from moe_lightning.collectives import RankGroup
from moe_lightning.data.packing import NO_TARGET
from moe_lightning.errors import UsageError
from moe_lightning.finetune.packed_masks import packed_masks
from moe_lightning.finetune.router_watch import RouterPass, RouterWatch


@dataclass(frozen=True, slots=True)
class Losses:
    """The losses of one micro-batch, each a scalar.

    Attributes:
        share: What this rank differentiates; the mean over the data ranks is the weighted sum of
            the losses. It has a gradient, those below have none and are the same on all data ranks.
        next_token: Mean next-token loss of the targets of all data ranks; 0 if there are none.
        num_targets: Targets of all data ranks.
        aux: The family's load-balancing loss, if it has a weight.
        z: The router z-loss, if it has a weight.
        passes: What the routers gave out, without gradients; empty if nobody watched them.
    """

    share: Tensor
    next_token: Tensor
    num_targets: Tensor
    aux: Tensor | None = None
    z: Tensor | None = None
    passes: Sequence[RouterPass] = ()


def language_model_losses(
    model: PreTrainedModel,
    batch: Mapping[str, Tensor],
    *,
    ranks: RankGroup,
    routers: RouterWatch | None = None,
    aux_loss_weight: float = 0.0,
    z_loss_weight: float = 0.0,
) -> Losses:
    """Run a micro-batch and compute its losses; all data ranks call this together.

    Args:
        model: The causal language model.
        batch: This rank's ``input_ids`` and ``labels`` (-100: no loss), and optionally
            ``position_ids`` and ``attention_mask``, each ``[B, S]``. A rank may have no targets.
        ranks: The data ranks: those that have different rows.
        routers: The watch over the model's routers; needed for either router loss.
        aux_loss_weight: Weight of the family's load-balancing loss, see :func:`aux_loss_weight_of`.
        z_loss_weight: Weight of the router z-loss.

    Returns:
        The losses.
    """
    assert routers is not None or not (aux_loss_weight or z_loss_weight), "nobody watches routers"
    inputs: dict[str, Any] = {
        k: batch[k] for k in ("input_ids", "attention_mask", "position_ids") if k in batch
    }
    if "position_ids" in inputs and "attention_mask" not in inputs:
        inputs["attention_mask"] = packed_masks(model, inputs["position_ids"])
    passes: list[RouterPass] = []
    if routers is None:
        logits_BSV = model(**inputs, use_cache=False).logits
    else:
        with routers as passes:
            logits_BSV = model(**inputs, use_cache=False).logits
    # The labels are shifted and not the logits, which would copy them.
    labels_BS = F.pad(batch["labels"][:, 1:], (0, 1), value=NO_TARGET)
    loss_sum = F.cross_entropy(
        logits_BSV.flatten(0, 1).float(),
        labels_BS.flatten(),
        ignore_index=NO_TARGET,
        reduction="sum",
    )
    num_targets = (labels_BS != NO_TARGET).sum()
    if not (aux_loss_weight or z_loss_weight):
        totals = ranks.sum(torch.stack([num_targets.float(), loss_sum.detach()]))
        num_targets, loss_total = totals.unbind()
        num_targets = num_targets.clamp(min=1)
        return Losses(
            share=ranks.size * loss_sum / num_targets,
            next_token=loss_total / num_targets,
            num_targets=totals[0],
            passes=_without_gradients(passes),
        )
    local = _router_sums(passes, batch.get("attention_mask"))
    sums = torch.stack([num_targets.float(), loss_sum, local.num_rows, local.z])
    totals = ranks.sum(torch.cat([sums, local.counts_E, local.probs_E]))
    num_targets, loss_total, num_rows, z_total = totals[:4].unbind()
    counts_E, probs_E = totals[4:].chunk(2)
    safe_targets, safe_rows = num_targets.clamp(min=1), num_rows.clamp(min=1)
    # d aux / d probs_E, the same for all rows; the counts have no gradient, as in transformers.
    slope_E = len(counts_E) * counts_E / safe_rows**2
    share = loss_sum / safe_targets
    share = share + aux_loss_weight * (slope_E * local.probs_E).sum()
    share = share + z_loss_weight * local.z / safe_rows
    return Losses(
        share=ranks.size * share,
        next_token=loss_total / safe_targets,
        num_targets=num_targets,
        aux=(slope_E * probs_E).sum() if aux_loss_weight else None,
        z=z_total / safe_rows if z_loss_weight else None,
        passes=_without_gradients(passes),
    )


def aux_loss_weight_of(model: PreTrainedModel, asked: float | None) -> float:
    """The weight of the family's own load-balancing loss.

    Args:
        model: The model.
        asked: The weight the user wants; None is the checkpoint's ``router_aux_loss_coef``.

    Returns:
        The weight; 0 for a family that has no such loss.

    Raises:
        UsageError: If a weight is asked for and the family has no such loss.
    """
    config = model.config.get_text_config()
    # In transformers, families with the loss have a forward that can be asked for what it needs,
    # and a weight in their config.
    asks = "output_router_logits" in inspect.signature(model.forward).parameters
    has_loss = asks and hasattr(config, "router_aux_loss_coef")
    if asked is None:
        return float(config.router_aux_loss_coef or 0.0) if has_loss else 0.0
    if asked and not has_loss:
        raise UsageError(
            f"aux_loss_weight is {asked}, but the family {config.model_type} has no load-balancing "
            "loss in transformers. Leave it out, or set it to 0 and balance by bias "
            "(bias_update_rate) if the family has a correction bias."
        )
    return asked


@dataclass(frozen=True, slots=True)
class _RouterSums:
    """Sums over the rows of this rank, padding excluded, and over the layers; all float32.

    Attributes:
        num_rows: Rows, one a layer and token.
        counts_E: Rows that have each expert among their K likeliest.
        probs_E: Router probabilities, with gradient.
        z: Squared logsumexp of the logits, with gradient.
    """

    num_rows: Tensor
    counts_E: Tensor
    probs_E: Tensor
    z: Tensor


def _router_sums(passes: Sequence[RouterPass], attention_mask_BS: Tensor | None) -> _RouterSums:
    """What the router losses need of the rows of this rank.

    The sums are those of transformers' ``load_balancing_loss_func``, equation 4 to 6 of Fedus et
    al., Switch Transformers (2021), over K choices; and equation 5 of Zoph et al., ST-MoE (2022).
    Like transformers' they take the K likeliest of a softmax, whatever the family's router does.
    """
    assert passes, "no router ran"
    first = passes[0].logits_TE
    num_experts = first.shape[1]
    real_T = first.new_ones(first.shape[0], dtype=torch.float32)
    if attention_mask_BS is not None:
        real_T = attention_mask_BS.flatten().to(first.device, torch.float32)
    counts_E = real_T.new_zeros(num_experts)
    probs_E = real_T.new_zeros(num_experts)
    z = real_T.new_zeros(())
    for _, logits, index_TK in passes:
        logits_TE = logits.to(first.device).float()
        probs_TE = logits_TE.softmax(1)
        top_k = index_TK.shape[1]
        likeliest_TK = probs_TE.topk(top_k, dim=1).indices
        counts_E = counts_E.index_add(0, likeliest_TK.flatten(), real_T.repeat_interleave(top_k))
        probs_E = probs_E + (real_T[:, None] * probs_TE).sum(
            0
        )  # no matmul: autocast would halve it
        z = z + (real_T * logits_TE.logsumexp(1) ** 2).sum()
    return _RouterSums(real_T.sum() * len(passes), counts_E, probs_E, z)


def _without_gradients(passes: Sequence[RouterPass]) -> list[RouterPass]:
    return [RouterPass(layer, logits.detach(), index_TK) for layer, logits, index_TK in passes]

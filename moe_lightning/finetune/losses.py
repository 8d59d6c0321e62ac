"""The losses of a causal language model with experts."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig


def language_model_losses(
    model: nn.Module, batch: Mapping[str, Tensor], *, with_aux_loss: bool
) -> tuple[Tensor, Tensor | None]:
    """Next-token loss, and the family's own load-balancing loss.

    Args:
        model: The causal language model.
        batch: ``input_ids`` and ``labels`` (-100: no loss), and optionally ``position_ids`` and
            ``attention_mask``, each ``[B, S]``.
        with_aux_loss: Whether the family's load-balancing loss is wanted.

    Returns:
        The mean loss of the targets, NaN if there are none, and the load-balancing loss, None if it
        is not wanted or the family has none.
    """
    output = model(
        input_ids=batch["input_ids"],
        attention_mask=batch.get("attention_mask"),
        position_ids=batch.get("position_ids"),
        use_cache=False,
        **({"output_router_logits": True} if with_aux_loss else {}),
    )
    logits_NV = output.logits[:, :-1].flatten(0, 1).float()
    loss = torch.nn.functional.cross_entropy(logits_NV, batch["labels"][:, 1:].flatten())
    return loss, getattr(output, "aux_loss", None)


def default_aux_loss_weight(config: PreTrainedConfig) -> float:
    """The weight of the load-balancing loss that a checkpoint asks for; 0 if it asks for none."""
    return float(getattr(config.get_text_config(), "router_aux_loss_coef", 0.0) or 0.0)

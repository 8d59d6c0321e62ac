"""Attention masks of packed rows, for the families that would let their documents see each other.

transformers finds out from restarting positions that a row is packed, but the models of some
families, gpt-oss among them (5.23), do not hand the positions on to the function that makes their
masks: documents then attend to those before them, silently. These families have layers of several
kinds and take ready masks, one for each kind.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.masking_utils import create_masks_for_generate


def packed_masks(model: PreTrainedModel, position_ids_BS: Tensor) -> dict[str, Any] | None:
    """The masks that keep documents apart.

    Args:
        model: The model.
        position_ids_BS: Positions that start again at each document.

    Returns:
        What the model takes as ``attention_mask``: a mask for each kind of layer, or None for a
        model that has one kind, which makes its mask itself, and rightly.
    """
    if not getattr(model.config.get_text_config(), "layer_types", None):
        return None
    make = getattr(model, "create_masks_for_generate", create_masks_for_generate)
    embeds_BSD = torch.empty(*position_ids_BS.shape, 0, dtype=model.dtype)  # only its type counts
    masks = make(
        config=model.config,
        inputs_embeds=embeds_BSD.to(position_ids_BS.device),
        attention_mask=None,
        past_key_values=None,
        position_ids=position_ids_BS,
    )
    return masks if isinstance(masks, dict) else None

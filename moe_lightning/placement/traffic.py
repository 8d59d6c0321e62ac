"""How many bytes travel for a token in a layer, by strategy. From sizes alone; no torch.

Rows travel for every token, weights for every step, whatever its tokens. Everything here is what
arrives on any device on account of one token, as a mean over the decoder layers.
"""

from moe_lightning.placement.footprint import ModelSizes

DECODE_TOKENS = 64
PREFILL_TOKENS = 16384  # also those of a training step


def slots_of_row(num_slots: int, top_k: int) -> float:
    """Slots that a token's experts are on, when each is on any slot with equal probability.

    >>> slots_of_row(2, 2)
    1.5
    """
    return num_slots * (1 - (1 - 1 / num_slots) ** top_k)


def row_traffic(
    sizes: ModelSizes, num_slots: int, *, has_home: bool, training: bool = False
) -> float:
    """Rows to other slots and one sum back from each.

    Args:
        sizes: The model.
        num_slots: Slots that hold experts.
        has_home: Whether the row's own device is one of them.
        training: Whether gradients travel the same way back.
    """
    away = slots_of_row(num_slots, sizes.top_k)
    if has_home:
        away *= (num_slots - 1) / num_slots
    share = sum(layer.num_experts > 0 for layer in sizes.layers) / len(sizes.layers)
    return away * sizes.row_bytes * share * (4 if training else 2)


def weight_traffic(
    sizes: ModelSizes,
    tokens: int,
    *,
    fsdp: int,
    ep: int = 1,
    shards_dense: bool = True,
    training: bool = False,
) -> float:
    """What FSDP gathers and, in training, reduces: weights of layers, per token.

    Args:
        sizes: The model.
        tokens: Tokens of a step on one device.
        fsdp: Ranks that share the dense layers.
        ep: Ranks that share experts whole; each expert is shared by ``fsdp / ep``.
        shards_dense: Whether the dense layers are shared.
        training: Whether weights come twice, and gradients leave.
    """
    efsdp = fsdp // ep
    dense = sum(layer.dense_bytes for layer in sizes.layers) * (fsdp - 1) / fsdp
    experts = sizes.expert_bytes / ep * (efsdp - 1) / efsdp
    gathered = (dense if shards_dense else 0) + experts
    # Frozen weights are gathered twice too, and have no gradients.
    times = 1 if not training else 3 if sizes.trains_all else 2
    return times * gathered / tokens / len(sizes.layers)


def gradient_traffic(sizes: ModelSizes, tokens: int, num_ranks: int) -> float:
    """What DDP adds up over the ranks after every step, per token: a ring's two rounds."""
    trained = sizes.num_bytes if sizes.adapter_bytes is None else sizes.adapter_bytes
    return 2 * trained * (num_ranks - 1) / num_ranks / tokens / len(sizes.layers)


def tensor_parallel_traffic(sizes: ModelSizes, tp: int, *, training: bool = False) -> float:
    """Sums over all ranks after attention and after the experts: a ring's two rounds each."""
    return 4.0 * sizes.row_bytes * (tp - 1) * (2 if training else 1)


def pipeline_traffic(sizes: ModelSizes, pp: int) -> float:
    """A row from stage to stage, and from the last to all others for the logits."""
    return 2 * (pp - 1) * sizes.row_bytes / len(sizes.layers)

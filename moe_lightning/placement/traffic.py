"""How many bytes travel for a token in a layer, by strategy. From sizes alone; no torch.

Rows travel for every token, weights for every step, whatever its tokens. Everything here is what
arrives on any device on account of one token, as a mean over the decoder layers. Sums over ranks
are counted as a ring makes them.
"""

from collections.abc import Sequence

from moe_lightning.placement.footprint import ModelSizes

QUESTION_BYTES = 44
"""What a message to a worker has beside rows, experts and weights."""


def row_to_slot(sizes: ModelSizes) -> int:
    """Bytes of a row to a slot of the same process, and of the sum that comes back.

    With the row go its experts, as int64, and their weights.
    """
    return 2 * sizes.row_bytes + sizes.top_k * (8 + sizes.itemsize)


def row_to_worker(sizes: ModelSizes) -> int:
    """Bytes of a row to a worker, with its experts as int16 and their weights, and of the sum."""
    return 2 * sizes.row_bytes + sizes.top_k * (2 + sizes.itemsize)


def row_to_rank(sizes: ModelSizes) -> int:
    """Bytes of a row to another rank, with weights and experts as int32, and of the sum.

    What goes out is rounded up to 16 bytes.
    """
    weights_end = _rounded_up(sizes.row_bytes, 8) + sizes.top_k * sizes.itemsize
    return _rounded_up(_rounded_up(weights_end, 4) + 4 * sizes.top_k, 16) + sizes.row_bytes


def placement_traffic(sizes: ModelSizes, visits_S: Sequence[float]) -> float:
    """Rows from home, the first slot, to the others.

    Args:
        sizes: The model.
        visits_S: The share of rows that go to each slot; see ``visits``.
    """
    return sum(visits_S[1:]) * row_to_slot(sizes) * _moe_share(sizes)


def rpc_traffic(sizes: ModelSizes, visits_W: Sequence[float], tokens: int) -> float:
    """Rows from the master to workers.

    Args:
        sizes: The model.
        visits_W: The share of rows that go to each worker.
        tokens: Tokens of a step, which share the messages.
    """
    row = sum(visits_W) * row_to_worker(sizes)
    return (row + QUESTION_BYTES * len(visits_W) / tokens) * _moe_share(sizes)


def exchange_traffic(
    sizes: ModelSizes, visits_P: Sequence[float], *, training: bool = False
) -> float:
    """Rows between the ranks that share experts; those of each rank are routed alike.

    Args:
        sizes: The model.
        visits_P: The share of rows that go to each rank.
        training: Whether gradients travel the same way back.
    """
    away = sum(visits_P) * (len(visits_P) - 1) / len(visits_P)
    return away * row_to_rank(sizes) * _moe_share(sizes) * (2 if training else 1)


def weight_traffic(
    sizes: ModelSizes,
    tokens: int,
    *,
    fsdp: int,
    ep: int = 1,
    shards_dense: bool = True,
    training: bool = False,
) -> float:
    """What FSDP gathers and, in training, reduces: weights, per token.

    Layers, and an input embedding with weights of its own, are gathered for every step. The output
    embedding stays gathered during inference; in training it is gathered once a step.

    Args:
        sizes: The model.
        tokens: Tokens of a step on one device.
        fsdp: Ranks that share the dense layers.
        ep: Ranks that share experts whole; each expert is shared by ``fsdp / ep``.
        shards_dense: Whether the dense layers are shared.
        training: Whether weights come twice, and gradients leave.
    """
    efsdp = fsdp // ep
    passing = sum(layer.dense_bytes for layer in sizes.layers)
    passing += sizes.embedding_bytes if sizes.head_bytes else 0
    staying = sizes.dense_bytes - passing
    # Frozen weights are gathered twice too, and have no gradients.
    times = 1 if not training else 3 if sizes.trains_all else 2
    gathered = 0.0
    if shards_dense:
        gathered = (times * passing + (times - 1) * staying) * (fsdp - 1) / fsdp
    for layer in sizes.layers:
        if layer.num_experts:
            # All ranks send as much, if need be an expert of zeros.
            num_experts = _rounded_up(-(-layer.num_experts // ep), efsdp)
            each = layer.expert_bytes / layer.num_experts
            gathered += times * num_experts * each * (efsdp - 1) / efsdp
    return gathered / tokens / len(sizes.layers)


def gradient_traffic(sizes: ModelSizes, tokens: int, num_ranks: int) -> float:
    """What DDP adds up over the ranks after every step, per token: a ring's two rounds."""
    trained = sizes.num_bytes if sizes.adapter_bytes is None else sizes.adapter_bytes
    return 2 * trained * (num_ranks - 1) / num_ranks / tokens / len(sizes.layers)


def tensor_parallel_traffic(
    sizes: ModelSizes, tp: int, *, makes_logits: bool, training: bool = False
) -> float:
    """Sums over all ranks, after attention and experts and where else the plan says.

    Args:
        sizes: The model.
        tp: Ranks.
        makes_logits: Whether a step makes logits of every token, as decoding does, which are
            gathered from the ranks.
        training: Whether there is a backward, with as many sums.
    """
    plan = sizes.tensor_parallel
    if plan is None:
        return 0.0
    travels = 2.0 * plan.num_sums * sizes.row_bytes
    if makes_logits and plan.gathers_logits:
        travels += sizes.vocab_size * sizes.itemsize
    return travels * (tp - 1) * (2 if training else 1) / len(sizes.layers)


def pipeline_traffic(sizes: ModelSizes, pp: int) -> float:
    """A row from stage to stage, and from the last to all others for the logits."""
    return 2 * (pp - 1) * sizes.row_bytes / len(sizes.layers)


def _moe_share(sizes: ModelSizes) -> float:
    return len(sizes.experts_by_layer) / len(sizes.layers)


def _rounded_up(number: int, step: int) -> int:
    return -(-number // step) * step

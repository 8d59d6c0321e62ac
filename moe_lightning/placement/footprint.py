"""How many bytes a strategy puts on its fullest device. From sizes alone; no torch.

    one copy:    weights (+ gradients + AdamW's two averages of what trains)
    placement:   home: dense layers + experts      slots: experts, as even as the room allows
    rpc:         master: dense layers              workers: experts
    fsdp:        1/R of everything + the largest layer, gathered while it computes
    ep:          dense layers whole (inference) or 1/R of them (training) + experts / ep
    tp, pp:      a part of what the family's plan cuts + the rest; or some layers + the head

Caches and activations are not counted: ``HEADROOM`` of a device is kept free for them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from moe_lightning.placement.policies import linear

HEADROOM = 0.1
STATES_PER_WEIGHT = 3  # the gradient and AdamW's two averages, in the dtype of the weight


@dataclass(frozen=True, slots=True)
class LayerSizes:
    """One decoder layer.

    Attributes:
        dense_bytes: Attention, norms, router, shared experts: everything but the routed experts.
        expert_bytes: All its routed experts; 0 in a dense layer.
        num_experts: How many they are.
    """

    dense_bytes: int
    expert_bytes: int = 0
    num_experts: int = 0

    @property
    def num_bytes(self) -> int:
        """The whole layer."""
        return self.dense_bytes + self.expert_bytes


@dataclass(frozen=True, slots=True)
class TensorParallelPlan:
    """What a family's plan for tensor parallelism does to a model.

    Attributes:
        whole_bytes: What every rank holds whole, such as routers and norms.
        num_sums: Rows of all tokens that are added up over the ranks in a forward.
        gathers_logits: Whether each rank makes a part of the logits, which are then gathered.
    """

    whole_bytes: int
    num_sums: int
    gathers_logits: bool = True


@dataclass(frozen=True, slots=True)
class ModelSizes:
    """A model, in the dtype that it is going to have.

    Attributes:
        name: What its family calls it.
        dtype: Name of the dtype of the dense layers and of rows.
        row_bytes: One row, a token's hidden state.
        layers: The decoder layers.
        embedding_bytes: The input embedding.
        head_bytes: The output embedding; 0 if it shares the weights of the input's.
        other_bytes: The rest outside of layers, such as the last norm.
        top_k: Experts that a token goes to.
        num_heads: Attention's numbers of heads, which tensor parallelism has to divide.
        adapter_bytes: Weights that LoRA would add, if it is asked for; these train then, and
            nothing else does.
        tensor_parallel: What tensor parallelism does; None if the family has no plan for it.
        expert_itemsize: Bytes of an expert's weight; 0 is as in the dense layers.
    """

    name: str
    dtype: str
    row_bytes: int
    layers: tuple[LayerSizes, ...]
    embedding_bytes: int
    head_bytes: int
    other_bytes: int
    top_k: int
    num_heads: tuple[int, ...]
    adapter_bytes: int | None = None
    tensor_parallel: TensorParallelPlan | None = None
    expert_itemsize: int = 0

    @property
    def itemsize(self) -> int:
        """Bytes of a number in a row."""
        return {"float64": 8, "float32": 4}.get(self.dtype, 2)

    @property
    def vocab_size(self) -> int:
        """Tokens that there are."""
        return self.embedding_bytes // self.row_bytes

    @property
    def experts_by_layer(self) -> dict[int, int]:
        """Experts of each MoE layer."""
        return {n: layer.num_experts for n, layer in enumerate(self.layers) if layer.num_experts}

    @property
    def outside_bytes(self) -> int:
        """Everything that is in no decoder layer."""
        return self.embedding_bytes + self.head_bytes + self.other_bytes

    @property
    def expert_bytes(self) -> int:
        """All routed experts of all layers."""
        return sum(layer.expert_bytes for layer in self.layers)

    @property
    def dense_bytes(self) -> int:
        """Everything but the routed experts."""
        return self.outside_bytes + sum(layer.dense_bytes for layer in self.layers)

    @property
    def num_bytes(self) -> int:
        """The whole model."""
        return self.dense_bytes + self.expert_bytes

    @property
    def num_experts(self) -> int:
        """Experts of the layer that has most."""
        return max((layer.num_experts for layer in self.layers), default=0)

    @property
    def trains_all(self) -> bool:
        """Whether fit would train every weight."""
        return self.adapter_bytes is None


def experts_share_bytes(sizes: ModelSizes, num_ranks: int) -> int:
    """Bytes of experts on the rank that has most, when ranks share them by the policy linear."""
    placement = linear(sizes.experts_by_layer, num_ranks)
    return max(
        sum(
            len(placement.experts_of(rank, number)) * layer.expert_bytes // layer.num_experts
            for number, layer in enumerate(sizes.layers)
            if layer.num_experts
        )
        for rank in range(num_ranks)
    )


def copy_bytes(
    sizes: ModelSizes, *, training: bool = False, is_mixed: bool = False, is_ddp: bool = False
) -> int:
    """Bytes of a device that holds the whole model.

    Args:
        sizes: The model.
        training: Whether it trains, with AdamW.
        is_mixed: Whether it computes in half precision on float32 weights: autocast keeps half
            copies of those that train.
        is_ddp: Whether gradients are there a second time, in DDP's buckets.
    """
    if not training:
        return sizes.num_bytes
    trained = _trained_bytes(sizes)
    extra = (trained // 2 if is_mixed else 0) + (trained if is_ddp else 0)
    return sizes.num_bytes + (sizes.adapter_bytes or 0) + STATES_PER_WEIGHT * trained + extra


def placed_bytes(sizes: ModelSizes, room_bytes: Sequence[int]) -> list[int]:
    """Bytes on each slot of one process; the first also holds the dense layers.

    Experts are spread evenly, and those that a slot has no room for go to others.

    Args:
        sizes: The model, for inference.
        room_bytes: Room of each slot.

    Returns:
        Bytes of each slot. If there is too little room, some have more than they have room for.
    """
    dense = [sizes.dense_bytes] + [0] * (len(room_bytes) - 1)
    rooms = [room - taken for room, taken in zip(room_bytes, dense, strict=True)]
    even = sizes.expert_bytes // len(rooms)
    if sum(max(0, room) for room in rooms) < sizes.expert_bytes:
        return [taken + even for taken in dense]
    experts, rest = [0] * len(rooms), sizes.expert_bytes
    # Slots with least room first: what they cannot take is shared by those after them.
    for num_left, slot in enumerate(sorted(range(len(rooms)), key=rooms.__getitem__)):
        experts[slot] = min(max(0, rooms[slot]), _ceil(rest, len(rooms) - num_left))
        rest -= experts[slot]
    return [taken + more for taken, more in zip(dense, experts, strict=True)]


def rpc_bytes(sizes: ModelSizes, num_workers: int) -> tuple[int, int]:
    """Bytes on the master, and on the worker that has most.

    Args:
        sizes: The model, for inference.
        num_workers: Workers, each with a device of its own.
    """
    return sizes.dense_bytes, experts_share_bytes(sizes, num_workers)


def sharded_bytes(
    sizes: ModelSizes,
    *,
    fsdp: int,
    ep: int = 1,
    shards_dense: bool = True,
    training: bool = False,
    is_mixed: bool = False,
) -> int:
    """Bytes on the fullest rank under FSDP and expert parallelism.

    Args:
        sizes: The model.
        fsdp: Ranks that share everything.
        ep: Ranks that share the experts of a layer, each with whole experts; divides ``fsdp``.
        shards_dense: Whether dense layers are shared too; otherwise every rank holds them.
        training: Whether it trains, with AdamW.
        is_mixed: Whether gathered layers are in half precision on float32 shards.
    """
    dense = _ceil(sizes.dense_bytes, fsdp) if shards_dense else sizes.dense_bytes
    if fsdp == ep:
        experts = experts_share_bytes(sizes, ep)
    else:
        # FSDP cuts experts' parameters between experts, so ranks beyond their number get none.
        experts = sum(
            _ceil(_ceil(layer.num_experts, ep), fsdp // ep)
            * (layer.expert_bytes // layer.num_experts)
            for layer in sizes.layers
            if layer.num_experts
        )
    shard = dense + experts
    if training:
        adapters = _ceil(sizes.adapter_bytes or 0, fsdp)
        trained = shard if sizes.trains_all else adapters
        shard += adapters + STATES_PER_WEIGHT * trained
    gathered = _gathered_bytes(sizes, fsdp=fsdp, ep=ep, shards_dense=shards_dense)
    if is_mixed:
        gathered //= 2
    if training and sizes.trains_all:
        gathered *= 2  # their gradients, before they are shared out
    return shard + gathered


def _gathered_bytes(sizes: ModelSizes, *, fsdp: int, ep: int, shards_dense: bool) -> int:
    """What is whole at once, at most: the output embedding stays, layers come and go."""
    if fsdp == 1:
        return 0
    units = [0]
    for layer in sizes.layers:
        here = layer.dense_bytes if shards_dense else 0
        # Even of experts that no other rank shares, FSDP makes a copy to compute with.
        if layer.num_experts and (shards_dense or fsdp > ep):
            here += _ceil(layer.num_experts, ep) * layer.expert_bytes // layer.num_experts
        units.append(here)
    if not shards_dense:
        return max(units)
    if not sizes.head_bytes:  # it is the input embedding, which stays too
        return sizes.embedding_bytes + max(units)
    return sizes.head_bytes + max(*units, sizes.embedding_bytes)


def tensor_parallel_bytes(
    sizes: ModelSizes, tp: int, *, training: bool = False, is_mixed: bool = False
) -> int:
    """Bytes of a rank under tensor parallelism."""
    whole = 0 if sizes.tensor_parallel is None else sizes.tensor_parallel.whole_bytes
    part = whole + _ceil(sizes.num_bytes - whole, tp)
    if not training:
        return part
    adapters = _ceil(sizes.adapter_bytes or 0, tp)
    trained = part if sizes.trains_all else adapters
    return part + adapters + STATES_PER_WEIGHT * trained + (trained // 2 if is_mixed else 0)


def pipeline_bytes(sizes: ModelSizes, pp: int) -> int:
    """Bytes of the fullest stage, for inference: its layers, and embeddings.

    Every stage makes the logits, so it holds the output embedding, which may be the input's.
    """
    per_stage, rest = divmod(len(sizes.layers), pp)
    stages, start = [], 0
    for stage in range(pp):
        end = start + per_stage + (stage < rest)
        here = sum(layer.num_bytes for layer in sizes.layers[start:end]) + sizes.head_bytes
        embeds = stage == 0 or not sizes.head_bytes
        here += sizes.embedding_bytes if embeds else 0
        here += sizes.other_bytes if stage == pp - 1 else 0
        stages.append(here)
        start = end
    return max(stages)


def _trained_bytes(sizes: ModelSizes) -> int:
    return sizes.num_bytes if sizes.adapter_bytes is None else sizes.adapter_bytes


def _ceil(number: int, parts: int) -> int:
    return -(-number // parts)

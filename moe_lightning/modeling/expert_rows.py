"""Which logical experts the rows of a rank's parameters are."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from moe_lightning.modeling.seam import MoELayer


@dataclass(frozen=True, slots=True)
class ExpertRows:
    """What dim 0 of an experts parameter means on this rank.

    Attributes:
        expert_ids: Logical expert of each row of dim 0 of the rank's parameter. Where FSDP shards
            the parameter as well, that is the whole parameter of its FSDP group, not the local
            shard.
        num_experts: Logical experts of the layer.
    """

    expert_ids: tuple[int, ...]
    num_experts: int


def expert_rows(
    layers: Sequence[MoELayer],
    num_experts: Mapping[int, int],
    experts_here: Mapping[int, Sequence[int]] | None = None,
) -> dict[str, ExpertRows]:
    """Find the parameters that have one row per expert, adapters on experts included.

    Args:
        layers: The model's MoE layers.
        num_experts: Logical experts of each MoE layer.
        experts_here: For each MoE layer the experts that this rank's FSDP group holds, in the order
            of the rows; None means that it holds all.

    Returns:
        The meaning of dim 0, by the parameter's name in the model.
    """
    rows: dict[str, ExpertRows] = {}
    for layer in layers:
        total = num_experts[layer.layer]
        ids = range(total) if experts_here is None else experts_here[layer.layer]
        for name, _ in layer.experts.named_parameters(recurse=False):
            rows[f"{layer.name}.{name}"] = ExpertRows(tuple(ids), total)
    return rows

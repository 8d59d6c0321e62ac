"""How parameters are grouped for an optimizer."""

from collections.abc import Collection, Iterable
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor


def parameter_groups(
    parameters: Iterable[tuple[str, Tensor]], *, expert_names: Collection[str]
) -> list[dict[str, Any]]:
    """Put the parameters that train into groups: dense ones, then those of experts.

    The two may be sharded on different meshes, and an optimizer that works on many tensors at once
    (``foreach``) wants one mesh for a group. The groups follow from names alone, so checkpoints of
    optimizers and schedules fit any number of ranks. Where a group still mixes meshes (tensor
    parallelism), its optimizer works on one tensor at a time, whatever it was told (``fused``).

    Args:
        parameters: Names and parameters, in the order of the model.
        expert_names: Names of the parameters that have a row per expert.

    Returns:
        Groups for an optimizer; none is empty.
    """
    dense: list[Tensor] = []
    experts: list[Tensor] = []
    for name, parameter in parameters:
        if parameter.requires_grad:
            (experts if name in expert_names else dense).append(parameter)
    return [_group(members) for members in (dense, experts) if members]


def _group(members: list[Tensor]) -> dict[str, Any]:
    kinds = {(p.device_mesh, p.placements) if isinstance(p, DTensor) else None for p in members}
    meshes = {kind if kind is None else kind[0] for kind in kinds}
    if len(meshes) == 1:
        return {"params": members}
    return {"params": members, "foreach": False, "fused": False}

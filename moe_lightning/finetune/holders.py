"""How many ranks hold the same piece of each parameter, from how the model is shared out.

dense:    all ranks of the world share one parameter, or hold copies of its pieces
experts:  the world / ep ranks of one place along ep do, and replicas of an expert are copies too
"""

from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor
from torch.distributed.tensor import DTensor

from moe_lightning.finetune.clipping import HeldParameter, num_copies
from moe_lightning.finetune.replicas import row_copies
from moe_lightning.modeling.expert_rows import ExpertRows


def held_parameters(
    parameters: Iterable[tuple[str, Tensor]],
    *,
    world_size: int,
    ep_size: int,
    rows: Mapping[str, ExpertRows],
    num_holders: Mapping[str, Sequence[int]],
) -> list[HeldParameter]:
    """Say of each parameter that trains how many ranks hold the same piece.

    A parameter that is no DTensor is taken to be whole on every rank that holds it; pipeline stages
    are none of this.

    Args:
        parameters: Names and parameters of the model.
        world_size: All ranks.
        ep_size: Places along ``ep``; 1 without expert parallelism.
        rows: What the rows of parameters with a row per expert are.
        num_holders: For each of these and each logical expert, on how many places along ``ep`` it
            is.

    Returns:
        What :func:`moe_lightning.finetune.clipping.gradient_norm` takes.
    """
    held: list[HeldParameter] = []
    for name, parameter in parameters:
        if not parameter.requires_grad:
            continue
        ranks = world_size // ep_size if name in rows else world_size
        mesh_size = parameter.device_mesh.size() if isinstance(parameter, DTensor) else 1
        copies: int | Tensor = num_copies(parameter, outside=ranks // mesh_size)
        if name in rows and ep_size > 1:
            copies = copies * row_copies(parameter, rows[name], num_holders[name])
        held.append(HeldParameter(parameter, copies))
    return held

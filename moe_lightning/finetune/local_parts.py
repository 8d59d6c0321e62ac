"""What this rank holds of a parameter that ranks may share.

Private name of torch used here, as of 2.13: ``compute_local_shape_and_global_offset``.
"""

from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset


def local_part(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor, as a plain tensor that shares its memory."""
    if not isinstance(tensor, DTensor):
        return tensor
    assert not any(p.is_partial() for p in tensor.placements), "ranks have not added this up yet"
    return tensor.to_local()


def local_box(tensor: Tensor) -> tuple[slice, ...]:
    """Which part of a tensor is on this rank, one slice a dim."""
    if not isinstance(tensor, DTensor):
        return tuple(slice(0, size) for size in tensor.shape)
    sizes, starts = compute_local_shape_and_global_offset(
        tensor.shape, tensor.device_mesh, tensor.placements
    )
    return tuple(slice(start, start + size) for start, size in zip(starts, sizes, strict=True))

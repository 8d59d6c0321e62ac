"""Gradient clipping over parameters that are sharded on different meshes.

torch's own ``clip_grad_norm_`` wants one mesh. Here each rank adds up the squares of what it holds,
each divided by the number of ranks that hold the same, and one all-reduce over the world makes that
the square of the norm.

    rank 0: shard a0, shard b0, copy c ─┐
    rank 1: shard a1, shard b1, copy c ─┴▶ |a0|² + |b0|² + |c|²/2 + |a1|² + |b1|² + |c|²/2
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from moe_lightning.collectives import RankGroup
from moe_lightning.finetune.local_parts import local_part


@dataclass(frozen=True, slots=True)
class HeldParameter:
    """A parameter, and how many ranks of the world hold the same piece of it.

    Attributes:
        parameter: The parameter; its gradient may be None.
        copies: The ranks, this one included; or one number for each row of dim 0 of this rank's
            piece, ``[rows]``.
    """

    parameter: Tensor
    copies: int | Tensor = 1


def num_copies(parameter: Tensor, *, outside: int) -> int:
    """How many ranks hold the same piece of a parameter as this rank.

    Args:
        parameter: The parameter.
        outside: Ranks that hold the same, one for each rank of its mesh. For a plain tensor, all
            ranks that hold it.

    Returns:
        The number of ranks.
    """
    if not isinstance(parameter, DTensor):
        return outside
    sizes = zip(parameter.device_mesh.shape, parameter.placements, strict=True)
    return outside * prod(size for size, placement in sizes if placement.is_replicate())


def local_gradients(parameters: Iterable[Tensor]) -> list[Tensor]:
    """What this rank holds of the gradients that are there; parts without elements are left out."""
    grads = (local_part(p.grad) for p in parameters if p.grad is not None)
    return [grad for grad in grads if grad.numel()]


@torch.no_grad()
def gradient_norm(held: Sequence[HeldParameter], *, world: RankGroup) -> Tensor:
    """The 2-norm of the gradients of all parameters over all ranks; all ranks call this together.

    Args:
        held: This rank's parameters; ranks may hold different ones.
        world: All ranks that hold parameters.

    Returns:
        The norm, float32, the same on all ranks; 0 if nobody has gradients.
    """
    squares: list[Tensor] = []
    whole: list[Tensor] = []
    copies: list[int] = []
    for item in held:
        grads = local_gradients([item.parameter])
        if isinstance(item.copies, Tensor):
            for grad in grads:
                norms_R = torch.linalg.vector_norm(grad.flatten(1), dim=1, dtype=torch.float32)
                squares.append((_wide(norms_R) ** 2 / item.copies.to(grad.device)).sum())
        else:
            whole += grads
            copies += [item.copies] * len(grads)
    norms = torch._foreach_norm(whole, 2, dtype=torch.float32) if whole else ()
    squares += [_wide(norm) ** 2 / n for norm, n in zip(norms, copies, strict=True)]
    if squares:
        device = squares[0].device
        total = torch.stack([square.to(device) for square in squares]).sum()
    else:
        device = held[0].parameter.device if held else torch.device("cpu")
        total = _wide(torch.zeros((), device=device))
    return world.sum(total).sqrt().float()


@torch.no_grad()
def clip_by_norm(parameters: Iterable[Tensor], *, max_norm: float, norm: Tensor) -> None:
    """Scale gradients down in place so that their norm is at most ``max_norm``.

    As torch's ``clip_grad_norm_`` with its defaults, gradients become NaN if the norm is NaN.

    Args:
        parameters: This rank's parameters.
        max_norm: The largest norm that is left alone.
        norm: What :func:`gradient_norm` gave.
    """
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for device, grads in _by_device(local_gradients(parameters)).items():
        torch._foreach_mul_(grads, factor.to(device))


@torch.no_grad()
def clip_by_value(parameters: Iterable[Tensor], *, max_value: float) -> None:
    """Move each element of the gradients into ``[-max_value, max_value]``, in place.

    Args:
        parameters: This rank's parameters.
        max_value: The largest absolute value that is left alone.
    """
    for grads in _by_device(local_gradients(parameters)).values():
        torch._foreach_clamp_min_(grads, -max_value)
        torch._foreach_clamp_max_(grads, max_value)


def _by_device(tensors: Sequence[Tensor]) -> dict[torch.device, list[Tensor]]:
    groups: dict[torch.device, list[Tensor]] = {}
    for tensor in tensors:
        groups.setdefault(tensor.device, []).append(tensor)
    return groups


def _wide(tensor: Tensor) -> Tensor:
    """As float64, so that the order of the sum shows nowhere; Apple's GPUs have none."""
    return tensor if tensor.device.type == "mps" else tensor.double()

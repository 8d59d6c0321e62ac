"""RankGroup: some ranks that add things up together, or a process that is alone."""

from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor


class RankGroup:
    """Some ranks that add things up together.

    Args:
        group: The process group. None is a process that is alone.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group

    @property
    def size(self) -> int:
        """Number of ranks in the group."""
        return 1 if self.group is None else self.group.size()

    @property
    def rank(self) -> int:
        """This rank's number within the group."""
        return 0 if self.group is None else self.group.rank()

    def sum(self, tensor: Tensor) -> Tensor:
        """Add a tensor up over the group; all of its ranks must call this, with equal shapes.

        Args:
            tensor: Any dtype; left alone.

        Returns:
            The sum, without a gradient; the tensor itself for a process that is alone.
        """
        tensor = tensor.detach()
        if self.size == 1:
            return tensor
        total = tensor.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=self.group)
        return total


@dataclass(frozen=True, slots=True)
class SharingRanks:
    """The ranks that share a model, as training sees them.

    Attributes:
        world: All ranks.
        data: Ranks that have rows of their own; gradients are averaged over them.
        experts: Ranks that together hold one copy of every expert, and its replicas.
        ep_size: Places along ``ep``, each with experts of its own.
    """

    world: RankGroup = field(default_factory=RankGroup)
    data: RankGroup = field(default_factory=RankGroup)
    experts: RankGroup = field(default_factory=RankGroup)
    ep_size: int = 1

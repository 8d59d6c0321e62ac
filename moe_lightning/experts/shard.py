"""ExpertShard: some experts of one layer on one device, and how they are computed."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from moe_lightning.errors import UsageError
from moe_lightning.experts.backends import Backend, make_backend, plain_backend
from moe_lightning.experts.freed_memory import give_back_freed_memory
from moe_lightning.experts.packed import PackedExperts


class ExpertShard:
    """Some experts of one layer on one device.

    The experts are the family's own module whose parameters have only these experts' rows. Row
    ``i`` of each parameter is logical expert ``expert_ids[i]``. Until :meth:`pack`, it computes
    with gradients and leaves the weights alone.

    Args:
        experts: The family's experts module, holding exactly the given experts.
        layer: Decoder layer that the experts belong to.
        expert_ids: Logical experts held here, in the order of the parameters' rows.
        backend: Name of how they are computed in inference.
    """

    def __init__(
        self, experts: nn.Module, *, layer: int, expert_ids: Sequence[int], backend: str
    ) -> None:
        assert experts.num_experts == len(expert_ids), (
            "a shard's module must hold its experts and no others"
        )
        self.experts = experts
        self.layer = layer
        self.expert_ids = tuple(expert_ids)
        self.backend_name = backend
        self._compute: Backend = plain_backend(backend, experts)
        self._is_for_inference = False

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.experts.parameters()).device

    def pack(self) -> None:
        """Bring the weights into the layout of the backend, for inference; once."""
        if not self._is_for_inference:
            self._compute = make_backend(self.backend_name, self.experts)
            self._is_for_inference = True
            if isinstance(self._compute, PackedExperts):
                give_back_freed_memory()

    def unpack(self) -> None:
        """Give the module its weights back, for training and saving.

        Raises:
            UsageError: If the backend's layout is not exact.
        """
        if isinstance(self._compute, PackedExperts):
            if not self._compute.kind.is_exact:
                raise UsageError(
                    f"the experts were packed by model.experts_backend={self.backend_name}, which "
                    "does not keep the checkpoint's weights: they can be neither trained nor "
                    "saved. Use a new module for that, or experts_backend=auto."
                )
            self._compute.unpack()
            give_back_freed_memory()
        self._compute = plain_backend(self.backend_name, self.experts)
        self._is_for_inference = False

    def make_room(self) -> None:
        """Give the module memory for other weights to be loaded into."""
        if isinstance(self._compute, PackedExperts):
            self._compute.make_room()
            give_back_freed_memory()
            self._compute = plain_backend(self.backend_name, self.experts)
            self._is_for_inference = False

    def compute(self, rows_RD: Tensor, index_RK: Tensor, weights_RK: Tensor) -> Tensor:
        """The weighted sum of the shard's experts for each row; a pure function of its arguments.

        Args:
            rows_RD: Received rows, on the shard's device.
            index_RK: *Local* expert of each row: positions in ``expert_ids``; their number stands
                for an expert that is elsewhere.
            weights_RK: Router weights.

        Returns:
            ``[R, D]``, in the dtype of ``rows_RD``.
        """
        return self._compute(rows_RD, index_RK, weights_RK)

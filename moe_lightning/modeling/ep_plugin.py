"""This package's exchange of rows for plain transformers' expert parallelism.

Importing this module registers it; then, under torchrun and without Lightning:

    AutoModelForCausalLM.from_pretrained(
        path,
        distributed_config=DistributedConfig(
            fsdp_size=4,
            ep_size=4,
            ep_implementation="moe_lightning",
            ep_plan=uneven_ep_plan(config),
        ),
    )

Experts are placed as transformers does, in contiguous slices, and computed as its
``experts_implementation`` says. With :func:`uneven_ep_plan` their number need not be a multiple of
the ranks', as long as a slice is left for every rank. Names of transformers used here, as of 5.23:
``EPImplementation``, its registry, ``MoEParamShard`` and ``ALL_PARALLEL_STYLES``.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from transformers import PretrainedConfig
from transformers.distributed.expert_parallel import (
    EPImplementation,
    EPImplementationInterface,
    MoEParamShard,
)
from transformers.distributed.parallel_utils import ALL_PARALLEL_STYLES
from typing_extensions import override

from moe_lightning.dispatch import CollectiveDispatcher, RoutingLog
from moe_lightning.errors import CheckpointError

EP_IMPLEMENTATION = "moe_lightning"
EXPERTS_STYLE = "moe_lightning_experts"
EVEN_STYLE = "grouped_gemm"
"""transformers' style of a parameter whose rows are experts."""


def slice_of(num_experts: int, *, slot: int, num_slots: int) -> range:
    """The experts of a rank where all are in contiguous slices; the last ranks may have less, or
    none. ``Shard(0)`` of a DTensor means the same slices.

    Args:
        num_experts: Logical experts of the layer.
        slot: The rank's number among those that share the layer's experts.
        num_slots: How many ranks that are.

    Returns:
        Its logical experts.
    """
    each = -(-num_experts // num_slots)
    return range(min(slot * each, num_experts), min((slot + 1) * each, num_experts))


@dataclass(frozen=True, slots=True)
class _FamilyExperts:
    """A rank's experts as transformers computes them."""

    experts: nn.Module
    forward: Callable[[Tensor, Tensor, Tensor], Tensor]
    num_experts: int
    layer: int = 0  # not known to a plug-in, and nothing is recorded

    def compute(self, rows_RD: Tensor, index_RK: Tensor, weights_RK: Tensor) -> Tensor:
        is_elsewhere_RK = index_RK == self.num_experts
        return self.forward(rows_RD, index_RK, weights_RK.masked_fill(is_elsewhere_RK, 0.0))


class MoELightningEP(EPImplementation):  # type: ignore[misc]  # transformers is untyped
    """Rows travel once per rank, and one weighted sum comes back; see ``CollectiveDispatcher``.

    Attributes:
        num_chunks: Parts of the rows, the next of which travels while one is computed.
        wire_dtype: Dtype of rows on their way; None for their own. A subclass, registered under a
            name of its own, may set both.

    Args:
        experts: A family's experts module, its parameters cut along ``ep_mesh`` already.
        ep_mesh: The ranks that share the layer's experts.
        tp_mesh: The ranks that hold the same rows.

    Raises:
        CheckpointError: If the experts are not in contiguous slices over the ranks.
    """

    num_chunks: ClassVar[int] = 1
    wire_dtype: ClassVar[torch.dtype | None] = None

    def __init__(self, experts: nn.Module, ep_mesh: DeviceMesh, tp_mesh: DeviceMesh) -> None:
        super().__init__(experts, ep_mesh, tp_mesh)
        num_slots = ep_mesh.size()
        totals = {p.shape[0] for p in experts.parameters() if isinstance(p, DTensor)}
        num_experts = max(totals, default=0)
        experts_of_slot = {
            slot: slice_of(num_experts, slot=slot, num_slots=num_slots) for slot in range(num_slots)
        }
        if len(totals) != 1 or self.num_local_experts != len(
            experts_of_slot[ep_mesh.get_local_rank()]
        ):
            raise CheckpointError(
                f"ep_implementation={EP_IMPLEMENTATION!r} cannot run {type(experts).__name__}: its "
                f"{self.num_local_experts} experts on this rank are no slice of {sorted(totals)} "
                f"over {num_slots} ranks. Name every parameter of the experts in ep_plan, before "
                f"the experts themselves, with the style {EVEN_STYLE!r} or {EXPERTS_STYLE!r}."
            )
        self.dispatch = CollectiveDispatcher(
            _FamilyExperts(experts, self.experts_forward, self.num_local_experts),
            num_experts=num_experts,
            experts_of_slot=experts_of_slot,
            group=ep_mesh.get_group(),
            same_rows_group=tp_mesh.get_group() if tp_mesh.size() > 1 else None,
            num_chunks=self.num_chunks,
            wire_dtype=self.wire_dtype,
            log=RoutingLog(),
        )

    @override
    def __call__(self, hidden_TD: Tensor, index_TK: Tensor, weights_TK: Tensor) -> Tensor:
        return self.dispatch(hidden_TD, index_TK, weights_TK)


class UnevenExperts(MoEParamShard):  # type: ignore[misc]
    """A parameter whose rows are experts, in contiguous slices that need not be equal.

    Each rank needs an expert: transformers' loader stacks the experts of a rank, and cannot stack
    none.
    """

    def __init__(self) -> None:
        super().__init__(Shard(0), shards_expert_dim=True)

    @override
    def shard_param(self, module: nn.Module, param: str, mesh: DeviceMesh) -> None:
        whole = module._parameters.get(param)
        if whole is None:
            return
        num_experts, num_slots = whole.shape[0], mesh.size()
        if len(slice_of(num_experts, slot=num_slots - 1, num_slots=num_slots)) == 0:
            raise CheckpointError(
                f"{num_experts} experts in equal slices leave none for the last of {num_slots} "
                "ranks, which transformers cannot load. Use another ep_size, or the strategy "
                "moe_ep, which spreads any number over any number of ranks."
            )
        ids = slice_of(num_experts, slot=mesh.get_local_rank(), num_slots=num_slots)
        object.__setattr__(module, "num_experts", len(ids))
        object.__setattr__(module, "_is_expert_parallel", True)
        sliced = distribute_tensor(whole, mesh, [self.placement], src_data_rank=None)
        module._parameters[param] = nn.Parameter(sliced, requires_grad=whole.requires_grad)


def uneven_ep_plan(config: PretrainedConfig) -> dict[str, str]:
    """An ``ep_plan`` for a number of experts that is no multiple of the ranks'.

    Args:
        config: The checkpoint's configuration.

    Returns:
        Overrides of the family's own plan; none if it has none.
    """
    plan = config.get_text_config().base_model_ep_plan or {}
    return {f"model.{name}": EXPERTS_STYLE for name, style in plan.items() if style == EVEN_STYLE}


EPImplementationInterface.register(EP_IMPLEMENTATION, MoELightningEP)
ALL_PARALLEL_STYLES.register(EXPERTS_STYLE, UnevenExperts())

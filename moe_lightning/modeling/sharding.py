"""A model on meta, cut into the share of one rank: tensor and pipeline parallelism, then FSDP2.

    model on meta, experts cut ──▶ tp ──▶ pp ──▶ fully_shard ──▶ filled: each rank reads its share

The plans are the family's own; transformers applies them. Private names of transformers used here,
as of 5.23: ``_resolve_parallel_plans``, ``apply_tensor_parallelism``,
``apply_fully_sharded_data_parallelism``, ``_get_fsdp_policy_kwargs`` and
``TransformersDeviceMesh``.
"""

from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.distributed import DistributedConfig
from transformers.distributed.fsdp import (
    _get_fsdp_policy_kwargs,
    apply_fully_sharded_data_parallelism,
)
from transformers.distributed.tensor_parallel import apply_tensor_parallelism
from transformers.distributed.utils import TransformersDeviceMesh

from moe_lightning.collectives import RankGroup, SharingRanks
from moe_lightning.errors import CheckpointError
from moe_lightning.modeling.pipeline import split_into_stages
from moe_lightning.modeling.quiet import without_warnings
from moe_lightning.modeling.seam import MoELayer, find_moe_layers

DENSE_AXES = ("pp", "dp_replicate", "fsdp", "tp")
EXPERT_AXES = ("pp", "dp_replicate", "efsdp", "ep")


class RankMeshes:
    """The ranks of a run as two meshes; all ranks must make this together.

    Args:
        device_type: ``cpu`` or ``cuda``.
        pp: Pipeline stages.
        dp_replicate: Copies of what the other axes share.
        fsdp: Ranks that share dense parameters.
        tp: Ranks that compute a dense layer together.
        ep: Ranks that share the experts of a layer; divides fsdp * tp.
        timeout_s: Seconds that a rank may keep the others waiting.
    """

    def __init__(
        self,
        device_type: str,
        *,
        pp: int,
        dp_replicate: int,
        fsdp: int,
        tp: int,
        ep: int,
        timeout_s: float,
    ) -> None:
        self.config = DistributedConfig(
            pp_size=pp, dp_replicate_size=dp_replicate, fsdp_size=fsdp, tp_size=tp, ep_size=ep
        )
        efsdp = fsdp * tp // ep
        self._dense = init_device_mesh(
            device_type, (pp, dp_replicate, fsdp, tp), mesh_dim_names=DENSE_AXES
        )
        self._experts = init_device_mesh(
            device_type, (pp, dp_replicate, efsdp, ep), mesh_dim_names=EXPERT_AXES
        )
        for mesh in (self._dense, self._experts):
            for group in mesh.get_all_groups():
                # torch gives groups of a mesh its own 30 minutes, whatever the world has.
                dist.distributed_c10d._set_pg_timeout(timedelta(seconds=timeout_s), group)
        self.manager = TransformersDeviceMesh(self._dense, self._experts)

    def axis(self, name: str) -> DeviceMesh:
        """The ranks along one axis that this rank is among."""
        mesh: DeviceMesh = self.manager.get_mesh(name)
        return mesh

    def group(self, name: str) -> ProcessGroup:
        """The process group of one axis."""
        return self.axis(name).get_group()

    def rank(self, name: str) -> int:
        """This rank's place along an axis."""
        return self.axis(name).get_local_rank()

    @property
    def dense_mesh(self) -> DeviceMesh:
        """The ranks that share the dense parameters of this rank."""
        is_hsdp = self.config.dp_replicate_size > 1
        axes = ("dp_replicate", "fsdp") if is_hsdp else "fsdp"
        mesh: DeviceMesh = self.manager.get_mesh(axes)
        return mesh

    @property
    def expert_mesh(self) -> DeviceMesh:
        """The ranks that share the parameters of this rank's experts."""
        is_hsdp = self.config.dp_replicate_size > 1
        axes = ("dp_replicate", "efsdp") if is_hsdp else "efsdp"
        mesh: DeviceMesh = self.manager.get_mesh(axes)
        return mesh

    def sharing_ranks(self) -> SharingRanks:
        """The ranks as training sees them; all ranks call this together, once."""
        config = self.config
        return SharingRanks(
            world=RankGroup(dist.group.WORLD),
            data=RankGroup(self._flat(self._dense["dp_replicate", "fsdp"])),
            experts=RankGroup(self._flat(self._experts["efsdp", "ep"])),
            ep_size=config.ep_size,
        )

    def _flat(self, mesh: DeviceMesh) -> ProcessGroup:
        """One group of all ranks of a mesh of two axes."""
        if mesh.size() == dist.get_world_size():
            assert dist.group.WORLD is not None, "there is a mesh"
            return dist.group.WORLD
        return mesh._flatten().get_group()


@dataclass(frozen=True, slots=True)
class ShardingOptions:
    """How parameters are shared out.

    Attributes:
        shards_dense: Whether dense layers are shared too; otherwise each rank holds all of them.
        cpu_offload: Whether parameters wait in the host's memory.
        mixed_precision: Whether layers compute in bfloat16 on float32 parameters.
    """

    shards_dense: bool = True
    cpu_offload: bool = False
    mixed_precision: bool = False


def shard_model(model: PreTrainedModel, meshes: RankMeshes, options: ShardingOptions) -> bool:
    """Cut a model on meta down to this rank's share.

    Args:
        model: The model, its MoE layers cut down to the experts of this rank's place along ``ep``;
            changed in place.
        meshes: The ranks.
        options: How.

    Returns:
        Whether forwards must go through the model itself (FSDP gathers from there) and never
        through its parts.

    Raises:
        CheckpointError: If the family has no plan for what is asked.
    """
    config = meshes.config
    config.fsdp_cpu_offload = options.cpu_offload
    config.fsdp_mixed_precision = options.mixed_precision
    layers = find_moe_layers(model)
    tp_plan, fsdp_plan = _plans(model, config, layers, shards_dense=options.shards_dense)
    # What transformers' own functions look for.
    model.config.distributed_config = config
    model._tp_size, model._fsdp_size = config.tp_size, config.fsdp_size
    if config.tp_size > 1:
        is_tied = model.config.tie_word_embeddings
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
        if is_tied:  # a plan names both weights; each is cut alike
            head.weight = nn.Parameter(torch.empty_like(embedding.weight))
        apply_tensor_parallelism(model, meshes.manager.get_mesh("tp"), tp_plan)
        if is_tied:
            head.weight = embedding.weight
    if config.pp_size > 1:
        split_into_stages(model, meshes.group("pp"))
    if config.dp_size == 1:
        return False
    if options.shards_dense:
        if model.config.tie_word_embeddings:
            fsdp_plan = _shard_tied(model, meshes, fsdp_plan)
        ep_plan = {layer.name: "ep_dispatch_experts" for layer in layers if config.ep_size > 1}
        apply_fully_sharded_data_parallelism(model, meshes.manager, fsdp_plan, ep_plan)
        return True
    if config.efsdp_size > 1:
        for layer in layers:
            # Each is a root of its own, which would stay gathered otherwise.
            fully_shard(layer.experts, mesh=meshes.expert_mesh, reshard_after_forward=True)
    return False


def _shard_tied(
    model: PreTrainedModel, meshes: RankMeshes, fsdp_plan: dict[str, str]
) -> dict[str, str]:
    """Share the embedding's weight, which is the head's too, in one group with both.

    torch 2.13 refuses a weight that is in two groups, which transformers' plan would put it in.

    Returns:
        The plan for the others.
    """
    base: Any = model.base_model
    modules = [model.get_input_embeddings(), base.norm, model.get_output_embeddings()]
    policies = _get_fsdp_policy_kwargs(meshes.config)
    fully_shard(modules, mesh=meshes.dense_mesh, reshard_after_forward=False, **policies)
    return {
        name: style
        for name, style in fsdp_plan.items()
        if not any(model.get_submodule(name) is module for module in modules)
    }


def _plans(
    model: PreTrainedModel,
    config: DistributedConfig,
    layers: list[MoELayer],
    *,
    shards_dense: bool,
) -> tuple[dict[str, str], dict[str, str]]:
    """The family's plans for tensor parallelism and FSDP, with concrete names."""
    # Expert parallelism is this package's own, so the family needs no plan for it.
    plain = DistributedConfig(
        pp_size=config.pp_size,
        dp_replicate_size=config.dp_replicate_size if shards_dense else 1,
        fsdp_size=config.fsdp_size if shards_dense else 1,
        tp_size=config.tp_size,
    )
    try:
        tp_plan, _, fsdp_plan = model._resolve_parallel_plans(plain)
    except ValueError as error:
        raise CheckpointError(f"{type(model).__name__} cannot be shared out so: {error}") from error
    experts = tuple(layer.name for layer in layers)
    if config.ep_size > 1:
        tp_plan = {name: style for name, style in tp_plan.items() if not name.startswith(experts)}
    elif config.tp_size > 1 and not any(name.startswith(experts) for name in tp_plan):
        raise CheckpointError(
            f"{type(model).__name__} has no tensor-parallel plan for its experts in transformers, "
            "so every rank would hold all of them. Use the strategy moe_ep or moe_fsdp."
        )
    return tp_plan, fsdp_plan


def tensor_parallel_styles(model: PreTrainedModel) -> dict[str, str]:
    """How the family cuts its modules and parameters for tensor parallelism, by their names; empty
    if it has no plan.

    Args:
        model: The model, on meta.
    """
    config = DistributedConfig(tp_size=2)
    try:
        with without_warnings():  # about rules for layers that this model does not have
            styles, _, _ = model._resolve_parallel_plans(config)
    except ValueError:
        return {}
    return dict(styles)


def is_sharded(tensor: torch.Tensor) -> bool:
    """Whether a tensor is a rank's part of a larger one."""
    return isinstance(tensor, DTensor)

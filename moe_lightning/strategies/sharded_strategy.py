"""ShardedStrategy: a model over ranks, by FSDP2, expert, tensor and pipeline parallelism."""

from collections.abc import Hashable
from datetime import timedelta
from functools import cached_property
from typing import Any, ClassVar, Literal

import lightning as L
import torch
import torch.distributed as dist
from typing_extensions import override

from moe_lightning.collectives import RankGroup
from moe_lightning.data.rank_batches import batches_of_rank
from moe_lightning.errors import UsageError
from moe_lightning.modeling.checkpoint import CheckpointView
from moe_lightning.modeling.sharding import RankMeshes, ShardingOptions
from moe_lightning.strategies.all_loaded import wait_until_all_have_loaded
from moe_lightning.strategies.checkpointing import CheckpointsOfRanks
from moe_lightning.strategies.hosting import HostedModel, HostingOptions
from moe_lightning.strategies.mesh_sizes import MeshSizes, Size, resolve_sizes
from moe_lightning.strategies.moe_strategy import MoEStrategy
from moe_lightning.strategies.placing import PlacementOptions, PolicyName
from moe_lightning.strategies.rank_launcher import RankLauncher
from moe_lightning.strategies.rank_watch import RankWatch, WatchTimes
from moe_lightning.strategies.sharded_model import ExchangeOptions, ShardLoader

WireName = Literal["bfloat16", "float16"]
SHARDED_PRESETS: dict[str, dict[str, Size]] = {
    "moe_fsdp": {},
    "moe_ep": {"ep_size": "auto"},
    "moe_tp": {"tp_size": "auto"},
    "moe_pp": {"pp_size": "auto"},
}
"""Names of the strategy with some of its sizes set."""


class ShardedStrategy(MoEStrategy, CheckpointsOfRanks):
    """A model over the ranks of a run, each of which holds its share of the weights.

    Args:
        fsdp_size: Ranks that share the dense layers' parameters and have rows of their own. auto
            is all ranks that the other sizes leave.
        ep_size: Ranks that share the experts of a layer, each with experts of its own, to whom rows
            travel; divides fsdp_size * tp_size. auto is all of these.
        tp_size: Ranks that compute each layer together, on the same rows. auto is all ranks that
            the other sizes leave.
        pp_size: Ranks that have some of the layers each, for inference. auto is all ranks that the
            other sizes leave.
        dp_replicate_size: Copies of all that fsdp_size and tp_size share, one for each machine for
            example. auto is 1.
        dense: Whether each rank holds all dense layers, or the ranks share them. auto shares them
            except for inference with ep_size above 1, where they are small beside the experts.
        policy: Which rank gets which expert, linear (blocks of equal size), round_robin, balanced
            (by the rows that each expert had) or file. Numbers need not divide.
        loads: For balanced, the rows of each expert, as in the routing_balance.json of an earlier
            run.
        replicas: For balanced, how many extra copies of busy experts each layer gets.
        file: For file, a placement, such as the placement.json of an earlier run.
        overlap_chunks: Parts of the rows between ranks, the next of which travels while one is
            computed. 1 sends all at once.
        wire_dtype: The precision of rows on their way between ranks. The default is the model's.
        cpu_offload: Whether parameters wait in the memory of the host, on GPUs only.
        activation_checkpointing: Whether fit computes each layer's activations again in the
            backward pass and keeps fewer.
        timeout_s: Seconds after which a rank that does not answer ends the run.
        process_group_backend: What ranks talk over. The default is nccl for GPUs and gloo for CPUs.
    """

    strategy_name: ClassVar[str] = "moe_fsdp"

    def __init__(
        self,
        fsdp_size: Size = "auto",
        ep_size: Size = 1,
        tp_size: Size = 1,
        pp_size: Size = 1,
        dp_replicate_size: Size = 1,
        *,
        dense: Literal["auto", "sharded", "replicated"] = "auto",
        policy: PolicyName = "linear",
        loads: str | None = None,
        replicas: int = 0,
        file: str | None = None,
        overlap_chunks: int = 1,
        wire_dtype: WireName | None = None,
        cpu_offload: bool = False,
        activation_checkpointing: bool = False,
        timeout_s: float = 120.0,
        process_group_backend: str | None = None,
    ) -> None:
        if timeout_s <= 0:
            raise UsageError(f"timeout_s is {timeout_s}, but it must be above 0.")
        if overlap_chunks < 1:
            raise UsageError(f"overlap_chunks is {overlap_chunks}, but it must be 1 or more.")
        super().__init__(
            process_group_backend=process_group_backend, timeout=timedelta(seconds=timeout_s)
        )
        self.given_sizes: dict[str, Size] = {
            "pp": pp_size,
            "dp_replicate": dp_replicate_size,
            "fsdp": fsdp_size,
            "tp": tp_size,
            "ep": ep_size,
        }
        self.dense = dense
        self.placing = PlacementOptions(policy, loads, replicas, file)
        self.placing.check()
        self.exchange = ExchangeOptions(
            overlap_chunks, None if wire_dtype is None else getattr(torch, wire_dtype)
        )
        self.cpu_offload = cpu_offload
        self.activation_checkpointing = activation_checkpointing
        self.timeout_s = timeout_s
        self._meshes: RankMeshes | None = None
        self._wants_sampler: bool | None = None
        self._watch: RankWatch | None = None

    # The ranks.

    @override
    def _configure_launcher(self) -> None:  # private in Lightning 2.6.6
        assert self.cluster_environment is not None
        self._launcher: RankLauncher = RankLauncher(
            self.cluster_environment, self.num_processes, self.num_nodes, watch=lambda: self._watch
        )

    @override
    def teardown(self) -> None:
        if self._watch is not None:
            self._watch.stop()
            self._watch = None
        super().teardown()

    @cached_property
    def sizes(self) -> MeshSizes:
        """The sizes of the mesh, once the number of ranks is known."""
        sizes = resolve_sizes(self.world_size, self.given_sizes)
        if sizes.ep == 1 and self.placing != PlacementOptions():
            raise UsageError(
                "policy, loads, replicas and file place experts on ranks, but ep_size is 1: every "
                "rank has all experts. Set ep_size, or leave them out."
            )
        return sizes

    @override
    def setup_environment(self) -> None:
        # Not Lightning's own, which makes a mesh of two axes.
        assert self.accelerator is not None
        self.accelerator.setup_device(self.root_device)
        self.set_world_ranks()
        sizes = self.sizes  # wrong ones are refused before the ranks meet
        if self.cpu_offload and self.root_device.type == "cpu":
            raise UsageError(
                "cpu_offload keeps the parameters of GPUs in the host's memory; these ranks "
                "compute on the CPU. Leave it out."
            )
        self._setup_distributed()
        if sizes.world > 1:
            self._meshes = RankMeshes(
                self.root_device.type,
                pp=sizes.pp,
                dp_replicate=sizes.dp_replicate,
                fsdp=sizes.fsdp,
                tp=sizes.tp,
                ep=sizes.ep,
                timeout_s=self.timeout_s,
            )
            world = dist.group.WORLD
            if self._process_group_backend != "gloo":
                timeout = timedelta(seconds=self.timeout_s)
                world = dist.new_group(backend="gloo", timeout=timeout)
            self.host_ranks = RankGroup(world)
            assert world is not None, "the ranks have met"
            self._watch = RankWatch.start(
                world, WatchTimes(self.timeout_s), before_exit=self._launcher.kill_children
            )
        else:
            self.host_ranks = RankGroup()

    @property
    def data_rank(self) -> int:
        """This rank's number among those that get rows of their own."""
        if self._meshes is None:
            return 0
        return self._meshes.rank("dp_replicate") * self.sizes.fsdp + self._meshes.rank("fsdp")

    @property
    def writes_rows(self) -> bool:
        """Whether this rank's answers are written; other ranks of its group have the same."""
        return self._meshes is None or not (self._meshes.rank("tp") or self._meshes.rank("pp"))

    @property
    @override
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        return {"num_replicas": self.sizes.data, "rank": self.data_rank}

    @override
    def process_dataloader(self, dataloader: object) -> Any:
        assert self.lightning_module is not None, "a trainer calls this"
        if self.lightning_module.trainer.predicting:
            return batches_of_rank(dataloader, rank=self.data_rank, num_ranks=self.sizes.data)
        return dataloader

    # The model.

    @property
    @override
    def hosting_key(self) -> Hashable:
        return (
            self.strategy_name,
            self.sizes,
            self.dense,
            self.placing,
            self.exchange,
            self.cpu_offload,
            self.root_device,
        )

    @override
    def host(self, view: CheckpointView, options: HostingOptions) -> HostedModel:
        sizes = self.sizes
        if options.is_training and sizes.pp > 1:
            raise UsageError(
                "pipeline parallelism is for inference here and does not train. Use moe_fsdp or "
                "moe_ep for fit."
            )
        if options.adaptation is not None and options.adaptation.has_adapters and sizes.tp > 1:
            raise UsageError(
                f"tp_size is {sizes.tp}, but adapters (--model.lora) are not split by tensor "
                "parallelism. Use moe_fsdp or moe_ep."
            )
        if options.is_training and self.dense == "replicated":
            raise UsageError(
                "dense is replicated, which is for inference: nobody would average the gradients "
                "of the dense layers. Leave it out for fit."
            )
        if self.cpu_offload and self.dense == "replicated":
            raise UsageError(
                "cpu_offload is for weights that ranks share, but dense is replicated. Leave one "
                "of them out."
            )
        holds_dense = sizes.ep > 1 and not options.is_training and not self.cpu_offload
        loader = ShardLoader(
            self._meshes,
            sharding=ShardingOptions(
                shards_dense=self.dense == "sharded" or (self.dense == "auto" and not holds_dense),
                cpu_offload=self.cpu_offload,
                mixed_precision=self.precision_plugin.precision == "bf16-mixed",
            ),
            exchange=self.exchange,
            device=self.root_device,
            host_ranks=self.host_ranks,
        )
        hosted = loader.load(view, options, place=self.placing.place, hosted_by=self.hosting_key)
        if options.is_training and self.activation_checkpointing:
            hosted.model.activation_checkpointing_enable()
        if not options.is_training:
            hosted.model.requires_grad_(False)
        if self._meshes is not None:
            wait_until_all_have_loaded(self.world_size)
        return hosted

    @override
    def setup(self, trainer: L.Trainer) -> None:
        # FSDP2 changes tensors in place between forwards, which inference mode forbids; Lightning
        # 2.6 switches it off for its own FSDP only.
        for loop in (trainer.predict_loop, trainer.validate_loop, trainer.test_loop):
            loop.inference_mode = False
        trainer.fit_loop.epoch_loop.val_loop.inference_mode = False
        # In predict, Lightning's sampler gives ranks unequal numbers of batches; our
        # batches_of_rank does not. A fit of the same trainer may want it.
        connector = trainer._accelerator_connector
        if self._wants_sampler is None:
            self._wants_sampler = connector.use_distributed_sampler
        connector.use_distributed_sampler = self._wants_sampler and not trainer.predicting
        super().setup(trainer)

    @override
    def model_to_device(self) -> None:
        if not self.cpu_offload:
            super().model_to_device()

    @override
    def report(self) -> dict[str, Any]:
        return {"mesh": str(self.sizes)}

"""MoELightningModule: a Hugging Face MoE checkpoint as a LightningModule.

    Trainer().predict(MoELightningModule("demo", task=Generate()), DataLoader(["To be, or", "Once
    upon"]))

Nothing is loaded in the constructor; ``configure_model`` loads weights straight to the strategy's
device.
"""

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.strategies import DDPStrategy, Strategy
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from typing_extensions import override

from moe_lightning.data.encode import Encoder
from moe_lightning.dispatch import RoutingLog
from moe_lightning.errors import UsageError
from moe_lightning.experts.backends import check_name
from moe_lightning.experts.names import BackendName
from moe_lightning.finetune.adaptation import Adaptation
from moe_lightning.finetune.fine_tuning import RouterBalance
from moe_lightning.finetune.lora import LoRA
from moe_lightning.finetune.trainable import Trainable
from moe_lightning.modeling.checkpoint import CheckpointView, open_checkpoint
from moe_lightning.modeling.export import export_model
from moe_lightning.modeling.manifest import manifest_hash
from moe_lightning.modeling.precision import DtypeName, choose_dtype
from moe_lightning.modeling.preflight import check_values
from moe_lightning.modeling.runner import ModelRunner
from moe_lightning.modeling.tokenizer import load_tokenizer, tokenizer_hash
from moe_lightning.predicting import PredictingHooks
from moe_lightning.strategies import (
    HostedModel,
    HostingOptions,
    MoEStrategy,
    ReadsShards,
    ShardedStrategy,
    host_on_one_device,
    hosting_key,
    register_strategies,
)
from moe_lightning.tally import Tally
from moe_lightning.tasks import Generate, Task
from moe_lightning.training import TrainingHooks

register_strategies()


class MoELightningModule(PredictingHooks, TrainingHooks):
    """A mixture-of-experts checkpoint that predicts, and trains.

    Args:
        checkpoint: Directory of a Hugging Face checkpoint, a hub id, or "demo" for the small
            checkpoint that comes with the package.
        task: What predict computes for a row: Generate, Score or Embed, each with options of its
            own.
        dtype: Precision of the weights and of the computation. "auto" is float32 on a CPU, and the
            checkpoint's own on a GPU; fit trains in float32 unless told otherwise.
        experts_backend: How experts are computed. "auto" picks the fastest that is exact. On a CPU,
            cpu_half takes half the memory (relative error 4e-4), and cpu_int8 a quarter (3e-2). A
            backend of your own is named MODULE.FUNCTION.
        check_weights: Whether to read all weights once before loading and refuse NaN or infinite
            values.
        optimizer: The optimizer of fit, with its options. The default is AdamW.
        lr_scheduler: The learning-rate schedule of fit, stepped after every optimizer step. The
            default is none: a constant learning rate.
        router_balance: What keeps routers from sending all rows to a few experts in fit.
        trainable: Which parameters fit trains. The default is all.
        lora: Trains low-rank adapters of attention and experts, and nothing else. The default is
            none.
        batch_budget_tokens: Tokens that may be in flight at once when rows come from your own
            dataloader; PromptData brings its own budget.
    """

    def __init__(
        self,
        checkpoint: str = "demo",
        *,
        task: Task | None = None,
        dtype: DtypeName = "auto",
        experts_backend: BackendName | str = "auto",
        check_weights: bool = False,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        lr_scheduler: LRSchedulerCallable | None = None,
        router_balance: RouterBalance | None = None,
        trainable: Trainable | None = None,
        lora: LoRA | None = None,
        batch_budget_tokens: int = 16384,
    ) -> None:
        super().__init__()
        self.checkpoint = checkpoint
        self.task = task if task is not None else Generate()
        self.dtype_name = dtype
        check_name(experts_backend)
        self.experts_backend = experts_backend
        self.check_weights = check_weights
        self.optimizer_factory = optimizer
        self.lr_scheduler_factory = lr_scheduler
        self.router_balance = router_balance if router_balance is not None else RouterBalance()
        self.trainable = trainable if trainable is not None else Trainable()
        self.lora = lora
        self.batch_budget_tokens = batch_budget_tokens
        self.model: PreTrainedModel | None = None
        self.runner: ModelRunner | None = None
        self.hosted: HostedModel | None = None
        self._adaptation: Adaptation | None = None
        self.routing_log = RoutingLog()
        self.tally = Tally()
        self._next_row = 0

    # What can be known before any weight is loaded.

    @cached_property
    def view(self) -> CheckpointView:
        """The opened checkpoint, its files checked."""
        return open_checkpoint(self.checkpoint)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The checkpoint's tokenizer."""
        return load_tokenizer(self.view)

    @cached_property
    def encoder(self) -> Encoder:
        """Turns prompts into token ids that this checkpoint can read."""
        config = self.view.config.get_text_config()
        return Encoder(
            self.tokenizer,
            max_positions=getattr(config, "max_position_embeddings", None),
            vocab_size=config.vocab_size,
            add_generation_prompt=self.task.add_generation_prompt,
        )

    def identity(self) -> dict[str, Any]:
        """What of the model and its options decides the answers of predict, wherever it runs.

        Returns:
            Plain values.
        """
        adapters = None if self.lora is None else {"rank": self.lora.rank, "alpha": self.lora.alpha}
        return {
            "model": {
                "manifest": manifest_hash(self.view),
                "tokenizer": tokenizer_hash(self.view),
                "dtype": self.dtype_name,
                "experts_backend": self.experts_backend,
                "lora": adapters,
            },
            "task": self.task.identity(),
        }

    # Loading.

    @override
    def configure_model(self) -> None:
        """Load the model once; later calls do nothing."""
        trainer = self._trainer
        strategy = trainer.strategy if trainer is not None else None
        is_training = trainer is not None and bool(trainer.training)
        if self.hosted is not None and (
            self.hosted.hosted_by != hosting_key(strategy)
            or (is_training and not self.hosted.may_train)
        ):
            if self.hosted.has_own_weights:
                raise UsageError(
                    "this module's weights are no longer the checkpoint's, and another strategy "
                    "would load those again. Export it first, and give the new directory as "
                    "checkpoint."
                )
            self.hosted = self.model = self.runner = None
        if self.hosted is not None:
            if trainer is not None and (trainer.training or isinstance(strategy, DDPStrategy)):
                self.hosted.unpack()
            self._read_shards(strategy, self.hosted)
            return
        if self._has_nothing_to_do():
            return
        if self.check_weights:
            check_values(self.view)
        device = strategy.root_device if strategy is not None else self.device
        if trainer is not None:
            # DDP sends weights around before the run, as they are; they are packed after that.
            packs = bool(trainer.predicting) and not isinstance(strategy, DDPStrategy)
        else:  # what follows is not known, so weights stay trainable unless told otherwise
            packs = self.experts_backend.startswith("cpu_")
        may_train = is_training or trainer is None
        self._adaptation = None
        if self.lora is not None or may_train:
            self._adaptation = Adaptation(self.lora, self.trainable if may_train else None)
        options = HostingOptions(
            dtype=choose_dtype(
                self.dtype_name,
                device,
                self.view.config,
                is_training=is_training,
                precision=trainer.precision if trainer is not None else "32-true",
            ),
            experts_backend=self.experts_backend,
            log=self.routing_log,
            packs_while_loading=packs,
            is_training=is_training,
            adaptation=self._adaptation,
        )
        self.__dict__.pop("fine_tuning", None)  # of a model that was hosted before
        if isinstance(strategy, MoEStrategy):
            self.hosted = strategy.host(self.view, options)
        else:
            self.hosted = host_on_one_device(self.view, device, options)
            self._read_shards(strategy, self.hosted)
        is_sharded = isinstance(strategy, ShardedStrategy)
        self.hosted.may_train = may_train or (not is_sharded and self.trainable == Trainable())
        self.model = self.hosted.model
        self.runner = ModelRunner(
            self.model,
            self.tokenizer,
            self.hosted.padding,
            self.routing_log,
            self.hosted.interleaver,
            lock_step=self.hosted.lock_step,
            calls_whole_model=self.hosted.calls_whole_model,
            is_alone=self.hosted.is_alone,
            device=self.hosted.device,
        )

    def _has_nothing_to_do(self) -> bool:
        """Whether earlier runs of the job have computed all rows, so that no weight is needed."""
        trainer = self._trainer
        datamodule = getattr(trainer, "datamodule", None)
        return trainer is not None and trainer.predicting and getattr(datamodule, "is_done", False)

    def _read_shards(self, strategy: Strategy | None, hosted: HostedModel) -> None:
        if (
            strategy is not None
            and not isinstance(strategy, MoEStrategy)
            and type(strategy.checkpoint_io) is TorchCheckpointIO
        ):
            strategy.checkpoint_io = ReadsShards(self, hosted)

    # Saving.

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.lora is not None:  # what export has to know of adapters
            checkpoint["lora"] = {"rank": self.lora.rank, "alpha": self.lora.alpha}

    @override
    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        if self.hosted is not None:
            self.hosted.unpack()
        return super().state_dict(*args, **kwargs)

    @override
    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        if self.hosted is not None:
            self.hosted.make_room()
        elif self._has_nothing_to_do():
            return None
        return super().load_state_dict(state_dict, *args, **kwargs)

    def export(self, directory: str | Path) -> None:
        """Write the model as a Hugging Face directory that plain ``from_pretrained`` loads.

        Args:
            directory: Where to; made if missing.

        Raises:
            UsageError: If there is no model yet, or the directory holds a checkpoint already.
        """
        if self.model is None:
            raise UsageError("There is no model to export: call configure_model, or fit, first.")
        assert self.hosted is not None, "it comes with the model"
        self.hosted.unpack()
        export_model(self.model, self.tokenizer, Path(directory))

"""Fits of a few steps, on one process or on ranks, that say what they did."""

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import lightning as L
import torch
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, Dataset

from moe_lightning import MoELightningModule
from moe_lightning.finetune.replicas import local_expert_ids
from moe_lightning.strategies.sharded_strategy import ShardedStrategy

ROWS_PER_STEP = 8


class Rows(Dataset):
    """Rows of random tokens with uneven numbers of targets."""

    def __init__(self, num_steps, num_tokens=12):
        generator = torch.Generator().manual_seed(7)
        count = num_steps * ROWS_PER_STEP
        self.input_ids = torch.randint(4, 300, (count, num_tokens), generator=generator)
        self.first_target = torch.randint(1, num_tokens, (count,), generator=generator)

    def __len__(self):
        return len(self.input_ids)

    def __getitem__(self, number):
        labels = self.input_ids[number].clone()
        labels[: self.first_target[number]] = -100
        return {"input_ids": self.input_ids[number], "labels": labels}


class Seen(L.Callback):
    """Loss and gradient norm of every step, and what else was logged in the last one."""

    def __init__(self):
        self.losses, self.norms, self.last = [], [], {}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.last = {name: float(value) for name, value in trainer.callback_metrics.items()}
        self.losses.append(self.last["train_loss"])
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            self.norms.append(self.last.get("grad_norm"))


@dataclass(frozen=True)
class Fit:
    """A fit; all of it can be sent to other processes.

    Attributes:
        strategy: Options of the strategy, or the name of another; None is one process without.
        module: Options of the module.
        trainer: Options of the trainer.
        num_steps: Optimizer steps.
        num_tokens: Tokens of a row.
        lr: The learning rate.
        keeps_weights: Whether the report has the weights at the end.
    """

    strategy: dict | str | None = None
    module: dict = field(default_factory=dict)
    trainer: dict = field(default_factory=dict)
    num_steps: int = 6
    num_tokens: int = 12
    lr: float = 1e-3
    keeps_weights: bool = False


@dataclass(frozen=True)
class FitReport:
    """What a fit did, as one rank saw it.

    Attributes:
        losses: Of every batch.
        norms: Of the gradient of every step.
        logged: Everything that was logged, as it was after the last batch.
        dtypes: Of the parameters.
        is_checkpointed: Whether layers compute their activations again in the backward pass.
        weights: Whole dense weights by name, and rows of experts by (name, expert).
    """

    losses: list
    norms: list
    logged: dict
    dtypes: set
    is_checkpointed: bool
    weights: dict


def fit(path, run):
    """Fit a checkpoint; every layout sees the same rows in each step.

    Args:
        path: The checkpoint.
        run: How.

    Returns:
        The report of this rank.
    """
    torch.manual_seed(0)
    world = 1 if run.strategy is None else torch.distributed.get_world_size()
    strategy = "auto" if run.strategy is None else run.strategy
    if isinstance(strategy, dict):
        strategy = ShardedStrategy(**strategy)
    seen = Seen()
    trainer = L.Trainer(
        **{
            "accelerator": "cpu",
            "devices": world,
            "strategy": strategy,
            "max_steps": run.num_steps,
            "gradient_clip_val": 0.5,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "use_distributed_sampler": False,
            "num_sanity_val_steps": 0,
            "callbacks": [seen],
        }
        | run.trainer
    )
    optimizer = partial(torch.optim.AdamW, lr=run.lr)
    module = MoELightningModule(str(path), **({"optimizer": optimizer} | run.module))
    num_batches = run.num_steps * run.trainer.get("accumulate_grad_batches", 1)
    trainer.fit(module, _Data(Rows(num_batches, run.num_tokens)))
    return FitReport(
        seen.losses,
        seen.norms,
        seen.last,
        {str(parameter.dtype) for parameter in module.parameters()},
        module.model.is_gradient_checkpointing,
        weights_of(module) if run.keeps_weights else {},
    )


def fit_each(path, runs):
    """Fit a checkpoint in several ways, one after the other.

    Args:
        path: The checkpoint.
        runs: The fits by name.

    Returns:
        Their reports by name.
    """
    return {name: fit(path, run) for name, run in runs.items()}


def weights_of(module) -> dict[Any, Any]:
    """The weights that this rank has: dense ones whole, and the rows of experts that it holds."""
    weights: dict[Any, Any] = {}
    for name, tensor in [*module.model.named_parameters(), *module.model.named_buffers()]:
        tensor = tensor.detach()
        rows = module.hosted.rows.get(name)
        if rows is None:
            whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            weights[name] = whole.clone().numpy()
            continue
        ids = local_expert_ids(tensor, rows)
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        weights |= {(name, e): row.clone().numpy() for e, row in zip(ids, local, strict=True)}
    return weights


class _Data(L.LightningDataModule):
    """Deals the rows of each step out to the ranks."""

    def __init__(self, rows):
        super().__init__()
        self.rows = rows

    def train_dataloader(self):
        place = self.trainer.distributed_sampler_kwargs or {"rank": 0, "num_replicas": 1}
        mine = range(place["rank"], len(self.rows), place["num_replicas"])
        size = ROWS_PER_STEP // place["num_replicas"]
        return DataLoader(self.rows, sampler=mine, batch_size=size)

"""Fits of a few steps, on one process or on ranks, that say what they did."""

import lightning as L
import torch
from torch.utils.data import DataLoader, Dataset

from moe_lightning import MoELightningModule
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
    """Loss and gradient norm of every step."""

    def __init__(self):
        self.losses, self.norms = [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append(float(trainer.callback_metrics["train_loss"]))
        self.norms.append(float(trainer.callback_metrics["grad_norm"]))


def fit(path, options, *, num_steps=6, trainer=None, fit_options=None, **module):
    """Fit a checkpoint; every layout sees the same rows in each step.

    Args:
        path: The checkpoint.
        options: Of the strategy; None is one process without it.
        num_steps: Optimizer steps.
        trainer: More options of the trainer.
        fit_options: More options of its ``fit``.
        module: Options of the module.

    Returns:
        Losses, norms, the trainer and the module.
    """
    torch.manual_seed(0)
    strategy = "auto" if options is None else ShardedStrategy(**options)
    world = torch.distributed.get_world_size() if options is not None else 1
    seen = Seen()
    runner = L.Trainer(
        accelerator="cpu",
        devices=world,
        strategy=strategy,
        max_steps=num_steps,
        gradient_clip_val=0.5,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        callbacks=[seen, *(trainer or {}).pop("callbacks", [])],
        **({} if trainer is None else trainer),
    )
    tuned = MoELightningModule(
        str(path),
        **({"optimizer": lambda groups: torch.optim.AdamW(groups, lr=1e-3)} | module),
    )
    runner.fit(tuned, _Data(Rows(num_steps)), **(fit_options or {}))
    return seen.losses, seen.norms, runner, tuned


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


def losses_and_norms(path, options, module=None):
    """What a fit on ranks gives back to the test."""
    losses, norms, _, _ = fit(path, options, **(module or {}))
    return losses, norms

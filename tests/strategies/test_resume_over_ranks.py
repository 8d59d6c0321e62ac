"""fit saves over ranks and goes on over others: the next losses are those of one process."""

import lightning as L
import pytest
import torch
from fit_runs import ROWS_PER_STEP, Rows, Seen
from ranks import run_on_ranks
from sampling import sampled
from torch.utils.data import DataLoader

from moe_lightning import MoELightningModule
from moe_lightning.callbacks import SaveCheckpoints
from moe_lightning.finetune.lora import LoRA
from moe_lightning.strategies.sharded_strategy import ShardedStrategy

BEFORE, STEPS = 3, 6
FSDP_4_EP_2 = {"fsdp_size": 4, "ep_size": 2}


class Data(L.LightningDataModule):
    """Deals the rows of each step out to the ranks, beginning with those of a later step."""

    def __init__(self, first_step):
        super().__init__()
        self.rows, self.first_step = Rows(STEPS), first_step

    def train_dataloader(self):
        place = self.trainer.distributed_sampler_kwargs or {"rank": 0, "num_replicas": 1}
        first = self.first_step * ROWS_PER_STEP
        mine = range(first + place["rank"], len(self.rows), place["num_replicas"])
        size = ROWS_PER_STEP // place["num_replicas"]
        return DataLoader(self.rows, sampler=mine, batch_size=size)


def fit(checkpoint, options, *, output_dir=None, ckpt_path=None, lora=False):
    """Losses of the steps, and the learning rate after them."""
    torch.manual_seed(0)
    world = torch.distributed.get_world_size() if options is not None else 1
    seen = Seen()
    callbacks = [seen]
    if output_dir is not None:
        callbacks.append(SaveCheckpoints(output_dir, every_n_train_steps=BEFORE, save_top_k=-1))
    trainer = L.Trainer(
        accelerator="cpu",
        devices=world,
        strategy="auto" if options is None else ShardedStrategy(**options),
        max_steps=STEPS,
        gradient_clip_val=0.5,
        logger=False,
        enable_checkpointing=output_dir is not None,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        callbacks=callbacks,
    )
    module = MoELightningModule(
        checkpoint,
        optimizer=lambda groups: torch.optim.AdamW(groups, lr=1e-3),
        lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.5),
        lora=LoRA(rank=2) if lora else None,
    )
    data = Data(0 if ckpt_path is None else BEFORE)
    trainer.fit(module, data, ckpt_path=ckpt_path, weights_only=True)
    return seen.losses, trainer.optimizers[0].param_groups[0]["lr"]


def fit_on_ranks(checkpoint, options, settings):
    return fit(checkpoint, options, **settings)


@pytest.mark.parametrize("lora", sampled([False, True], False))
def test_fit_goes_on_over_other_ranks(family_checkpoint, tmp_path, lora):
    checkpoint = str(family_checkpoint("qwen3_moe"))
    want, lr = fit(checkpoint, None, lora=lora, output_dir=tmp_path / "one")
    over_ranks = {"output_dir": str(tmp_path), "lora": lora}
    for losses, _ in run_on_ranks(4, fit_on_ranks, checkpoint, FSDP_4_EP_2, over_ranks):
        torch.testing.assert_close(losses, want, rtol=1e-5, atol=1e-5)
    saved = tmp_path / "checkpoints"
    assert sorted(p.name for p in saved.iterdir()) == ["last.ckpt", "step=3.ckpt", "step=6.ckpt"]
    paths = [
        (saved / "step=3.ckpt", 1, {}),
        (saved / "step=3.ckpt", 2, {"ep_size": 2}),
        (saved / "step=3.ckpt", 2, {}),
        (saved / "step=3.ckpt", 4, {"ep_size": 4}),
        # Of one device.
        (tmp_path / "one" / "checkpoints" / "step=3.ckpt", 2, {"ep_size": 2}),
    ]
    for path, num_ranks, options in paths:
        settings = {"ckpt_path": str(path), "lora": lora}
        for losses, final_lr in run_on_ranks(
            num_ranks, fit_on_ranks, checkpoint, options, settings
        ):
            # fp32 sums in another order.
            torch.testing.assert_close(losses, want[BEFORE:], rtol=1e-5, atol=1e-5)
            assert final_lr == lr

"""fit saves over ranks and goes on over others: the next losses are those of one process."""

import pytest
import torch
from fit_runs import fit
from ranks import run_on_ranks

from moe_lightning.callbacks import SaveCheckpoints

BEFORE, STEPS = 3, 6
FSDP_2_EP_2 = {"fsdp_size": 4, "ep_size": 2}


def schedule(optimizer):
    return torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.5)


def save(checkpoint, directory, options):
    losses, _, trainer, _ = fit(
        checkpoint,
        options,
        trainer={"callbacks": [Stop(), SaveCheckpoints(directory, every_n_train_steps=1)]}
        | {"enable_checkpointing": True},
        lr_scheduler=schedule,
    )
    return losses


class Stop(SaveCheckpoints.__mro__[2]):
    """Ends a fit after some steps, as if interrupted between two."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        trainer.should_stop = batch_idx + 1 == BEFORE


def go_on(checkpoint, path, options):
    losses, norms, trainer, _ = fit(
        checkpoint, options, lr_scheduler=schedule, fit_options={"ckpt_path": path}
    )
    return losses, trainer.optimizers[0].param_groups[0]["lr"]


@pytest.mark.parametrize(
    ("num_ranks", "options"),
    [
        (1, {}),
        (2, {"ep_size": 2}),
        (2, {}),
        (4, {"ep_size": 4}),
    ],
)
def test_fit_goes_on_over_other_ranks(family_checkpoint, tmp_path, num_ranks, options):
    checkpoint = str(family_checkpoint("qwen3_moe"))
    whole = fit(checkpoint, None, lr_scheduler=schedule)
    want = whole[0]
    before = run_on_ranks(4, save, checkpoint, str(tmp_path), FSDP_2_EP_2)[0]
    torch.testing.assert_close(before, want[:BEFORE], rtol=1e-5, atol=1e-5)
    path = str(tmp_path / "checkpoints" / "last.ckpt")
    for losses, lr in run_on_ranks(num_ranks, go_on, checkpoint, path, options):
        # fp32 sums in another order.
        torch.testing.assert_close(losses, want[BEFORE:], rtol=1e-5, atol=1e-5)
        assert lr == whole[2].optimizers[0].param_groups[0]["lr"]

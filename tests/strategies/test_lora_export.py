"""Adapters from a fit over ranks to plain PEFT."""

import lightning as L
import pytest
import torch
from fit_runs import Fit, fit
from peft import PeftModel
from ranks import run_on_ranks
from transformers import AutoModelForCausalLM

from moe_lightning.cli.export import export_checkpoint
from moe_lightning.finetune.lora import LoRA

TOKENS = torch.arange(4, 24)[None]


class SaveAndAsk(L.Callback):
    """Saves what was trained, and keeps what the model then gives."""

    def __init__(self, checkpoint):
        self.checkpoint = checkpoint

    def on_train_end(self, trainer, pl_module):
        trainer.save_checkpoint(self.checkpoint)
        pl_module.model.eval()
        with torch.no_grad():
            self.logits = pl_module.model(TOKENS, use_cache=False).logits


def tune(path, checkpoint, strategy):
    """Fit adapters, save them, and return the logits of the tuned model."""
    keeper = SaveAndAsk(checkpoint)
    lora = {"lora": LoRA(rank=4, alpha=8.0)}
    fit(path, Fit(strategy, lora, {"callbacks": [keeper]}, num_steps=3))
    return keeper.logits


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_peft_gives_the_logits_of_the_ranks(family, family_checkpoint, tmp_path):
    path = str(family_checkpoint(family))
    checkpoint = str(tmp_path / "tuned.ckpt")
    logits, others = run_on_ranks(2, tune, path, checkpoint, {"ep_size": 2})
    torch.testing.assert_close(logits, others, atol=1e-5, rtol=1e-5)
    export_checkpoint(path, checkpoint, str(tmp_path / "adapter"))
    base = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    with torch.no_grad():
        before = base.eval()(TOKENS, use_cache=False).logits
        plain = PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()
        got = plain(TOKENS, use_cache=False).logits
    assert (got - before).abs().max() > 1e-3  # something was learnt
    torch.testing.assert_close(got, logits, atol=1e-5, rtol=1e-4)


def test_adapters_of_one_device_are_exported_too(family_checkpoint, tmp_path):
    path = str(family_checkpoint("qwen3_moe"))
    checkpoint = str(tmp_path / "tuned.ckpt")
    logits = tune(path, checkpoint, None)
    export_checkpoint(path, checkpoint, str(tmp_path / "adapter"))
    base = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    plain = PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()
    with torch.no_grad():
        got = plain(TOKENS, use_cache=False).logits
    torch.testing.assert_close(got, logits, atol=1e-5, rtol=1e-4)

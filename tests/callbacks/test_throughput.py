"""Throughput: rates, memory, utilisation, of predict and of fit."""

import json
from functools import partial

import lightning as L
import pytest
import torch
from quiet_trainer import quiet_trainer
from torch.utils.data import DataLoader

from moe_lightning import MoELightningModule, RunReport, Score, Throughput
from moe_lightning.callbacks.utilisation import active_weights, flops_per_token, peak_flops
from moe_lightning.errors import UsageError
from moe_lightning.placement.footprint import LayerSizes, ModelSizes


def report_of(directory):
    return json.loads((directory / "run.json").read_text())


def predict(checkpoint, tmp_path, *callbacks):
    module = MoELightningModule(str(checkpoint), task=Score())
    quiet_trainer(tmp_path, callbacks=list(callbacks)).predict(
        module, DataLoader(["one two three", "four"], batch_size=2)
    )
    return module


def test_rates_and_memory_of_predict(family_checkpoint, tmp_path, capsys):
    predict(family_checkpoint("mixtral"), tmp_path, Throughput())
    report = report_of(tmp_path)
    seconds = report["elapsed_s"]
    assert report["prompt_tokens_per_s"] * seconds == pytest.approx(
        report["num_prompt_tokens"], rel=0.2
    )
    assert report["new_tokens_per_s"] == 0
    (peak,) = report["peak_memory"]
    assert peak["process"] == "rank 0"
    assert 1e8 < peak["host_bytes"] < 1e11
    assert report["mfu"] is None, "nobody knows the peak of this machine"
    assert "GB of memory" in capsys.readouterr().err


def test_utilisation_where_the_peak_is_given(family_checkpoint, tmp_path):
    module = predict(family_checkpoint("mixtral"), tmp_path, Throughput(peak_tflops=0.01))
    report = report_of(tmp_path)
    flops = flops_per_token(module.view.config, training=False)
    assert report["mfu"] == pytest.approx(flops * report["tokens_per_s"] / 0.01e12, rel=0.01)


def test_weights_that_a_token_meets_by_hand():
    sizes = ModelSizes(
        name="by hand",
        dtype="float16",
        row_bytes=16,
        layers=(LayerSizes(100), LayerSizes(60, expert_bytes=800, num_experts=8)),
        embedding_bytes=1000,
        head_bytes=400,
        other_bytes=20,
        top_k=2,
        num_heads=(4,),
    )
    # Head, rest, two dense parts, and 2 of 8 experts; 2 bytes a weight. Not the embedding.
    assert active_weights(sizes) == (400 + 20 + 100 + 60 + 200) / 2


def test_weights_of_a_model_are_those_of_its_parameters(family_checkpoint):
    module = MoELightningModule(str(family_checkpoint("mixtral")), task=Score())
    module.configure_model()
    total = 0.0
    for name, parameter in module.model.named_parameters():
        if "embed_tokens" in name:
            continue
        total += parameter.numel() * (2 / 8 if ".experts." in name else 1)
    flops = flops_per_token(module.view.config, training=False)
    assert flops == 2 * total
    assert flops_per_token(module.view.config, training=True) == 3 * flops
    assert flops_per_token(module.view.config, training=True, lora=True) == 2 * flops


def test_peaks_of_devices():
    assert peak_flops("NVIDIA H100 80GB HBM3", torch.bfloat16) == 989e12
    assert peak_flops("NVIDIA H100 PCIe", torch.float16) == 756e12
    assert peak_flops("NVIDIA H200", torch.bfloat16) == 989e12
    assert peak_flops("NVIDIA H100 80GB HBM3", torch.float32) is None
    assert peak_flops("Something else", torch.bfloat16) is None
    with pytest.raises(UsageError, match="peak_tflops=0"):
        Throughput(peak_tflops=0)


class Batches(L.LightningDataModule):
    def train_dataloader(self):
        ids = torch.arange(10, 58).view(8, 6)
        mask = torch.ones_like(ids)
        mask[::2, 4:] = 0
        rows = [
            {"input_ids": i, "labels": i.where(m == 1, -100), "attention_mask": m}
            for i, m in zip(ids, mask, strict=True)
        ]
        return DataLoader(rows, batch_size=2)


def test_a_fit(family_checkpoint, tmp_path, capsys):
    module = MoELightningModule(
        str(family_checkpoint("mixtral")), optimizer=partial(torch.optim.SGD, lr=0.1)
    )
    trainer = quiet_trainer(
        tmp_path, max_epochs=2, callbacks=[Throughput(), RunReport()], log_every_n_steps=2
    )
    trainer.fit(module, Batches())
    report = report_of(tmp_path)
    assert report["num_steps"] == 8
    assert report["num_tokens"] == 2 * (48 - 4 * 2)
    assert report["padding_share"] == pytest.approx(8 / 48, abs=1e-4)
    assert report["steps_per_s"] == pytest.approx(8 / report["elapsed_s"], rel=0.1)
    assert report["exit_reason"] == "finished"
    error = capsys.readouterr().err
    assert "8 steps in" in error
    assert f"report: {tmp_path / 'report.html'}" in error

"""CommunicationTime over ranks: a late one is named, and what FSDP gathers is counted."""

import json
import time
from pathlib import Path

import lightning as L
import torch
import torch.distributed as dist
from fit_runs import Fit, fit
from ranks import rank_directory, run_on_ranks
from torch.utils.data import DataLoader

from moe_lightning import CommunicationTime, MoELightningModule, Score
from moe_lightning.modeling.seam import dispatcher_of, find_moe_layers
from moe_lightning.strategies import ShardedStrategy

PROMPTS = [f"{'ab c ' * n}{n}" for n in range(3, 10)]
SLOW_S = 0.2  # more than other work of the machine takes away


class SlowRank(L.Callback):
    def on_predict_start(self, trainer, pl_module):
        if dist.get_rank() != 1:
            return
        for layer in find_moe_layers(pl_module.model):
            shard = dispatcher_of(layer).shard
            object.__setattr__(shard, "compute", self.slow(shard.compute))

    def slow(self, compute):
        def slowly(*args):
            time.sleep(SLOW_S)
            return compute(*args)

        return slowly


def predict(path, options, callbacks):
    callback = CommunicationTime(picture=False)
    directory = rank_directory()
    trainer = L.Trainer(
        accelerator="cpu",
        devices=dist.get_world_size(),
        strategy=ShardedStrategy(**options),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=directory,
        callbacks=[callback, *callbacks],
    )
    module = MoELightningModule(str(path), task=Score())
    trainer.predict(module, DataLoader(PROMPTS, batch_size=2), return_predictions=False)
    if dist.get_rank():
        return None, module
    return json.loads(Path(directory, "communication_time.json").read_text()), module


def late_rank(path):
    content, _ = predict(path, {"ep_size": 3}, [SlowRank()])
    return content


def test_a_late_rank_is_named(family_checkpoint) -> None:
    content, *_ = run_on_ranks(3, late_rank, family_checkpoint("qwen3_moe"))
    assert content["slots"] == ["rank 0", "rank 1", "rank 2"]
    assert content["waited_for"]["slot"] == "rank 1"
    assert content["waited_for"]["share"] > 0.5
    for layer in content["layers"].values():
        # Ranks 0 and 2 wait for each of the passes.
        assert layer["wait_s"] > 0.6 * SLOW_S * layer["num_passes"] * 2 / 3
        parts = sum(layer[f"{part}_s"] for part in ("dispatch", "compute", "combine", "wait"))
        assert abs(parts / layer["total_s"] - 1) < 0.05
    matrix = content["bytes"]
    assert all(matrix[a][b] > 0 for a in range(3) for b in range(3) if a != b)
    assert content["sharding"] is None
    assert content["link_peak_bytes_per_s"] > 0


def gathers(path):
    content, module = predict(path, {}, [])
    watched = [
        type(group._all_gather_comm).__name__
        for layer in module.model.modules()
        if hasattr(layer, "_get_fsdp_state")
        for group in layer._get_fsdp_state()._fsdp_param_groups
    ]
    whole = sum(p.nbytes for p in module.model.parameters())
    in_layers = sum(p.nbytes for p in module.model.model.layers.parameters())
    return content, watched, whole, in_layers


def test_what_fsdp_gathers_is_counted(family_checkpoint) -> None:
    path = family_checkpoint("qwen3_moe")
    (content, watched, whole, in_layers), _ = run_on_ranks(2, gathers, path)
    sharding = content["sharding"]
    num_forwards = content["layers"]["0"]["num_passes"]
    # Each forward gathers the other rank's half of the layers, and the first the rest; probes and
    # idle forwards do as well.
    least = (in_layers * num_forwards + whole - in_layers) // 2
    assert least <= sharding["gather_bytes"] <= whole * (num_forwards + 6) // 2
    assert 0 < sharding["gather_s"] < content["wall_s"]
    assert sharding["reduce_bytes"] == 0
    assert sharding["exposed_s"] == sharding["gather_s"]
    assert set(watched) == {"DefaultAllGather"}, "the watch is over"


def fits(path):
    losses = {}
    for name, more in (("plain", []), ("watched", [CommunicationTime(picture=False)])):
        seen = Losses()
        directory = rank_directory()
        options = {"callbacks": [seen, *more], "default_root_dir": directory}
        fit(path, Fit(strategy={"ep_size": 2}, trainer=options, num_steps=2))
        losses[name] = seen.losses
    content = None
    if dist.get_rank() == 0:
        content = json.loads(Path(directory, "communication_time.json").read_text())
    return losses, content


class Losses(L.Callback):
    def __init__(self):
        self.losses = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append(float(trainer.callback_metrics["train_loss"]))


def test_fits_are_timed_and_stay_as_they_are(family_checkpoint) -> None:
    (losses, content), _ = run_on_ranks(2, fits, family_checkpoint("qwen3_moe"))
    assert torch.equal(torch.tensor(losses["plain"]), torch.tensor(losses["watched"]))
    assert {layer["num_passes"] for layer in content["layers"].values()} == {2}
    assert content["sharding"]["reduce_bytes"] > 0
    assert content["sharding"]["gather_bytes"] > 0

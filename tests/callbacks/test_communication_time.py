"""CommunicationTime in real runs: parts that add up, slots that are late, files and loggers."""

import json
import re
import time

import lightning as L
import pytest
from lightning.pytorch.loggers import CSVLogger
from quiet_trainer import quiet_trainer
from torch.utils.data import DataLoader

from moe_lightning import CommunicationTime, MoELightningModule, PlacementStrategy, Score
from moe_lightning.errors import UsageError
from moe_lightning.modeling.seam import dispatcher_of, find_moe_layers

PROMPTS = [f"{'ab c ' * n}{n}" for n in range(3, 9)]
PARTS = ("dispatch_s", "compute_s", "combine_s", "wait_s")
SLOW_S = 0.03


class Slowed(L.Callback):
    """One slot's experts take longer, and the time of every layer is measured from outside."""

    def __init__(self, slot=None):
        self.slot = slot
        self.measured_s = 0.0

    def on_predict_start(self, trainer, pl_module):
        for layer in find_moe_layers(pl_module.model):
            dispatcher = dispatcher_of(layer)
            if self.slot is not None:
                shard = dispatcher.shards[self.slot]
                object.__setattr__(shard, "compute", self.slow(shard.compute))
            attachment = layer.experts._moe_lightning
            timed = attachment._replace(dispatcher=self.timed(dispatcher))
            object.__setattr__(layer.experts, "_moe_lightning", timed)

    def slow(self, compute):
        def slowly(*args):
            time.sleep(SLOW_S)
            return compute(*args)

        return slowly

    def timed(self, dispatcher):
        def call(*args):
            started_s = time.perf_counter()
            out_TD = dispatcher(*args)
            if dispatcher.log.is_read:  # probes are nobody's rows
                self.measured_s += time.perf_counter() - started_s
            return out_TD

        return call


def predict(checkpoint, tmp_path, *, strategy="auto", slot=None, callback=None, **settings):
    callback = callback or CommunicationTime(picture=False)
    slowed = Slowed(slot)
    module = MoELightningModule(str(checkpoint), task=Score())
    trainer = quiet_trainer(tmp_path, strategy=strategy, callbacks=[callback, slowed], **settings)
    trainer.predict(module, DataLoader(PROMPTS, batch_size=6))
    return json.loads((tmp_path / "communication_time.json").read_text()), slowed


def no_interleaving(num_slots):
    return PlacementStrategy(["cpu"] * num_slots, interleave=False)


@pytest.mark.parametrize("num_slots", [1, 2, 3])
def test_the_parts_add_up_to_the_time_of_the_layers(num_slots, family_checkpoint, tmp_path):
    strategy = "auto" if num_slots == 1 else no_interleaving(num_slots)
    slot = None if num_slots == 1 else num_slots - 1
    content, slowed = predict(
        family_checkpoint("qwen3_moe"), tmp_path, strategy=strategy, slot=slot
    )
    assert content["num_passes"] == 3
    for layer in content["layers"].values():
        assert sum(layer[part] for part in PARTS) == pytest.approx(layer["total_s"], rel=0.05)
    assert content["moe_s"] <= slowed.measured_s
    if num_slots > 1:  # long enough for the clock's own cost not to count
        assert content["moe_s"] == pytest.approx(slowed.measured_s, rel=0.05)
    assert content["moe_s"] < content["wall_s"]


@pytest.mark.parametrize("slot", [1, 2])
def test_a_slow_slot_is_waited_for_and_named(slot, family_checkpoint, tmp_path, capsys):
    content, _ = predict(
        family_checkpoint("qwen3_moe"), tmp_path, strategy=no_interleaving(3), slot=slot
    )
    late = content["waited_for"]
    assert late["slot"] == f"{slot}:cpu"
    assert late["wait_s"] > 3 * 0.5 * SLOW_S, "three layers, less what home did meanwhile"
    assert late["share"] > 0.5
    for layer in content["layers"].values():
        assert layer["wait_s_by_slot"][slot] == max(layer["wait_s_by_slot"])
        assert layer["compute_s_by_slot"][slot] >= SLOW_S
    assert f"most waited for: {slot}:cpu" in capsys.readouterr().err


def test_a_slow_home_waits_for_nobody(family_checkpoint, tmp_path):
    content, _ = predict(
        family_checkpoint("qwen3_moe"), tmp_path, strategy=no_interleaving(3), slot=0
    )
    assert sum(layer["wait_s"] for layer in content["layers"].values()) < 0.2 * content["moe_s"]
    assert sum(layer["overlapped_s"] for layer in content["layers"].values()) > 0


def test_a_wait_in_which_the_other_half_computes_is_not_exposed(family_checkpoint, tmp_path):
    strategy = PlacementStrategy(["cpu"] * 2, interleave=True)
    callback = CommunicationTime(picture=False)

    class SmallBatches(L.Callback):
        def on_predict_start(self, trainer, pl_module):
            pl_module.hosted.interleaver.min_tokens = 1

    module = MoELightningModule(str(family_checkpoint("qwen3_moe")), task=Score())
    slowed = Slowed(1)
    quiet_trainer(
        tmp_path, strategy=strategy, callbacks=[callback, SmallBatches(), slowed]
    ).predict(module, DataLoader(PROMPTS, batch_size=6))
    content = json.loads((tmp_path / "communication_time.json").read_text())
    assert content["num_passes"] == 6, "two halves of three layers"
    for layer in content["layers"].values():
        assert sum(layer[part] for part in PARTS) == pytest.approx(layer["total_s"], rel=0.05)
    # Both halves' waits, each moment once: no more than what passed on the wall.
    assert content["moe_s"] < content["wall_s"]
    events = json.loads((tmp_path / "communication_trace.json").read_text())["traceEvents"]
    tracks = {e["args"]["name"] for e in events if e["name"] == "thread_name"}
    assert tracks == {"0:cpu", "0:cpu, part 2", "1:cpu"}


def test_bytes_of_links_are_those_of_the_rows(family_checkpoint, tmp_path):
    content, _ = predict(family_checkpoint("qwen3_moe"), tmp_path, strategy=no_interleaving(2))
    (_, out), (back, _) = content["bytes"]
    # There: 32 floats, two experts in int64 and two weights; back: 32 floats.
    assert out / (32 * 4 + 2 * 8 + 2 * 4) == back / (32 * 4)
    assert content["link_peak_bytes_per_s"] > 0
    assert 0 < content["link_fraction"][0][1] < 1


def test_a_known_link_is_not_tried(family_checkpoint, tmp_path):
    callback = CommunicationTime(picture=False, link_gb_per_s=2.5, trace_batches=0)
    content, _ = predict(
        family_checkpoint("qwen3_moe"), tmp_path, strategy=no_interleaving(2), callback=callback
    )
    assert content["link_peak_bytes_per_s"] == 2.5e9
    assert not (tmp_path / "communication_trace.json").exists()


def test_only_the_first_batches_are_traced(family_checkpoint, tmp_path):
    callback = CommunicationTime(picture=True, trace_batches=2)
    module = MoELightningModule(str(family_checkpoint("qwen3_moe")), task=Score())
    quiet_trainer(tmp_path, callbacks=[callback]).predict(module, DataLoader(PROMPTS, batch_size=1))
    events = json.loads((tmp_path / "communication_trace.json").read_text())["traceEvents"]
    assert sum(event["ph"] == "X" for event in events) == 2 * 3
    assert (tmp_path / "communication_time.png").exists()


def test_loggers_get_seconds(family_checkpoint, tmp_path):
    callback = CommunicationTime(picture=False, every_n_batches=1)
    predict(
        family_checkpoint("qwen3_moe"),
        tmp_path,
        callback=callback,
        logger=CSVLogger(tmp_path, name="csv"),
    )
    header, *rows = (tmp_path / "csv" / "version_0" / "metrics.csv").read_text().splitlines()
    assert "communication/wait_s" in header
    assert rows


def test_a_run_that_fails_leaves_nothing(family_checkpoint, tmp_path):
    class Failing(L.Callback):
        def on_predict_batch_end(self, *args, **kwargs):
            raise RuntimeError("on purpose")

    module = MoELightningModule(str(family_checkpoint("qwen3_moe")), task=Score())
    trainer = quiet_trainer(tmp_path, callbacks=[CommunicationTime(), Failing()])
    with pytest.raises(RuntimeError, match="on purpose"):
        trainer.predict(module, DataLoader(PROMPTS))
    assert not module.routing_log.is_read
    assert not list(tmp_path.glob("communication*"))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"trace_batches": -1}, "trace_batches=-1"),
        ({"link_gb_per_s": 0.0}, "link_gb_per_s=0.0"),
        ({"every_n_batches": 0}, "every_n_batches=0"),
    ],
)
def test_wrong_options_are_refused(options, words):
    with pytest.raises(UsageError, match=re.escape(words)):
        CommunicationTime(**options)

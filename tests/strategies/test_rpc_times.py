"""CommunicationTime over workers: a late one is named, its link is measured, parts add up."""

import json
import time

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader
from worker_threads import worker_threads

from moe_lightning import CommunicationTime, MoELightningModule, Score
from moe_lightning.strategies import RPCStrategy
from moe_lightning.workers.expert_host import ExpertHost

__all__ = ["worker_threads"]

PROMPTS = [f"{'ab c ' * n}{n}" for n in range(3, 9)]
PARTS = ("dispatch_s", "compute_s", "combine_s", "wait_s")
NUM_LAYERS = 3
SLOW_S = 0.2  # more than other work of the machine takes away


@pytest.fixture
def slow_down(monkeypatch):
    """Make the worker of a slot slow, which is known by its experts: ``slow_down(strategy, 1)``."""

    def slow_down(strategy, slot):
        compute = ExpertHost.compute

        def slowly(host, layer, *tensors):
            one_of_its = torch.tensor([[strategy.placement.experts_of(slot, layer)[0]]])
            if host._held[layer].holds(one_of_its):
                time.sleep(SLOW_S)
            return compute(host, layer, *tensors)

        monkeypatch.setattr(ExpertHost, "compute", slowly)

    return slow_down


@pytest.mark.parametrize("slot", [0, 2])
def test_a_late_worker_is_named(
    slot, family_checkpoint, worker_threads, slow_down, trainer_with, tmp_path
):
    path = family_checkpoint("qwen3_moe")
    strategy = RPCStrategy(worker_threads(path, 3))

    class Slow(L.Callback):
        def on_predict_start(self, *_):
            slow_down(strategy, slot)

    trainer = trainer_with(strategy, callbacks=[CommunicationTime(), Slow()])
    module = MoELightningModule(str(path), task=Score())
    trainer.predict(module, DataLoader(PROMPTS, batch_size=6))
    content = json.loads((tmp_path / "communication_time.json").read_text())

    late, slots = content["waited_for"], content["slots"]
    assert late["slot"] == slots[slot]
    assert late["share"] > 0.5
    assert late["wait_s"] > 0.5 * NUM_LAYERS * SLOW_S
    assert len(content["layers"]) == NUM_LAYERS
    for layer in content["layers"].values():
        assert sum(layer[part] for part in PARTS) == pytest.approx(layer["total_s"], rel=0.05)
        assert layer["compute_s_by_slot"][slot] >= SLOW_S, "as the worker itself says"
        assert layer["compute_s"] < SLOW_S, "what workers do is not the master's time"

    # Rows go from the master to workers and back; workers do not talk to each other.
    matrix, home = content["bytes"], len(slots) - 1
    for a, row in enumerate(matrix):
        for b, num_bytes in enumerate(row):
            assert (num_bytes > 0) == ((a == home) != (b == home)), (a, b)
    for worker in range(3):
        num_rows, rest = divmod(matrix[worker][home], 32 * 4)
        assert rest == 0, "sums of 32 floats"
        # 32 floats and at least one expert and weight a row, and what a message has around them.
        assert matrix[home][worker] > num_rows * (32 * 4 + 4 + 1)
        assert content["link_bytes_per_s"][worker][home] > 0
    assert content["link_fraction"] is None, "workers may be anywhere: no link is tried"

    events = json.loads((tmp_path / "communication_trace.json").read_text())["traceEvents"]
    tracks = {e["tid"]: e["args"]["name"] for e in events if e["name"] == "thread_name"}
    assert set(tracks.values()) == set(slots)
    slow = [e["dur"] for e in events if e["ph"] == "X" and tracks[e["tid"]] == slots[slot]]
    assert min(slow) >= 1e6 * SLOW_S

"""What ``plan`` says of memory and bytes, against what strategies hold and send on the CPU.

Weights stay plain tensors here; that packed ones take what is planned is in
experts/test_packed_memory.
"""

import json
import math
from pathlib import Path

import lightning as L
import pytest
import torch
import torch.distributed as dist
from quiet_trainer import quiet_trainer
from ranks import rank_directory, run_on_ranks
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader
from worker_threads import worker_threads

from moe_lightning import CommunicationTime, Generate, MoELightningModule, RoutingBalance, Score
from moe_lightning.modeling.model_sizes import measure, read_config
from moe_lightning.modeling.seam import dispatcher_of, find_moe_layers
from moe_lightning.modeling.sharding_times import ShardingWatch
from moe_lightning.placement.cluster import Cluster
from moe_lightning.placement.estimates import estimate
from moe_lightning.placement.recording import load_recording
from moe_lightning.placement.workload import Workload
from moe_lightning.strategies import PlacementStrategy, RPCStrategy
from moe_lightning.strategies.sharded_strategy import ShardedStrategy
from moe_lightning.workers.expert_host import ExpertHost

__all__ = ["worker_threads"]

MEMORY, TRAFFIC = 0.10, 0.02  # what issue 8 asks for
# All of one length, so that no position is padding; single letters are tokens.
PROMPTS = [
    "".join(chr(97 + (7 * n + n * n * i + 3 * i) % 26) for i in range(24)) for n in range(32)
]
RANKS = {
    "copies": ("copies", {"fsdp_size": 1, "dp_replicate_size": 2, "dense": "replicated"}),
    "fsdp": ("fsdp", {}),
    "ep": ("ep", {"ep_size": 2, "dense": "replicated"}),
    "sharded ep": ("sharded ep", {"ep_size": 2, "dense": "sharded"}),
    "tp": ("tp", {"tp_size": 2}),
    "pp": ("pp", {"pp_size": 2}),
}
# Dense layers beside MoE layers, shared experts, tied embeddings, unequal numbers of experts.
CHECKPOINTS = {
    "demo": None,
    "qwen3_moe": {"num_experts": 7, "tie": True},
    "deepseek_v3": {"num_layers": 4},
    "qwen2_moe": {},
}


def checkpoint(name, family_checkpoint):
    settings = CHECKPOINTS[name]
    return "demo" if settings is None else str(family_checkpoint(name, **settings))


def planned(path, num_devices, **workload):
    sizes = measure(read_config(path), dtype=torch.float32)
    cluster = Cluster(1, num_devices, 10**12, "cpu")
    return estimate(sizes, cluster, workload=Workload(**workload)), sizes


def storages(tensors):
    """Where memory of tensors begins, and its bytes."""
    local = [t.to_local() if isinstance(t, DTensor) else t for t in tensors]
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in local}


class Held(L.Callback):
    """Bytes of weights that a process holds, at most, in its forwards."""

    def __init__(self):
        self.most = 0

    def on_predict_start(self, trainer, pl_module):
        model = pl_module.model
        self.cut = {n: p for n, p in model.named_parameters() if isinstance(p, DTensor)}
        whole = [p for n, p in model.named_parameters() if n not in self.cut]
        self.at_rest = storages([*self.cut.values(), *whole, *model.buffers()])
        self.look(model)
        for module in model.modules():
            module.register_forward_pre_hook(lambda *_: self.look(model))

    def look(self, model):
        # Experts without a DTensor may be packed meanwhile, which takes as much as they do now.
        now = self.at_rest | storages([p for n, p in model.named_parameters() if n in self.cut])
        self.most = max(self.most, sum(now.values()))


def module_of(path, task=None):
    return MoELightningModule(
        path, task=task or Score(), experts_backend="grouped_mm", dtype="float32"
    )


def on_ranks(path, options, task, batch_size, callbacks):
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
        callbacks=callbacks,
    )
    module = module_of(path, task)
    trainer.predict(module, DataLoader(PROMPTS, batch_size=batch_size), return_predictions=False)
    return Path(directory)


def held_on_rank(path, layouts):
    most = {}
    for name, (_, options) in layouts.items():
        held = Held()
        on_ranks(path, options, Score(), 16, [held])
        most[name] = held.most
    return most


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_memory_of_ranks(name, family_checkpoint) -> None:
    path = checkpoint(name, family_checkpoint)
    rows, _ = planned(path, 2)
    layouts = {key: layout for key, layout in RANKS.items() if rows[layout[0]].fits}
    by_rank = run_on_ranks(2, held_on_rank, path, layouts)
    most = {key: max(of_rank[key] for of_rank in by_rank) for key in layouts}
    plan = {key: rows[row].device_bytes for key, (row, _) in layouts.items()}
    assert plan == pytest.approx(most, rel=MEMORY)
    assert len(layouts) >= 5


def held_by_slots(path, tmp_path):
    """Bytes of home, dense layers included, and of the other slots."""
    slots = {0: 0}

    class Look(L.Callback):
        def on_predict_start(self, trainer, pl_module):
            inside = {}
            for layer in find_moe_layers(pl_module.model):
                for slot, shard in dispatcher_of(layer).shards.items():
                    here = storages(shard.experts.parameters())
                    slots[slot] = slots.get(slot, 0) + sum(here.values())
                    inside |= here
            tensors = [*pl_module.model.parameters(), *pl_module.model.buffers()]
            slots[0] += sum(n for where, n in storages(tensors).items() if where not in inside)

    strategy = PlacementStrategy(["cpu"] * 2)
    trainer = quiet_trainer(tmp_path, strategy=strategy, callbacks=[Look()])
    trainer.predict(module_of(path), DataLoader(PROMPTS, batch_size=16))
    return slots


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_memory_of_slots(name, family_checkpoint, tmp_path) -> None:
    path = checkpoint(name, family_checkpoint)
    rows, _ = planned(path, 2)
    slots = held_by_slots(path, tmp_path)
    assert rows["placement"].device_bytes == pytest.approx(max(slots.values()), rel=MEMORY)
    assert rows["single"].device_bytes == pytest.approx(sum(slots.values()), rel=MEMORY)


@pytest.mark.parametrize("name", ["demo", "qwen3_moe"])
def test_memory_of_workers(name, family_checkpoint, worker_threads, tmp_path, monkeypatch) -> None:
    path = checkpoint(name, family_checkpoint)
    rows, _ = planned(path, 3)
    load, by_host = ExpertHost.load, {}

    def loads(host, *args, **options):
        load(host, *args, **options)
        experts = [s.experts for held in host._held.values() for s in held.shards]
        here = storages([p for module in experts for p in module.parameters()])
        by_host[id(host)] = sum(here.values())

    monkeypatch.setattr(ExpertHost, "load", loads)
    held = Held()
    strategy = RPCStrategy(worker_threads(path, 2))
    trainer = quiet_trainer(tmp_path, strategy=strategy, callbacks=[held])
    trainer.predict(module_of(path), DataLoader(PROMPTS, batch_size=16))
    assert len(by_host) == 2
    most = max(held.most, *by_host.values())
    assert rows["rpc"].device_bytes == pytest.approx(most, rel=MEMORY)


# What travels.


def watched(directory):
    """Bytes for a token and MoE layer, tokens of a pass, and the routing, of a run."""
    content = json.loads((directory / "communication_time.json").read_text())
    recording = load_recording(directory / "routing.npz")
    return sum(map(sum, content["bytes"])), content["num_passes"], recording


def callbacks(directory):
    return [
        CommunicationTime(str(directory), picture=False, link_gb_per_s=1.0),
        RoutingBalance(str(directory), record=True, picture=False),
    ]


def check_rows(name, sizes, sent, num_passes, recording, path, num_devices):
    tokens = sum(map(sum, recording.total().values())) / sizes.top_k / len(recording.loads)
    each = tokens * len(recording.loads) / num_passes
    rows, _ = planned(path, num_devices, decode_tokens=each, prefill_tokens=each, routing=recording)
    travels = sent / tokens / len(sizes.layers)
    assert rows[name].bytes_per_token[0] == pytest.approx(travels, rel=TRAFFIC)
    assert rows[name].bytes_per_token[1] == pytest.approx(travels, rel=TRAFFIC)


TASKS = {"prompts": Score(), "decoding": Generate(max_new_tokens=12)}


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("name", ["demo", "deepseek_v3"])
def test_rows_to_slots_and_workers(name, task, family_checkpoint, worker_threads, tmp_path) -> None:
    path = checkpoint(name, family_checkpoint)
    _, sizes = planned(path, 2)
    strategies = {
        "placement": (PlacementStrategy(["cpu"] * 3, interleave=False), 3),
        "rpc": (RPCStrategy(worker_threads(path, 3), micro_batches=1), 4),
    }
    for key, (strategy, num_devices) in strategies.items():
        directory = tmp_path / key
        trainer = quiet_trainer(directory, strategy=strategy, callbacks=callbacks(directory))
        trainer.predict(module_of(path, TASKS[task]), DataLoader(PROMPTS, batch_size=16))
        check_rows(key, sizes, *watched(directory), path, num_devices)


def rows_of_rank(path):
    found = {}
    for task, what in TASKS.items():
        directory = Path(rank_directory()) / task
        on_ranks(path, {"ep_size": 2}, what, 16, callbacks(directory))
        found[task] = watched(directory) if dist.get_rank() == 0 else None
    return found


@pytest.mark.parametrize("name", ["demo", "qwen3_moe"])
def test_rows_between_ranks(name, family_checkpoint) -> None:
    path = checkpoint(name, family_checkpoint)
    _, sizes = planned(path, 2)
    for found in run_on_ranks(2, rows_of_rank, path)[0].values():
        check_rows("ep", sizes, *found, path, 2)


class OneForward(L.Callback):
    """Bytes that come to this rank in one more forward of 16 rows, with all logits.

    FSDP's are counted as CommunicationTime does. Sums, sends and gathers of logits, which it leaves
    out, are counted by what goes into them, as a ring makes sums.
    """

    TOKENS = 16 * 8

    def __init__(self):
        self.num_bytes = 0

    def on_predict_end(self, trainer, pl_module):
        model, world = pl_module.model, dist.get_world_size()
        watch = ShardingWatch(model)
        watch.begin()
        with (
            pytest.MonkeyPatch.context() as patch,
            torch.profiler.profile(record_shapes=True) as seen,
        ):
            self.count(patch, "all_reduce", lambda t, **_: 2 * t.nbytes * (world - 1) / world)
            self.count(patch, "broadcast", lambda t, src, **_: t.nbytes * (src != dist.get_rank()))
            self.count(
                patch,
                "batch_isend_irecv",
                lambda works: sum(w.tensor.nbytes for w in works if w.op is dist.irecv),
            )
            model(input_ids=torch.arange(self.TOKENS).view(16, 8) % 100, use_cache=False)
        watch.end()
        self.num_bytes += watch.read().gather_bytes
        for event in seen.events():
            shape = event.input_shapes[0] if event.input_shapes else []
            if event.name == "_c10d_functional::all_reduce":
                self.num_bytes += 4 * math.prod(shape) * 2 * (world - 1) / world
            elif event.name == "_c10d_functional::all_gather_into_tensor":
                self.num_bytes += 4 * math.prod(shape) * (world - 1)

    def count(self, patch, name, num_bytes):
        call = getattr(dist, name)

        def counted(*args, **options):
            self.num_bytes += num_bytes(*args, **options)
            return call(*args, **options)

        patch.setattr(dist, name, counted)


def counted_on_rank(path, layouts):
    counted = {}
    for key in layouts:
        forward = OneForward()
        on_ranks(path, RANKS[key][1], Score(), 16, [forward])
        counted[key] = forward.num_bytes
    return counted


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_weights_sums_and_hidden_states(name, family_checkpoint) -> None:
    path = checkpoint(name, family_checkpoint)
    layouts = ["copies", "fsdp", "sharded ep", "tp", "pp"]
    by_rank = run_on_ranks(2, counted_on_rank, path, layouts)
    # Ranks that share each layer see the same tokens; others have tokens of their own.
    num_tokens = {key: OneForward.TOKENS * (1 if key in ("tp", "pp") else 2) for key in layouts}
    rows, sizes = planned(path, 2, decode_tokens=OneForward.TOKENS)
    plan = {key: rows[key].bytes_per_token[0] for key in layouts}
    plan["sharded ep"] -= rows["ep"].bytes_per_token[0]  # rows, which the tests above compare
    counted = {
        key: sum(of_rank[key] for of_rank in by_rank) / num_tokens[key] / len(sizes.layers)
        for key in layouts
    }
    assert plan == pytest.approx(counted, rel=TRAFFIC)

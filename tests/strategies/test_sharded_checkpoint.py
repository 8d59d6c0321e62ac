"""Checkpoints over ranks: any ranks load what any others saved, and killed saves do no harm.

Gradients are made up from the parameters, element by element, so that every layout of ranks takes
bitwise the same steps.
"""

import errno
import os
import pickle
import random
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from ranks import run_on_ranks
from torch import nn
from torch.distributed.tensor import DTensor

from moe_lightning.collectives import RankGroup
from moe_lightning.dispatch import RoutingLog
from moe_lightning.errors import CheckpointError, UsageError
from moe_lightning.finetune.optimizers import parameter_groups
from moe_lightning.modeling.checkpoint import open_checkpoint
from moe_lightning.modeling.sharded_state import Share, local_part, model_tensors, optimizer_state
from moe_lightning.modeling.sharding import RankMeshes, ShardingOptions
from moe_lightning.modeling.training_checkpoint import find_sharded
from moe_lightning.placement import ExpertPlacement, make_placement
from moe_lightning.strategies import checkpoint_directories
from moe_lightning.strategies.checkpoint_directories import remove_checkpoint
from moe_lightning.strategies.hosting import HostingOptions
from moe_lightning.strategies.random_states import random_states, restore_random_states
from moe_lightning.strategies.sharded_checkpoint import load_sharded, save_sharded
from moe_lightning.strategies.sharded_model import ExchangeOptions, ShardLoader
from moe_lightning.strategies.single_file import load_single_file

EP_2 = {"fsdp": 4, "ep": 2}


def share_of(checkpoint, *, fsdp=1, tp=1, ep=1, dp_replicate=1, replicas=0):
    """A rank's share of a model, an optimizer, what its rows are, and the ranks."""
    meshes = None
    ranks = RankGroup()
    if dist.is_initialized():
        meshes = RankMeshes(
            "cpu", pp=1, dp_replicate=dp_replicate, fsdp=fsdp, tp=tp, ep=ep, timeout_s=60
        )
        ranks = RankGroup(dist.group.WORLD)
    loader = ShardLoader(
        meshes,
        sharding=ShardingOptions(),
        exchange=ExchangeOptions(),
        device=torch.device("cpu"),
        host_ranks=ranks,
    )

    def place(num_experts, num_slots) -> ExpertPlacement:
        loads = {layer: list(range(1, n + 1)) for layer, n in num_experts.items()}
        return make_placement(
            "balanced" if replicas else "linear",
            num_experts,
            num_slots,
            loads=loads if replicas else None,
            num_replicas=replicas,
        )

    hosted = loader.load(
        open_checkpoint(checkpoint),
        HostingOptions(torch.float32, "reference", RoutingLog(), is_training=True),
        place=place,
        hosted_by=None,
    )
    optimizer = torch.optim.AdamW(
        parameter_groups(hosted.model.named_parameters(), expert_names=hosted.rows),
        lr=0.01,
        foreach=False,
    )
    return hosted.model, optimizer, hosted.rows, ranks


def train(model, optimizer, num_steps):
    for _ in range(num_steps):
        for parameter in model.parameters():
            parameter.grad = parameter.detach() * 0.5 + 0.1
        optimizer.step()


def everything(model, optimizer, rows):
    """This rank's tensors under the names that they are saved by, and where they begin."""
    found = model_tensors(model).tensors
    share = Share()
    for name, tensor in found.items():
        share.add(name, tensor, rows.get(name))
    for name, states in optimizer_state(optimizer, found).tensors.items():
        for key, value in states.items():
            share.add(name, value, rows.get(name) if value.ndim else None, form=f"{{}}@{key}")
    return share.tensors


def compare(mine, whole):
    """How many of the tensors are not those of one process."""
    differing = []
    for name, tensor in mine.items():
        local, offset = local_part(tensor)
        cut = tuple(slice(o, o + n) for o, n in zip(offset, local.shape, strict=True))
        if not torch.equal(local, whole[name][cut]):
            differing.append(name)
    return differing


def save(checkpoint, path, sizes, steps=2):
    model, optimizer, rows, ranks = share_of(checkpoint, **sizes)
    train(model, optimizer, steps)
    optimizer.param_groups[0]["lr"] = 0.125
    save_sharded(Path(path), model, optimizer=optimizer, rows=rows, rest={"epoch": 3}, ranks=ranks)
    return sum(isinstance(p, DTensor) for p in model.parameters())


def load(checkpoint, path, sizes, whole_file):
    model, optimizer, rows, ranks = share_of(checkpoint, **sizes)
    rest = load_sharded(Path(path), model, optimizer=optimizer, rows=rows, ranks=ranks)
    assert rest == {"epoch": 3}
    assert optimizer.param_groups[0]["lr"] == 0.125
    mine = everything(model, optimizer, rows)
    differing = compare(mine, torch.load(whole_file))
    train(model, optimizer, 1)  # the state is one that the optimizer goes on with
    return differing, sorted(mine)


@pytest.fixture
def whole_file(family_checkpoint, tmp_path):
    """What one process has after two steps."""

    def make(checkpoint):
        model, optimizer, rows, _ = share_of(checkpoint)
        train(model, optimizer, 2)
        tensors = everything(model, optimizer, rows)
        torch.save({name: t.clone() for name, t in tensors.items()}, tmp_path / "whole.pt")
        return tmp_path / "whole.pt"

    return make


def on_ranks(num_ranks, function, *args):
    return run_on_ranks(num_ranks, function, *args) if num_ranks else [function(*args)]


def check_loads(checkpoint, path, whole, layouts):
    for num_ranks, sizes in layouts:
        results = on_ranks(num_ranks, load, checkpoint, path, sizes, whole)
        assert [differing for differing, _ in results] == [[]] * len(results), (num_ranks, sizes)
        names = set().union(*(names for _, names in results))
        assert names == set(torch.load(whole)), (num_ranks, sizes)


def test_any_ranks_load_what_four_saved(family_checkpoint, whole_file, tmp_path):
    """6 experts: uneven over 4."""
    checkpoint = str(family_checkpoint("qwen3_moe", num_experts=6))
    path, whole = str(tmp_path / "x.ckpt"), str(whole_file(checkpoint))
    num_shared = run_on_ranks(4, save, checkpoint, path, EP_2)
    assert min(num_shared) > 0
    check_loads(
        checkpoint,
        path,
        whole,
        [
            (0, {}),
            (2, {"fsdp": 2}),
            (2, {"fsdp": 2, "ep": 2}),
            (4, {"fsdp": 4}),
            (4, {"fsdp": 4, "ep": 4}),
            (4, {"fsdp": 4, "ep": 2, "replicas": 2}),
            (4, {"dp_replicate": 2, "fsdp": 2, "ep": 2}),
            (2, {"fsdp": 1, "tp": 2}),
            (4, {"fsdp": 2, "tp": 2}),
            (4, {"fsdp": 2, "tp": 2, "ep": 2}),
        ],
    )


@pytest.mark.parametrize(
    ("num_ranks", "sizes"),
    [
        (0, {}),
        (2, {"fsdp": 2, "ep": 2, "replicas": 2}),
        (4, {"dp_replicate": 2, "fsdp": 2}),
        (4, {"fsdp": 2, "tp": 2}),
    ],
)
def test_one_process_loads_what_any_ranks_saved(
    family_checkpoint, whole_file, tmp_path, num_ranks, sizes
):
    checkpoint = str(family_checkpoint("mixtral"))
    path, whole = str(tmp_path / "x.ckpt"), str(whole_file(checkpoint))
    on_ranks(num_ranks, save, checkpoint, path, sizes)
    check_loads(checkpoint, path, whole, [(0, {})])


@pytest.mark.parametrize("family", ["gpt_oss", "deepseek_v3"])
def test_other_families(family, family_checkpoint, whole_file, tmp_path):
    """Expert biases; a routing buffer, shared experts and a dense first layer."""
    checkpoint = str(family_checkpoint(family))
    path, whole = str(tmp_path / "x.ckpt"), str(whole_file(checkpoint))
    run_on_ranks(2, save, checkpoint, path, {"fsdp": 2, "ep": 2})
    check_loads(checkpoint, path, whole, [(0, {}), (2, {"fsdp": 2})])


# Killed and refused saves, with a model of one layer.


def small(value):
    model = nn.Linear(3, 2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(value)
    return model


def value_of(path):
    model = small(0.0)
    load_sharded(path, model, rows={})
    values = {float(v) for p in model.parameters() for v in p.detach().flatten()}
    assert len(values) == 1, "a mixture of two saves"
    return values.pop()


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def die_before(monkeypatch, name, number):
    """kill -9 at the so-manieth call of what a save does with the disk."""
    owner, attribute = {
        "rename": (os, "rename"),
        "rmtree": (checkpoint_directories.shutil, "rmtree"),
        "meta": (checkpoint_directories, "atomic_writer"),
        "marker": (checkpoint_directories, "write_atomically"),
        "sync": (os, "fsync"),
    }[name]
    real, calls = getattr(owner, attribute), []

    def counted(*args, **kwargs):
        calls.append(1)
        if len(calls) == number:
            die()
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, attribute, counted)


KILLS = [
    ("sync", 1, 1.0),  # in the middle of the tensors
    ("meta", 1, 1.0),
    ("marker", 1, 1.0),
    ("rename", 1, 1.0),
    ("rename", 2, 2.0),  # the older one has made way, the new one has no name yet
    ("rmtree", 1, 2.0),
]


@pytest.mark.parametrize(("name", "number", "left"), KILLS)
def test_a_killed_save_leaves_a_checkpoint(tmp_path, monkeypatch, name, number, left):
    path = tmp_path / "last.ckpt"
    save_sharded(path, small(1.0), rows={}, rest={})
    with monkeypatch.context() as patched:
        # torch's writer renames .metadata into place, which is not what is meant here.
        patched.setattr("torch.distributed.checkpoint.filesystem.FileSystem.rename", replaced)
        die_before(patched, name, number)
        child = os.fork()
        if child == 0:
            try:
                save_sharded(path, small(2.0), rows={}, rest={})
            finally:
                os._exit(9)
        _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status), "the save came to its end"
    assert value_of(path) == left
    save_sharded(path, small(3.0), rows={}, rest={})
    assert value_of(path) == 3.0
    assert [p.name for p in tmp_path.iterdir()] == ["last.ckpt"]
    remove_checkpoint(path)
    assert list(tmp_path.iterdir()) == []


def replaced(self, path, new_path):
    os.replace(path, new_path)


def test_a_file_of_that_name_is_replaced_and_removed(tmp_path):
    path = tmp_path / "last.ckpt"
    path.write_text("of one device")
    save_sharded(path, small(1.0), rows={}, rest={})
    assert value_of(path) == 1.0
    path = tmp_path / "other.ckpt"
    path.write_text("of one device")
    remove_checkpoint(path)
    remove_checkpoint(path)
    assert not path.exists()


def test_a_full_disk_leaves_the_older_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "last.ckpt"
    save_sharded(path, small(1.0), rows={}, rest={})

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(UsageError, match=r"No space left on device.*Free space"):
            save_sharded(path, small(2.0), rows={}, rest={})
    assert value_of(path) == 1.0


def refused_together(path):
    ranks = RankGroup(dist.group.WORLD)
    try:
        save_sharded(Path(path), small(1.0), rows={}, rest={}, ranks=ranks)
    except UsageError as error:
        refused = str(error)
    try:
        load_sharded(Path(path), small(1.0), rows={}, ranks=ranks)
    except CheckpointError as error:
        return refused, str(error)


def test_all_ranks_raise_what_one_found(tmp_path):
    (tmp_path / "file").write_text("")
    results = run_on_ranks(2, refused_together, str(tmp_path / "file" / "x.ckpt"))
    assert results[0] == results[1]
    assert "cannot be written" in results[0][0]
    assert "there is no training checkpoint" in results[0][1]


def test_another_model_is_refused(tmp_path):
    path = tmp_path / "x.ckpt"
    save_sharded(path, small(1.0), rows={}, rest={})
    with pytest.raises(CheckpointError, match=r"no place for bias, weight"):
        load_sharded(path, nn.Sequential(nn.Linear(3, 2)), rows={})
    with pytest.raises(CheckpointError, match=r"weight is \[2, 3\], and \[5, 3\] in the model"):
        load_sharded(path, nn.Linear(3, 5), rows={})
    model = small(0.0)
    with pytest.raises(CheckpointError, match="without its optimizer"):
        load_sharded(path, model, rows={}, optimizer=torch.optim.SGD(model.parameters()))


def test_a_damaged_directory_is_refused(tmp_path):
    path = tmp_path / "x.ckpt"
    save_sharded(path, small(1.0), rows={}, rest={})
    shard = next(path.glob("*.distcp"))
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1])
    with pytest.raises(CheckpointError, match="missing or truncated"):
        load_sharded(path, small(0.0), rows={})
    shard.write_bytes(whole)
    (path / "complete.json").unlink()
    with pytest.raises(CheckpointError, match="not a complete training checkpoint"):
        find_sharded(path)


class Attack:
    def __reduce__(self):
        return os.system, ("true",)


def test_metadata_runs_nothing(tmp_path):
    path = tmp_path / "x.ckpt"
    save_sharded(path, small(1.0), rows={}, rest={})
    (path / ".metadata").write_bytes(pickle.dumps(Attack()))
    with pytest.raises(CheckpointError, match=r"refers to .*system"):
        load_sharded(path, small(0.0), rows={})


def test_frozen_parameters_may_be_left_out(tmp_path):
    path = tmp_path / "x.ckpt"
    model = nn.Sequential(small(1.0), small(2.0))
    model[0].requires_grad_(False)
    save_sharded(path, model, rows={}, rest={}, only_trainable=True)
    other = nn.Sequential(small(5.0), small(6.0))
    load_sharded(path, other, rows={})
    assert [float(m.bias[0]) for m in other] == [5.0, 2.0]


def test_random_numbers_go_on():
    def numbers():
        return torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random()

    torch.rand(5)
    states = [random_states(), random_states()]
    want = numbers()
    restore_random_states(states, rank=1, num_ranks=2)
    assert numbers() == want
    restore_random_states(states, rank=3, num_ranks=4)
    assert numbers() == want


def load_file(checkpoint, path, sizes, whole_file):
    model, optimizer, rows, _ = share_of(checkpoint, **sizes)
    rest = load_single_file(Path(path), model, optimizer=optimizer, rows=rows)
    assert rest == {"epoch": 3}
    assert optimizer.param_groups[0]["lr"] == 0.125
    return compare(everything(model, optimizer, rows), torch.load(whole_file))


@pytest.mark.parametrize("sizes", [{"fsdp": 2}, {"fsdp": 2, "ep": 2}, {"tp": 2}])
def test_ranks_load_the_file_of_one_device(family_checkpoint, whole_file, tmp_path, sizes):
    checkpoint = str(family_checkpoint("mixtral"))
    model, optimizer, _, _ = share_of(checkpoint)
    train(model, optimizer, 2)
    optimizer.param_groups[0]["lr"] = 0.125
    content = {
        "state_dict": {f"model.{name}": t for name, t in model.state_dict().items()},
        "optimizer_states": [optimizer.state_dict()],
        "epoch": 3,
    }
    torch.save(content, tmp_path / "x.ckpt")
    args = checkpoint, str(tmp_path / "x.ckpt"), sizes, str(whole_file(checkpoint))
    assert run_on_ranks(2, load_file, *args) == [[], []]

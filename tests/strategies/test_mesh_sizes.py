"""How the ranks of a run are divided: what ``auto`` means, and what is refused."""

import pytest

from moe_lightning.errors import UsageError
from moe_lightning.strategies import SHARDED_PRESETS, ShardedStrategy
from moe_lightning.strategies.mesh_sizes import MeshSizes, resolve_sizes

DEFAULTS = {"pp": 1, "dp_replicate": 1, "fsdp": "auto", "tp": 1, "ep": 1}


def sizes(world, **given):
    return resolve_sizes(world, DEFAULTS | given)


@pytest.mark.parametrize(
    ("world", "given", "expected"),
    [
        (1, {}, MeshSizes()),
        (1, {"pp": "auto", "tp": "auto", "ep": "auto"}, MeshSizes()),
        (8, {}, MeshSizes(fsdp=8)),
        (8, {"ep": "auto"}, MeshSizes(fsdp=8, ep=8)),
        (6, {"ep": 3}, MeshSizes(fsdp=6, ep=3)),
        (8, {"tp": "auto"}, MeshSizes(tp=8)),
        (8, {"pp": "auto"}, MeshSizes(pp=8)),
        (8, {"tp": 2}, MeshSizes(fsdp=4, tp=2)),
        (8, {"tp": 2, "ep": "auto"}, MeshSizes(fsdp=4, tp=2, ep=8)),
        (8, {"tp": 2, "ep": 4}, MeshSizes(fsdp=4, tp=2, ep=4)),
        (8, {"pp": "auto", "tp": 2}, MeshSizes(pp=4, tp=2)),
        (8, {"pp": 2, "tp": "auto"}, MeshSizes(pp=2, tp=4)),
        (8, {"dp_replicate": 2}, MeshSizes(dp_replicate=2, fsdp=4)),
        (8, {"dp_replicate": "auto"}, MeshSizes(fsdp=8)),
        (8, {"dp_replicate": 2, "ep": "auto"}, MeshSizes(dp_replicate=2, fsdp=4, ep=4)),
        (8, {"dp_replicate": 8, "fsdp": 1}, MeshSizes(dp_replicate=8)),
    ],
)
def test_open_sizes_are_found(world, given, expected) -> None:
    found = sizes(world, **given)
    assert found == expected
    assert found.world == world
    assert found.pp * found.dp_replicate * found.efsdp * found.ep == world


@pytest.mark.parametrize(
    ("world", "given", "words"),
    [
        (4, {"fsdp": 0}, ["fsdp_size is 0", "1 or more"]),
        (4, {"ep": -1}, ["ep_size is -1"]),
        (4, {"fsdp": 3}, ["fsdp_size 3", "number of ranks, 4", "Start 3 ranks", "auto"]),
        (4, {"tp": 3}, ["tp_size 3", "must divide", "4", "multiple of 3"]),
        (4, {"fsdp": 8}, ["fsdp_size 8", "4"]),
        (4, {"ep": 3}, ["ep_size is 3", "fsdp_size * tp_size = 4 * 1 = 4", "1, 2, 4"]),
        # Two ranks of a tensor-parallel group have the same rows, so they need different experts.
        (8, {"tp": 4, "ep": 2}, ["ep_size is 2", "multiple of tp_size 4", "1, 4, 8"]),
        (8, {"dp_replicate": 2, "ep": 8}, ["ep_size is 8", "= 4", "1, 2, 4"]),
        (4, {"pp": 2}, ["pp_size 2", "tp_size only", "fsdp_size"]),
        (4, {"pp": 2, "tp": 2, "ep": 2}, ["pp_size 2", "ep_size to 1"]),
        (4, {"pp": 2, "dp_replicate": 2}, ["pp_size 2", "dp_replicate_size"]),
    ],
)
def test_what_cannot_be_is_refused_with_the_rule_and_the_fix(world, given, words) -> None:
    with pytest.raises(UsageError) as caught:
        sizes(world, **given)
    assert caught.value.exit_code == 2
    for word in words:
        assert word in str(caught.value)


def test_every_suggestion_is_legal() -> None:
    for world in (1, 2, 3, 4, 6, 8, 12):
        for tp in (n for n in range(1, world + 1) if world % n == 0):
            legal = []
            for ep in range(1, world + 1):
                try:
                    sizes(world, tp=tp, ep=ep)
                    legal.append(ep)
                except UsageError as error:
                    said = str(error).partition("Use one of ")[2].partition(", or auto")[0]
                    suggested = [int(n) for n in said.split(", ")]
            if len(legal) < world:
                assert suggested == legal


def test_counts_of_ranks() -> None:
    mesh = MeshSizes(dp_replicate=2, fsdp=4, tp=2, ep=4)
    assert (mesh.world, mesh.data, mesh.efsdp) == (16, 8, 2)
    assert str(mesh) == "pp 1 x dp_replicate 2 x fsdp 4 x tp 2 x ep 4"


def test_presets_use_every_rank_in_their_way() -> None:
    made = {
        name: resolve_sizes(4, ShardedStrategy(**preset).given_sizes)
        for name, preset in SHARDED_PRESETS.items()
    }
    assert made == {
        "moe_fsdp": MeshSizes(fsdp=4),
        "moe_ep": MeshSizes(fsdp=4, ep=4),
        "moe_tp": MeshSizes(tp=4),
        "moe_pp": MeshSizes(pp=4),
    }

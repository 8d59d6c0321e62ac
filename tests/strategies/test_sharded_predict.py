"""Predict over ranks gives the rows of one process, whatever the rows and the layout."""

import pytest
from predict_runs import check_rows, predict, predict_layouts, together
from ranks import run_on_ranks

# Three MoE layers and 8 experts: a rank that left out one exchange would break the next ones.
TWO_RANKS = {
    "fsdp": {},
    "hsdp of one": {"dp_replicate_size": 2},
    "a copy each": {"dp_replicate_size": 2, "dense": "replicated"},
    "experts shared only": {"dense": "replicated"},
    "ep": {"ep_size": 2},
    "ep, dense shared": {"ep_size": 2, "dense": "sharded"},
    "tp": {"tp_size": 2},
    "pp": {"pp_size": 2},
}
THREE_RANKS = {
    "fsdp": {},
    "ep, uneven": {"ep_size": "auto"},
    "ep, round robin": {"ep_size": 3, "policy": "round_robin"},
    "pp": {"pp_size": "auto"},
}
FOUR_RANKS = {
    "fsdp 2, ep 2": {"fsdp_size": 4, "ep_size": 2},
    "fsdp 2, ep 2, dense shared": {"fsdp_size": 4, "ep_size": 2, "dense": "sharded"},
    "hsdp": {"fsdp_size": 2, "dp_replicate_size": 2},
    "hsdp, ep": {"fsdp_size": 2, "dp_replicate_size": 2, "ep_size": 2},
    "tp, fsdp": {"fsdp_size": 2, "tp_size": 2},
    "tp, ep": {"fsdp_size": 2, "tp_size": 2, "ep_size": 4},
    "tp, ep of 2": {"fsdp_size": 2, "tp_size": 2, "ep_size": 2},
    "tp, pp": {"tp_size": 2, "pp_size": 2},
}


def copies(layout, world):
    """Ranks that compute the same rows."""
    tp, pp = layout.get("tp_size", 1), layout.get("pp_size", 1)
    return tp * (world if pp == "auto" else pp)


@pytest.fixture(scope="session")
def one_process():
    """What one process says: ``one_process(path, count)``."""
    kept = {}

    def one_process(path, count):
        if path not in kept:
            (kept[path],) = predict(path, None, [9])
        return {name: kept[path][name] for name in (f"row-{n}" for n in range(count))}

    return one_process


def check_layouts(world, layouts, path, counts, one_process):
    results = run_on_ranks(world, predict_layouts, path, list(layouts.values()), counts)
    for number, (name, layout) in enumerate(layouts.items()):
        for place, count in enumerate(counts):
            rows = [result[number][place] for result in results]
            got = together(rows, copies=copies(layout, world))
            check_rows(got, one_process(path, count), what=f"{name}, {count} rows")


@pytest.mark.parametrize("name", TWO_RANKS)
def test_two_ranks(name, family_checkpoint, one_process) -> None:
    layouts = {name: TWO_RANKS[name]}
    check_layouts(2, layouts, family_checkpoint("qwen3_moe"), range(6), one_process)


@pytest.mark.parametrize("name", THREE_RANKS)
def test_three_ranks(name, family_checkpoint, one_process) -> None:
    layouts = {name: THREE_RANKS[name]}
    check_layouts(3, layouts, family_checkpoint("qwen3_moe"), range(8), one_process)


@pytest.mark.parametrize("name", FOUR_RANKS)
def test_four_ranks(name, family_checkpoint, one_process) -> None:
    layouts = {name: FOUR_RANKS[name]}
    counts = [0, 1, 3, 4, 5, 9]
    check_layouts(4, layouts, family_checkpoint("qwen3_moe"), counts, one_process)

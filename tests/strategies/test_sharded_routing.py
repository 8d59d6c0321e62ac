"""Routing counted in fits over ranks is that of one process: each row once, whatever the layout."""

from fit_runs import Fit, fit
from ranks import run_on_ranks

from moe_lightning import RoutingBalance

LAYOUTS = {
    "fsdp": {"fsdp_size": 2},
    "ep": {"ep_size": 2},
    "tp": {"tp_size": 2},
}


def loads_of(path, layouts):
    """Rows of each expert by layer, of each layout; the weights stay as they are."""
    loads = {}
    for name, strategy in layouts.items():
        callback = RoutingBalance(picture=False)
        options = {"callbacks": [callback], "default_root_dir": path.parent / name}
        fit(path, Fit(strategy=strategy, trainer=options, num_steps=3, lr=0.0))
        slots = callback.summary.slot_rows
        loads[name] = (
            {each.layer: each.load_E.tolist() for each in callback.summary.layers},
            {layer: int(rows_S.sum()) for layer, rows_S in slots.items()},
        )
    return loads


def test_fits_over_two_ranks(family_checkpoint) -> None:
    path = family_checkpoint("qwen3_moe")
    want, _ = loads_of(path, {"one": None})["one"]
    assert sum(map(sum, want.values())) == 3 * 8 * 12 * 2 * 3, "steps, rows, tokens, K, layers"
    for rank in run_on_ranks(2, loads_of, path, LAYOUTS):
        for name, (loads, slots) in rank.items():
            assert loads == want, name
            if name == "ep":
                assert slots == {layer: sum(rows) for layer, rows in want.items()}

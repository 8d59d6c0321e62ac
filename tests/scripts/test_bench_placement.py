"""The benchmark of placements runs at a tiny size, and its numbers follow from its times."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from moe_lightning.errors import UsageError

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
LAYERS, EXPERTS, TOP_K, HIDDEN = 2, 8, 3, 64
PLACED = ["1 slot", "2 slots", "3 slots"]
BALANCED = ["3 slots, balanced", "3 slots, 2 replicas"]


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, str]:
    path = tmp_path_factory.mktemp("bench") / "report.json"
    options = {
        "slots": "[cpu,cpu,cpu]",
        "tokens": 12,
        "rows": 2,
        "decode_rows": 5,
        "layer_tokens": "[1,7]",
        "replicas": 2,
        "seconds": 0.05,
        "hidden_size": HIDDEN,
        "num_layers": LAYERS,
        "num_experts": EXPERTS,
        "expert_size": 32,
        "top_k": TOP_K,
        "num_heads": 2,
        "vocab_size": 512,
        "json": path,
    }
    done = subprocess.run(
        [
            sys.executable,
            str(ROOT / "scripts" / "bench_placement.py"),
            *(f"--{name}={value}" for name, value in options.items()),
        ],
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(path.read_text()), done.stdout


def test_everybody_takes_part_and_gives_the_same_logits(bench: tuple[dict, str]) -> None:
    taking_part = {p["name"]: [row["name"] for row in p["rows"]] for p in bench[0]["passes"]}
    assert taking_part == {
        "prefill": ["local", *PLACED],
        "decode": ["local", *PLACED],
        "prefill, Zipf routing": ["local", *PLACED, *BALANCED],
    }
    for row in rows_of(bench[0]):
        assert row["difference"] <= 1e-4
        assert row["devices"] == ["cpu"] * int(row["name"].replace("local", "1")[0])


def test_ratios_follow_from_the_least_times(bench: tuple[dict, str]) -> None:
    for each in bench[0]["passes"]:
        rows = {row["name"]: row for row in each["rows"]}
        assert each["tokens"] == (5 if each["name"] == "decode" else 12)
        assert len({row["total"]["runs"] for row in rows.values()}) == 1
        for row in rows.values():
            total, experts = row["total"], row["experts"]
            one, local = rows["1 slot"], rows["local"]
            assert 0 < experts["min_ms"] < total["min_ms"] <= total["median_ms"] <= total["max_ms"]
            assert row["tokens_per_s"] == pytest.approx(each["tokens"] / total["min_ms"] * 1e3)
            assert row["to_one_slot"] == pytest.approx(one["total"]["min_ms"] / total["min_ms"])
            assert row["to_local"] == pytest.approx(local["total"]["min_ms"] / total["min_ms"])
            assert row["experts_to_one_slot"] == pytest.approx(
                one["experts"]["min_ms"] / experts["min_ms"]
            )


def test_the_limit_gains_in_the_experts_and_nowhere_else(bench: tuple[dict, str]) -> None:
    for each in bench[0]["passes"]:
        rows = {row["name"]: row for row in each["rows"]}
        assert [limit["name"] for limit in each["limits"]] == ["2 slots", "3 slots"]
        for limit in each["limits"]:
            alone_ms = sum(times["min_ms"] for times in limit["alone"])
            assert limit["scaling"] == pytest.approx(alone_ms / limit["together"]["min_ms"])
            total_ms, experts_ms = (rows["1 slot"][of]["min_ms"] for of in ("total", "experts"))
            least_ms = total_ms - experts_ms + experts_ms / limit["scaling"]
            expected = pytest.approx(total_ms / least_ms)
            assert rows[limit["name"]]["limit_to_one_slot"] == expected
        assert rows["local"]["limit_to_one_slot"] is None


def test_parts_of_every_slot_and_the_bytes_of_the_rows_that_travelled(
    bench: tuple[dict, str],
) -> None:
    for row in rows_of(bench[0]):
        slots = [parts["slot"] for parts in row["parts"]]
        here = ["cpu"] if row["name"] == "local" else [f"{n}:cpu" for n in range(3)]
        assert slots == here[: len(row["devices"])]
        assert all(parts["ms"]["compute"] > 0 for parts in row["parts"])
        assert row["parts"][0]["num_bytes"] == 0  # home's rows stay
        for parts in row["parts"][1:]:
            # Rows in float32 there and back; experts in int64 and weights in float32 there.
            num_rows, rest = divmod(parts["num_bytes"], 2 * 4 * HIDDEN + 12 * TOP_K)
            assert rest == 0
            assert 0 < num_rows <= 12 * LAYERS


def test_the_acceptance_is_judged_by_the_times(bench: tuple[dict, str]) -> None:
    speedup, prefill, *layer = bench[0]["acceptance"]
    rows = {row["name"]: row for row in bench[0]["passes"][0]["rows"]}
    assert speedup["value"] == rows["2 slots"]["to_one_slot"]
    assert speedup["is_met"] == (speedup["value"] >= 1.7)
    assert speedup["limit"] == rows["2 slots"]["limit_to_one_slot"]
    one_ms, local_ms = (rows[name]["total"]["min_ms"] for name in ("1 slot", "local"))
    assert prefill["value"] == pytest.approx(one_ms / local_ms - 1)
    assert [point["tokens"] for point in bench[0]["layer"]] == [1, 7]
    for verdict, point in zip(layer, bench[0]["layer"], strict=True):
        times = point["times"]
        assert list(times) == ["local", "2 slots", "3 slots", "1 slot", "1 slot, planned"]
        overhead = times["1 slot"]["min_ms"] / times["local"]["min_ms"] - 1
        assert verdict["value"] == point["overhead"]["1 slot"] == pytest.approx(overhead)
    for verdict in (prefill, *layer):
        assert verdict["is_met"] == (verdict["value"] <= 0.03)
    assert bench[1].count("PASS") + bench[1].count("FAIL") == 4


def test_planning_is_timed_for_two_and_four_slots(bench: tuple[dict, str]) -> None:
    plans = [(plan["tokens"], plan["slots"], plan["replicas"]) for plan in bench[0]["planning"]]
    assert plans == [(t, slots, extra) for t in (1, 7) for slots in (2, 4) for extra in (0, 2)]
    local_us = {p["tokens"]: 1e3 * p["times"]["local"]["min_ms"] for p in bench[0]["layer"]}
    for plan in bench[0]["planning"]:
        assert 0 < plan["min_us"] <= plan["median_us"]
        assert plan["of_local"] == pytest.approx(plan["min_us"] / local_us[plan["tokens"]])


def test_the_machine_and_the_versions_are_named(bench: tuple[dict, str]) -> None:
    machine = bench[0]["machine"]
    assert machine["versions"]["torch"] == torch.__version__
    assert machine["cpu"]
    assert (machine["threads"], machine["slots"]) == (1, ["cpu"] * 3)


def test_tokens_that_do_not_fill_rows_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "scripts")
    from bench_placement import main

    with pytest.raises(UsageError, match=r"tokens=10 is no multiple of --rows=4"):
        main(tokens=10)


def test_different_answers_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "scripts")
    from bench_placement_contestants import check_same

    right, wrong = torch.tensor([4.0, -8.0]), torch.tensor([4.0, -7.0])
    assert check_same("pass", {"local": right, "one": right + 0.5}, 0.1)["one"] == 0.0625
    with pytest.raises(UsageError, match=r"pass: two differs from local by 1\.2e-01"):
        check_same("pass", {"local": right, "one": right, "two": wrong}, 0.1)
    with pytest.raises(UsageError, match="one differs from local by nan"):
        check_same("pass", {"local": right, "one": right * torch.nan}, 0.1)


def test_passes_drawn_together_have_the_same_busy_experts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(ROOT / "scripts")
    from bench_experts_layers import Layer
    from bench_placement_contestants import draw_passes

    recorded, measured = draw_passes(
        ["recorded", "measured"],
        Layer("qwen3_moe", hidden_size=8, expert_size=8, num_experts=6, top_k=2),
        [1, 4],
        routing="zipf",
        shape=(20, 50),
        vocab_size=9,
        device=CPU,
        generator=torch.Generator().manual_seed(0),
    )
    assert recorded.num_tokens == measured.num_tokens == 1000
    assert recorded.rows != measured.rows
    order = {}
    for layer in (1, 4):
        pairs = [each.index_TK[layer] for each in (recorded, measured)]
        assert not torch.equal(*pairs)
        # The shares of the ranks of two draws: 1000 rows tell 1/1, 1/2 and 1/3 apart.
        busiest = [p.flatten().bincount().argsort(descending=True)[:3].tolist() for p in pairs]
        assert busiest[0] == busiest[1]
        order[layer] = busiest[0]
    assert order[1] != order[4]


def test_contestants_run_equally_often_in_changing_orders(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(ROOT / "scripts")
    from bench_placement_clock import PartClock, race

    ran: list[str] = []

    def turn(name: str) -> int:
        time.sleep(1e-4)
        ran.append(name)
        return len(ran)

    results = race({name: lambda name=name: turn(name) for name in "abc"}, seconds=0.1, title="")
    rounds = ["".join(ran[start : start + 3]) for start in range(0, len(ran), 3)]
    assert {"".join(sorted(each)) for each in rounds} == {"abc"}
    assert len(set(rounds)) > 1
    assert results["a"] == [1 + place for place, name in enumerate(ran) if name == "a"]

    clock = PartClock(CPU)
    for pause_s in (0.01, 0.5, 0.01):  # in a part, between two, in another
        clock.mark()
        time.sleep(pause_s)
    clock.mark()
    assert 0.02 <= clock.take_s() < 0.5
    assert clock.take_s() == 0


def rows_of(report: dict) -> list[dict]:
    return [row for each in report["passes"] for row in each["rows"]]

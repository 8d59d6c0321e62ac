"""The benchmark of workers runs at a tiny size, and its numbers follow from what was measured."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
WAYS = ["naive", "one call", "one call, overlap", "... and bfloat16", "... and int8"]
LAYERS, HIDDEN = 2, 64  # of --quick


def run(tmp_path, *options):
    path = tmp_path / "report.json"
    files = ["--json", str(path), "--markdown", str(tmp_path / "report.md")]
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "bench_rpc.py"), "--quick", *options, *files],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "report.md").read_text() == done.stdout
    return json.loads(path.read_text()), done.stdout


@pytest.fixture(scope="module")
def passes(tmp_path_factory):
    """Both passes over zmq on loopback."""
    out = tmp_path_factory.mktemp("passes")
    return run(out, "--places", "[loopback]", "--transports", "[zmq]")


@pytest.fixture(scope="module")
def layer(tmp_path_factory):
    """The layer alone, without torch.distributed.rpc."""
    out = tmp_path_factory.mktemp("layer")
    sizes = ["--alone.tokens", "64", "--alone.num_experts", "16", "--alone.width", "512"]
    return run(out, "--layer", "--places", "[loopback]", "--transports", "[zmq]", *sizes)


@pytest.fixture
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")


@pytest.mark.wide
def test_everybody_takes_part_and_gives_the_answers_of_one_device(passes):
    assert [each["name"] for each in passes[0]["passes"]] == ["prefill", "decode"]
    for each in passes[0]["passes"]:
        assert [(way["place"], way["transport"], way["way"]) for way in each["ways"]] == [
            ("loopback", "zmq", way) for way in WAYS
        ]
        for way in each["ways"][:3]:
            assert way["difference"] <= 1e-4


@pytest.mark.wide
def test_rows_travel_once_per_worker_and_fewer_bytes_do_when_compressed(passes):
    for each in passes[0]["passes"]:
        naive, one_call, overlap, bfloat16, int8 = each["ways"]
        # Three copies of a row against at most two; float32.
        assert naive["bytes_back"] == pytest.approx(3 * 4 * HIDDEN)
        assert 4 * HIDDEN <= one_call["bytes_back"] <= 2 * 4 * HIDDEN
        assert overlap["bytes_back"] == one_call["bytes_back"]
        # Compressed rows change what the next layer's router chooses, so not exactly half.
        assert bfloat16["bytes_back"] == pytest.approx(one_call["bytes_back"] / 2, rel=0.05)
        # A row has a scale of 4 bytes.
        int8_share = (HIDDEN + 4) / (4 * HIDDEN)
        assert int8["bytes_back"] == pytest.approx(one_call["bytes_back"] * int8_share, rel=0.05)
        assert all(way["bytes_there"] > way["bytes_back"] for way in each["ways"])


@pytest.mark.wide
def test_ratios_follow_from_medians(passes):
    report = passes[0]
    there, back = (
        report["probes"]["loopback"][f"{direction}_of_both_gbit"] * 1e9 / 8
        for direction in ("there", "back")
    )
    for each in report["passes"]:
        shape = each["shape"]
        through = shape["num_rows"] * (shape["row_tokens"] + max(0, shape["new_tokens"] - 1))
        counted = shape["num_rows"] * (shape["new_tokens"] or shape["row_tokens"])
        for way in each["ways"]:
            median_ms, limits = way["times"]["median_ms"], way["limits"]
            assert way["tokens_per_s"] == pytest.approx(counted / median_ms * 1e3)
            on_wire = max(
                way["bytes_there"] * through * LAYERS / there,
                way["bytes_back"] * through * LAYERS / back,
            )
            assert limits["wire"] == pytest.approx(1e3 * on_wire)
            assert way["rate_share"] == pytest.approx(limits["wire"] / median_ms)
            assert limits["dense"] == each["dense"]["median_ms"]
            parts = way["traced"]["ms"]
            assert {"dispatch", "wait", "combine", "compute"} <= parts.keys()
            assert 0 < limits["experts"] <= each["ways"][1]["traced"]["ms"]["compute"]


@pytest.mark.wide
def test_tables_and_verdicts_are_printed(passes, layer):
    for line in ("### prefill: 8 rows of 40 tokens", "### decode: 4 rows of 8 tokens, 4 new"):
        assert line in passes[1]
    assert "prefill: largest difference from one device, float32 on the wire" in passes[1]
    assert "layer: one message, zmq over raw TCP echo" in layer[1]


def test_one_layer_alone_counts_bytes_of_messages_and_calls(layer):
    (report,) = layer[0]["layer"]
    rows = {row["name"]: row for row in report["rows"]}
    assert list(rows) == ["one message, zmq", "zmq call per expert", "raw TCP echo"]
    one, calls, echo = rows.values()
    assert calls["bytes_back"] == 64 * 8 * 512 * 4  # a copy of each row for each of its experts
    assert one["bytes_back"] <= 2 * 64 * 512 * 4
    assert (echo["bytes_there"], echo["bytes_back"]) == (one["bytes_there"], one["bytes_back"])
    assert len({row["times"]["runs"] for row in rows.values()}) == 1


@pytest.mark.usefixtures("scripts")
def test_the_link_is_left_out_loudly_or_refused_where_there_can_be_none(monkeypatch):
    import bench_rpc

    from moe_lightning.errors import UsageError

    said = []
    monkeypatch.setattr(bench_rpc.Link, "available", staticmethod(lambda: "no root"))
    assert bench_rpc.choose_places(None, said.append) == ["loopback"]
    assert "LEFT OUT" in said[0]
    assert "no root" in said[0]
    assert bench_rpc.choose_places(["loopback"], said.append) == ["loopback"]
    with pytest.raises(UsageError, match="no link can be made: no root"):
        bench_rpc.choose_places(["link"], said.append)
    monkeypatch.setattr(bench_rpc.Link, "available", staticmethod(lambda: None))
    assert bench_rpc.choose_places(None, said.append) == ["loopback", "link"]


@pytest.mark.usefixtures("scripts")
def test_limits_by_hand():
    from bench_rpc_measure import Rate, Traced, difference, make_limits

    spans = [
        (0, "dispatch", 0, 0.001, 1000),
        (0, "dispatch", 1, 0.001, 2000),
        (0, "wait", 0, 0.010, 0),
        (0, "compute", 0, 0.008, 0),
        (0, "compute", 1, 0.005, 0),
        (0, "combine", 0, 0.002, 500),
        (1, "compute", 0, 0.001, 0),
        (1, "compute", 1, 0.003, 0),
    ]
    traced = Traced.of(spans)
    assert traced.ms == pytest.approx({"dispatch": 2, "wait": 10, "compute": 17, "combine": 2})
    assert (traced.bytes_there, traced.bytes_back) == (3000, 500)
    assert traced.slowest_ms == pytest.approx(8 + 3)
    limits = make_limits(traced, traced, dense_ms=7.0, rate=Rate(1e5, 1e4), num_cores=2)
    assert limits.wire == pytest.approx(50)  # 500 bytes back at 10 KB/s, 3000 there at 100 KB/s
    assert limits.bound == limits.wire
    assert limits.cores == pytest.approx((7 + 17) / 2)
    assert difference([1.0, 2.5], [1.0, 2.0]) == 0.5
    assert difference([[1, 2], [3], [4]], [[1, 2], [3], [5]]) == pytest.approx(1 / 3)


@pytest.mark.usefixtures("scripts")
def test_the_naive_way_sums_up_what_the_experts_give():
    from bench_rpc_naive import NaiveDispatcher

    from moe_lightning.dispatch import RoutingLog

    class Workers:
        names, home = ("one", "two", "master"), 2

        def ask(self, slot, layer, rows_RD, index_RK, weights_RK):
            assert index_RK.shape[1] == 1
            expert = int(index_RK[0, 0])
            assert (index_RK == expert).all()
            assert slot == expert // 2
            asked.append(expert)
            return Flight(rows_RD * (expert + 1) * weights_RK)

    class Flight:
        num_bytes_sent, num_bytes_received, compute_s = 10, 20, 0.0

        def __init__(self, sums_RD):
            self.result = lambda: sums_RD

    asked, traces = [], []
    log = RoutingLog()
    log.subscribe(traces.append)
    dispatcher = NaiveDispatcher(Workers(), slot_of=[0, 0, 1, 1], layer=3, log=log)
    hidden_TD = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    index_TK = torch.tensor([[0, 3], [3, 1], [0, 1]])
    weights_TK = torch.tensor([[0.5, 0.25], [1.0, 2.0], [0.125, 1.0]])
    out_TD = dispatcher(hidden_TD, index_TK, weights_TK)
    factors = torch.tensor([0.5 * 1 + 0.25 * 4, 1.0 * 4 + 2.0 * 2, 0.125 * 1 + 1.0 * 2])
    torch.testing.assert_close(out_TD, hidden_TD * factors[:, None])
    assert asked == [0, 1, 3]  # expert 2 has no rows
    (trace,) = traces
    assert sum(span.num_bytes for span in trace.spans if span.part == "dispatch") == 30
    assert sum(span.num_bytes for span in trace.spans if span.part == "combine") == 60

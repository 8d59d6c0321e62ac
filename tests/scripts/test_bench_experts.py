"""The benchmark of experts runs at a tiny size, and its numbers follow from its times."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from moe_lightning.errors import UsageError

ROOT = Path(__file__).resolve().parents[2]
HIDDEN, WIDTH, EXPERTS, TOP_K = 64, 32, 8, 2  # the tiny layers
PEER = """
import sys
sys.path.insert(0, {peers!r})
import numpy as np
from serve import serve

def load(layer):
    print("what libraries print does not disturb the answers")
    up, down = layer.weight("gate_up"), layer.weight("down")

    def prepare(point):
        def compute():
            out_TD = np.zeros_like(point.hidden_TD)
            for t, row in enumerate(point.hidden_TD):
                for expert, weight in zip(point.index_TK[t], point.weights_TK[t]):
                    gate, value = np.split(up[expert] @ row, 2)
                    out_TD[t] += weight * (down[expert] @ (gate / (1 + np.exp(-gate)) * value))
            return out_TD
        return compute

    return prepare, {{"numpy": np.__version__}}

serve(load)
"""


def run_bench(path: Path, **options: object) -> tuple[dict, str]:
    done = subprocess.run(
        [
            sys.executable,
            str(ROOT / "scripts" / "bench_experts.py"),
            f"--json={path}",
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


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, str]:
    path = tmp_path_factory.mktemp("bench") / "report.json"
    return run_bench(
        path,
        models="[tiny,tiny-gpt-oss]",
        tokens="[1,128]",
        seconds=0.05,
        read_mb=4,
        threads=1,
        # An environment without vLLM and ONNX Runtime: ours.
        peer_python=sys.executable,
    )


def rows_of(point: dict) -> dict[str, dict]:
    return {row["name"]: row for row in point["rows"]}


def test_every_model_t_and_routing_is_a_point(bench: tuple[dict, str]) -> None:
    points = [(p["model"], p["routing"], p["tokens"]) for p in bench[0]["points"]]
    assert points == [
        (model, routing, tokens)
        for model in ("tiny", "tiny-gpt-oss")
        for routing in ("uniform", "zipf")
        for tokens in (1, 128)
    ]


def test_one_row_has_k_distinct_experts(bench: tuple[dict, str]) -> None:
    distinct = [p["num_distinct"] for p in bench[0]["points"] if p["tokens"] == 1]
    assert distinct == [TOP_K] * 4


def test_all_implementations_of_transformers_and_of_ours_take_part(bench: tuple[dict, str]) -> None:
    for point in bench[0]["points"]:
        assert {
            *("transformers:eager", "transformers:grouped_mm", "transformers:batched_mm"),
            *("grouped_mm", "cpu_packed", "auto"),
        } <= rows_of(point).keys()


def test_exact_contestants_give_eagers_rows(bench: tuple[dict, str]) -> None:
    for point in bench[0]["points"]:
        for row in point["rows"]:
            if row["name"] not in ("cpu_half", "cpu_int8"):
                assert row["relative_error"] < 1e-5, row  # sums of 64 float32 in another order


def test_inexact_contestants_are_as_exact_as_their_weights(bench: tuple[dict, str]) -> None:
    for point in bench[0]["points"]:
        rows = rows_of(point)
        assert rows.get("cpu_half", {"relative_error": 0})["relative_error"] < 2e-3  # 11 bits
        assert rows.get("cpu_int8", {"relative_error": 0})["relative_error"] < 5e-2  # 8 bits


def test_speedups_rates_and_fractions_follow_from_the_times(bench: tuple[dict, str]) -> None:
    report = bench[0]
    times = {name: iter(layer["times_s"]) for name, layer in report["layers"].items()}
    for point in report["points"]:
        times_s = next(times[point["model"]])
        best = min(min(times_s[n]) for n in times_s if n.startswith("transformers:"))
        rates = report["layers"][point["model"]]["rates"]
        flop = 2 * point["tokens"] * TOP_K * 3 * HIDDEN * WIDTH
        for row in point["rows"]:
            seconds = min(times_s[row["name"]])
            width = {"cpu_half": 2, "cpu_int8": 1}.get(row["name"], 4)
            num_bytes = point["num_distinct"] * 3 * HIDDEN * WIDTH * width
            kind = "int8_flop_per_s" if row["name"] == "cpu_int8" else "float_flop_per_s"
            limit_s = max(num_bytes / rates["read_bytes_per_s"], flop / rates[kind])
            assert row["speedup"] == pytest.approx(best / seconds)
            assert row["gb_per_s"] == pytest.approx(num_bytes / seconds / 1e9)
            assert row["gflop_per_s"] == pytest.approx(flop / seconds / 1e9)
            assert row["fraction_of_limit"] == pytest.approx(limit_s / seconds)


def test_the_acceptance_is_judged_by_the_speedups(bench: tuple[dict, str]) -> None:
    verdicts = bench[0]["acceptance"]
    # Of two models and two routings: packed at T = 128, auto at both T; 512 was not measured.
    assert [v["backend"] for v in verdicts].count("cpu_packed") == 4
    assert [v["backend"] for v in verdicts].count("auto") == 8
    for verdict in verdicts:
        (point,) = (
            p
            for p in bench[0]["points"]
            if all(p[key] == verdict[key] for key in ("model", "tokens", "routing"))
        )
        speedup = rows_of(point)[verdict["backend"]]["speedup"]
        least = {"cpu_packed": 1.6, "cpu_half": 2.0, "cpu_int8": 3.4, "auto": 1 / 1.03}
        assert verdict["is_met"] == (speedup >= least[verdict["backend"]])


def test_peers_that_are_not_installed_are_left_out_with_the_reason(
    bench: tuple[dict, str],
) -> None:
    absent = bench[0]["layers"]["tiny"]["absent"]
    assert absent["vllm"] == "ModuleNotFoundError: No module named 'vllm'"
    assert absent["ort"] == "ModuleNotFoundError: No module named 'onnxruntime'"
    assert f"without ort: {absent['ort']}" in bench[1]


def test_a_peer_of_another_process_computes_the_same_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(ROOT / "scripts")
    import bench_experts_layers as layers
    from bench_experts_contestants import Remote
    from bench_experts_remote import Peer, write_layer, write_point

    layer, cpu = layers.TINY_LAYERS["tiny"], torch.device("cpu")
    experts = layers.make_experts(layer, seed=0, device=cpu, dtype=torch.float32)
    (point,) = layers.make_points(
        *(layer,), tokens=[5], routings=["zipf"], seed=0, device=cpu, dtype=torch.float32
    )
    write_layer(tmp_path, layer, experts, threads=1)
    write_point(tmp_path, point)
    (tmp_path / "peer.py").write_text(PEER.format(peers=str(ROOT / "scripts" / "peers")))
    remote = Remote("vllm", Peer(sys.executable, str(tmp_path / "peer.py"), 1), tmp_path)
    try:
        expected = experts(point.hidden_TD, point.index_TK, point.weights_TK)
        torch.testing.assert_close(remote.output(point), expected)
        assert 0 < remote.turn(point) < 60
        assert remote.versions == {"numpy": np.__version__}
    finally:
        remote.close()


def test_a_peer_that_dies_says_how(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "scripts")
    from bench_experts_remote import Peer, PeerError

    (tmp_path / "peer.py").write_text("import sys; input(); sys.exit('no AVX-512 here')")
    peer = Peer(sys.executable, str(tmp_path / "peer.py"), 1)
    with pytest.raises(PeerError, match="ended with code 1: no AVX-512 here"):
        peer.ask(load=str(tmp_path))
    peer.close()


@pytest.mark.parametrize("option", ["models", "contestants"])
def test_unknown_names_are_refused(option: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "scripts")
    from bench_experts import main

    with pytest.raises(UsageError, match=r"'gpt-5'.*choose from"):
        main(**{option: ["gpt-5"]})


def test_zipf_routing_prefers_few_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "scripts")
    from bench_experts_layers import Layer, draw_experts

    layer = Layer("olmoe", hidden_size=8, expert_size=8, num_experts=4, top_k=1)
    index_TK = draw_experts(layer, 20_000, "zipf", torch.Generator().manual_seed(0))
    share_E = index_TK.flatten().bincount(minlength=4).sort(descending=True).values / 20_000
    # 1/1, 1/2, 1/3, 1/4 over their sum; one standard deviation of a share is at most 0.0035.
    expected = torch.tensor([12.0, 6.0, 4.0, 3.0]) / 25
    torch.testing.assert_close(share_E, expected, atol=0.014, rtol=0)
    index_TK = draw_experts(
        Layer("olmoe", 8, 8, num_experts=6, top_k=4), 500, "uniform", torch.Generator()
    )
    assert all(len(set(row)) == 4 for row in index_TK.tolist())

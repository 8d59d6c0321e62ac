"""What bench_predict.py counts and compares, on models and answers that are checked by hand."""

import math
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from moe_lightning import MoELightningModule

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "scripts")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "scripts")
        from bench_predict_workload import random_model

        return random_model(
            tmp_path_factory.mktemp("cache"),
            hidden_size=64,
            num_layers=2,
            num_experts=8,
            expert_size=32,
            vocab_size=512,
        )


@pytest.mark.parametrize(("backend", "num_bytes"), [("auto", 4), ("cpu_half", 2), ("cpu_int8", 1)])
def test_limits_count_an_experts_weights_in_the_bytes_of_the_backend(
    backend: str, num_bytes: int, checkpoint: Path
) -> None:
    from bench_experts_machine import Rates
    from bench_predict_limits import Forward, Limits

    module = MoELightningModule(str(checkpoint))
    module.configure_model()
    assert module.hosted is not None
    module.hosted.pack()
    limits = Limits(module, backend)
    # q, k, v and o of 8 heads of 8 (4 of them for k and v), norms of heads and of rows, router.
    layer = 64 * 64 + 2 * 64 * 32 + 64 * 64 + 2 * 8 + 2 * 64 + 8 * 64
    dense, head, expert = 2 * layer + 64, 512 * 64, 3 * 64 * 32
    key_and_value = 2 * 4 * 8 * 2  # of a token, in all layers
    assert limits.num_params == dense + 2 * head + 2 * 8 * expert
    step = Forward(
        num_tokens=3, num_head_rows=3, kv_tokens=10, is_prefill=False, hit_experts=[5, 6]
    )
    slow_to_read = Rates(read_bytes_per_s=1.0, float_flop_per_s=math.inf, int8_flop_per_s=math.inf)
    expected = 4 * (dense + head + 10 * key_and_value) + num_bytes * 11 * expert
    assert limits.least_s(step, slow_to_read) == expected
    slow_to_multiply = Rates(read_bytes_per_s=math.inf, float_flop_per_s=1.0, int8_flop_per_s=8.0)
    expert_flop = 2 * 3 * 2 * 4 * expert  # 3 rows, 2 layers, 4 experts of a row
    expected = 2 * 3 * (dense + head) + expert_flop / (8 if num_bytes == 1 else 1)
    assert limits.least_s(step, slow_to_multiply) == expected


def test_differences_of_scores_are_per_row_and_per_token(tmp_path: Path) -> None:
    from bench_predict_sameness import compare_scores
    from bench_predict_workload import Workload

    workload = Workload(tmp_path / "rows", [[1, 2, 3], [4, 5]], [1, 1])
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    theirs.write_text('{"id": 0, "logprob": -4.0}\n{"id": 1, "logprob": -2.0}\n')
    ours.write_text('{"id": 1, "logprob": -2.5}\n{"id": 0, "logprob": -3.75}\n')
    same = compare_scores(workload, theirs, ours, torch.tensor([0.0, 0.25, 0.5]))
    assert same.max_logprob_difference == 0.5
    assert same.plain_perplexity == pytest.approx(math.exp(6 / 3))
    assert same.perplexity == pytest.approx(math.exp(6.25 / 3))
    assert (same.max_token_difference, same.mean_token_difference) == (0.5, 0.25)


def test_equal_tokens_and_rows_are_counted(checkpoint: Path, tmp_path: Path) -> None:
    from bench_predict_contestants import PlainLoop
    from bench_predict_sameness import compare_texts
    from bench_predict_workload import Workload

    workload = Workload(tmp_path / "rows", [[1, 2, 3], [4, 5]], [3, 1])
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    theirs.write_text('{"id": 0, "token_ids": [7, 8, 9]}\n{"id": 1, "token_ids": [6]}\n')
    ours.write_text('{"id": 0, "token_ids": [7, 1, 9]}\n{"id": 1, "token_ids": [6]}\n')
    plain = PlainLoop(checkpoint, tokenizer=None)
    same = compare_texts(plain, workload, theirs, ours, is_exact=False)
    assert (same.same_tokens_share, same.same_rows_share) == (3 / 4, 1 / 2)
    assert (same.num_ties, same.num_unexplained) == (None, None)
    same = compare_texts(plain, workload, theirs, ours, is_exact=True)
    # The two best logits of random weights are far apart.
    assert (same.num_ties, same.num_unexplained) == (0, 1)


def test_the_log_probability_of_a_token_is_that_of_transformers_alone(checkpoint: Path) -> None:
    from bench_predict_contestants import OurLoops, PlainLoop
    from bench_predict_sameness import token_logprobs

    plain = PlainLoop(checkpoint, tokenizer=None)
    runner = OurLoops(str(checkpoint), "auto", 64).module.runner
    assert runner is not None
    rows = [[5, 6, 7, 8], [9, 10]]
    with torch.inference_mode():
        logprobs = [plain.model(torch.tensor([ids])).logits[0].log_softmax(-1) for ids in rows]
    expected_N = torch.stack([logprobs[0][i, 6 + i] for i in range(3)] + [logprobs[1][0, 10]])
    # fp32, other sizes of batches and another implementation of experts
    for logits in (plain.logits, runner.logits):
        torch.testing.assert_close(
            token_logprobs(rows, runner, logits), expected_N, atol=1e-4, rtol=0
        )


def test_a_backend_that_gives_way_is_no_contestant(checkpoint: Path, tmp_path: Path) -> None:
    from bench_predict_contestants import BackendUnusableError, OurLoops

    for file in checkpoint.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    name = next(name for name in weights if ".experts." in name)
    weights[name] *= 1e6  # beyond float16
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(BackendUnusableError, match=r"layer 0: .* float16's range"):
        OurLoops(str(tmp_path), "cpu_half", 64)


def test_an_environment_without_vllm_says_so(checkpoint: Path) -> None:
    from bench_experts_remote import PeerError
    from bench_predict_peers import Vllm

    with pytest.raises(PeerError, match="No module named 'vllm'"):
        Vllm(sys.executable, checkpoint)

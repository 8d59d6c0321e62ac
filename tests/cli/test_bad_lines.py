"""predict of thousands of lines, many of them bad in every way: nothing is lost, or answered twice.

What each line should give is known to scripts/bad_lines.py, which wrote it.
"""

import json
import math
import random
from pathlib import Path

import pytest

from moe_lightning.data.lines import LineSource
from moe_lightning.tasks import Score, score
from moe_lightning.tasks.forward_task import ForwardTask

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
LONG_LINE_BYTES = 8192
SEED = random.SystemRandom().randrange(10**6)


@pytest.fixture(scope="module")
def bad_lines():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(SCRIPTS)
        import bad_lines
    return bad_lines


@pytest.fixture(scope="module")
def checkpoint(bad_lines, tiny, tmp_path_factory):
    """The tiny one, with a tokenizer that knows a word more than the model."""
    return bad_lines.make_bad_checkpoint(tmp_path_factory.mktemp("checkpoints"), tiny)


@pytest.fixture
def faulty(bad_lines, monkeypatch):
    """Lines may be 8 KiB long; some rows make the model raise, for others it gives NaN."""
    limits = LineSource.__init__.__kwdefaults__
    monkeypatch.setitem(limits, "max_line_bytes", LONG_LINE_BYTES)
    run, answer = Score.run, score._answer

    def run_or_raise(self, runner, rows, **options):
        if any(str(row.id).startswith(bad_lines.RAISES) for row in rows):
            raise RuntimeError("no such luck")
        return run(self, runner, rows, **options)

    def answer_or_nan(row, logprob, num_tokens):
        is_nan = str(row.id).startswith(bad_lines.NOT_FINITE)
        return answer(row, math.nan if is_nan else logprob, num_tokens)

    monkeypatch.setattr(Score, "run", run_or_raise)
    monkeypatch.setattr(score, "_answer", answer_or_nan)


@pytest.fixture
def predict_bad(bad_lines, run, checkpoint, faulty):
    """Write a file, predict it, and say what is wrong."""

    def predict_bad(num_lines, share_bad, seed):
        num_bad = round(share_bad * num_lines)
        expected = bad_lines.write_bad_lines(
            Path("in.jsonl"),
            num_lines,
            share_bad,
            seed,
            long_line_bytes=LONG_LINE_BYTES,
            num_long_lines=min(3, num_bad // 5),
            num_compute_faults=min(20, num_bad // 5),
        )
        assert sum(line.stage is not None for line in expected.values()) == num_bad
        options = ("--data.input", "in.jsonl", "--model.task", "Score", "--output_dir", "out")
        finished = run("predict", "--model.checkpoint", checkpoint, *options)
        assert "Traceback" not in finished.err
        return (
            expected,
            bad_lines.check(Path("in.jsonl"), Path("out"), expected, finished.code),
            finished,
        )

    return predict_bad


@pytest.mark.parametrize("share_bad", [0.01, 0.1, 0.5])
def test_every_good_line_is_answered_and_every_bad_one_explained(
    predict_bad, read_rows, bad_lines, checkpoint, share_bad
) -> None:
    print("seed", SEED)
    expected, wrong, finished = predict_bad(2000, share_bad, SEED)
    assert wrong == []
    num_bad = round(share_bad * 2000)
    assert f"{num_bad:,} rows could not be computed" in finished.err
    if share_bad == 0.5:
        kinds = {line.kind for line in expected.values() if line.stage is not None}
        assert kinds == bad_lines.BAD.keys() | bad_lines.COMPUTE.keys()
    # Each answer is that of its own text: as many tokens as the tokenizer makes of it.
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(checkpoint))
    lines = Path("in.jsonl").read_bytes().split(b"\n")
    lines[0] = lines[0].removeprefix(b"\xef\xbb\xbf")
    good = [n for n, line in expected.items() if line.is_row and line.stage is None]
    answers = read_rows("out/predictions.jsonl")
    for number, answer in zip(good, answers, strict=True):
        row = json.loads(lines[number - 1])
        if "prompt" in row:
            token_ids = tokenizer(row["prompt"])["input_ids"]
        else:
            token_ids = tokenizer.apply_chat_template(row["messages"], return_dict=False)
        assert answer["num_tokens"] == len(token_ids), (number, row)


def test_bad_lines_change_no_answer_of_the_others(predict_bad, run, read_rows, checkpoint) -> None:
    expected, wrong, _ = predict_bad(400, 0.5, 7)
    assert wrong == []
    lines = Path("in.jsonl").read_bytes().split(b"\n")
    good = [n for n, line in expected.items() if line.is_row and line.stage is None]
    Path("good.jsonl").write_bytes(b"\n".join(lines[number - 1] for number in good))
    options = ("--data.input", "good.jsonl", "--model.task", "Score", "--output_dir", "good")
    finished = run("predict", "--model.checkpoint", checkpoint, *options)
    assert finished.code == 0, finished.err
    pairs = zip(
        read_rows("out/predictions.jsonl"), read_rows("good/predictions.jsonl"), strict=True
    )
    for one, alone in pairs:
        # Other batches, so other orders of summing up in fp32.
        assert one["logprob"] == pytest.approx(alone["logprob"], rel=1e-5)


def test_the_same_command_changes_nothing_and_retrying_only_what_the_model_refused(
    predict_bad, run, read_rows, checkpoint, monkeypatch
) -> None:
    expected, wrong, _ = predict_bad(400, 0.5, 8)
    assert wrong == []
    names = ("predictions.jsonl", "errors.jsonl", "_SUCCESS", "run.json")
    before = {name: Path("out", name).read_bytes() for name in names}
    command = ("predict", "--model.checkpoint", checkpoint, "--data.input", "in.jsonl")
    command += ("--model.task", "Score", "--output_dir", "out")
    assert run(*command).code == 3
    assert {name: Path("out", name).read_bytes() for name in names} == before
    monkeypatch.setattr(Score, "run", ForwardTask.run)  # it raises no more, but gives NaN
    assert run(*command, "--retry_errors").code == 3
    assert [error["line"] for error in read_rows("out/errors.jsonl")] == [
        number
        for number, line in expected.items()
        if line.stage is not None and line.kind != "the model raises"
    ]


def test_the_check_notices_what_it_is_for(predict_bad, bad_lines) -> None:
    expected, wrong, _ = predict_bad(200, 0.3, 9)
    assert wrong == []
    errors = Path("out/errors.jsonl")
    lines = [json.loads(line) for line in errors.read_bytes().splitlines()]

    def complaints(*changed) -> str:
        errors.write_text("".join(f"{json.dumps(line)}\n" for line in changed))
        return " ".join(bad_lines.check(Path("in.jsonl"), Path("out"), expected, 3))

    assert complaints(*lines) == ""
    assert "59 errors, not 60" in complaints(*lines[1:])
    first, rest = lines[0], lines[1:]
    for name, value in {"offset": first["offset"] + 1, "id": "another", "stage": "later"}.items():
        assert f"{name} {value!r}".replace("'later'", "later") in complaints(
            first | {name: value}, *rest
        )
    assert "does not say" in complaints(first | {"error": "something"}, *rest)
    complaints(*lines)
    answers = Path("out/predictions.jsonl")
    first, second, *others = answers.read_bytes().splitlines(keepends=True)
    answers.write_bytes(b"".join([second, first, *others]))
    assert "other ones from number 0" in complaints(*lines)
    answers.write_bytes(b"".join([first, first, second, *others]))
    assert "other ones from number 1" in complaints(*lines)


@pytest.mark.wide
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("share_bad", [0.01, 0.1, 0.5, 0.9])
def test_more_lines_of_other_seeds(predict_bad, share_bad, seed) -> None:
    _, wrong, _ = predict_bad(10_000, share_bad, seed)
    assert wrong == []

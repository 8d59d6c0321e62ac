"""The decode loop: refill, stop strings, and how few steps it takes."""

import pytest
import torch

from moe_lightning.data.records import RowOptions
from moe_lightning.tasks import Generate, decoding
from moe_lightning.tasks.decoding import Request, decode


@pytest.fixture(scope="module")
def runner(family_checkpoint, loaded_runner):
    return loaded_runner(family_checkpoint("qwen3_moe"))


def widths_of_calls(runner, monkeypatch):
    """The [rows, columns] of every forward."""
    calls = []
    forward = runner.model.forward

    def spy(*args, **kwargs):
        calls.append(tuple(kwargs["input_ids"].shape))
        return forward(*args, **kwargs)

    monkeypatch.setattr(runner.model, "forward", spy)
    return calls


def generate(runner, requests, budget_tokens):
    with torch.inference_mode():
        return decode(
            runner,
            requests,
            budget_tokens=budget_tokens,
            eos_ids=frozenset(),
            progress=lambda *_: None,
        )


def test_finished_rows_are_replaced(runner, random_ids, monkeypatch):
    """12 rows of 2 to 24 tokens in four places: as many steps as a full batch needs, or so."""
    max_new = [2 * n for n in range(1, 13)]
    requests = [Request(tuple(random_ids(8, seed=n)), m) for n, m in enumerate(max_new)]
    calls = widths_of_calls(runner, monkeypatch)
    answers = generate(runner, requests, 4 * (8 + 24))
    assert [len(answer.token_ids) for answer in answers] == max_new
    steps = [rows for rows, columns in calls if columns == 1]
    assert max(steps) == 4
    assert sum(steps) == sum(max_new) - 12  # the prompts give the first tokens
    # Four places, 144 tokens: 36 steps if all are always full. In batches of four as they come, the
    # longest of each would cost 7 + 15 + 23 = 45.
    assert len(steps) <= 40


def test_the_batch_never_holds_more_than_the_budget(runner, random_ids, monkeypatch):
    requests = [
        Request(tuple(random_ids(1 + 11 * n % 30, seed=n)), 1 + 7 * n % 20) for n in range(30)
    ]
    longest = max(len(r.token_ids) + r.max_new_tokens for r in requests)
    for budget_tokens in (longest, 2 * longest + 1, 200):
        calls = widths_of_calls(runner, monkeypatch)
        generate(runner, requests, budget_tokens)
        assert all(rows * columns <= budget_tokens for rows, columns in calls)
        assert max(rows for rows, _ in calls) <= budget_tokens // longest
        monkeypatch.undo()


def test_nothing_to_generate_is_no_forward(runner, monkeypatch):
    calls = widths_of_calls(runner, monkeypatch)
    answers = generate(runner, [Request((5, 6), 0)] * 3, 100)
    assert calls == []
    assert [(a.token_ids, a.finish_reason) for a in answers] == [([], "length")] * 3


def test_one_new_token_takes_no_step(runner, random_ids, monkeypatch):
    calls = widths_of_calls(runner, monkeypatch)
    generate(runner, [Request(tuple(random_ids(6, seed=n)), 1) for n in range(3)], 100)
    assert calls == [(3, 6)]


# Stop strings.

NUM_SAID = 24


@pytest.fixture
def say(runner, monkeypatch):
    """Make the model say a text, whatever the prompt: its tokens in turn."""

    def script(text):
        ids = runner.tokenizer(text).input_ids
        monkeypatch.setattr(
            decoding,
            "choose_tokens",
            lambda logits_NV, _, steps: (
                torch.tensor([ids[step] for step in steps]),
                torch.ones(len(steps), dtype=torch.bool),
            ),
        )
        return ids

    return script


@pytest.fixture
def said(runner, say, run_task, random_ids):
    """A prompt, the whole answer to it, and the pieces of text that its tokens stand for."""
    text = "there is ten hens, and a teen: he eats tees"
    ids = say(text)
    pieces = [runner.tokenizer.decode([token]) for token in ids]
    assert "".join(pieces) == text
    assert max(map(len, pieces)) > 1
    prompt = random_ids(6)
    (answer,) = run_task(Generate(max_new_tokens=NUM_SAID, ignore_eos=True), runner, [prompt])
    assert answer["text"] == "".join(pieces[:NUM_SAID])
    return prompt, answer, pieces


def stopped(runner, run_task, prompt, *stop, **settings):
    task = Generate(max_new_tokens=NUM_SAID, ignore_eos=True, stop=list(stop), **settings)
    (answer,) = run_task(task, runner, [prompt])
    return answer


def test_a_stop_string_cuts_the_text_before_it(runner, run_task, said):
    prompt, whole, pieces = said
    # Two whole tokens, from the 6th on.
    stop = pieces[5] + pieces[6]
    where = whole["text"].find(stop)
    answer = stopped(runner, run_task, prompt, stop)
    assert answer["text"] == whole["text"][:where]
    assert answer["finish_reason"] == "stop"
    assert stop not in answer["text"]
    num_tokens = answer["num_tokens"]
    assert answer["token_ids"] == whole["token_ids"][:num_tokens]
    # Generation ended with the token that completed the string, not later.
    said_by_then = ["".join(pieces[:n]) for n in range(NUM_SAID + 1)]
    assert num_tokens == min(n for n in range(NUM_SAID + 1) if stop in said_by_then[n])


def test_a_stop_string_may_begin_and_end_inside_tokens(runner, run_task, said):
    prompt, whole, pieces = said
    text = whole["text"]
    long_ones = [n for n in range(1, 19) if len(pieces[n]) > 1]
    for n in [*long_ones, 4, 9][:4]:
        start = len("".join(pieces[:n])) + len(pieces[n]) - 1  # the last character of piece n
        stop = text[start : start + 3]
        answer = stopped(runner, run_task, prompt, stop)
        assert answer["text"] == text[: text.find(stop)]
        assert answer["finish_reason"] == "stop"


def test_the_first_of_several_stop_strings_counts(runner, run_task, said):
    prompt, whole, pieces = said
    early, late = pieces[4] + pieces[5], pieces[10] + pieces[11]
    for stops in ((early, late), (late, early)):
        answer = stopped(runner, run_task, prompt, *stops)
        first = min(stops, key=whole["text"].find)
        assert answer["text"] == whole["text"][: whole["text"].find(first)]


def test_of_two_strings_that_one_token_completes_the_earlier_one_cuts(runner, run_task, said):
    prompt, whole, pieces = said
    short, long = pieces[8], pieces[6] + pieces[7] + pieces[8]
    if short in "".join(pieces[:8]):
        short = pieces[7] + pieces[8]
    answer = stopped(runner, run_task, prompt, short, long)
    assert answer["text"] == whole["text"][: whole["text"].find(long)]


def test_a_stop_string_in_the_prompt_does_not_count(runner, run_task, said):
    prompt, whole, _ = said
    stop = runner.tokenizer.decode(prompt[:3])
    assert stop not in whole["text"]
    answer = stopped(runner, run_task, prompt, stop)
    assert answer["token_ids"] == whole["token_ids"]
    assert answer["finish_reason"] == "length"


def test_a_stop_string_at_the_very_start_leaves_no_text(runner, run_task, said):
    prompt, _whole, pieces = said
    answer = stopped(runner, run_task, prompt, pieces[0])
    assert (answer["text"], answer["num_tokens"]) == ("", 1)
    assert answer["finish_reason"] == "stop"


def test_rows_stop_by_their_own_strings(runner, run_task, said):
    prompt, whole, pieces = said
    stop = pieces[5] + pieces[6]
    task = Generate(max_new_tokens=NUM_SAID, ignore_eos=True, stop=[stop])
    options = [RowOptions(), RowOptions(stop=("never said",)), RowOptions(stop=(pieces[0],))]
    answers = run_task(task, runner, [prompt] * 3, options=options)
    assert [answer["text"] for answer in answers] == [
        whole["text"][: whole["text"].find(stop)],
        whole["text"],
        "",
    ]
    assert [answer["finish_reason"] for answer in answers] == ["stop", "length", "stop"]


def test_stop_strings_of_characters_that_take_several_tokens(runner, say, random_ids):
    text = "Wörter: 日本語 und 🙂🙃 Ende"
    ids = say(text)
    assert len(ids) > len(text)
    for stop in ("本語", "🙃", "ö", "🙂🙃 E", ": 日"):
        request = Request(tuple(random_ids(4)), len(ids), stop=(stop,))
        (answer,) = generate(runner, [request], 4096)
        assert (answer.finish_reason, answer.stop_string) == ("stop", stop)
        said = runner.tokenizer.decode(answer.token_ids)
        assert said == text[: text.find(stop) + len(stop)]

"""Generate answers what transformers' own ``generate`` answers, whatever the batch."""

import numpy as np
import pytest
import torch

from moe_lightning import MoELightningModule
from moe_lightning.data.records import Row, RowError, RowOptions
from moe_lightning.errors import UsageError
from moe_lightning.tasks import Generate

LENGTHS = (12, 40, 3, 1, 25, 7, 30)
MAX_NEW = (10, 4, 20, 15, 1, 9, 30)
OPTIONS = [RowOptions(max_new_tokens=n) for n in MAX_NEW]


def tokens(answers):
    return [answer["token_ids"] for answer in answers]


def test_greedy_text_equals_transformers_whatever_the_budget(
    family, family_checkpoint, plain_transformers, loaded_runner, run_task, random_ids
):
    path = family_checkpoint(family)
    plain, runner = plain_transformers(path), loaded_runner(path)
    prompts = [random_ids(n) for n in LENGTHS]
    want = [plain.greedy(prompt, n) for prompt, n in zip(prompts, MAX_NEW, strict=True)]
    # All at once; three places; two; one row at a time, as the longest alone is beyond the budget.
    for budget_tokens in (4096, 180, 120, 1):
        answers = run_task(
            Generate(), runner, prompts, options=OPTIONS, budget_tokens=budget_tokens
        )
        assert tokens(answers) == want
    for n, answer in enumerate(answers):
        is_at_eos = want[n][-1] == runner.tokenizer.eos_token_id
        assert answer == {
            "id": f"row-{n}",
            "text": runner.tokenizer.decode(want[n], skip_special_tokens=True),
            "token_ids": want[n],
            "finish_reason": "stop" if is_at_eos else "length",
            "num_prompt_tokens": LENGTHS[n],
            "num_tokens": len(want[n]),
        }


def test_greedy_text_is_the_same_with_the_reference_backend(
    family, family_checkpoint, plain_transformers, loaded_runner, run_task, random_ids
):
    path = family_checkpoint(family)
    prompts = [random_ids(n) for n in LENGTHS[:4]]
    runner = loaded_runner(path, "reference")
    answers = run_task(Generate(), runner, prompts, options=OPTIONS[:4], budget_tokens=120)
    plain = plain_transformers(path)
    assert tokens(answers) == [
        plain.greedy(p, n) for p, n in zip(prompts, MAX_NEW[:4], strict=True)
    ]


@pytest.mark.parametrize("budget_tokens", [4096, 130])
def test_end_of_sequence_in_the_middle(
    family,
    budget_tokens,
    family_checkpoint,
    plain_transformers,
    loaded_runner,
    run_task,
    random_ids,
    monkeypatch,
):
    path = family_checkpoint(family)
    plain, runner = plain_transformers(path), loaded_runner(path)
    prompts = [random_ids(n) for n in LENGTHS]
    # Random models hardly ever say <eos>: take two tokens that they do say.
    eos = [plain.greedy(prompts[0], 10)[4], plain.greedy(prompts[2], 10)[7]]
    monkeypatch.setattr(runner.model.generation_config, "eos_token_id", eos)
    want = [
        plain.greedy(prompt, n, eos_token_id=eos)
        for prompt, n in zip(prompts, MAX_NEW, strict=True)
    ]
    assert len(want[0]) <= 5
    assert want[0][-1] in eos
    answers = run_task(Generate(), runner, prompts, options=OPTIONS, budget_tokens=budget_tokens)
    assert tokens(answers) == want
    assert [a["finish_reason"] for a in answers] == [
        "stop" if w[-1] in eos else "length" for w in want
    ]
    ignoring = run_task(Generate(ignore_eos=True), runner, prompts, options=OPTIONS)
    assert [a["num_tokens"] for a in ignoring] == list(MAX_NEW)


def test_prompts_that_fill_the_positions(
    family, family_checkpoint, plain_transformers, loaded_runner, run_task, random_ids
):
    """The model has 64 positions: no room for an answer, room for one token, room for four."""
    path = family_checkpoint(family)
    plain, runner = plain_transformers(path), loaded_runner(path)
    prompts = [random_ids(64), random_ids(63), random_ids(60), random_ids(64, seed=1)]
    answers = run_task(Generate(max_new_tokens=10), runner, prompts)
    assert [a["num_tokens"] for a in answers] == [0, 1, 4, 0]
    assert answers[0] == {
        "id": "row-0",
        "text": "",
        "token_ids": [],
        "finish_reason": "length",
        "num_prompt_tokens": 64,
        "num_tokens": 0,
    }
    assert tokens(answers)[1:3] == [plain.greedy(prompts[1], 1), plain.greedy(prompts[2], 4)]
    assert tokens(run_task(Generate(), runner, [prompts[0]])) == [[]]


@pytest.mark.parametrize("budget_tokens", [4096, 130])
def test_repetition_penalty_is_that_of_transformers(
    budget_tokens, family_checkpoint, plain_transformers, loaded_runner, run_task, random_ids
):
    path = family_checkpoint("qwen3_moe")
    plain, runner = plain_transformers(path), loaded_runner(path)
    prompts = [random_ids(n) for n in LENGTHS]
    want = [
        plain.greedy(prompt, n, repetition_penalty=3.0)
        for prompt, n in zip(prompts, MAX_NEW, strict=True)
    ]
    assert want != [plain.greedy(p, n) for p, n in zip(prompts, MAX_NEW, strict=True)]
    task = Generate(repetition_penalty=3.0)
    answers = run_task(task, runner, prompts, options=OPTIONS, budget_tokens=budget_tokens)
    assert tokens(answers) == want


def test_no_rows(family_checkpoint, loaded_runner, run_task):
    assert run_task(Generate(), loaded_runner(family_checkpoint("qwen3_moe")), []) == []


def test_own_options_come_before_the_tasks(family_checkpoint, loaded_runner, run_task, random_ids):
    runner = loaded_runner(family_checkpoint("qwen3_moe"))
    prompt = random_ids(6)
    task = Generate(max_new_tokens=5, temperature=2.0, seed=3)
    own = RowOptions(max_new_tokens=3, temperature=0.0)
    default, greedy, same_seed, other_seed = run_task(
        task,
        runner,
        [prompt] * 4,
        options=[RowOptions(), own, RowOptions(seed=11), RowOptions(seed=12)],
    )
    assert default["num_tokens"] == 5
    assert greedy["token_ids"] == tokens(run_task(Generate(max_new_tokens=3), runner, [prompt]))[0]
    assert len({tuple(a["token_ids"]) for a in (default, same_seed, other_seed)}) == 3


def test_progress_adds_up(family_checkpoint, loaded_runner, random_ids):
    runner = loaded_runner(family_checkpoint("qwen3_moe"))
    rows = [
        Row(n, n, n, random_ids(length), option)
        for n, (length, option) in enumerate(zip(LENGTHS, OPTIONS, strict=True))
    ]
    steps = []
    answers = Generate(ignore_eos=True).run(
        runner, rows, budget_tokens=150, progress=lambda *counts: steps.append(counts)
    )
    num_rows, prompt_tokens, new_tokens, padding = map(sum, zip(*steps, strict=True))
    assert (num_rows, prompt_tokens, new_tokens) == (7, sum(LENGTHS), sum(MAX_NEW))
    assert padding >= 0
    assert [a["num_tokens"] for a in answers] == list(MAX_NEW)


def test_planned_tokens_are_prompt_and_answer():
    planned = Generate().planned_tokens(np.array([3, 10]), np.array([5, 1]))
    assert planned.tolist() == [8, 11]
    assert Generate(rows_factor=3).rows_factor == 3


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("max_new_tokens", 0),
        ("temperature", -0.1),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("rows_factor", 0),
        ("stop", ["a", ""]),
    ],
)
def test_options_out_of_range_are_named(option, value):
    with pytest.raises(UsageError, match=rf"model\.task\.{option}="):
        Generate(**{option: value})


def test_not_finite_rows_are_errors(family_checkpoint, run_task, random_ids):
    module = MoELightningModule(str(family_checkpoint("qwen3_moe")))
    module.configure_model()
    with torch.no_grad():
        module.model.get_input_embeddings().weight[5] = float("nan")
    good = random_ids(6)
    good = [t if t != 5 else 6 for t in good]
    before = run_task(Generate(), module.runner, [good])
    assert isinstance(before[0], dict)
    error, same = run_task(Generate(), module.runner, [[5, 6, 7], good])
    assert isinstance(error, RowError)
    assert (error.row, error.line, error.id, error.stage) == (0, 1, "row-0", "compute")
    assert "NaN" in error.error
    assert same["token_ids"] == before[0]["token_ids"]

"""The repetition penalty is transformers' own, from an option or from the checkpoint."""

import copy

import pytest

from moe_lightning.tasks import Generate


@pytest.fixture
def qwen(family_checkpoint, plain_transformers, loaded_runner):
    path = family_checkpoint("qwen3_moe")
    return plain_transformers(path), loaded_runner(path)


@pytest.fixture
def settings(qwen):
    """The runner's generation settings, given back as they were."""
    runner = qwen[1]
    before = copy.deepcopy(runner.model.generation_config)
    yield runner.model.generation_config
    runner.model.generation_config = before


def test_option_equals_transformers_beside_rows_of_other_lengths(qwen, run_task, random_ids):
    plain, runner = qwen
    prompts = [random_ids(n) for n in (5, 19, 1)]
    answers = run_task(Generate(max_new_tokens=20, repetition_penalty=1.4), runner, prompts)
    without = [plain.greedy(prompt, 20) for prompt in prompts]
    want = [plain.greedy(prompt, 20, repetition_penalty=1.4) for prompt in prompts]
    assert want != without
    assert [answer["token_ids"] for answer in answers] == want


def test_checkpoints_own_penalty_is_the_default(qwen, settings, run_task, random_ids):
    plain, runner = qwen
    settings.repetition_penalty = 1.4
    prompt = random_ids(9)
    (answer,) = run_task(Generate(max_new_tokens=20), runner, [prompt])
    assert answer["token_ids"] == plain.greedy(prompt, 20, repetition_penalty=1.4)
    (answer,) = run_task(Generate(max_new_tokens=20, repetition_penalty=1.0), runner, [prompt])
    assert answer["token_ids"] == plain.greedy(prompt, 20)


def test_settings_that_are_not_applied_are_named(qwen, settings, run_task, random_ids):
    settings.no_repeat_ngram_size = 2
    with pytest.warns(UserWarning, match="no_repeat_ngram_size, which Generate does not apply"):
        run_task(Generate(max_new_tokens=2), qwen[1], [random_ids(3)])

"""Sampling draws what the softmax says, by a seed per row, whatever the batch."""

import math

import pytest
import torch

from moe_lightning.data.records import Row, RowOptions
from moe_lightning.tasks import Generate
from moe_lightning.tasks.sampling import Sampling, choose_tokens, row_seed, uniform

# Probabilities 0.4, 0.3, 0.2, 0.1 of tokens 2, 0, 3, 1.
LOGITS_V = torch.tensor([0.3, 0.1, 0.4, 0.2]).log()


def draw(num_draws, logits_V=LOGITS_V, **options):
    """Counts of each token over many draws, each with a seed of its own."""
    sampling = [Sampling(seed=seed, **options) for seed in range(num_draws)]
    tokens_N, _ = choose_tokens(logits_V.expand(num_draws, -1), sampling, [0] * num_draws)
    return tokens_N.bincount(minlength=logits_V.numel()).tolist()


def assert_frequencies(counts, probabilities):
    """Each count within five standard deviations of the binomial."""
    total = sum(counts)
    for count, p in zip(counts, probabilities, strict=True):
        assert abs(count - total * p) <= 5 * math.sqrt(total * p * (1 - p))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies_match_the_softmax(temperature):
    want = (LOGITS_V.double() / temperature).softmax(0).tolist()
    assert_frequencies(draw(20_000, temperature=temperature), want)


def test_steps_of_one_seed_are_as_random_as_seeds():
    num = 20_000
    tokens_N, _ = choose_tokens(
        LOGITS_V.expand(num, -1), [Sampling(temperature=1.0, seed=5)] * num, list(range(num))
    )
    assert_frequencies(tokens_N.bincount(minlength=4).tolist(), [0.3, 0.1, 0.4, 0.2])
    # And neighbours do not follow each other: 0.4 * 0.4 of the pairs are (2, 2).
    is_pair = (tokens_N[1:] == 2) & (tokens_N[:-1] == 2)
    # Overlapping pairs vary more than independent ones; their variance is below 3 p (1 - p) n.
    assert abs(int(is_pair.sum()) - 0.16 * num) <= 5 * math.sqrt(3 * 0.16 * 0.84 * num)


@pytest.mark.parametrize(
    ("top_p", "want"),
    [
        # Before each token, sorted: 0, 0.4, 0.7, 0.9; a token stays if that is less than top_p.
        (0.1, [0.0, 0.0, 1.0, 0.0]),
        (0.35, [0.0, 0.0, 1.0, 0.0]),
        (0.45, [3 / 7, 0.0, 4 / 7, 0.0]),
        (0.65, [3 / 7, 0.0, 4 / 7, 0.0]),
        (0.75, [3 / 9, 0.0, 4 / 9, 2 / 9]),
        (0.95, [0.3, 0.1, 0.4, 0.2]),
        (1.0, [0.3, 0.1, 0.4, 0.2]),
    ],
)
def test_top_p_by_hand(top_p, want):
    assert_frequencies(draw(5_000, temperature=1.0, top_p=top_p), want)


@pytest.mark.parametrize(
    ("top_k", "want"),
    [
        (1, [0.0, 0.0, 1.0, 0.0]),
        (2, [3 / 7, 0.0, 4 / 7, 0.0]),
        (3, [3 / 9, 0.0, 4 / 9, 2 / 9]),
        (4, [0.3, 0.1, 0.4, 0.2]),
        (100, [0.3, 0.1, 0.4, 0.2]),
    ],
)
def test_top_k_by_hand(top_k, want):
    assert_frequencies(draw(5_000, temperature=1.0, top_k=top_k), want)


def test_top_p_at_a_boundary_keeps_no_more_than_it_needs():
    # Halves are exact in floating point: the first two have 0.75 together, which is enough.
    logits_V = torch.tensor([0.5, 0.25, 0.125, 0.125]).log()
    assert draw(2_000, logits_V, temperature=1.0, top_p=0.75)[2:] == [0, 0]


def test_top_p_is_a_share_of_what_top_k_leaves():
    # Of 4/7 and 3/7, the first alone has more than 0.5.
    counts = draw(2_000, temperature=1.0, top_k=2, top_p=0.5)
    assert counts == [0, 0, 2_000, 0]


def test_a_temperature_near_zero_is_greedy():
    logits_NV = torch.randn(200, 50, generator=torch.Generator().manual_seed(0))
    for sampling in (Sampling(), Sampling(temperature=1e-4), Sampling(temperature=1.0, top_k=1)):
        tokens_N, is_finite_N = choose_tokens(logits_NV, [sampling] * 200, [0] * 200)
        assert torch.equal(tokens_N, logits_NV.argmax(1))
        assert is_finite_N.all()


def test_rows_sample_each_in_their_own_way():
    ways = [
        Sampling(),
        Sampling(temperature=1.0, seed=1),
        Sampling(temperature=0.7, top_k=3, seed=2),
        Sampling(),
        Sampling(temperature=1.5, top_p=0.8, seed=2**64 - 1),
        Sampling(temperature=1.5, seed=-3),
    ]
    logits_NV = torch.randn(6, 30, generator=torch.Generator().manual_seed(1))
    steps = [0, 5, 2, 9, 0, 1]
    together, _ = choose_tokens(logits_NV, ways, steps)
    alone = [int(choose_tokens(logits_NV[n : n + 1], [ways[n]], [steps[n]])[0]) for n in range(6)]
    assert together.tolist() == alone
    order = [4, 2, 0, 5, 1, 3]
    shuffled, _ = choose_tokens(
        logits_NV[order], [ways[n] for n in order], [steps[n] for n in order]
    )
    assert shuffled.tolist() == [alone[n] for n in order]


def test_bad_logits_are_told_apart_from_good_ones():
    nan, inf = float("nan"), float("inf")
    logits_NV = torch.tensor([[0.0, 1.0, 2.0], [0.0, nan, 1.0], [0.0, inf, 1.0], [-inf, 1.0, 0.0]])
    for temperature in (0.0, 1.0):
        ways = [Sampling(temperature=temperature, seed=n) for n in range(4)]
        tokens_N, is_finite_N = choose_tokens(logits_NV, ways, [0] * 4)
        # A token that cannot be (-inf) is no fault.
        assert is_finite_N.tolist() == [True, False, False, True]
        assert tokens_N[3] != 0
        assert ((tokens_N >= 0) & (tokens_N < 3)).all()


def test_uniform_numbers_are_uniform_and_repeatable():
    numbers = [uniform(seed, step) for seed in range(100) for step in range(20)]
    assert len(set(numbers)) == 2000
    assert all(0 <= number < 1 for number in numbers)
    # The mean of 2000 uniform numbers has a standard deviation of 1 / sqrt(12 * 2000).
    assert abs(sum(numbers) / 2000 - 0.5) < 5 / math.sqrt(12 * 2000)
    assert numbers[21] == uniform(1, 1)


def test_row_seeds_tell_ids_and_runs_apart():
    seeds = {row_seed(run, row) for run in (0, 1) for row in (1, "1", "row-1", 11, "11")}
    assert len(seeds) == 10
    assert row_seed(0, "a") == row_seed(0, "a")
    assert all(0 <= seed < 2**64 for seed in seeds)


def test_texts_depend_on_their_seeds_and_not_on_the_batch(
    family_checkpoint, loaded_runner, run_task, random_ids
):
    runner = loaded_runner(family_checkpoint("qwen3_moe"))
    task = Generate(temperature=1.0, ignore_eos=True, seed=4)
    prompts = [random_ids(1 + 7 * n % 20, seed=n) for n in range(14)]
    options = [
        RowOptions(max_new_tokens=3 + 5 * n % 11, seed=n if n % 2 else None) for n in range(14)
    ]

    def tokens(**settings):
        answers = run_task(task, runner, prompts, options=options, **settings)
        return [answer["token_ids"] for answer in answers]

    all_at_once = tokens()
    assert tokens(budget_tokens=100) == all_at_once  # three places, with refill
    assert tokens(budget_tokens=1) == all_at_once  # one
    # Batches of one and three: the ids of rows must stay, so rows are given as such.
    rows = [
        Row(n, n, f"row-{n}", prompt, option)
        for n, (prompt, option) in enumerate(zip(prompts, options, strict=True))
    ]
    for size in (1, 3):
        parts = [rows[i : i + size] for i in range(0, 14, size)]
        with torch.inference_mode():
            answers = [
                answer
                for part in reversed(parts)
                for answer in task.run(
                    runner, part[::-1], budget_tokens=4096, progress=lambda *_: None
                )
            ]
        assert [answer["token_ids"] for answer in answers[::-1]] == all_at_once


def test_other_seeds_give_other_texts(family_checkpoint, loaded_runner, run_task, random_ids):
    runner = loaded_runner(family_checkpoint("qwen3_moe"))
    prompts = [random_ids(5)] * 4

    def texts(seed):
        answers = run_task(Generate(temperature=1.0, max_new_tokens=12, seed=seed), runner, prompts)
        return [tuple(answer["token_ids"]) for answer in answers]

    assert len({*texts(0), *texts(1)}) == 8
    assert texts(0) == texts(0)
    same_seed = run_task(
        Generate(temperature=1.0, max_new_tokens=12),
        runner,
        prompts,
        options=[RowOptions(seed=9)] * 4,
    )
    assert len({tuple(answer["token_ids"]) for answer in same_seed}) == 1


def test_sampling_that_leaves_one_token_is_greedy(
    family_checkpoint, loaded_runner, run_task, random_ids
):
    runner = loaded_runner(family_checkpoint("mixtral"))
    prompts = [random_ids(n) for n in (4, 9)]
    greedy, *others = (
        [answer["token_ids"] for answer in run_task(task, runner, prompts)]
        for task in (
            Generate(max_new_tokens=12),
            Generate(max_new_tokens=12, temperature=1e-5),
            Generate(max_new_tokens=12, temperature=1.0, top_k=1),
            Generate(max_new_tokens=12, temperature=1.0, top_p=1e-6),
        )
    )
    assert others == [greedy] * 3

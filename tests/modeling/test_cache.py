"""The KV cache of the decode loop: windows, refill, and caches that cannot be refilled."""

import pytest
import torch
from transformers import AutoConfig, LlamaConfig

from moe_lightning.data.records import RowOptions
from moe_lightning.modeling.cache import ColumnCache
from moe_lightning.tasks import Generate

# Families with recurrent layers, or caches of their own, beside attention.
HYBRIDS = {
    "qwen3_next": {
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
    },
    "granitemoehybrid": {
        "layer_types": ["mamba", "attention", "mamba", "attention"],
        "mamba_n_heads": 8,
        "mamba_d_head": 8,
        "mamba_d_state": 16,
        "mamba_chunk_size": 16,
        "shared_intermediate_size": 24,
    },
    "jamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "mamba_d_state": 8,
        "mamba_dt_rank": 4,
    },
    "minimax": {},
}


@pytest.fixture(params=HYBRIDS)
def hybrid_checkpoint(request, family_checkpoint):
    return family_checkpoint(request.param, num_layers=4, overrides=HYBRIDS[request.param])


def greedy_equals(plain, runner, run_task, prompts, max_new, budget_tokens):
    answers = run_task(
        Generate(),
        runner,
        prompts,
        options=[RowOptions(max_new_tokens=n) for n in max_new],
        budget_tokens=budget_tokens,
    )
    want = [plain.greedy(prompt, n) for prompt, n in zip(prompts, max_new, strict=True)]
    return [answer.get("token_ids", answer) for answer in answers] == want


def test_supports_exactly_the_families_with_plain_caches(
    family, family_checkpoint, hybrid_checkpoint
):
    assert ColumnCache.supports(AutoConfig.from_pretrained(family_checkpoint(family)))
    assert not ColumnCache.supports(AutoConfig.from_pretrained(hybrid_checkpoint))


@pytest.mark.parametrize("budget_tokens", [4096, 90, 1])
def test_hybrids_decode_without_refill(
    budget_tokens, hybrid_checkpoint, plain_transformers, loaded_runner, run_task, random_ids
):
    prompts = [random_ids(n) for n in (12, 5, 20, 3, 1, 9, 13)]
    assert greedy_equals(
        plain_transformers(hybrid_checkpoint),
        loaded_runner(hybrid_checkpoint),
        run_task,
        prompts,
        [10, 3, 7, 14, 2, 12, 1],
        budget_tokens,
    )


# gpt_oss has sliding and full layers in turn, with a window of 16 here; mixtral only sliding ones.
WINDOWS = [("mixtral", {"overrides": {"sliding_window": 8}}, 8), ("gpt_oss", {}, 16)]


@pytest.mark.parametrize("budget_tokens", [4096, 130])
@pytest.mark.parametrize(("family", "settings", "window"), WINDOWS)
def test_texts_longer_than_the_sliding_window(
    family,
    settings,
    window,
    budget_tokens,
    family_checkpoint,
    plain_transformers,
    loaded_runner,
    run_task,
    random_ids,
):
    path = family_checkpoint(family, **settings)
    assert AutoConfig.from_pretrained(path).sliding_window == window
    runner, plain = loaded_runner(path), plain_transformers(path)
    assert ColumnCache.supports(runner.model.config)
    # Prompts beyond the window, answers that cross it, and rows that stay within it.
    prompts = [random_ids(n) for n in (40, 30, 7, 15, 3, 17, 25, 2)]
    assert greedy_equals(
        plain, runner, run_task, prompts, [20, 9, 24, 4, 5, 30, 1, 40], budget_tokens
    )
    for ids in (prompts[0], prompts[2]):
        for side in ("left", "right"):
            with torch.inference_mode():
                logits_BSV = runner.logits(runner.pad([prompts[1], ids], side=side))
            got_SV = logits_BSV[1, -len(ids) :] if side == "left" else logits_BSV[1, : len(ids)]
            torch.testing.assert_close(got_SV, plain.logits(ids), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("family", "settings", "window"), WINDOWS)
def test_the_window_matters(
    family, settings, window, family_checkpoint, plain_transformers, random_ids
):
    """If the window made no difference, the tests above could not fail."""
    ids = random_ids(40)
    narrow = plain_transformers(family_checkpoint(family, **settings)).logits(ids)
    wide_path = family_checkpoint(family, overrides={"sliding_window": 64})
    wide = plain_transformers(wide_path).logits(ids)
    torch.testing.assert_close(narrow[:window], wide[:window], atol=1e-5, rtol=1e-5)
    assert (narrow[window:] - wide[window:]).abs().max() > 1e-2


def test_columns_move_back_to_the_front(
    family_checkpoint, plain_transformers, loaded_runner, run_task, random_ids, monkeypatch
):
    """50 rows through three places: several times as many steps as the cache has columns.

    The lengths differ enough that the batch never empties, which would start it afresh.
    """
    path = family_checkpoint("qwen3_moe")
    moves = []
    move = ColumnCache._move_window
    monkeypatch.setattr(
        ColumnCache, "_move_window", lambda self, end: (moves.append(end), move(self, end))
    )
    prompts = [random_ids(1 + n % 7, seed=n) for n in range(50)]
    max_new = [1 + 17 * n * n % 41 for n in range(50)]
    plain, runner = plain_transformers(path), loaded_runner(path)
    assert greedy_equals(plain, runner, run_task, prompts, max_new, 150)
    assert len(moves) >= 2


def make_cache(**settings):
    cache = ColumnCache(LlamaConfig(num_hidden_layers=1), **settings)

    def write(values):
        """One column per value and row; keys are values, values their negatives."""
        keys = torch.tensor(values, dtype=torch.float32)[:, None, :, None]
        got_keys, got_values = cache.update(keys, -keys, 0)
        torch.testing.assert_close(got_keys, -got_values, atol=0, rtol=0, equal_nan=True)
        return got_keys[:, 0, :, 0].tolist()

    return cache, write


def test_rows_come_and_go_by_hand():
    cache, write = make_cache(max_rows=2, max_tokens=6)
    # Prompts of 3 and 2 tokens, padded on the left.
    cache.begin_prefill(torch.tensor([0, 1]), 3, 0)
    assert cache.get_seq_length() == 0
    assert write([[1, 2, 3], [0, 11, 12]]) == [[1, 2, 3], [0, 11, 12]]
    cache.end_prefill()
    assert cache.get_seq_length() == 3
    cache.begin_step(3)
    assert write([[4], [13]]) == [[1, 2, 3, 4], [0, 11, 12, 13]]
    cache.end_step()
    # Row 0 is done: row 1 takes its place, and a prompt of 2 tokens comes into place 1.
    cache.move_row(1, 0)
    cache.begin_prefill(torch.tensor([1]), 2, 3)
    assert write([[21, 22]]) == [[21, 22]]
    cache.end_prefill()
    cache.begin_step(3)
    rows = write([[14], [23]])
    assert rows[0] == [11, 12, 13, 14]
    assert rows[1][-3:] == [21, 22, 23]  # what is before them, the mask hides
    cache.end_step()
    # A prompt longer than all that is in the cache opens columns to the left.
    cache.move_row(0, 1)
    cache.begin_prefill(torch.tensor([0]), 5, 4)
    write([[31, 32, 33, 34, 35]])
    cache.end_prefill()
    cache.begin_step(5)
    rows = write([[36], [15]])
    assert rows[0] == [31, 32, 33, 34, 35, 36]
    assert rows[1][-5:] == [11, 12, 13, 14, 15]


def test_a_window_at_the_end_moves_to_the_front_by_hand():
    cache, write = make_cache(max_rows=1, max_tokens=3)
    cache.begin_prefill(torch.tensor([0]), 2, 0)
    write([[1, 2]])
    cache.end_prefill()
    for step in range(3, 200):
        cache.begin_step(2)  # rows of two tokens: the loop has dropped what is older
        assert write([[step]]) == [[step - 2, step - 1, step]]
        cache.end_step()


def test_a_bad_row_leaves_nothing_behind():
    cache, write = make_cache(max_rows=2, max_tokens=4)
    cache.begin_prefill(torch.tensor([0, 1]), 2, 0)
    write([[1, 2], [float("nan")] * 2])
    cache.end_prefill()
    cache.clear_row(1)
    cache.begin_step(2)
    assert write([[3], [4]]) == [[1, 2, 3], [0, 0, 4]]

"""Pipeline stages compute what the whole model does, in parts and with a cache."""

import pytest
import torch
import torch.distributed as dist
from ranks import run_on_ranks

from moe_lightning.dispatch import LocalDispatcher, RoutingLog
from moe_lightning.experts import ExpertShard
from moe_lightning.modeling import pipeline
from moe_lightning.modeling.cache import ColumnCache
from moe_lightning.modeling.checkpoint import open_checkpoint
from moe_lightning.modeling.loading import load_model
from moe_lightning.modeling.pipeline import AbsentLayer, split_into_stages, stage_layers
from moe_lightning.modeling.seam import attach


@pytest.mark.parametrize(
    ("num_layers", "expected"),
    [
        (2, [[0], [1]]),
        (5, [[0, 1, 2], [3, 4]]),
        (3, [[0], [1], [2]]),
        (7, [[0, 1], [2, 3], [4, 5], [6]]),
    ],
)
def test_stages_are_of_equal_size(num_layers, expected) -> None:
    stages = [list(stage_layers(num_layers, len(expected), n)) for n in range(len(expected))]
    sizes = [len(stage) for stage in stages]
    assert [layer for stage in stages for layer in stage] == list(range(num_layers))
    assert max(sizes) - min(sizes) <= 1
    assert sizes == sorted(sizes, reverse=True)
    assert sizes == [len(stage) for stage in expected]


def load(path, dtype=torch.float32, group=None):
    return load_model(
        open_checkpoint(str(path)),
        device=torch.device("cpu"),
        dtype=dtype,
        on_meta=None if group is None else lambda model: split_into_stages(model, group),
        show_progress=False,
    )


def batch(num_rows=8, width=40):
    """Rows padded on the left, the first of which is whole."""
    generator = torch.Generator().manual_seed(0)
    ids_BS = torch.randint(4, 300, (num_rows, width), generator=generator)
    mask_BS = torch.ones_like(ids_BS)
    for row in range(num_rows):
        mask_BS[row, : 2 * row] = 0
    return ids_BS, mask_BS, (mask_BS.cumsum(1) - 1).clamp_(min=0)


@torch.no_grad()
def answers(model):
    """Logits of a batch at once; of its first half and then one token more, with a cache."""
    ids_BS, mask_BS, positions_BS = batch()
    num_rows, width = ids_BS.shape
    inputs = {"attention_mask": mask_BS, "position_ids": positions_BS}
    whole = model(input_ids=ids_BS, use_cache=False, **inputs).logits
    half = width // 2
    cache = ColumnCache(model.config, max_rows=num_rows, max_tokens=width)
    cache.begin_prefill(torch.arange(num_rows), half, 0)
    first = model(
        input_ids=ids_BS[:, :half],
        attention_mask=mask_BS[:, :half],
        position_ids=positions_BS[:, :half],
        past_key_values=cache,
        use_cache=True,
    ).logits
    cache.end_prefill()
    cache.begin_step(half)
    second = model(
        input_ids=ids_BS[:, half : half + 1],
        attention_mask=mask_BS[:, : half + 1],
        position_ids=positions_BS[:, half : half + 1],
        past_key_values=cache,
        use_cache=True,
    ).logits
    cache.end_step()
    # What a padding token gives is nobody's business.
    return torch.cat([whole[:, 16:], first[:, 16:], second], dim=1)


def answers_of_stages(path, dtype):
    parts = []

    def rows(value, start, end, num_rows, original=pipeline._rows):
        parts.append((start, end))
        return original(value, start, end, num_rows)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "_rows", rows)
        model = load(path, dtype, dist.group.WORLD)
        logits = answers(model)
    layers = [
        number
        for number, layer in enumerate(model.base_model.layers)
        if not isinstance(layer, AbsentLayer)
    ]
    num_parameters = sum(p.numel() for p in model.base_model.layers.parameters())
    return logits, layers, num_parameters, sorted(set(parts))


@pytest.mark.parametrize("num_stages", [2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_logits_are_those_of_the_whole_model(num_stages, dtype, family_checkpoint) -> None:
    path = family_checkpoint("qwen3_moe")
    model = load(path, dtype)
    expected = answers(model)
    results = run_on_ranks(num_stages, answers_of_stages, path, dtype)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype]  # parts are other GEMMs
    for logits, _, _, parts in results:
        assert logits.dtype == dtype
        torch.testing.assert_close(logits, expected, atol=tolerance, rtol=tolerance)
        # 320 tokens are two parts, of whole rows; with a cache there is one.
        assert parts == [(0, 4), (0, 8), (4, 8)]
    assert [n for _, layers, _, _ in results for n in layers] == [0, 1, 2]
    whole = sum(p.numel() for p in model.base_model.layers.parameters())
    assert sum(number for _, _, number, _ in results) == whole


def test_what_a_family_does_to_embeddings_is_done_once(family_checkpoint) -> None:
    path = family_checkpoint("granitemoe")
    model = load(path)
    assert model.config.embedding_multiplier != 1, "nothing to see"
    (logits, *_), _ = run_on_ranks(2, answers_of_stages, path, torch.float32)
    torch.testing.assert_close(logits, answers(model), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def padded_answers(path):
    """Logits of real tokens, where padding never reaches the experts, and how many rows did."""
    model = load(path, group=dist.group.WORLD)
    log, num_rows = RoutingLog(), []
    log.subscribe(lambda trace: num_rows.append(len(trace.index_TK)))

    def dispatcher(layer):
        ids = range(layer.num_experts)
        shard = ExpertShard(layer.experts, layer=layer.layer, expert_ids=ids, backend="reference")
        return LocalDispatcher(shard, log=log)

    padding = attach(model, dispatcher)
    ids_BS, mask_BS, positions_BS = batch()
    with padding.over(mask_BS):
        logits = model(
            input_ids=ids_BS, attention_mask=mask_BS, position_ids=positions_BS, use_cache=False
        ).logits
    return logits[mask_BS.bool()], num_rows


def test_each_part_of_a_padded_batch_has_its_own_padding(family_checkpoint) -> None:
    path = family_checkpoint("qwen3_moe")
    ids_BS, mask_BS, positions_BS = batch()
    with torch.no_grad():
        expected = load(path)(
            input_ids=ids_BS, attention_mask=mask_BS, position_ids=positions_BS, use_cache=False
        ).logits[mask_BS.bool()]
    for logits, num_rows in run_on_ranks(2, padded_answers, path):
        torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
        # Two parts: the first has 0, 2, 4 and 6 tokens of padding, the second 8 to 14.
        assert set(num_rows) == {4 * 40 - 12, 4 * 40 - 44}

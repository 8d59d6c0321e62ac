"""The local dispatcher computes all experts in place, and keeps books only for readers."""

import pytest
import torch

from moe_lightning.dispatch import LocalDispatcher, RoutingLog
from moe_lightning.experts import ExpertShard
from moe_lightning.experts.backends import reference
from moe_lightning.modeling.seam import find_moe_layers


@pytest.fixture(scope="module")
def experts(family_checkpoint, plain_transformers):
    return find_moe_layers(plain_transformers(family_checkpoint("qwen3_moe")).model)[1].experts


def rows_of(num_tokens):
    generator = torch.Generator().manual_seed(num_tokens)
    scores_TE = torch.rand(num_tokens, 8, generator=generator)
    weights_TK, index_TK = scores_TE.topk(2, dim=1)
    return torch.randn(num_tokens, 32, generator=generator), index_TK, weights_TK


def dispatcher_for(experts, log):
    shard = ExpertShard(experts, layer=1, expert_ids=range(8), backend="grouped_mm")
    return LocalDispatcher(shard, log=log)


@torch.inference_mode()
@pytest.mark.parametrize("num_tokens", [0, 1, 13])
def test_equals_the_reference_with_and_without_a_reader(experts, num_tokens):
    log, traces = RoutingLog(), []
    dispatcher, rows = dispatcher_for(experts, log), rows_of(num_tokens)
    unread = dispatcher(*rows)
    log.subscribe(traces.append)
    read = dispatcher(*rows)
    # Bitwise: looking must not change the answer.
    assert torch.equal(read, unread)
    # fp32 sums in another order.
    torch.testing.assert_close(read, reference(experts, *rows), atol=1e-5, rtol=1e-5)
    assert len(traces) == 1


@torch.inference_mode()
def test_a_trace_tells_what_was_routed_and_for_how_long(experts):
    log, traces = RoutingLog(), []
    log.subscribe(traces.append)
    hidden_TD, index_TK, weights_TK = rows_of(5)
    dispatcher_for(experts, log)(hidden_TD, index_TK, weights_TK)
    (trace,) = traces
    assert (trace.layer, trace.num_experts) == (1, 8)
    assert torch.equal(trace.index_TK, index_TK)
    assert torch.equal(trace.weights_TK, weights_TK)
    (span,) = trace.spans
    assert (span.part, span.slot, span.num_bytes) == ("compute", "cpu", 0)
    assert span.end_s > span.start_s


@torch.inference_mode()
def test_readers_come_and_go(experts):
    log, first, second = RoutingLog(), [], []
    dispatcher, rows = dispatcher_for(experts, log), rows_of(3)
    assert not log.is_read
    one, two = first.append, second.append
    log.subscribe(one)
    log.subscribe(two)
    dispatcher(*rows)
    log.unsubscribe(one)
    dispatcher(*rows)
    log.unsubscribe(two)
    dispatcher(*rows)
    assert (len(first), len(second)) == (1, 2)
    assert not log.is_read


def test_a_shard_without_all_experts_is_refused(experts):
    shard = ExpertShard(experts, layer=1, expert_ids=[1, 0, *range(2, 8)], backend="grouped_mm")
    with pytest.raises(AssertionError, match="every expert, in order"):
        LocalDispatcher(shard, log=RoutingLog())

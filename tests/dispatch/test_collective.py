"""Rows over ranks: CollectiveDispatcher computes what one process computes, gradients too."""

import random
from dataclasses import dataclass
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from ranks import run_on_ranks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from moe_lightning.dispatch import CollectiveDispatcher, RoutingLog
from moe_lightning.dispatch.row_format import RowFormat
from moe_lightning.experts import ExpertShard
from moe_lightning.modeling.loading import build_on_meta
from moe_lightning.modeling.seam import find_moe_layers

D, F, K = 8, 12, 2
EXACT = {"rtol": 1e-5, "atol": 1e-5}  # float32; sums over ranks are in another order


# --- experts -------------------------------------------------------------------------------------


def make_experts(num_experts, *, family="qwen3_moe", seed=0, top_k=K):
    """A family's experts module with random weights."""
    from transformers import AutoConfig

    settings = {
        "hidden_size": D,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 4,
        "vocab_size": 16,
        "intermediate_size": F,
        "moe_intermediate_size": F,
        "num_experts_per_tok": top_k,
        "n_routed_experts" if family == "deepseek_v3" else "num_local_experts": num_experts,
        "num_experts": num_experts,
    }
    if family == "deepseek_v3":
        settings |= {"n_group": 1, "topk_group": 1, "first_k_dense_replace": 0}
    experts = find_moe_layers(build_on_meta(AutoConfig.for_model(family, **settings)))[0].experts
    experts = experts.to_empty(device="cpu").float()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 3)
    assert experts.num_experts == num_experts
    return experts


def cut(experts, ids):
    """The module with only some experts' rows."""
    for name, parameter in list(experts.named_parameters()):
        rows = parameter.detach()[list(ids)].clone()
        setattr(experts, name, torch.nn.Parameter(rows))
    experts.num_experts = len(ids)
    return experts


def make_rows(num_rows, num_experts, *, seed, top_k=K, dtype=torch.float32, is_skewed=False):
    generator = torch.Generator().manual_seed(seed)
    likely_E = torch.ones(num_experts)
    if is_skewed:
        likely_E = 1.0 / torch.arange(1, num_experts + 1) ** 2
    hidden_TD = torch.randn(num_rows, D, generator=generator).to(dtype)
    index_TK = torch.zeros(0, top_k, dtype=torch.int64)
    if num_rows:
        index_TK = torch.multinomial(likely_E.expand(num_rows, -1), top_k, generator=generator)
    weights_TK = torch.rand(num_rows, top_k, generator=generator).softmax(1).to(dtype)
    return hidden_TD, index_TK, weights_TK


# --- one pass on a rank, and in one process ------------------------------------------------------


@dataclass
class Case:
    """Rows of each rank (of each group of same rows), and where the experts are."""

    num_rows: list[int]
    experts_of_slot: dict[int, list[int]]
    num_experts: int
    seed: int = 0
    family: str = "qwen3_moe"
    backend: str = "grouped_mm"
    is_skewed: bool = False
    is_checkpointed: bool = False
    num_same: int = 1  # ranks that hold the same rows
    options: dict = None

    def rows(self, rank):
        return make_rows(
            self.num_rows[rank // self.num_same],
            self.num_experts,
            seed=1000 * self.seed + rank // self.num_same,
            is_skewed=self.is_skewed,
        )

    def experts(self):
        return make_experts(self.num_experts, family=self.family, seed=self.seed)


def leaves(hidden_TD, index_TK, weights_TK):
    return hidden_TD.clone().requires_grad_(), index_TK, weights_TK.clone().requires_grad_()


def loss_of(out_TD):
    """Any function whose gradient differs from element to element."""
    factors_TD = torch.linspace(-1, 1, out_TD.numel()).view_as(out_TD)
    return (out_TD * factors_TD + out_TD**2 / 4).sum()


def collective(case, *, log=None, **options):
    ids = case.experts_of_slot.get(dist.get_rank(), [])
    shard = ExpertShard(cut(case.experts(), ids), layer=3, expert_ids=ids, backend=case.backend)
    return CollectiveDispatcher(
        shard,
        num_experts=case.num_experts,
        experts_of_slot=case.experts_of_slot,
        group=dist.group.WORLD,
        same_rows_group=same_rows_group(case.num_same),
        log=log or RoutingLog(),
        **(case.options or {}),
        **options,
    )


def same_rows_group(num_same):
    if num_same == 1:
        return None
    starts = range(0, dist.get_world_size(), num_same)
    groups = [dist.new_group(list(range(start, start + num_same))) for start in starts]
    return groups[dist.get_rank() // num_same]


def run_cases(cases):
    """What each case gives on this rank: output, gradients of rows and weights and experts."""
    results = []
    for case in cases:
        dispatcher = collective(case)
        hidden_TD, index_TK, weights_TK = leaves(*case.rows(dist.get_rank()))
        if case.is_checkpointed:
            out_TD = checkpoint(dispatcher, hidden_TD, index_TK, weights_TK, use_reentrant=False)
        else:
            out_TD = dispatcher(hidden_TD, index_TK, weights_TK)
        loss_of(out_TD).backward()
        with torch.no_grad():
            again_TD = dispatcher(hidden_TD, index_TK, weights_TK)
        assert torch.equal(again_TD, out_TD), "with and without gradients"
        grads = {n: p.grad for n, p in dispatcher.shard.experts.named_parameters()}
        results.append((out_TD.detach(), hidden_TD.grad, weights_TK.grad, grads))
    return results


def check_case(case, results, tolerance=EXACT):
    """Compare the ranks' results with the family's own code in one process."""
    whole = ExpertShard(
        case.experts(), layer=3, expert_ids=range(case.num_experts), backend="reference"
    )
    for rank, (out_TD, grad_hidden_TD, grad_weights_TK, _) in enumerate(results):
        hidden_TD, index_TK, weights_TK = leaves(*case.rows(rank))
        if hidden_TD.shape[0]:
            expected_TD = whole.compute(hidden_TD, index_TK, weights_TK)
            loss_of(expected_TD).backward(
                # The rows of ranks that hold the same ones count once for the experts.
                inputs=[hidden_TD, weights_TK] if rank % case.num_same else None
            )
            torch.testing.assert_close(out_TD, expected_TD.detach(), **tolerance)
            torch.testing.assert_close(grad_hidden_TD, hidden_TD.grad, **tolerance)
            torch.testing.assert_close(grad_weights_TK, weights_TK.grad, **tolerance)
        assert out_TD.shape == hidden_TD.shape
        assert grad_hidden_TD.shape == hidden_TD.shape
    for name, parameter in whole.experts.named_parameters():
        expected = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
        total = torch.zeros_like(parameter)
        for slot, (*_, grads) in enumerate(results):
            assert grads[name] is not None, f"rank {slot} has no gradient of {name}"
            ids = case.experts_of_slot.get(slot, [])
            assert grads[name].shape[0] == len(ids)
            total.index_add_(0, torch.tensor(ids, dtype=torch.int64), grads[name])
        torch.testing.assert_close(total, expected, **tolerance)


def check(num_ranks, cases, tolerance=EXACT):
    by_rank = run_on_ranks(num_ranks, run_cases, cases)
    for number, case in enumerate(cases):
        try:
            check_case(case, [results[number] for results in by_rank], tolerance)
        except AssertionError as error:
            raise AssertionError(f"{case}: {error}") from error


# --- equal to one process ------------------------------------------------------------------------

EVEN_2 = {0: [0, 1, 2, 3], 1: [4, 5, 6, 7]}


@pytest.mark.parametrize("backend", ["reference", "grouped_mm"])
def test_output_and_gradients_of_two_ranks(backend):
    placements = {
        "even": EVEN_2,
        "uneven, out of order": {0: [5], 1: [7, 0, 2, 1, 6, 4, 3]},
        "a rank without experts": {1: [0, 1, 2, 3, 4, 5, 6, 7]},
        "replicas": {0: [0, 1, 2, 3, 4, 7], 1: [0, 4, 5, 6, 7, 2]},
    }
    rows = [[13, 13], [1, 30], [0, 9], [9, 0], [0, 0]]
    check(
        2,
        [
            Case(num_rows, experts_of_slot, 8, seed=seed, backend=backend)
            for experts_of_slot in placements.values()
            for seed, num_rows in enumerate(rows)
        ],
    )


@pytest.mark.parametrize("family", ["gpt_oss", "deepseek_v3", "mixtral"])
def test_families_with_biases_and_other_layouts(family):
    check(2, [Case([7, 5], EVEN_2, 8, family=family)])


def test_six_experts_on_four_ranks():
    placements = [
        {0: [0, 1], 1: [2, 3], 2: [4], 3: [5]},
        {0: [0, 1], 1: [2, 3], 2: [4, 5], 3: []},
        {0: [3, 1, 5], 2: [0], 3: [2, 4]},
    ]
    check(4, [Case([5, 0, 11, 2], experts_of_slot, 6) for experts_of_slot in placements])


def test_five_replicas_of_an_expert():
    everywhere = {0: [0, 1], 1: [0, 2], 2: [3, 0], 3: [0], 4: [0]}
    check(5, [Case([9, 4, 0, 1, 6], everywhere, 4, is_skewed=True)])


def test_replicas_share_the_rows_of_an_expert():
    counts = run_on_ranks(2, _rows_computed)
    # 8 rows of a replicated expert and none of others from each rank.
    assert counts == [8, 8]


def _rows_computed():
    dispatcher = collective(Case([], {0: [0, 1], 1: [2, 0]}, 3))
    rows = []
    compute = dispatcher.shard.compute
    dispatcher.shard.compute = lambda *a: rows.append(a[0].shape[0]) or compute(*a)
    dispatcher(torch.ones(8, D), torch.zeros(8, 1, dtype=torch.int64), torch.ones(8, 1))
    return sum(rows)


@pytest.mark.parametrize("num_ranks", [2, 3, 4])
def test_random_placements_and_rows(num_ranks):
    check(num_ranks, [random_case(num_ranks, seed) for seed in range(10)])


def random_case(num_ranks, seed):
    draw = random.Random(seed)
    num_experts = draw.randint(K, 9)
    experts_of_slot = {slot: [] for slot in range(num_ranks)}
    for expert in range(num_experts):
        num_replicas = 1 if draw.random() < 0.7 else draw.randint(1, num_ranks)
        for slot in draw.sample(range(num_ranks), num_replicas):
            experts_of_slot[slot].append(expert)
    for experts in experts_of_slot.values():
        draw.shuffle(experts)
    return Case(
        [draw.choice([0, 1, 2, 7, 40]) for _ in range(num_ranks)],
        experts_of_slot,
        num_experts,
        seed=seed,
        is_skewed=draw.random() < 0.5,
        is_checkpointed=draw.random() < 0.3,
        options={"num_chunks": draw.choice([1, 1, 3]), "chunk_rows": draw.choice([1, 10])},
    )


# --- what else ranks may do ----------------------------------------------------------------------


def test_ranks_that_hold_the_same_rows_share_them():
    placement = {0: [0, 3], 1: [1], 2: [5, 4], 3: [2]}
    rows = [[5, 8], [1, 0], [0, 0]]
    check(4, [Case(num_rows, placement, 6, num_same=2) for num_rows in rows])
    check(2, [Case([7], EVEN_2, 8, num_same=2, options={"num_chunks": 2, "chunk_rows": 1})])


def test_chunks_of_unequal_ranks():
    cases = [
        Case(num_rows, EVEN_2, 8, is_skewed=True, options={"num_chunks": n, "chunk_rows": 8})
        for num_rows in ([20, 3], [0, 8], [7, 7], [64, 64])
        for n in (2, 5)
    ]
    check(2, cases)


def test_chunks_are_only_made_when_some_rank_has_many_rows():
    # Ranks with 3 and 8 rows; 8 rows are many.
    assert run_on_ranks(2, _computations, [3, 8]) == [3, 3]
    assert run_on_ranks(2, _computations, [3, 7]) == [1, 1]


def _computations(num_rows):
    case = Case(num_rows, EVEN_2, 8, options={"num_chunks": 3, "chunk_rows": 8})
    log, traces = RoutingLog(), []
    log.subscribe(traces.append)
    collective(case, log=log)(*case.rows(dist.get_rank()))
    return sum(span.part == "compute" for span in traces[0].spans)


def test_narrow_wire():
    case = Case([50, 30], EVEN_2, 8, options={"wire_dtype": torch.bfloat16})
    results = [result[0] for result in run_on_ranks(2, run_cases, [case])]
    whole = case.experts()
    for rank, (out_TD, grad_hidden_TD, *_) in enumerate(results):
        hidden_TD, index_TK, weights_TK = leaves(*case.rows(rank))
        expected_TD = ExpertShard(whole, layer=3, expert_ids=range(8), backend="reference").compute(
            hidden_TD, index_TK, weights_TK
        )
        loss_of(expected_TD).backward()
        assert out_TD.dtype == grad_hidden_TD.dtype == torch.float32
        # bfloat16 rounds to 2^-9; there are two roundings each way.
        assert 1e-4 < relative(out_TD, expected_TD) < 4 * 2**-9
        assert 1e-4 < relative(grad_hidden_TD, hidden_TD.grad) < 8 * 2**-9


def relative(actual, expected):
    return float((actual - expected.detach()).norm() / expected.detach().norm())


def test_half_precision_rows_are_added_up_in_float32():
    """256 + 1 + 1: in bfloat16, whose steps are 2 from 256 on, that would stay 256."""
    assert run_on_ranks(3, _half_precision) == [(torch.bfloat16, [258.0])] * 3


def _half_precision():
    dispatcher = collective(Case([], {0: [0], 1: [1], 2: [2]}, 3))
    factor = 256 if dist.get_rank() == 0 else 1
    dispatcher.shard.compute = lambda rows_RD, *_: rows_RD * factor
    hidden_TD = torch.ones(1, 1, dtype=torch.bfloat16)
    out_TD = dispatcher(hidden_TD, torch.tensor([[0, 1, 2]]), torch.ones(1, 3))
    return out_TD.dtype, out_TD[0].tolist()


def test_activation_checkpointing_recomputes_the_exchange_on_every_rank():
    assert run_on_ranks(2, _checkpointed_layers) == [True, True]


def _checkpointed_layers():
    """Two layers with residuals; one rank has no rows in its batch."""
    case = Case([0, 6], EVEN_2, 8)
    gradients = []
    for is_checkpointed in (False, True):
        dispatchers = [collective(case), collective(case, num_chunks=2, chunk_rows=1)]
        hidden_TD, index_TK, weights_TK = leaves(*case.rows(dist.get_rank()))
        out_TD = hidden_TD
        for dispatcher in dispatchers:
            arguments = (dispatcher, out_TD, index_TK, weights_TK)
            if is_checkpointed:
                out_TD = checkpoint(_layer, *arguments, use_reentrant=False)
            else:
                out_TD = _layer(*arguments)
        loss_of(out_TD).backward()
        parameters = [p for d in dispatchers for p in d.shard.experts.parameters()]
        gradients.append([out_TD, hidden_TD.grad, weights_TK.grad, *(p.grad for p in parameters)])
    return all(map(torch.equal, *gradients))


def _layer(dispatcher, hidden_TD, index_TK, weights_TK):
    normed_TD = torch.nn.functional.rms_norm(hidden_TD, (D,))
    return hidden_TD + dispatcher(normed_TD, index_TK, weights_TK).tanh()


def test_frozen_rows_still_train_experts():
    assert run_on_ranks(3, _frozen) == [None, None, None]


def _frozen():
    """Rank 0 has no rows, rank 1 gets none, rank 2 has no experts."""
    case = Case([0, 4, 5], {0: [0, 1], 1: [2]}, 3)
    dispatcher = collective(case)
    hidden_TD, _, weights_TK = case.rows(dist.get_rank())
    index_TK = torch.zeros(hidden_TD.shape[0], K, dtype=torch.int64)
    index_TK[:, 1] = 1
    dispatcher(hidden_TD, index_TK, weights_TK).sum().backward()
    grads = [parameter.grad for parameter in dispatcher.shard.experts.parameters()]
    assert all(grad is not None for grad in grads)
    assert any(bool(grad.any()) for grad in grads) == (dist.get_rank() == 0)
    for parameter in dispatcher.shard.experts.parameters():
        parameter.requires_grad_(False)
    assert not dispatcher(hidden_TD, index_TK, weights_TK).requires_grad


def test_training_after_inference():
    """What is made in the first pass must be fit for gradients."""
    assert run_on_ranks(2, _inference_first) == [True, True]


def _inference_first():
    case = Case([6, 3], {0: [0, 1, 2], 1: [2, 3]}, 4)
    dispatcher = collective(case)
    rows = case.rows(dist.get_rank())
    with torch.inference_mode():
        inferred_TD = dispatcher(*rows)
    out_TD = dispatcher(*leaves(*rows))
    out_TD.sum().backward()
    return torch.equal(out_TD, inferred_TD)


def test_experts_shared_by_fsdp_where_a_rank_gets_no_rows():
    assert run_on_ranks(4, _experts_under_fsdp) == [None] * 4


def _experts_under_fsdp():
    """ep 2, efsdp 2. Only ranks 0 and 3 have rows; rank 0's go to its own experts, so rank 1
    computes nothing while rank 3, which shares the parameters, does."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("efsdp", "ep"))
    rank, ep_rank = dist.get_rank(), mesh["ep"].get_local_rank()
    experts_of_slot = {0: [0, 1], 1: [2, 3]}
    whole = make_experts(4)
    experts = cut(make_experts(4), experts_of_slot[ep_rank])
    dispatcher = CollectiveDispatcher(
        ExpertShard(experts, layer=0, expert_ids=experts_of_slot[ep_rank], backend="grouped_mm"),
        num_experts=4,
        experts_of_slot=experts_of_slot,
        group=mesh["ep"].get_group(),
        log=RoutingLog(),
    )
    experts.forward = dispatcher
    fully_shard(experts, mesh=mesh["efsdp"])
    rows = [make_rows(n, 4, seed=seed) for seed, n in enumerate([5, 0, 0, 6])]
    rows[0][1][:] = torch.tensor([0, 1])
    hidden_TD, index_TK, weights_TK = rows[rank]
    out_TD = experts(hidden_TD.requires_grad_(), index_TK, weights_TK)
    loss_of(out_TD).backward()
    for hidden_TD, index_TK, weights_TK in rows:
        if hidden_TD.shape[0]:
            shard = ExpertShard(whole, layer=0, expert_ids=range(4), backend="reference")
            loss_of(shard.compute(hidden_TD.detach(), index_TK, weights_TK)).backward()
    for name, parameter in experts.named_parameters():
        # FSDP takes the mean over its two ranks.
        actual = 2 * parameter.grad.full_tensor()
        expected = whole.get_parameter(name).grad[experts_of_slot[ep_rank]]
        torch.testing.assert_close(actual, expected, **EXACT)


# --- cost, and the books -------------------------------------------------------------------------


class _Reads(TorchDispatchMode):
    """Counts operations whose result the host waits for."""

    WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "unique")

    def __init__(self):
        super().__init__()
        self.num_reads = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        self.num_reads += name in self.WAITS or name.startswith("_unique")
        return function(*args, **(kwargs or {}))

    def tolist(self):
        """A method of tensors that reads, which on a CPU is no operation."""
        plain = torch.Tensor.tolist

        def counted(tensor):
            self.num_reads += 1
            return plain(tensor)

        return counted


def test_one_host_read_a_layer():
    assert run_on_ranks(2, _host_reads) == [[1, 1, 1]] * 2


def _host_reads():
    """Of two chunks, of one, and with replicas as on an accelerator."""
    replicas = {0: [0, 1, 2, 3, 4], 1: [4, 5, 6, 7]}
    counts = []
    for case in (
        Case([9, 9], EVEN_2, 8, options={"num_chunks": 2, "chunk_rows": 1}),
        Case([9, 9], EVEN_2, 8),
        Case([9, 9], replicas, 8),
    ):
        dispatcher = collective(case)
        dispatcher.shard.compute = lambda rows_RD, *_: rows_RD * 2  # a backend reads as it likes
        rows = leaves(*case.rows(dist.get_rank()))
        dispatcher(*rows)
        dispatcher._routes._balances = False
        with _Reads() as reads, mock.patch.object(torch.Tensor, "tolist", reads.tolist()):
            dispatcher(*rows).sum().backward()
        counts.append(reads.num_reads)
    return counts


def test_bytes_by_hand():
    # Rank 0's three rows: to itself, to both, to rank 1. Rank 1 has none.
    assert run_on_ranks(2, _bytes, None) == [(16 + 2 * 48, 2 * 32, 3), (16, 0, 0)]
    # bfloat16: 16 bytes of row, 8 of float32 weights, 8 of experts.
    assert run_on_ranks(2, _bytes, torch.bfloat16) == [(16 + 2 * 32, 2 * 16, 3), (16, 0, 0)]


def _bytes(wire_dtype):
    log, traces = RoutingLog(), []
    log.subscribe(traces.append)
    dispatcher = collective(Case([], EVEN_2, 8), log=log, wire_dtype=wire_dtype)
    num_rows = 3 if dist.get_rank() == 0 else 0
    hidden_TD, _, weights_TK = make_rows(num_rows, 8, seed=0)
    dispatcher(hidden_TD, torch.tensor([[0, 1], [3, 4], [7, 5]])[:num_rows], weights_TK)
    (trace,) = traces
    assert {span.part for span in trace.spans} == {"dispatch", "wait", "compute", "combine"}
    assert {span.slot for span in trace.spans} == {f"rank {dist.get_rank()}"}
    assert all(span.end_s >= span.start_s for span in trace.spans)

    def num_bytes(part):
        return sum(span.num_bytes for span in trace.spans if span.part == part)

    return num_bytes("dispatch"), num_bytes("combine"), trace.index_TK.shape[0]


def test_rows_of_ranks_that_hold_the_same_ones_are_recorded_once():
    assert run_on_ranks(2, _rows_recorded) == [3, 2]


def _rows_recorded():
    log, traces = RoutingLog(), []
    log.subscribe(traces.append)
    case = Case([5], EVEN_2, 8, num_same=2)
    collective(case, log=log)(*case.rows(dist.get_rank()))
    return traces[0].index_TK.shape[0]


def test_a_row_travels_once_to_a_rank():
    assert run_on_ranks(2, _rows_received) == [[2], [1]]


def _rows_received():
    dispatcher = collective(Case([], EVEN_2, 8))
    received = []
    compute = dispatcher.shard.compute
    dispatcher.shard.compute = lambda *a: received.append(a[0].shape[0]) or compute(*a)
    num_rows = 2 if dist.get_rank() == 0 else 0
    hidden_TD, _, weights_TK = make_rows(num_rows, 8, seed=0)
    dispatcher(hidden_TD, torch.tensor([[0, 1], [3, 4]])[:num_rows], weights_TK)
    return received


def test_other_work_is_done_while_rows_are_away():
    assert run_on_ranks(2, _order) == [["meanwhile", "compute", "compute"], ["meanwhile"]]


def _order():
    dispatcher = collective(Case([], {0: [0, 1]}, 2, options={"num_chunks": 2, "chunk_rows": 1}))
    events = []
    compute = dispatcher.shard.compute
    dispatcher.shard.compute = lambda *a: events.append("compute") or compute(*a)
    # Rank 0 has no rows of its own, and all the work.
    dispatcher(*make_rows(4 * dist.get_rank(), 2, seed=0), lambda: events.append("meanwhile"))
    return events


def test_a_row_on_the_wire():
    """Width 3 in bfloat16: 6 bytes of row up to 8, 12 of weights, 12 of experts: 32."""
    rows = RowFormat(3, torch.bfloat16, 3, torch.float32)
    assert rows.num_bytes == 32
    values = torch.tensor([[1.0, -2.0, 0.5], [3.0, 4.0, 5.0]])
    weights = torch.tensor([[0.1, 0.2, 0.7], [0.3, 0.3, 0.4]])
    index = torch.tensor([[0, 65536, 2], [2, 1, 0]])
    bytes_RX = rows.pack(values, weights, index)
    assert (bytes_RX.shape, bytes_RX.dtype) == ((2, 32), torch.uint8)
    there = rows.views(bytes_RX)
    assert torch.equal(there[0], values.bfloat16())
    assert torch.equal(there[1], weights)
    assert torch.equal(there[2], index.int())
    assert not rows.views(rows.pack(values, weights, None))[2].any()
    assert [tuple(view.shape) for view in rows.views(bytes_RX[:0])] == [(0, 3)] * 3

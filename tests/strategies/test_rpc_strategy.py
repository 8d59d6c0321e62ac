"""The strategy over workers in threads: what it promises besides right answers for every family."""

import json
import threading

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader
from worker_threads import worker_threads

from moe_lightning import MoELightningModule
from moe_lightning.callbacks import RoutingBalance
from moe_lightning.errors import UsageError, WorkersLostError
from moe_lightning.placement import ExpertPlacement, load_loads
from moe_lightning.strategies import PlacementStrategy, RPCStrategy
from moe_lightning.strategies.placing import RESERVE_BYTES
from moe_lightning.tasks import Embed, Generate, Score
from moe_lightning.workers.expert_host import ExpertHost

__all__ = ["worker_threads"]

LONG_ENOUGH_S = 20
EXPERT_BYTES = 3 * 32 * 24 * 4  # gate, up and down in float32


@pytest.fixture
def rpc_trainer(worker_threads, trainer_with):
    """A trainer whose experts are on so many workers: ``rpc_trainer(path, 3, policy=...)``."""

    def rpc_trainer(path, num_workers, **options):
        return trainer_with(RPCStrategy(worker_threads(path, num_workers), **options))

    return rpc_trainer


# Fewer bits on the way.

# Relative errors of one rounding, as in tests/transport/test_wire.py.
ROUNDED = {"bfloat16": (1e-4, 4e-3), "float16": (1e-5, 5e-4), "int8": (1e-3, 2e-2)}


@pytest.mark.parametrize("dtype", ROUNDED)
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_rows_in_fewer_bits_give_close_scores_and_say_how_close(
    family, dtype, family_checkpoint, answers, rpc_trainer, predict
):
    path = family_checkpoint(family)
    trainer = rpc_trainer(path, 2, dispatch_dtype=dtype, combine_dtype=dtype)
    rows = predict(trainer, MoELightningModule(str(path)), Score())
    least, most = ROUNDED[dtype]
    errors = trainer.strategy.wire.errors
    assert set(errors) == {"dispatch", "combine"}
    assert all(least < error < most for error in errors.values())
    assert trainer.strategy.report()["wire_relative_error"] == errors
    logprobs, _, _ = answers(path)
    off = [
        abs(row["logprob"] - want) / row["num_tokens"]
        for row, want in zip(rows, logprobs, strict=True)
    ]
    # Three layers, both ways; the residual stream around them is exact.
    assert 1e-6 < max(off) < 6 * most


@pytest.mark.parametrize("way", ["dispatch_dtype", "combine_dtype"])
def test_each_way_has_a_dtype_of_its_own(way, family_checkpoint, rpc_trainer, predict):
    path = family_checkpoint("mixtral")
    trainer = rpc_trainer(path, 2, **{way: "int8"})
    predict(trainer, MoELightningModule(str(path)), Score(), ["To be"])
    errors = trainer.strategy.wire.errors
    assert errors[way.removesuffix("_dtype")] > 1e-3
    assert sum(error > 0 for error in errors.values()) == 1


def test_without_fewer_bits_there_is_no_error_to_report(family_checkpoint, rpc_trainer, predict):
    path = family_checkpoint("mixtral")
    trainer = rpc_trainer(path, 2)
    predict(trainer, MoELightningModule(str(path)), Score(), ["To be"])
    assert trainer.strategy.wire.errors == {}
    assert "wire_relative_error" not in trainer.strategy.report()


# Placements, and what workers offer.


@pytest.mark.parametrize("policy", ["round_robin", "balanced", "file"])
def test_every_policy(policy, family_checkpoint, check_answers, policy_options, rpc_trainer):
    path = family_checkpoint("deepseek_v3")
    trainer = rpc_trainer(path, 5, **policy_options(policy, path))
    check_answers(path, trainer, MoELightningModule(str(path)))
    placement = trainer.strategy.placement
    replicas = {"round_robin": (0, 0, 0), "balanced": (3, 3, 3), "file": (4, 3, 4)}[policy]
    assert placement.num_replicas == sum(replicas[layer] for layer in placement.layers)


def test_six_experts_on_four_workers(family_checkpoint, check_answers, rpc_trainer):
    path = family_checkpoint("granitemoe", num_experts=6)
    trainer = rpc_trainer(path, 4)
    check_answers(path, trainer, MoELightningModule(str(path)))
    sizes = [len(trainer.strategy.placement.experts_of(slot, 2)) for slot in range(4)]
    assert sorted(sizes) == [1, 1, 2, 2]


def test_a_placement_for_fewer_slots_leaves_workers_empty(
    family_checkpoint, check_answers, tmp_path, rpc_trainer
):
    path = family_checkpoint("mixtral")
    ExpertPlacement(2, {layer: ((1,), (0, 1)) * 4 for layer in range(3)}).save(tmp_path / "p.json")
    trainer = rpc_trainer(path, 3, file=tmp_path / "p.json")
    check_answers(path, trainer, MoELightningModule(str(path)))
    assert not any(trainer.strategy.placement.experts_by_layer(2).values())


def gigabytes(num_experts):
    """``memory_gb`` for so many experts, beside what the package keeps free of any memory."""
    return (RESERVE_BYTES + num_experts * EXPERT_BYTES) / 1e9


def test_a_worker_that_offers_less_memory_gets_fewer_experts(
    family_checkpoint, check_answers, worker_threads, trainer_with
):
    path = family_checkpoint("mixtral")
    small, large = (worker_threads(path, 1, memory_gb=gigabytes(n))[0] for n in (5, 19))
    plenty = worker_threads(path, 1)[0]
    strategy = RPCStrategy([small, plenty])
    check_answers(path, trainer_with(strategy), MoELightningModule(str(path)))
    sizes = [sum(map(len, strategy.placement.experts_by_layer(n).values())) for n in (0, 1)]
    assert sum(sizes) == 24
    assert 3 <= sizes[0] <= 5
    strategy = RPCStrategy([small, large])  # they have room for 24 together
    check_answers(path, trainer_with(strategy), MoELightningModule(str(path)))
    sizes = [sum(map(len, strategy.placement.experts_by_layer(n).values())) for n in (0, 1)]
    assert sizes == [5, 19]


@pytest.mark.parametrize("policy", ["linear", "round_robin", "file"])
def test_workers_without_room_are_refused_with_numbers_and_nothing_is_read(
    policy, family_checkpoint, worker_threads, trainer_with, policy_options, predict
):
    path = family_checkpoint("mixtral")
    addresses = [worker_threads(path, 1, memory_gb=gigabytes(n))[0] for n in (5, 7, 8, 0.5, 1.5)]
    strategy = RPCStrategy(addresses, **policy_options(policy, path))
    module = MoELightningModule(str(path))
    with pytest.raises(UsageError) as error:
        predict(trainer_with(strategy), module, Score())
    said = str(error.value)
    assert "do not fit" in said
    assert " GB" in said
    assert "Start more workers, or some that have more memory" in said
    assert all(address in said for address in addresses)
    # The user's own placement is checked; others are made to fit.
    assert ("too much" in said) == (policy == "file")
    assert module.view.bytes_read == 0
    assert module.model is None
    # They are free again, and have nothing.
    fits = RPCStrategy([*addresses, *worker_threads(path, 1)])
    predict(trainer_with(fits), module, Score(), ["To be"])


def test_workers_need_not_compute_alike(
    family_checkpoint, answers, worker_threads, trainer_with, predict
):
    path = family_checkpoint("qwen3_moe")
    exact = worker_threads(path, 1)[0]
    int8 = worker_threads(path, 1, experts_backend="cpu_int8")[0]
    logprobs, _, _ = answers(path)
    off = []
    for addresses in ([exact], [exact, int8], [int8]):
        trainer = trainer_with(RPCStrategy(addresses))
        rows = predict(trainer, MoELightningModule(str(path)), Score())
        off.append(
            sum(abs(row["logprob"] - want) for row, want in zip(rows, logprobs, strict=True))
            / sum(row["num_tokens"] for row in rows)
        )
    assert off[0] < 1e-5
    # int8 errs by some percent of what experts add to the residual stream.
    assert 1e-4 < off[1] < 5e-2
    assert 1e-4 < off[2] < 5e-2


@pytest.mark.parametrize("backend", ["reference", "grouped_mm", "cpu_packed"])
def test_the_masters_backend_is_that_of_the_workers(
    backend, family_checkpoint, check_answers, rpc_trainer, monkeypatch
):
    path = family_checkpoint("gpt_oss")
    backends = []
    real = ExpertHost.load

    def load(self, experts, *, dtype, experts_backend):
        backends.append(experts_backend)
        real(self, experts, dtype=dtype, experts_backend=experts_backend)

    monkeypatch.setattr(ExpertHost, "load", load)
    trainer = rpc_trainer(path, 2, experts_on_master=True)
    check_answers(path, trainer, MoELightningModule(str(path), experts_backend=backend))
    assert backends == [backend] * 2


def test_the_balance_of_a_run_is_what_the_next_is_placed_by(
    family_checkpoint, check_answers, tmp_path, rpc_trainer, predict
):
    path = family_checkpoint("qwen3_moe")
    trainer = rpc_trainer(path, 3)
    trainer.callbacks.append(RoutingBalance())
    prompts = ["To be", "or not to be, that is the question"]
    predict(trainer, MoELightningModule(str(path)), Score(), prompts)
    file = tmp_path / "routing_balance.json"
    tokenizer = MoELightningModule(str(path)).tokenizer
    num_tokens = sum(len(tokenizer(prompt).input_ids) for prompt in prompts)
    # Every token has two experts; padding and what the package tries out have none.
    assert [sum(loads) for loads in load_loads(file).values()] == [2 * num_tokens] * 3
    assert json.loads(file.read_text())
    trainer = rpc_trainer(path, 3, loads=file, replicas=2)
    check_answers(path, trainer, MoELightningModule(str(path)))


# A module's life.


def test_a_module_predicts_again_and_under_other_strategies(
    family_checkpoint, check_answers, rpc_trainer, trainer_with
):
    path = family_checkpoint("qwen3_moe")
    module = MoELightningModule(str(path))
    trainer = rpc_trainer(path, 2)
    for _ in range(2):  # workers are given back after a run, so that the next loads anew
        check_answers(path, trainer, module)
    check_answers(path, rpc_trainer(path, 3), module)
    assert module.hosted.placement.num_slots == 3
    check_answers(path, trainer_with("auto"), module)
    assert module.hosted.placement is None
    check_answers(path, trainer_with(PlacementStrategy(["cpu"] * 2)), module)
    check_answers(path, trainer, module)
    assert module.hosted.placement.num_slots == 2


def test_weights_of_its_own_are_not_lost_to_workers(
    family_checkpoint, rpc_trainer, predict, trainer_with
):
    path = family_checkpoint("qwen3_moe")
    module = MoELightningModule(str(path))
    predict(trainer_with("auto"), module, Score(), ["To be"])
    module.load_state_dict(module.state_dict())
    with pytest.raises(UsageError, match=r"no longer the checkpoint's.*Export"):
        predict(rpc_trainer(path, 2), module, Score(), ["To be"])


def test_the_answers_do_not_depend_on_the_batch_size(
    family_checkpoint, answers, rpc_trainer, predict
):
    """One token at a time, and rows that take the places of finished ones."""
    path = family_checkpoint("qwen3_moe")
    _, _, tokens = answers(path)
    for budget in (1, 40):
        module = MoELightningModule(str(path), batch_budget_tokens=budget)
        task = Generate(max_new_tokens=len(max(tokens, key=len)))
        rows = predict(rpc_trainer(path, 3), module, task)
        assert [row["token_ids"] for row in rows] == tokens


def test_two_runs_are_bitwise_equal(family_checkpoint, policy_options, rpc_trainer, predict):
    path = family_checkpoint("mixtral")
    options = policy_options("file", path)
    first, second = (
        predict(rpc_trainer(path, 5, **options), MoELightningModule(str(path)), Embed())
        for _ in range(2)
    )
    assert first == second


def test_without_inference_mode(family_checkpoint, check_answers, worker_threads, trainer_with):
    path = family_checkpoint("gpt_oss")
    strategy = RPCStrategy(worker_threads(path, 2))
    trainer = trainer_with(strategy, inference_mode=False)
    check_answers(path, trainer, MoELightningModule(str(path)))


def test_bfloat16_weights_are_those_of_one_device(
    family_checkpoint, trainer_with, predict, worker_threads
):
    path = family_checkpoint("qwen3_moe")
    scores = [
        [
            row["logprob"]
            for row in predict(
                trainer_with(strategy, precision="bf16-true"),
                MoELightningModule(str(path)),
                Score(),
            )
        ]
        for strategy in ("auto", RPCStrategy(worker_threads(path, 3)))
    ]
    # One bfloat16 rounding of each worker's partial sum, in scores of about 40.
    assert scores[1] == pytest.approx(scores[0], abs=0.05)


@pytest.mark.parametrize("num_workers", [1, 3])
def test_validate_gives_the_loss_of_one_device(
    num_workers, family_checkpoint, random_ids, worker_threads, trainer_with
):
    path = family_checkpoint("qwen2_moe")
    ids = torch.tensor([random_ids(12, seed) for seed in range(2)])
    batch = {"input_ids": ids, "labels": ids, "position_ids": torch.arange(12).expand(2, 12)}
    losses = [
        trainer_with(strategy).validate(
            MoELightningModule(str(path)), DataLoader([batch], batch_size=None), verbose=False
        )[0]["val_loss"]
        for strategy in ("auto", RPCStrategy(worker_threads(path, num_workers)))
    ]
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)


class Watch(L.Callback):
    def __init__(self):
        self.seen = []

    def on_predict_start(self, trainer, pl_module):
        self.seen.append(torch.get_num_threads())


def test_the_process_has_its_threads_back_after_a_run_good_or_bad(
    family_checkpoint, worker_threads, trainer_with, predict, tmp_path
):
    path = family_checkpoint("olmoe")
    addresses, watch, before = worker_threads(path, 2), Watch(), torch.get_num_threads()
    torch.set_num_threads(6)
    try:
        for options in ({}, {"threads": 2}):
            trainer = trainer_with(RPCStrategy(addresses, **options))
            trainer.callbacks.append(watch)
            predict(trainer, MoELightningModule(str(path)), Score(), ["To be"])
            assert torch.get_num_threads() == 6
        assert watch.seen == [6, 2], "workers that are elsewhere take none of ours"
        trainer = trainer_with(RPCStrategy(addresses, file=tmp_path / "nope.json", threads=3))
        with pytest.raises(UsageError):
            predict(trainer, MoELightningModule(str(path)), Score())
        assert torch.get_num_threads() == 6
    finally:
        torch.set_num_threads(before)


def test_a_run_leaves_no_threads(family_checkpoint, rpc_trainer, predict):
    path = family_checkpoint("olmoe")
    predict(rpc_trainer(path, 2), MoELightningModule(str(path)), Score(), ["To be"])
    before = set(threading.enumerate())  # workers, and what a process starts once
    predict(rpc_trainer(path, 2), MoELightningModule(str(path)), Score(), ["To be"])
    for thread in set(threading.enumerate()) - before:
        thread.join(LONG_ENOUGH_S)
        assert not thread.is_alive(), thread.name


# Losses in the middle of a run. Processes that are killed: tests/workers/test_faults.py.


class LoseWorkers(L.Callback):
    """Makes the master believe that workers are gone, before some batches."""

    def __init__(self, worker_of_batch):
        self.worker_of_batch = worker_of_batch

    def on_predict_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        worker = self.worker_of_batch.get(batch_idx)
        if worker is not None:
            trainer.strategy.fleet.roster.liveness.give_up(worker, "made up")


class SeeReport(L.Callback):
    def on_predict_end(self, trainer, pl_module):
        self.report = trainer.strategy.report()


@pytest.fixture
def lossy_run(worker_threads, trainer_with, answers, predict):
    """Greedy tokens of a run of four batches in which workers are lost: workers of their own, as
    those that are called lost serve nobody for a while."""

    def lossy_run(path, num_workers, worker_of_batch, **options):
        addresses = worker_threads(path, num_workers, threads=2)
        strategy = RPCStrategy(addresses, timeout_s=1.0, **options)
        trainer, see = trainer_with(strategy), SeeReport()
        trainer.callbacks += [LoseWorkers(worker_of_batch), see]
        _, _, tokens = answers(path)
        task = Generate(max_new_tokens=max(map(len, tokens)))
        rows = predict(trainer, MoELightningModule(str(path)), task, batch_size=1)
        assert [row["token_ids"] for row in rows] == tokens
        return see.report

    return lossy_run


def test_the_text_stays_the_same_when_workers_are_lost(family_checkpoint, lossy_run):
    report = lossy_run(family_checkpoint("qwen2_moe"), 3, {1: 2, 3: 0})
    assert [worker["reason"] for worker in report["workers_lost"]] == ["made up"] * 2
    assert len(report["workers"]) == 3


def test_the_master_adopts_if_it_may(family_checkpoint, lossy_run):
    lossy_run(family_checkpoint("deepseek_v2"), 2, {1: 0, 2: 1}, master_adopts=True)


def test_without_anybody_to_adopt_the_run_ends(family_checkpoint, lossy_run):
    with pytest.raises(WorkersLostError, match="made up") as error:
        lossy_run(family_checkpoint("mixtral"), 2, {1: 0, 2: 1})
    assert error.value.exit_code == 6

"""The transport tensorpipe: the same answers from worker processes, and what a killed one does.

A process is in one session of torch.distributed.rpc at a time, so workers cannot be threads here.
"""

import lightning as L
import pytest
from forked_workers import ForkedWorkers

from moe_lightning import MoELightningModule
from moe_lightning.strategies import RPCStrategy
from moe_lightning.tasks import Generate, Score


@pytest.fixture(scope="module")
def forked_workers(tmp_path_factory):
    workers = ForkedWorkers(tmp_path_factory.mktemp("w"))
    yield workers
    workers.close()


@pytest.fixture(scope="module")
def start(forked_workers):
    """Addresses of so many workers of a checkpoint, the same ones each time: ``start(path, 3)``."""
    kept = {}

    def start(path, num_workers):
        addresses = kept.setdefault(path, [])
        while len(addresses) < num_workers:
            addresses.append(forked_workers.start(path))
        return addresses[:num_workers]

    return start


@pytest.fixture
def rpc_trainer(trainer_with):
    """A trainer of these workers: ``rpc_trainer(addresses, ...)``."""
    return lambda addresses, **options: trainer_with(
        RPCStrategy(addresses, transport="tensorpipe", **options)
    )


@pytest.mark.parametrize("num_workers", [1, 2, 3])
@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "gpt_oss"])
def test_families_on_any_number_of_workers(
    family, num_workers, family_checkpoint, check_answers, start, rpc_trainer, monkeypatch
):
    """Sessions follow each other, in the master and in the workers, of which the next has more."""
    monkeypatch.setattr("moe_lightning.strategies.rpc_strategy.INTERLEAVE_TOKENS", 2)
    path = family_checkpoint(family)
    trainer = rpc_trainer(start(path, num_workers), micro_batches=num_workers)
    check_answers(path, trainer, MoELightningModule(str(path)))
    assert trainer.strategy.placement.num_slots == num_workers


def test_replicas_an_empty_worker_and_experts_on_the_master(
    family_checkpoint, check_answers, start, rpc_trainer, policy_options
):
    path = family_checkpoint("mixtral")
    trainer = rpc_trainer(start(path, 4), experts_on_master=True, **policy_options("file", path))
    check_answers(path, trainer, MoELightningModule(str(path)))


def test_rows_in_fewer_bits(family_checkpoint, answers, start, rpc_trainer, predict):
    path = family_checkpoint("mixtral")
    trainer = rpc_trainer(start(path, 2), dispatch_dtype="int8", combine_dtype="bfloat16")
    rows = predict(trainer, MoELightningModule(str(path)), Score())
    errors = trainer.strategy.wire.errors
    assert 1e-3 < errors["dispatch"] < 2e-2
    assert 1e-4 < errors["combine"] < 4e-3
    logprobs, _, _ = answers(path)
    assert [row["logprob"] for row in rows] == pytest.approx(logprobs, abs=1.0)
    assert [row["logprob"] for row in rows] != pytest.approx(logprobs, abs=1e-5)


class Kill(L.Callback):
    """Kills a worker before the second batch."""

    def __init__(self, kill):
        self.kill = kill
        self.report = None

    def on_predict_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        if batch_idx == 1:
            self.kill()

    def on_predict_end(self, trainer, pl_module):
        self.report = trainer.strategy.report()


def test_the_text_stays_the_same_when_a_worker_is_killed(
    family_checkpoint, answers, forked_workers, rpc_trainer, predict
):
    path = family_checkpoint("mixtral")
    addresses = [forked_workers.start(path) for _ in range(3)]
    trainer = rpc_trainer(addresses)
    kill = Kill(lambda: forked_workers.kill(addresses[1]))
    trainer.callbacks.append(kill)
    _, _, tokens = answers(path)
    task = Generate(max_new_tokens=max(map(len, tokens)))
    rows = predict(trainer, MoELightningModule(str(path)), task, batch_size=1)
    assert [row["token_ids"] for row in rows] == tokens
    (lost,) = kill.report["workers_lost"]
    assert lost["address"] == addresses[1]

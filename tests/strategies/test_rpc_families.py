"""Every family with its experts on workers, in every way, against unmodified transformers.

The workers are threads of this process that serve real sockets; `tests/workers` and `tests/cli` run
processes.
"""

import pytest

from moe_lightning import MoELightningModule
from moe_lightning.strategies.rpc_strategy import RPCStrategy


@pytest.fixture
def rpc_trainer(worker_threads, trainer_with):
    """A trainer whose experts are on so many workers: ``rpc_trainer(path, 3, policy=...)``."""

    def rpc_trainer(path, num_workers, **options):
        return trainer_with(RPCStrategy(worker_threads(path, num_workers), **options))

    return rpc_trainer


@pytest.mark.parametrize("num_workers", [1, 2, 3])
def test_every_family_on_every_number_of_workers(
    family, num_workers, family_checkpoint, check_answers, rpc_trainer
):
    path = family_checkpoint(family)
    trainer = rpc_trainer(path, num_workers)
    check_answers(path, trainer, MoELightningModule(str(path)))
    placement = trainer.strategy.placement
    sizes = [len(placement.experts_of(slot, placement.layers[0])) for slot in range(num_workers)]
    assert sorted(sizes) == {1: [8], 2: [4, 4], 3: [2, 3, 3]}[num_workers]


@pytest.mark.parametrize("policy", ["round_robin", "balanced", "file"])
def test_every_family_with_every_policy_replicas_and_empty_workers(
    family, policy, family_checkpoint, check_answers, policy_options, rpc_trainer
):
    path = family_checkpoint(family)
    trainer = rpc_trainer(path, 5, **policy_options(policy, path))
    check_answers(path, trainer, MoELightningModule(str(path)))
    placement = trainer.strategy.placement
    replicas = {"round_robin": (0, 0, 0), "balanced": (3, 3, 3), "file": (4, 3, 4)}[policy]
    assert placement.num_replicas == sum(replicas[layer] for layer in placement.layers)


@pytest.mark.parametrize("micro_batches", [1, 2, 3])
def test_every_family_when_parts_of_a_batch_take_turns(
    family, micro_batches, family_checkpoint, check_answers, rpc_trainer, monkeypatch
):
    monkeypatch.setattr("moe_lightning.strategies.rpc_strategy.INTERLEAVE_TOKENS", 2)
    path = family_checkpoint(family)
    trainer = rpc_trainer(path, 2, micro_batches=micro_batches)
    check_answers(path, trainer, MoELightningModule(str(path)))


def test_every_family_with_experts_on_the_master_too(
    family, family_checkpoint, check_answers, rpc_trainer
):
    path = family_checkpoint(family)
    trainer = rpc_trainer(path, 2, experts_on_master=True)
    module = MoELightningModule(str(path))
    check_answers(path, trainer, module)
    placement = trainer.strategy.placement
    assert placement.num_slots == 3
    assert sum(len(shard.expert_ids) for shard in module.hosted.shards) == sum(
        len(placement.experts_of(2, layer)) for layer in placement.layers
    )

"""Every family with its experts on workers, in every way, against unmodified transformers.

The workers are threads of this process that serve real sockets; `tests/cli` and
`test_rpc_tensorpipe` run processes.
"""

import pytest
from families import FAMILIES
from worker_threads import worker_pool

from moe_lightning import MoELightningModule
from moe_lightning.dispatch import Interleaver
from moe_lightning.strategies import RPCStrategy


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    """Each of the promised families in turn, with all its tests one after the other."""
    return request.param


@pytest.fixture(scope="module")
def worker_threads(family):
    """Workers of one family: there are no more of them at a time."""
    with worker_pool() as pool:
        yield pool


@pytest.fixture
def check(family, family_checkpoint, worker_threads, trainer_with, check_answers, monkeypatch):
    """Check all tasks of the family; the module and the placement: ``check(3, policy=...)``."""
    monkeypatch.setattr("moe_lightning.strategies.rpc_strategy.INTERLEAVE_TOKENS", 2)

    def check(num_workers, **options):
        path = family_checkpoint(family)
        strategy = RPCStrategy(worker_threads(path, num_workers), **options)
        module = MoELightningModule(str(path))
        check_answers(path, trainer_with(strategy), module)
        return module, strategy.placement

    return check


@pytest.fixture
def most_parts(monkeypatch):
    """Into how many parts batches have been split so far."""
    most, run = [1], Interleaver.run

    def count(self, parts):
        most[0] = max(most[0], len(parts))
        return run(self, parts)

    monkeypatch.setattr(Interleaver, "run", count)
    return most


def test_one_worker_that_holds_all(check, most_parts):
    module, placement = check(1, micro_batches=1)
    assert len(placement.experts_of(0, 1)) == 8
    assert module.hosted.shards == [], "none is at home"
    assert most_parts == [1]


@pytest.mark.parametrize("num_workers", [2, 3])
def test_several_workers_and_parts_of_a_batch_that_take_turns(check, most_parts, num_workers):
    _, placement = check(num_workers, micro_batches=num_workers)
    sizes = [len(placement.experts_of(slot, 1)) for slot in range(num_workers)]
    assert sorted(sizes) == {2: [4, 4], 3: [2, 3, 3]}[num_workers]
    assert most_parts == [num_workers]


def test_replicas_of_busy_experts(family_checkpoint, family, check, policy_options):
    _, placement = check(3, **policy_options("balanced", family_checkpoint(family)))
    assert placement.num_replicas == 3 * len(placement.layers)


def test_replicas_an_empty_worker_and_experts_on_the_master(
    family_checkpoint, family, check, policy_options
):
    """Slot 3 of the file's five holds nothing; slot 4 is the master."""
    module, placement = check(
        4, experts_on_master=True, **policy_options("file", family_checkpoint(family))
    )
    assert not any(placement.experts_by_layer(3).values())
    assert {shard.layer: shard.expert_ids for shard in module.hosted.shards} == {
        layer: placement.experts_of(4, layer) for layer in placement.layers
    }
    assert placement.experts_of(4, 1) == (0, 3, 6)

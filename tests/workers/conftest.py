"""Masters of workers in threads, and what their experts give by the family's own code."""

from contextlib import ExitStack, suppress

import pytest
import torch
from masters import LAYERS, NUM_EXPERTS, Master, placed
from worker_threads import worker_threads

from moe_lightning.experts.backends import reference
from moe_lightning.modeling.checkpoint import open_checkpoint
from moe_lightning.modeling.manifest import manifest_hash
from moe_lightning.modeling.seam import find_moe_layers
from moe_lightning.transport.messages import Control
from moe_lightning.transport.zmq_transport import ZmqTransport
from moe_lightning.workers.roster import Roster

__all__ = ["placed", "worker_threads"]


@pytest.fixture(scope="session")
def checkpoint(family_checkpoint):
    """Three MoE layers of eight experts, 32 wide."""
    return family_checkpoint("mixtral")


@pytest.fixture(scope="session")
def rows():
    """Rows, their experts (all of them have some) and weights: ``rows(num_rows)``."""

    def rows(num_rows=37, seed=0):
        generator = torch.Generator().manual_seed(seed)
        hidden_TD = torch.randn(num_rows, 32, generator=generator)
        weights_TK, index_TK = torch.rand(num_rows, NUM_EXPERTS, generator=generator).topk(3, dim=1)
        return hidden_TD, index_TK, weights_TK

    return rows


@pytest.fixture(scope="session")
def expected(checkpoint, plain_transformers):
    """What the family's own experts give: ``expected(layer, *rows)``."""
    layers = {n.layer: n.experts for n in find_moe_layers(plain_transformers(checkpoint).model)}

    @torch.no_grad()
    def expected(layer, hidden_TD, index_TK, weights_TK):
        return reference(layers[layer], hidden_TD, index_TK, weights_TK)

    return expected


@pytest.fixture
def meet(checkpoint):
    """The roster of workers that have been met: ``meet(addresses, timeout_s=...)``."""
    with ExitStack() as stack:

        def meet(addresses, *, timeout_s=15.0, join_timeout_s=20.0, manifest=None):
            roster = Roster(addresses, keys=None, timeout_s=timeout_s)
            with open_checkpoint(str(checkpoint)) as view, ExitStack() as on_failure:
                on_failure.callback(roster.close)
                manifest = manifest or manifest_hash(view)
                roster.meet(manifest, join_timeout_s=join_timeout_s, still_starting=lambda: None)
                on_failure.pop_all()
            stack.callback(_tell_the_lost, roster)
            stack.callback(roster.close)
            return roster

        yield meet


def _tell_the_lost(roster):
    """Tell workers that a test has called lost that they are free for the next test's master."""
    lost = [worker for worker in roster.offers if roster.liveness.lost(worker) is not None]
    transport = ZmqTransport(roster.addresses)
    frames = Control(roster.session, 1, "bye", {}).frames()
    for pending in [transport.ask(worker, 1, frames) for worker in lost]:
        with suppress(TimeoutError):  # it has left
            pending.result(0.3)
    transport.close()


@pytest.fixture
def master(checkpoint, meet):
    """A master of workers, which load by a placement: ``master(addresses, placement)``."""

    def master(addresses, placement=None, *, timeout_s=15.0, **options):
        made = Master(meet(addresses, timeout_s=timeout_s), checkpoint, **options)
        if placement is not None:
            made.start_loading(placement)()
        return made

    return master


@pytest.fixture
def check_sums(rows, expected):
    """Check that a master's sums are those of the family's own code, in every layer."""

    def check_sums(master, **options):
        some = rows(**options)
        for layer in LAYERS:
            # fp32 sums in another order.
            torch.testing.assert_close(
                master.compute(layer, *some), expected(layer, *some), atol=1e-6, rtol=1e-5
            )

    return check_sums

"""Masters of workers in threads, and what their experts give by the family's own code."""

from contextlib import ExitStack, suppress

import pytest
import torch
from worker_threads import worker_threads

from moe_lightning.dispatch import RemoteDispatcher, RoutingLog
from moe_lightning.experts import ExpertShard
from moe_lightning.experts.backends import reference
from moe_lightning.modeling.checkpoint import open_checkpoint
from moe_lightning.modeling.loading import load_experts
from moe_lightning.modeling.manifest import manifest_hash
from moe_lightning.modeling.seam import find_moe_layers
from moe_lightning.placement import ExpertPlacement
from moe_lightning.transport.messages import Control
from moe_lightning.transport.zmq_transport import ZmqTransport
from moe_lightning.workers.fleet import Fleet
from moe_lightning.workers.question import WireOptions
from moe_lightning.workers.roster import Roster

__all__ = ["worker_threads"]

CPU = torch.device("cpu")
LAYERS = (0, 1, 2)
NUM_EXPERTS = 8


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
            stack.callback(_say_goodbye, roster)
            stack.callback(roster.close)
            with open_checkpoint(str(checkpoint)) as view:
                manifest = manifest or manifest_hash(view)
            roster.meet(manifest, join_timeout_s=join_timeout_s, still_starting=lambda: None)
            return roster

        yield meet


def _say_goodbye(roster):
    """Tell those that the master takes for lost as well: the next test's master is to be served."""
    transport = ZmqTransport(roster.addresses)
    pending = [
        transport.ask(worker, 1, Control(roster.session, 1, "bye", {}).frames())
        for worker in range(len(roster.addresses))
    ]
    for each in pending:
        with suppress(TimeoutError):  # it has left
            each.result(5)
    transport.close()


def placed(*experts_of_slot):
    """A placement that is the same in every layer: ``placed((0, 1), (2, 3, ...))``."""
    slots = tuple(
        tuple(slot for slot, held in enumerate(experts_of_slot) if expert in held)
        for expert in range(NUM_EXPERTS)
    )
    return ExpertPlacement(len(experts_of_slot), dict.fromkeys(LAYERS, slots))


class Master:
    """A fleet whose workers load, and a dispatcher for each layer."""

    def __init__(self, roster, checkpoint, *, expert_bytes=1, master_adopts=False, wire=None):
        self.fleet = Fleet(roster, wire=wire or WireOptions(), device=CPU)
        self.log = RoutingLog()
        self.read_at_home = []
        self._checkpoint = checkpoint
        self._expert_bytes = expert_bytes
        self._adopts = master_adopts
        self._dispatchers = {
            layer: RemoteDispatcher(self.fleet, num_experts=NUM_EXPERTS, layer=layer, log=self.log)
            for layer in LAYERS
        }

    def start_loading(self, placement, *, experts_backend="auto"):
        self._backend = experts_backend
        wait = self.fleet.start_loading(
            placement,
            dtype=torch.float32,
            experts_backend=experts_backend,
            expert_bytes=[dict.fromkeys(LAYERS, self._expert_bytes)] * self.fleet.home,
            load_at_home=self._load_at_home if self._adopts else None,
        )
        self._load_at_home(placement.experts_by_layer(self.fleet.home))
        return wait

    def _load_at_home(self, experts):
        self.read_at_home.append({layer: list(ids) for layer, ids in experts.items() if ids})

        def add(layer):
            ids = experts[layer.layer]
            shard = ExpertShard(
                layer.experts, layer=layer.layer, expert_ids=ids, backend=self._backend
            )
            self.fleet.held_at_home(layer.layer).add(shard)

        with open_checkpoint(str(self._checkpoint)) as view:
            load_experts(
                view,
                device=CPU,
                dtype=torch.float32,
                experts=experts,
                on_layer=add,
                show_progress=False,
            )

    @torch.inference_mode()
    def compute(self, layer, *rows):
        return self._dispatchers[layer](*rows)

    def lose(self, worker, reason="made up"):
        """Make the fleet believe that a worker is gone."""
        self.fleet.roster.liveness.give_up(worker, reason)


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

"""Masters of a checkpoint with three MoE layers of eight experts: a fleet, and its dispatchers."""

import torch

from moe_lightning.dispatch import RemoteDispatcher, RoutingLog
from moe_lightning.experts import ExpertShard
from moe_lightning.modeling.checkpoint import open_checkpoint
from moe_lightning.modeling.loading import load_experts
from moe_lightning.placement import ExpertPlacement
from moe_lightning.workers.fleet import Fleet
from moe_lightning.workers.question import WireOptions

CPU = torch.device("cpu")
LAYERS = (0, 1, 2)
NUM_EXPERTS = 8
EXPERT_BYTES = 3 * 32 * 24 * 4  # gate, up and down in float32


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

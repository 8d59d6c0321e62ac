"""Fleet: the workers of a run as dispatchers see them: who is asked, and who steps in.

meet ──▶ load ──▶ ask, ask, ...        a worker is lost ──▶ recover: others adopt its experts
"""

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from moe_lightning.dispatch.plan import LayerRoutes
from moe_lightning.errors import WorkersLostError
from moe_lightning.experts import HeldExperts
from moe_lightning.placement import ExpertPlacement
from moe_lightning.placement.adoption import Survivor, plan_adoption
from moe_lightning.transport.messages import Failure, FailureCode
from moe_lightning.transport.transport import ExpertTransport, Pending, WorkerLost
from moe_lightning.workers.holdings import Holdings, in_words
from moe_lightning.workers.question import Flights, Questions, WireOptions, WorkerFlight
from moe_lightning.workers.roster import LOOK_AGAIN_S, Roster

_log = logging.getLogger("moe_lightning.fleet")
STUCK_S = 120.0  # a worker that reads nothing for so long, while it loads, is stuck


class Fleet:
    """The workers of a run, met and loaded (dispatch.RemoteExperts).

    Args:
        roster: The workers, met.
        wire: How rows travel.
        device: Where the master's rows are.

    Attributes:
        names: Address of each worker, then ``master``.
        home: The master's own slot, after those of the workers.
        lost: Why workers were lost, by number.
    """

    def __init__(self, roster: Roster, *, wire: WireOptions, device: torch.device) -> None:
        self.roster = roster
        self.names = (*roster.addresses, "master")
        self.home = len(roster.addresses)
        self.lost: dict[int, str] = {}
        self._device = device
        self._data: ExpertTransport = roster.transport
        self._wire = wire
        self._questions = Questions(roster.session, wire, ids=roster.ids, device=device)
        self._held_at_home: dict[int, HeldExperts] = {}
        self._expert_bytes: Sequence[Mapping[int, int]] = ()
        self._how: dict[str, str] = {}
        self._load_at_home: Callable[[Mapping[int, Sequence[int]]], None] | None = None
        self._lock = threading.RLock()

    def report(self) -> dict[str, Any]:
        """What the run's report says of the workers."""
        said = ("host", "device", "threads", "torch")
        workers = [
            {"address": self.names[worker], **{key: offer.get(key) for key in said}}
            for worker, offer in sorted(self.roster.offers.items())
        ]
        lost = [{"address": self.names[w], "reason": why} for w, why in sorted(self.lost.items())]
        return {"workers": workers, "workers_lost": lost}

    # Before the first row.

    def use(self, transport: Callable[..., ExpertTransport]) -> None:
        """Carry rows by another transport than control messages.

        Args:
            transport: Makes it; called with names, how to tell a worker to join, whether one is
                lost, and how to give one up.
        """
        self._data = transport(
            [f"worker{n}" for n in range(self.home)],
            join=lambda worker, body: self.roster.order(worker, "join", body),
            lost=self.roster.liveness.lost,
            give_up=self.roster.liveness.give_up,
        )

    def start_loading(
        self,
        placement: ExpertPlacement,
        *,
        dtype: torch.dtype,
        experts_backend: str,
        expert_bytes: Sequence[Mapping[int, int]],
        load_at_home: Callable[[Mapping[int, Sequence[int]]], None] | None,
    ) -> Callable[[], None]:
        """Have all workers load their experts.

        Args:
            placement: Who holds what; the slot after the workers is the master.
            dtype: Dtype of the weights.
            experts_backend: How experts are computed.
            expert_bytes: For each worker, bytes of one expert of each layer.
            load_at_home: Loads experts into the master; None if it is to adopt none.

        Returns:
            A function that waits until all have.
        """
        self._how = {"dtype": str(dtype).removeprefix("torch."), "experts_backend": experts_backend}
        self._expert_bytes = expert_bytes
        self._load_at_home = load_at_home
        self._holdings = Holdings(placement, device=self._device)
        for layer in placement.layers:
            self._held_at_home[layer] = HeldExperts(placement.num_experts(layer))
        asked = {
            worker: self._tell_to_load(worker, placement.experts_by_layer(worker))
            for worker in range(self.home)
        }

        def wait() -> None:
            lost = []
            with tqdm(desc="Workers load", unit="B", unit_scale=True, delay=2, leave=False) as bar:
                for worker, pending in asked.items():
                    try:
                        self._finish_loading(worker, pending, bar)
                    except WorkerLost:
                        lost.append(worker)
            for worker in lost:  # now that all others have told what room they have left
                self.recover(worker)
            self._holdings.plan_routes()

        return wait

    def _tell_to_load(self, worker: int, experts: Mapping[int, Sequence[int]]) -> Pending:
        wanted = {str(layer): list(ids) for layer, ids in experts.items() if ids}
        return self.roster.tell(worker, "load", {**self._how, "experts": wanted})

    def _finish_loading(
        self, worker: int, pending: Pending, bar: "tqdm[Any] | None" = None
    ) -> None:
        liveness = self.roster.liveness
        num_read, since_s = -1, time.monotonic()
        while True:
            try:
                answer = self.roster.answer(pending, LOOK_AGAIN_S)
                break
            except TimeoutError:
                if bar is not None:
                    all_read = (liveness.progress(w).bytes_read for w in range(self.home))
                    bar.update(sum(all_read) - bar.n)
                now = liveness.progress(worker).bytes_read
                if now != num_read:
                    num_read, since_s = now, time.monotonic()
                elif time.monotonic() - since_s > STUCK_S:
                    reason = f"it read nothing for {STUCK_S:.0f} s while it loaded its experts"
                    liveness.give_up(worker, reason)
        if isinstance(answer, Failure) and answer.code is FailureCode.WRONG_SESSION:
            liveness.give_up(worker, answer.text)
            raise WorkerLost(worker, answer.text)
        if isinstance(answer, Failure):
            raise WorkersLostError(
                f"worker {self.names[worker]} cannot load its experts: {answer.text}"
            )
        self.roster.offers[worker]["free_bytes"] = answer.body.get("free_bytes", 0)

    # Rows.

    def routes(self, layer: int) -> LayerRoutes:
        """Where the layer's experts are now."""
        return self._holdings.routes(layer)

    def held_at_home(self, layer: int) -> HeldExperts:
        """The layer's experts that the master holds."""
        return self._held_at_home[layer]

    def ask(
        self, slot: int, layer: int, rows_RD: Tensor, index_RK: Tensor, weights_RK: Tensor
    ) -> WorkerFlight | Flights:
        """Send rows to a worker.

        Args:
            slot: The worker.
            layer: Decoder layer.
            rows_RD: Rows.
            index_RK: Logical experts; the layer's number of experts stands for "not yours".
            weights_RK: Router weights.

        Returns:
            What the sums are waited for with.

        Raises:
            WorkerLost: If the worker is known to be gone.
        """
        num_bytes = rows_RD.numel() * rows_RD.element_size()
        num_parts = max(1, min(-(-num_bytes // self._wire.message_bytes), len(rows_RD)))
        tensors = (t.tensor_split(num_parts) for t in (rows_RD, index_RK, weights_RK))
        parts = [self._ask(slot, layer, *part) for part in zip(*tensors, strict=True)]
        return parts[0] if num_parts == 1 else Flights(parts)

    def _ask(
        self, slot: int, layer: int, rows_RD: Tensor, index_RK: Tensor, weights_RK: Tensor
    ) -> WorkerFlight:
        question = self._questions.put(layer, rows_RD, index_RK, weights_RK)
        pending = self._data.ask(slot, question.request, question.frames)
        return WorkerFlight(slot, question, pending, give_up=self.roster.liveness.give_up)

    # Losses.

    def recover(self, slot: int) -> None:
        """See to it that others hold a lost worker's experts.

        Args:
            slot: The lost worker.

        Raises:
            WorkersLostError: If nobody can.
        """
        with self._lock:
            self._note_losses(slot)
            while orphans := self._holdings.orphans():
                adopted, left_over = plan_adoption(
                    orphans, self._survivors(), room_bytes=self._room()
                )
                if left_over and self._load_at_home is None:
                    raise self._nobody(left_over)
                self._adopt(adopted)
                if left_over and self._load_at_home is not None:
                    self._load_at_home(left_over)
                    self._holdings.hold(self.home, left_over)
                    _log.warning("the master adopted %s", in_words(left_over))
            self._holdings.plan_routes()

    def _adopt(self, adopted: Mapping[int, Mapping[int, Sequence[int]]]) -> None:
        start_s = time.monotonic()
        asked = {worker: self._tell_to_load(worker, adopted[worker]) for worker in adopted}
        for worker, pending in asked.items():
            try:
                self._finish_loading(worker, pending)
            except WorkerLost as lost:
                self._note_losses(lost.worker)
            except WorkersLostError as error:
                _log.warning("%s", error)
                self.roster.offers[worker]["free_bytes"] = 0  # it is not asked again
            else:
                self._holdings.hold(worker, adopted[worker])
                _log.warning(
                    "worker %s adopted %s in %.1f s",
                    self.names[worker],
                    in_words(adopted[worker]),
                    time.monotonic() - start_s,
                )

    def _note_losses(self, slot: int) -> None:
        liveness = self.roster.liveness
        if liveness.lost(slot) is None:
            liveness.give_up(slot, "it does not answer")
        for worker in range(self.home):
            reason = liveness.lost(worker)
            if reason is not None and worker not in self.lost:
                self.lost[worker] = reason
                _log.warning("worker %s is lost: %s", self.names[worker], reason)
                self._holdings.drop(worker)

    def _survivors(self) -> dict[int, Survivor]:
        return {
            worker: self._holdings.survivor(worker, offer["pool"], self._expert_bytes[worker])
            for worker, offer in self.roster.offers.items()
            if worker not in self.lost and offer["free_bytes"] > 0
        }

    def _room(self) -> dict[str, float]:
        room: dict[str, float] = {}
        for worker, offer in self.roster.offers.items():
            if worker not in self.lost and offer["free_bytes"] > 0:
                pool = offer["pool"]
                room[pool] = min(room.get(pool, offer["free_bytes"]), offer["free_bytes"])
        return room

    def _nobody(self, orphans: Mapping[int, Sequence[int]]) -> WorkersLostError:
        gone = "; ".join(f"{self.names[w]} ({reason})" for w, reason in sorted(self.lost.items()))
        return WorkersLostError(
            f"lost {gone}. Nobody has room to adopt {in_words(orphans)}. Start the "
            "workers again and repeat the command, add workers, or let the master load what "
            "nobody else can (--trainer.strategy.master_adopts true)."
        )

    def close(self) -> None:
        """Tell the workers that the run is over, and give up all sockets."""
        if self._data is not self.roster.transport:
            self._data.close()
        self.roster.close()

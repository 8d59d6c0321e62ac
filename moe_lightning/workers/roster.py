"""Roster: the workers that a master has met, and control messages to them."""

import itertools
import logging
import os
import secrets
import socket
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

import moe_lightning
from moe_lightning.errors import UsageError, WorkersLostError
from moe_lightning.transport.addresses import seen_from
from moe_lightning.transport.keys import Keys
from moe_lightning.transport.liveness import Liveness
from moe_lightning.transport.messages import (
    PROTOCOL,
    Control,
    Failure,
    FailureCode,
    MalformedMessage,
    Reply,
    parse,
)
from moe_lightning.transport.transport import Pending, WorkerLost
from moe_lightning.transport.zmq_transport import ZmqTransport

_log = logging.getLogger("moe_lightning.fleet")
LOOK_AGAIN_S = 0.5
GOODBYE_S = 0.5  # Ctrl-C ends a run within 2 s, whoever sleeps
OFFER = {"pulse": str, "pool": str, "device": str, "free_bytes": int, "host": str}


class Roster:
    """The workers of a run; a worker's number is its place here.

    Args:
        addresses: Where they are.
        keys: Keys beyond loopback.
        timeout_s: Longest silence of a worker that is not lost.

    Attributes:
        addresses: Where they are.
        session: Number of the run.
        ids: Where numbers of requests come from.
        offers: What each worker that was met offered.
        liveness: Who is there.
        transport: Carries control messages, and may carry rows.
    """

    def __init__(self, addresses: Sequence[str], *, keys: Keys | None, timeout_s: float) -> None:
        self.addresses = tuple(addresses)
        self.session = secrets.randbits(63) | 1
        self.ids = itertools.count(1)
        self.offers: dict[int, dict[str, Any]] = {}
        self.liveness = Liveness(session=self.session, timeout_s=timeout_s, keys=keys)
        self.transport = ZmqTransport(self.addresses, keys=keys, lost=self.liveness.lost)
        self._num_workers = len(self.addresses)
        self._timeout_s = timeout_s

    def meet(
        self, manifest: str, *, join_timeout_s: float, still_starting: Callable[[], None]
    ) -> None:
        """Meet all workers.

        Args:
            manifest: Hash of the master's checkpoint.
            join_timeout_s: Longest wait for all of them.
            still_starting: Called while waiting; raises if a worker will never come.

        Raises:
            UsageError: If one does not answer in time, or does not fit.
        """
        body = {
            "protocol": PROTOCOL,
            "version": moe_lightning.__version__,
            "manifest": manifest,
            "timeout_s": self._timeout_s,
            "master": f"{socket.gethostname()} {os.getpid()}",
        }
        begin_s = time.monotonic()
        deadline_s = begin_s + join_timeout_s
        # By then a worker has noticed that its master was killed.
        free_s = min(begin_s + 1.2 * self._timeout_s, deadline_s - 2 * LOOK_AGAIN_S)
        absent = {worker: self.tell(worker, "hello", body) for worker in range(self._num_workers)}
        trouble = [""] * self._num_workers
        # Whoever answers is greeted at once: a worker that hears nothing takes its master for gone.
        while absent and time.monotonic() < deadline_s:
            still_starting()
            for worker, pending in list(absent.items()):
                try:
                    answer = self.answer(pending, LOOK_AGAIN_S / self._num_workers)
                except TimeoutError as error:
                    cause = str(error).partition(" s: ")[2]
                    trouble[worker] = cause and f" ({cause})"
                    continue
                del absent[worker]
                is_busy = isinstance(answer, Failure) and answer.code is FailureCode.BUSY
                if is_busy and time.monotonic() < free_s:
                    time.sleep(LOOK_AGAIN_S)
                    absent[worker] = self.tell(worker, "hello", body)
                    continue
                if isinstance(answer, Failure):
                    raise UsageError(
                        f"worker {self.addresses[worker]} refuses this run: {answer.text}"
                    )
                self._welcome(worker, answer.body)
        if absent:
            who = [f"{self.addresses[worker]}{trouble[worker]}" for worker in absent]
            raise UsageError(
                f"no answer within {join_timeout_s:.0f} s from {', '.join(who)}. Start a worker "
                "there (python -m moe_lightning worker --listen ADDRESS --model.checkpoint DIR), "
                "check address, firewall (the port and the one after it) and keys, or wait longer "
                "with --trainer.strategy.join_timeout_s."
            )

    def _welcome(self, worker: int, offer: dict[str, Any]) -> None:
        address = self.addresses[worker]
        if any(not isinstance(offer.get(name), kind) for name, kind in OFFER.items()):
            raise UsageError(f"worker {address} gave an answer that makes no sense.")
        if offer.get("torch") != str(torch.__version__):
            _log.warning(
                "worker %s has torch %s, the master %s: last digits may differ",
                address,
                offer.get("torch"),
                torch.__version__,
            )
        # Only the port is taken from the answer: the host is the one that was asked.
        self.liveness.watch(worker, address, seen_from(address, offer["pulse"]))
        self.offers[worker] = offer

    def tell(self, worker: int, verb: str, body: dict[str, Any]) -> Pending:
        """Send a control message.

        Args:
            worker: To whom.
            verb: What is to be done.
            body: With what.

        Returns:
            What the answer is waited for with.
        """
        request = next(self.ids)
        frames = Control(self.session, request, verb, body).frames()
        try:
            return self.transport.ask(worker, request, frames)
        except WorkerLost as lost:
            return _Gone(lost)

    def answer(self, pending: Pending, timeout_s: float) -> Reply | Failure:
        """Wait for the answer to a control message.

        Args:
            pending: What :meth:`tell` returned.
            timeout_s: Longest wait.

        Returns:
            The answer.

        Raises:
            WorkerLost: If the worker is gone.
            TimeoutError: If there is no answer in time.
            WorkersLostError: If the answer makes no sense.
        """
        try:
            answer = parse(pending.result(timeout_s))
        except MalformedMessage as error:
            raise WorkersLostError(f"a worker's answer makes no sense: {error}") from error
        if isinstance(answer, Failure) and answer.code is FailureCode.WRONG_SESSION:
            return Failure(0, 0, answer.code, "it has been restarted, or serves another master")
        if not isinstance(answer, Reply | Failure):
            raise WorkersLostError(f"a worker answers with {type(answer).__name__}")
        return answer

    def order(self, worker: int, verb: str, body: dict[str, Any]) -> None:
        """Send a control message and wait until it is done.

        Raises:
            UsageError: If it cannot be done.
        """
        answer = self.answer(self.tell(worker, verb, body), 4 * self._timeout_s)
        if isinstance(answer, Failure):
            raise UsageError(f"worker {self.addresses[worker]} cannot {verb}: {answer.text}")

    def close(self) -> None:
        """Tell the workers that the run is over, and give up all sockets."""
        # Those too whose answer to hello was not waited for, when another one refused.
        told = [
            self.tell(worker, "bye", {})
            for worker in range(self._num_workers)
            if self.liveness.lost(worker) is None
        ]
        deadline_s = time.monotonic() + GOODBYE_S
        for pending in told:
            try:
                self.answer(pending, max(0.0, deadline_s - time.monotonic()))
            except (WorkerLost, WorkersLostError, TimeoutError):
                continue  # it will notice by itself
        self.transport.close()
        self.liveness.close()


class _Gone(Pending):
    """What a worker that is known to be gone was asked."""

    def __init__(self, lost: WorkerLost) -> None:
        self._lost = lost

    def result(self, timeout_s: float) -> list[memoryview]:
        raise self._lost

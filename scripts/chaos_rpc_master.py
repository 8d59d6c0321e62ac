"""The strategy of a master that is watched: ``moe_rpc``, with marks that say how far it is.

began ─▶ met ─▶ ready ─▶ (prefill ─▶ decode) ... ─▶ done ─▶ left        lost, adopted: any time
"""

import json
import logging
import os
import sys
import time
from typing import Any

from typing_extensions import override

from moe_lightning.strategies.rpc_meeting import RPCMeeting
from moe_lightning.strategies.rpc_strategy import RPCStrategy
from moe_lightning.workers.fleet import Fleet

MARKS = "CHAOS_MARKS"
"""Names the file, in the environment."""


class WatchedRPCStrategy(RPCStrategy):
    """``moe_rpc``, watched."""

    @override
    def setup_environment(self) -> None:
        mark("began")
        handler = FleetLog()
        logging.getLogger("moe_lightning.fleet").addHandler(handler)
        self._meeting = WatchedMeeting(self)
        super().setup_environment()

    @override
    def on_predict_start(self) -> None:
        super().on_predict_start()
        mark("ready")
        self._is_prefill = True
        model = getattr(self.lightning_module, "model")  # noqa: B009  (a Tensor or Module to mypy)
        model.register_forward_pre_hook(self._on_forward, with_kwargs=True)

    def _on_forward(self, model: Any, args: Any, kwargs: Any) -> None:
        if self._is_prefill and kwargs["input_ids"].shape[1] == 1:
            self._is_prefill = False
            mark("decode")

    @override
    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        mark("prefill")
        self._is_prefill = True
        return super().predict_step(*args, **kwargs)

    @override
    def on_predict_end(self) -> None:
        mark("done")
        super().on_predict_end()

    @override
    def teardown(self) -> None:
        super().teardown()
        mark("left")


class WatchedMeeting(RPCMeeting):
    """Marks when all workers are there."""

    @override
    def meet(self, *args: Any, **kwargs: Any) -> Fleet:
        fleet = super().meet(*args, **kwargs)
        mark("met")
        return fleet


class FleetLog(logging.Handler):
    """Marks what the fleet logs, and says it."""

    @override
    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        name = next((word for word in ("lost", "adopted") if f" {word}" in text), "log")
        mark(name, text)
        print(text, file=sys.stderr, flush=True)


def mark(name: str, text: str = "") -> None:
    """Write a mark: one line, in one piece."""
    line = json.dumps({"name": name, "at_s": time.monotonic(), "text": text}) + "\n"
    with open(os.environ[MARKS], "a") as file:
        file.write(line)

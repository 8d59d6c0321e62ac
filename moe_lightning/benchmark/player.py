"""The process of one strategy: ``python -m moe_lightning.benchmark.player TASK.json``.

One call of ``Trainer.predict`` with a dataloader for each phase: everything is loaded once. Every
rank leaves ``rank-N.json`` in the directory of the task.

    score      all rows: log-probabilities, to compare; warms up
    warm-up    two tokens for a few rows
    prefill    one token for every row
    decode     all tokens for every row, and their prefill again
"""

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from typing_extensions import override

from moe_lightning.callbacks.communication_times import PARTS, CommunicationTimes
from moe_lightning.data.prompts import PromptData
from moe_lightning.modeling.sharding_times import ShardingTimes, ShardingWatch
from moe_lightning.module import MoELightningModule
from moe_lightning.strategies import SHARDED_PRESETS
from moe_lightning.strategies.registry import STRATEGIES
from moe_lightning.tasks import Generate, Score, Task

PHASES = ("score", "warm-up", "prefill", "decode")
WARM_UP_ROWS = 8
Numbers = dict[str, Any]


def play(task: Numbers) -> None:
    """Run every phase, and leave what this rank saw.

    Args:
        task: What ``rounds`` writes: ``checkpoint``, ``dtype``, ``experts_backend``, ``strategy``,
            ``options``, ``accelerator``, ``num_devices``, ``rows``, ``max_new_tokens``,
            ``max_batch_tokens``, ``out``.
    """
    module = MoELightningModule(
        task["checkpoint"], dtype=task["dtype"], experts_backend=task["experts_backend"]
    )
    clock = PhaseClock(max_new_tokens=task["max_new_tokens"])
    out = Path(task["out"])
    trainer = Trainer(
        strategy=_strategy(task["strategy"], task["options"]),
        accelerator=task["accelerator"],
        devices=task["num_devices"],
        callbacks=[clock],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        default_root_dir=out,
    )
    data = PhaseData(task["rows"], task["max_batch_tokens"], clock.tasks)
    answers = trainer.predict(module, datamodule=data)
    assert answers is not None, "predict returns them"
    rows: list[dict[str, Any]] = [
        row for phase in (answers[0], answers[-1]) for batch in phase for row in batch
    ]
    report = {"phases": clock.phases, "rows": rows, "device_bytes": _device_bytes()}
    (out / f"rank-{trainer.global_rank}.json").write_text(json.dumps(report))


class PhaseData(LightningDataModule):
    """The same rows once for each phase, planned for its task."""

    def __init__(self, rows: str, max_batch_tokens: int, tasks: list[Task]) -> None:
        super().__init__()
        self.budget_tokens = max_batch_tokens
        self._tasks = tasks
        self._data = [
            PromptData(
                rows,
                max_batch_tokens=max_batch_tokens,
                limit_rows=WARM_UP_ROWS if phase == "warm-up" else None,
            )
            for phase in PHASES
        ]

    @override
    def setup(self, stage: str) -> None:
        assert self.trainer is not None, "setup is called by a trainer"
        encoder: Any = self.trainer.lightning_module.encoder
        for data, task in zip(self._data, self._tasks, strict=True):
            data.trainer = self.trainer
            data.plan(encoder, task)

    @override
    def predict_dataloader(self) -> Any:
        return [data.predict_dataloader() for data in self._data]


@dataclass
class _Seen:
    """What the layers of a phase did."""

    times: CommunicationTimes
    gather_s: float
    gather_bytes: int


class PhaseClock(Callback):
    """Gives the module the task of each phase, and takes its times and bytes.

    Args:
        max_new_tokens: Tokens to generate in the last phase.

    Attributes:
        tasks: The task of each phase.
        phases: By name, its beginning and end (``time.monotonic``), seconds of the parts of all
            layers and of gathers of weights, how many passes they had, and bytes that left this
            process for another slot.
    """

    def __init__(self, *, max_new_tokens: int) -> None:
        lengths = (2, 1, max_new_tokens)
        # A plan that is no larger than a forward: all ranks get rows.
        generate = [Generate(max_new_tokens=n, ignore_eos=True, rows_factor=1) for n in lengths]
        self.tasks: list[Task] = [Score(), *generate]
        self.phases: dict[str, Numbers] = {}
        self._seen: _Seen | None = None
        self._sharding: ShardingWatch | None = None

    @override
    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        module: Any = pl_module
        self._sharding = ShardingWatch(module.model)
        self._sharding.begin()
        module.routing_log.subscribe(self._see, wants_times=True)

    @override
    def on_predict_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        module: Any = pl_module
        name = PHASES[dataloader_idx]
        if name in self.phases:
            return
        module.task = self.tasks[dataloader_idx]
        gathered = self._gathered()
        self._seen = _Seen(CommunicationTimes(), gathered.gather_s, gathered.gather_bytes)
        self.phases[name] = {"begin_s": time.monotonic()}

    @override
    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        end_s = time.monotonic()
        assert self._seen is not None, "the batch has begun"
        times = self._seen.times
        times.read()
        layers, gathered = times.layers.values(), self._gathered()
        seconds = {part: sum(getattr(each, f"{part}_s") for each in layers) for part in PARTS}
        seconds["gather"] = gathered.gather_s - self._seen.gather_s
        self.phases[PHASES[dataloader_idx]] |= {
            "end_s": end_s,
            "parts_s": seconds,
            "num_passes": sum(each.num_passes for each in layers),
            "row_bytes": sum(times.links.values()),
            "weight_bytes": gathered.gather_bytes - self._seen.gather_bytes,
        }

    @override
    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        module: Any = pl_module
        module.routing_log.unsubscribe(self._see)
        assert self._sharding is not None, "the run has begun"
        self._sharding.end()

    def _see(self, trace: Any) -> None:
        if self._seen is not None:
            self._seen.times.add(trace)

    def _gathered(self) -> ShardingTimes:
        assert self._sharding is not None, "the run has begun"
        return self._sharding.read()


def _strategy(name: str, options: Numbers) -> Any:
    if name not in STRATEGIES:
        return name
    strategy: Any = STRATEGIES[name]
    return strategy(**SHARDED_PRESETS.get(name, {}) | options)


def _device_bytes() -> int:
    """Most memory of GPUs that this process has had at once."""
    return sum(torch.cuda.max_memory_allocated(i) for i in range(torch.cuda.device_count()))


if __name__ == "__main__":
    play(json.loads(Path(sys.argv[1]).read_text()))

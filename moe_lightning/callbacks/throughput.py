"""Throughput: what a predict run did, how fast, and on what."""

import importlib.metadata
import json
import platform
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

import moe_lightning
from moe_lightning.files import write_atomically
from moe_lightning.strategies import MoEStrategy

PACKAGES = ("torch", "lightning", "transformers", "safetensors")


class Throughput(Callback):
    """Counts rows and tokens per second of predict; prints a summary and writes ``run.json``.

    Args:
        output_dir: Where ``run.json`` goes. The default is the trainer's ``default_root_dir``.

    Attributes:
        num_errors: After the run, rows in ``errors.jsonl``, over all ranks.
    """

    def __init__(self, output_dir: str | None = None) -> None:
        self.output_dir = output_dir
        self.num_errors = 0
        self._started: datetime | None = None

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._started = datetime.now(UTC)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "predict":
            return
        counts = self._counts(trainer, pl_module)
        self.num_errors = int(counts["num_errors"]) + _num_input_errors(trainer)
        if trainer.is_global_zero:
            report = self._write(trainer, counts, "finished")
            print(_summary(report), file=sys.stderr)

    @override
    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        # Without a setup nothing has begun, and older reports stay.
        if trainer.is_global_zero and trainer.predicting and self._started is not None:
            is_interrupt = isinstance(exception, KeyboardInterrupt)
            reason = "interrupted" if is_interrupt else f"{type(exception).__name__}: {exception}"
            # The other ranks may be gone, so nothing is summed over them here.
            self._write(trainer, _own_counts(trainer, pl_module), reason)

    def _counts(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, float]:
        own = _own_counts(trainer, pl_module)
        elapsed_s = own.pop("elapsed_s")
        total = trainer.strategy.reduce(
            torch.tensor(list(own.values()), dtype=torch.float64), reduce_op="sum"
        )
        counts = dict(zip(own, torch.as_tensor(total).tolist(), strict=True))
        return counts | {"elapsed_s": elapsed_s}

    def _write(
        self, trainer: Trainer, counts: dict[str, float], exit_reason: str
    ) -> dict[str, Any]:
        directory = Path(self.output_dir or trainer.default_root_dir)
        elapsed_s = counts["elapsed_s"]
        tokens = counts["num_prompt_tokens"] + counts["num_new_tokens"]
        input_errors = _num_input_errors(trainer)
        num_failed = int(counts["num_errors"]) + input_errors
        report = {
            "exit_reason": exit_reason,
            "started": (self._started or datetime.now(UTC)).isoformat(timespec="seconds"),
            "elapsed_s": round(elapsed_s, 3),
            "num_rows": int(counts["num_rows"]) + input_errors,
            "num_predictions": int(counts["num_rows"]) - int(counts["num_errors"]),
            "num_errors": num_failed,
            "num_prompt_tokens": int(counts["num_prompt_tokens"]),
            "num_new_tokens": int(counts["num_new_tokens"]),
            "padding_share": round(
                counts["num_padding_tokens"] / max(1, tokens + counts["num_padding_tokens"]), 4
            ),
            "rows_per_s": round(counts["num_rows"] / max(elapsed_s, 1e-9), 2),
            "tokens_per_s": round(tokens / max(elapsed_s, 1e-9), 1),
            "strategy": type(trainer.strategy).__name__,
            "world_size": trainer.world_size,
            "devices": _devices(trainer),
            **_strategy_report(trainer),
            "versions": {
                "moe_lightning": moe_lightning.__version__,
                "python": platform.python_version(),
                **{name: importlib.metadata.version(name) for name in PACKAGES},
            },
            "output_dir": str(directory),
        }
        directory.mkdir(parents=True, exist_ok=True)
        write_atomically(directory / "run.json", json.dumps(report, indent=2) + "\n")
        return report


def _own_counts(trainer: Trainer, pl_module: LightningModule) -> dict[str, float]:
    names = (
        "num_rows",
        "num_errors",
        "num_prompt_tokens",
        "num_new_tokens",
        "num_padding_tokens",
        "elapsed_s",
    )
    tally = getattr(pl_module, "tally", None)
    return {name: float(getattr(tally, name, 0)) for name in names}


def _num_input_errors(trainer: Trainer) -> int:
    # Every rank reads the whole input, so these are not summed over ranks.
    return len(getattr(getattr(trainer, "datamodule", None), "row_errors", ()))


def _devices(trainer: Trainer) -> list[str]:
    devices = getattr(trainer.strategy, "devices", [trainer.strategy.root_device])
    return [
        torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu()
        for device in devices
    ]


def _strategy_report(trainer: Trainer) -> dict[str, Any]:
    strategy = trainer.strategy
    return strategy.report() if isinstance(strategy, MoEStrategy) else {}


def _cpu() -> str:
    return f"cpu ({torch.get_num_threads()} threads)"


def _summary(report: dict[str, Any]) -> str:
    lines = [
        f"{report['num_predictions']:,} of {report['num_rows']:,} rows answered in "
        f"{report['elapsed_s']:.1f} s: "
        f"{report['num_prompt_tokens']:,} prompt + {report['num_new_tokens']:,} new tokens, "
        f"{report['tokens_per_s']:,.0f} tokens/s",
        f"predictions: {report['output_dir']}",
    ]
    if report["num_errors"]:
        lines.append(f"{report['num_errors']:,} rows could not be computed: see errors.jsonl there")
    return "\n".join(lines)

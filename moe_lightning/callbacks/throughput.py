"""Throughput: what a run did, how fast, and on what."""

import importlib.metadata
import json
import platform
import resource
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

import moe_lightning
from moe_lightning.callbacks.fit_tally import FitTally
from moe_lightning.callbacks.run_summary import nothing_to_do, summary
from moe_lightning.callbacks.utilisation import flops_per_token, peak_flops
from moe_lightning.errors import StoppedError, UsageError
from moe_lightning.files import write_atomically
from moe_lightning.modeling.precision import computing_dtype
from moe_lightning.strategies import MoEStrategy

PACKAGES = ("torch", "lightning", "transformers", "safetensors")


class Throughput(Callback):
    """Counts rows and tokens per second of predict and fit; prints a summary and writes
    ``run.json``.

    Tokens of prompts and new ones are over the whole time, not over that of their phase. Peak
    memory is that of every process of the trainer; workers of ``moe_rpc`` are not among them.

    Args:
        output_dir: Where ``run.json`` goes. The default is the trainer's ``default_root_dir``.
        peak_tflops: What one device could do, in TFLOP/s, for the model FLOPs utilisation. The
            default is the data sheet's where the device is known and computes in half precision;
            otherwise no utilisation is reported.

    Attributes:
        place: What the run's files are said to be in. The default is ``output_dir``.
        num_errors: After the run, rows in ``errors.jsonl``, over all ranks.
    """

    def __init__(self, output_dir: str | None = None, *, peak_tflops: float | None = None) -> None:
        if peak_tflops is not None and not peak_tflops > 0:
            raise UsageError(f"peak_tflops={peak_tflops}, but it must be above 0.")
        self.output_dir = output_dir
        self.peak_tflops = peak_tflops
        self.place: str | None = None
        self.num_errors = 0
        self._started: datetime | None = None
        self._predict_s: float | None = None
        self._fit = FitTally()

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._started, self._predict_s, self._fit = datetime.now(UTC), None, FitTally()

    @override
    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._predict_s = _own_counts(trainer, pl_module)["elapsed_s"]

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._fit = FitTally(first_step=trainer.global_step)

    @override
    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        self._fit.add(batch)
        every = cast(Any, trainer).log_every_n_steps
        if every and (batch_idx + 1) % every == 0 and trainer.loggers:
            values = {
                "throughput/tokens_per_s": self._fit.tokens_per_s() * _num_data_ranks(trainer)
            }
            for logger in trainer.loggers:
                logger.log_metrics(values, trainer.global_step)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._fit.end(trainer.global_step)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "predict":
            counts = self._sum_over_ranks(trainer, _own_counts(trainer, pl_module))
            if self._predict_s is not None:
                counts["elapsed_s"] = self._predict_s
            self.num_errors = int(counts["num_errors"]) + _num_errors_before(trainer)
            work = _predicted(trainer, counts)
            if getattr(getattr(trainer, "datamodule", None), "is_done", False):
                # The report of the run that did it stays, unless that was killed before it.
                if trainer.is_global_zero:
                    directory = self.output_dir or trainer.default_root_dir
                    if not _is_finished(Path(directory) / "run.json"):
                        self._write(trainer, work | {"mfu": None, "peak_memory": []}, "finished")
                    print(nothing_to_do(work, self.place or directory), file=sys.stderr)
                return
        elif stage == "fit":
            work = self._fit.report(self._sum_over_ranks(trainer, self._fit.counts(trainer)))
        else:
            return
        peaks = _peak_memory(trainer)
        if trainer.is_global_zero:
            mfu = self._mfu(trainer, pl_module, work, training=stage == "fit")
            report = self._write(trainer, work | {"mfu": mfu, "peak_memory": peaks}, "finished")
            print(summary(report), file=sys.stderr)

    @override
    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        # Without a setup nothing has begun, and older reports stay.
        if trainer.is_global_zero and trainer.predicting and self._started is not None:
            is_interrupt = isinstance(exception, KeyboardInterrupt | StoppedError)
            reason = "interrupted" if is_interrupt else f"{type(exception).__name__}: {exception}"
            # The other ranks may be gone, so nothing is summed over them here.
            self._write(trainer, _predicted(trainer, _own_counts(trainer, pl_module)), reason)

    def _sum_over_ranks(self, trainer: Trainer, own: dict[str, float]) -> dict[str, float]:
        """The counts of all ranks; the time is this one's."""
        elapsed_s = own.pop("elapsed_s")
        device = trainer.strategy.root_device  # NCCL sums nothing on the host
        numbers = torch.tensor(list(own.values()), dtype=torch.float64, device=device)
        total = trainer.strategy.reduce(numbers, reduce_op="sum")
        counts = dict(zip(own, torch.as_tensor(total).tolist(), strict=True))
        return counts | {"elapsed_s": elapsed_s}

    def _mfu(
        self, trainer: Trainer, pl_module: LightningModule, work: dict[str, Any], *, training: bool
    ) -> float | None:
        view, model = getattr(pl_module, "view", None), getattr(pl_module, "model", None)
        if view is None or model is None:
            return None
        devices = getattr(trainer.strategy, "devices", [trainer.strategy.root_device])
        peak = self.peak_tflops and self.peak_tflops * 1e12
        if peak is None and devices[0].type == "cuda":
            dtype = computing_dtype(trainer.precision, model.dtype)
            peak = peak_flops(torch.cuda.get_device_name(devices[0]), dtype)
        if not peak:
            return None
        has_lora = getattr(pl_module, "lora", None) is not None
        flops = flops_per_token(view.config, training=training, lora=has_lora)
        num_devices = len(devices) * trainer.world_size
        return float(f"{flops * work['tokens_per_s'] / (peak * num_devices):.4g}")

    def _write(self, trainer: Trainer, work: dict[str, Any], exit_reason: str) -> dict[str, Any]:
        directory = Path(self.output_dir or trainer.default_root_dir)
        report = {
            "exit_reason": exit_reason,
            "started": (self._started or datetime.now(UTC)).isoformat(timespec="seconds"),
            **work,
            "strategy": type(trainer.strategy).__name__,
            "world_size": trainer.world_size,
            "devices": _devices(trainer),
            **_strategy_report(trainer),
            "versions": {
                "moe_lightning": moe_lightning.__version__,
                "python": platform.python_version(),
                **{name: importlib.metadata.version(name) for name in PACKAGES},
            },
            "output_dir": self.place or str(directory),
        }
        directory.mkdir(parents=True, exist_ok=True)
        write_atomically(directory / "run.json", json.dumps(report, indent=2) + "\n")
        return report


def _predicted(trainer: Trainer, counts: dict[str, float]) -> dict[str, Any]:
    """What ``run.json`` says of a predict run."""
    elapsed_s = max(counts["elapsed_s"], 1e-9)
    tokens = counts["num_prompt_tokens"] + counts["num_new_tokens"]
    errors_before = _num_errors_before(trainer)
    datamodule = getattr(trainer, "datamodule", None)
    num_before = int(getattr(datamodule, "num_done", 0))
    num_answered = int(counts["num_rows"]) - int(counts["num_errors"])
    num_answered_before = num_before - int(getattr(datamodule, "num_failed", 0))
    num_errors = int(counts["num_errors"]) + errors_before
    return {
        "elapsed_s": round(counts["elapsed_s"], 3),
        "num_rows": num_answered + num_answered_before + num_errors,
        "num_predictions": num_answered + num_answered_before,
        "num_errors": num_errors,
        "num_done_before": num_before,
        "num_prompt_tokens": int(counts["num_prompt_tokens"]),
        "num_new_tokens": int(counts["num_new_tokens"]),
        "padding_share": round(
            counts["num_padding_tokens"] / max(1, tokens + counts["num_padding_tokens"]), 4
        ),
        "rows_per_s": round(counts["num_rows"] / elapsed_s, 2),
        "tokens_per_s": round(tokens / elapsed_s, 1),
        "prompt_tokens_per_s": round(counts["num_prompt_tokens"] / elapsed_s, 1),
        "new_tokens_per_s": round(counts["num_new_tokens"] / elapsed_s, 1),
    }


def _peak_memory(trainer: Trainer) -> list[dict[str, Any]]:
    """Of each process, in the order of the ranks; all ranks call this."""
    devices = {
        device
        for device in getattr(trainer.strategy, "devices", [trainer.strategy.root_device])
        if device.type == "cuda"
    }
    own = torch.zeros(trainer.world_size, 2, dtype=torch.float64)
    # Linux counts in KiB.
    own[trainer.global_rank, 0] = 1024.0 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    own[trainer.global_rank, 1] = sum(torch.cuda.max_memory_allocated(d) for d in devices)
    total = trainer.strategy.reduce(own.to(trainer.strategy.root_device), reduce_op="sum")
    every = torch.as_tensor(total).tolist()
    return [
        {"process": f"rank {rank}", "host_bytes": int(host), "device_bytes": int(device)}
        for rank, (host, device) in enumerate(every)
    ]


def _num_data_ranks(trainer: Trainer) -> int:
    kwargs = getattr(trainer.strategy, "distributed_sampler_kwargs", None)
    return int(kwargs["num_replicas"]) if kwargs else 1


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


def _num_errors_before(trainer: Trainer) -> int:
    """Rows that failed before the model saw them, or in an earlier run of the job."""
    # Every rank knows all of them, so these are not summed over ranks.
    datamodule = getattr(trainer, "datamodule", None)
    return len(getattr(datamodule, "row_errors", ())) + int(getattr(datamodule, "num_failed", 0))


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


def _is_finished(report: Path) -> bool:
    try:
        return bool(json.loads(report.read_text())["exit_reason"] == "finished")
    except (OSError, ValueError, KeyError):
        return False

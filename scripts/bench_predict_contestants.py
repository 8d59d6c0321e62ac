"""The contestants of this process: each reads the file, computes, writes a file, and takes a time.

bench_predict_peers.py has those of other processes.
"""

import json
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from bench_predict_workload import TaskName, Workload
from torch import Tensor
from transformers import AutoModelForCausalLM

from moe_lightning import MoELightningModule
from moe_lightning.callbacks import PredictionWriter
from moe_lightning.data.prompts import PromptData
from moe_lightning.experts.backends import PACKED, why_not
from moe_lightning.experts.packed import PackedExperts
from moe_lightning.modeling.runner import PaddedBatch
from moe_lightning.tasks import Generate, Score, Task
from moe_lightning.tasks.isolation import run_isolated

CpuBackendName = Literal[
    "auto", "reference", "grouped_mm", "cpu_packed", "cpu_half", "cpu_int8"
]  # experts.names.BackendName but those of other devices
PLAIN_BATCH_ROWS = 16


class BackendUnusableError(Exception):
    """A backend that cannot compute these experts on this machine."""


def timed_s(call: Callable[[], object]) -> float:
    """How long a call takes."""
    start_s = time.perf_counter()
    call()
    return time.perf_counter() - start_s


class PlainLoop:
    """What a user would write in plain transformers.

    Args:
        checkpoint: The checkpoint.
        tokenizer: Its tokenizer.
    """

    def __init__(self, checkpoint: Path, tokenizer: Any) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
        self.model.generation_config.eos_token_id = None
        self.tokenizer = tokenizer

    def run(self, task: TaskName, experts: str, path: Path, out: Path) -> None:
        """Answer all rows in batches of input order."""
        self.model.set_experts_implementation(experts)
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        compute = self._score if task == "score" else self._generate
        with torch.inference_mode(), open(out, "w") as file:
            for start in range(0, len(rows), PLAIN_BATCH_ROWS):
                batch = rows[start : start + PLAIN_BATCH_ROWS]
                for row, answer in zip(batch, compute(batch), strict=True):
                    file.write(json.dumps({"id": row["id"], **answer}) + "\n")

    def _tokenize(self, rows: Sequence[Mapping[str, Any]], side: str) -> Any:
        return self.tokenizer(
            [row["prompt"] for row in rows],
            padding=True,
            padding_side=side,
            return_tensors="pt",
            return_token_type_ids=False,
        )

    def _score(self, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        batch = self._tokenize(rows, "right")
        logprobs_BSV = self.model(**batch).logits[:, :-1].log_softmax(dim=-1)
        targets_BS1 = batch["input_ids"][:, 1:, None]
        logprobs_BS = logprobs_BSV.gather(-1, targets_BS1).squeeze(-1)
        # In float64: the sum of a long row in float32 is only good to 1e-4.
        sums_B = (logprobs_BS * batch["attention_mask"][:, 1:]).double().sum(dim=1)
        return [{"logprob": logprob} for logprob in sums_B.tolist()]

    def _generate(self, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        batch = self._tokenize(rows, "left")
        output_BS = self.model.generate(
            **batch,
            do_sample=False,
            max_new_tokens=max(row["max_new_tokens"] for row in rows),
            pad_token_id=self.tokenizer.pad_token_id,
        )
        new_BS = output_BS[:, batch["input_ids"].shape[1] :].tolist()
        answers = [ids[: row["max_new_tokens"]] for row, ids in zip(rows, new_BS, strict=True)]
        texts = self.tokenizer.batch_decode(answers, skip_special_tokens=True)
        return [{"text": t, "token_ids": ids} for t, ids in zip(texts, answers, strict=True)]

    def padding_share(self, task: TaskName, workload: Workload) -> float:
        """Share of the computed tokens that nobody asked for."""
        computed = 0
        for start in range(0, len(workload.max_new_tokens), PLAIN_BATCH_ROWS):
            batch = slice(start, start + PLAIN_BATCH_ROWS)
            width = max(workload.num_prompt_tokens[batch])
            if task == "generate":
                width += max(workload.max_new_tokens[batch])
            computed += width * len(workload.max_new_tokens[batch])
        return 1 - workload.num_tokens(task) / computed

    def logits(self, batch: PaddedBatch) -> Tensor:
        """Logits ``[B, S, V]`` of right-padded rows."""
        logits_BSV: Tensor = self.model(batch.input_ids_BS, attention_mask=batch.mask_BS).logits
        return logits_BSV


class OurLoops:
    """moe_lightning with one backend, through Lightning and without it.

    Args:
        checkpoint: The checkpoint.
        backend: How experts are computed.
        max_batch_tokens: Token budget of the planned batches.

    Attributes:
        is_exact: Whether the backend keeps the weights as they are.
        outside_s: For ``lightning`` and ``bare``, each run's time outside the task.
        trainer_s: Time that making the last trainer took.
        num_padding_tokens: Padding that the last run through Lightning computed.

    Raises:
        BackendUnusableError: If the backend gave way to another one.
    """

    def __init__(self, checkpoint: str, backend: CpuBackendName, max_batch_tokens: int) -> None:
        self.backend = backend
        self.is_exact = backend not in PACKED or PACKED[backend].is_exact
        self.max_batch_tokens = max_batch_tokens
        self.module = MoELightningModule(checkpoint, experts_backend=backend)
        self.outside_s: defaultdict[str, list[float]] = defaultdict(list)
        self.trainer_s = 0.0
        self.num_padding_tokens = 0
        self._task_s = 0.0
        self.module.configure_model()
        hosted = self.module.hosted
        assert hosted is not None
        hosted.pack()  # as Trainer.predict does when it starts
        for shard in hosted.shards:
            compute = shard._compute
            if backend in PACKED and not (
                isinstance(compute, PackedExperts) and compute.kind is PACKED[backend]
            ):
                reason = why_not(backend, shard.experts) or "it gave way to another backend"
                raise BackendUnusableError(f"layer {shard.layer}: {reason}")

    def set_task(self, name: TaskName) -> None:
        """Choose what is computed."""
        task: Task = Score() if name == "score" else Generate(ignore_eos=True)
        compute = task.run

        def run(*args: Any, **kwargs: Any) -> Any:
            start_s = time.perf_counter()
            answers = compute(*args, **kwargs)
            self._task_s += time.perf_counter() - start_s
            return answers

        task.run = run  # type: ignore[method-assign]
        self.module.task = task
        self.outside_s.clear()

    def lightning(self, path: Path, out: Path) -> float:
        """Answer all rows as the predict verb does.

        Args:
            path: The file of prompts.
            out: Directory for the answers, ``predictions.jsonl``.

        Returns:
            How long it took; the trainer is made before, as the model is.
        """
        start_s = time.perf_counter()
        trainer = L.Trainer(
            accelerator="cpu",
            devices=1,
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=False,
            default_root_dir=out,
            callbacks=[PredictionWriter(str(out), restart=True)],
        )
        self.trainer_s = time.perf_counter() - start_s

        def run() -> None:
            data = PromptData(str(path), max_batch_tokens=self.max_batch_tokens)
            trainer.predict(self.module, datamodule=data, return_predictions=False)

        elapsed_s = self._timed("lightning", run)
        self.num_padding_tokens = self.module.tally.num_padding_tokens
        return elapsed_s

    def bare(self, path: Path, out: Path) -> float:
        """Answer the same planned batches in a plain loop; the file is ``bare.jsonl``."""

        def run() -> None:
            module = self.module
            assert module.runner is not None
            data = PromptData(str(path), max_batch_tokens=self.max_batch_tokens)
            data.plan(module.encoder, module.task)
            out.mkdir(parents=True, exist_ok=True)
            with torch.inference_mode(), open(out / "bare.jsonl", "w") as file:
                for batch in data.predict_dataloader():
                    answers = run_isolated(
                        module.task,
                        module.runner,
                        batch,
                        budget_tokens=self.max_batch_tokens,
                        progress=module.tally.add,
                    )
                    for answer in answers:
                        file.write(json.dumps(answer, ensure_ascii=False) + "\n")

        return self._timed("bare", run)

    def _timed(self, name: str, run: Callable[[], None]) -> float:
        self._task_s = 0.0
        elapsed_s = timed_s(run)
        self.outside_s[name].append(elapsed_s - self._task_s)
        return elapsed_s

    def padding_share(self, task: TaskName, workload: Workload) -> float:
        """Share of the computed tokens that nobody asked for, of the last Lightning run."""
        padding = self.num_padding_tokens
        return padding / (padding + workload.num_tokens(task))

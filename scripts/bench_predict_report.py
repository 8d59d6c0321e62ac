"""What bench_predict.py prints, and its verdict against the acceptance."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from bench_predict_comparison import OURS, VLLM
from bench_predict_profile import Profile
from bench_predict_results import Comparison, Result, Sameness
from bench_predict_sameness import TIE, ScoreSameness
from bench_predict_workload import TaskName

LEAST_RATIOS = {("generate", "cpu_half"): 3.0, ("generate", "cpu_int8"): 4.0}  # the acceptance


@dataclass(frozen=True)
class Verdict:
    """One backend on one model and one task.

    Attributes:
        model: The model.
        task: The task.
        backend: The backend.
        ratio: How many times the tokens/s of the faster transformers contestant.
        least_ratio: What was wanted; None: nothing.
        is_met: Whether it was reached; None: nothing was wanted.
        vllm_ratio: How many times the tokens/s of vLLM; None: it was not there.
    """

    model: str
    task: TaskName
    backend: str
    ratio: float
    least_ratio: float | None
    is_met: bool | None
    vllm_ratio: float | None


def judge(comparisons: Sequence[Comparison]) -> list[Verdict]:
    """Hold every backend's ratio against what was wanted."""
    verdicts = []
    for c in comparisons:
        vllm = c.results.get(VLLM)
        for name, result in c.results.items():
            if not name.startswith(f"{OURS} "):
                continue
            backend = name.removeprefix(f"{OURS} ")
            least = LEAST_RATIOS.get((c.task, backend))
            verdicts.append(
                Verdict(
                    model=c.model,
                    task=c.task,
                    backend=backend,
                    ratio=result.ratio,
                    least_ratio=least,
                    is_met=None if least is None else result.ratio >= least,
                    vllm_ratio=None if vllm is None else vllm.median_s / result.median_s,
                )
            )
    return verdicts


def describe_verdicts(verdicts: Sequence[Verdict]) -> Iterator[str]:
    """The lines at the end."""
    yield "\ntokens/s against the faster transformers contestant:"
    for v in verdicts:
        line = f"  {v.model + ', ' + v.task + ', ' + v.backend:<30}{v.ratio:>7.2f}x"
        if v.least_ratio is not None:
            line += f"  wanted {v.least_ratio:g}x: {'met' if v.is_met else 'NOT met'}"
        if v.vllm_ratio is not None:
            line += f"  ({v.vllm_ratio:.2f}x {VLLM})"
        yield line


def describe(comparison: Comparison) -> Iterator[str]:
    """The lines of one comparison."""
    c = comparison
    yield f"\n{c.model} ({c.num_params / 1e6:.1f} M parameters), {c.task}: {c.tokens:,} tokens" + (
        f", {c.new_tokens:,} of them new" if c.new_tokens else ""
    )
    header = f"  {'':<24}{'median s':>9}{'min s':>8}{'spread':>8}{'runs':>5}{'tokens/s':>10}"
    header += f"{'new/s':>8}" if c.new_tokens else ""
    yield header + f"{'ratio':>8}{'padding':>9}{'of limit':>9}"
    for name, result in c.results.items():
        yield _row(c, name, result)
    for name, reason in c.absent.items():
        yield f"  without {name}: {reason}"
    if c.peer_versions:
        ran = ", ".join(f"{name} {number}" for name, number in c.peer_versions.items())
        yield f"  {VLLM} ran on {ran}"
    o = c.overhead
    yield (
        f"  Lightning overhead over the bare loop: {o.share:+.2%} ({o.seconds * 1e3:+.0f} ms "
        f"outside the task; wall times differ by {o.wall_share:+.1%}, noise included; making the "
        f"trainer took {o.trainer_s * 1e3:.0f} ms more)"
    )
    for name, result in c.results.items():
        if result.sameness is not None:
            yield f"  {name} and {c.peer}: {_describe_sameness(result.sameness)}"
        if result.profile is not None:
            yield from _describe_profile(name, result.profile)


def _row(c: Comparison, name: str, result: Result) -> str:
    times_s, median_s = result.times_s, result.median_s
    line = f"  {name:<24}{median_s:>9.2f}{min(times_s):>8.2f}"
    line += f"{(max(times_s) - min(times_s)) / median_s:>8.0%}{len(times_s):>5}"
    line += f"{c.tokens / median_s:>10,.0f}"
    line += f"{c.new_tokens / median_s:>8,.0f}" if c.new_tokens else ""
    line += f"{result.ratio:>7.2f}x"
    padding = "" if result.padding is None else f"{result.padding:.1%}"
    return line + f"{padding:>9}{result.fraction_of_limit:>9.2f}"


def _describe_profile(name: str, profile: Profile) -> Iterator[str]:
    total_s = sum(profile.seconds.values())
    parts = []
    for part, part_s in profile.seconds.items():
        notes = []
        if part in profile.experts_s:
            notes.append(f"experts {profile.experts_s[part] / total_s:.0%}")
        if part in profile.limit_s:
            notes.append(f"limit {profile.limit_s[part]:.2f} s")
        parts.append(
            f"{part} {part_s:.2f} s {part_s / total_s:.0%}"
            + (f" ({', '.join(notes)})" if notes else "")
        )
    yield f"  {name}, profiled run of {total_s:.2f} s: " + "; ".join(parts)
    if profile.num_decode_steps:
        yield (
            f"  {name}, {profile.num_decode_steps} decode steps of "
            f"{profile.mean_decode_rows:.1f} rows, {profile.mean_hit_experts:.1f} distinct "
            "experts a layer"
        )


def _describe_sameness(same: Sameness) -> str:
    if isinstance(same, ScoreSameness):
        text = f"rows' log-probabilities differ by at most {same.max_logprob_difference:.1e}, "
        if same.max_token_difference is not None:
            text += (
                f"tokens' by at most {same.max_token_difference:.1e} and on average by "
                f"{same.mean_token_difference:.1e}, "
            )
        change = same.perplexity / same.plain_perplexity - 1
        return text + (
            f"perplexity of the rows {same.perplexity:.3f} and {same.plain_perplexity:.3f} "
            f"({change:+.4%})"
        )
    text = f"{same.same_tokens_share:.2%} of the token ids and {same.same_rows_share:.1%} of the "
    text += "rows are the same"
    if same.num_ties is None:
        return text
    return (
        f"{text}; rows that part at a tie (logits within {TIE:g}): {same.num_ties}, elsewhere: "
        f"{same.num_unexplained}"
    )

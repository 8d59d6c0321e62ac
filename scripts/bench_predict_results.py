"""The numbers of one model and one task, as bench_predict.py reports them."""

from dataclasses import dataclass

from bench_predict_profile import Profile
from bench_predict_sameness import GenerateSameness, ScoreSameness
from bench_predict_workload import TaskName

Sameness = ScoreSameness | GenerateSameness


@dataclass(frozen=True)
class Result:
    """One contestant.

    Attributes:
        times_s: Its runs.
        median_s: Their median.
        ratio: How many times the tokens/s of the faster transformers contestant.
        padding: Share of the computed tokens that nobody asked for; None: not known.
        limit_s: The least time of our forwards, with experts' weights in the contestant's bytes.
        fraction_of_limit: That time over the median.
        sameness: How alike its answers and those of transformers are; None: not looked at.
        profile: Where its time goes; None: not looked at.
    """

    times_s: list[float]
    median_s: float
    ratio: float
    padding: float | None
    limit_s: float
    fraction_of_limit: float
    sameness: Sameness | None
    profile: Profile | None


@dataclass(frozen=True)
class Overhead:
    """What Lightning costs, with the first backend.

    Attributes:
        share: Time outside the task beyond the bare loop's, over the bare loop's whole time.
        seconds: That time.
        wall_share: Difference of the whole times, noise included.
        trainer_s: Making the trainer, which is in no other time.
    """

    share: float
    seconds: float
    wall_share: float
    trainer_s: float


@dataclass(frozen=True)
class Comparison:
    """One model, one task.

    Attributes:
        model: The model.
        num_params: Its parameters.
        task: The task.
        tokens: Useful tokens of the rows.
        new_tokens: How many of them are generated.
        peer: The faster transformers contestant.
        results: All contestants by name.
        overhead: What Lightning costs.
        absent: Why contestants are missing.
        peer_versions: What the contestant of another process runs.
    """

    model: str
    num_params: int
    task: TaskName
    tokens: int
    new_tokens: int
    peer: str
    results: dict[str, Result]
    overhead: Overhead
    absent: dict[str, str]
    peer_versions: dict[str, str]

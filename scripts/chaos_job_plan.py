"""What is to happen to a predict job: who is struck, how and when, drawn by seed and number."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

Strategy = Literal["single", "placement", "rpc", "fsdp"]
Victim = Literal["master", "worker", "two workers", "rank", "two ranks", "master and one", "group"]
Signal = Literal["KILL", "TERM", "INT"]
When = Literal[
    "planning", "loading", "predicting", "merging", "last tenth", "after a part", "after a line"
]

STRATEGIES = get_args(Strategy)
MOST_STRIKES = 3
ANOTHER = 0.4  # chance that a run that was continued is struck again
KILLED = 0.7  # chance that a strike is SIGKILL
HURRIED = 0.5
VICTIMS: dict[Strategy, tuple[Victim, ...]] = {
    "single": ("master",),
    "placement": ("master",),
    "rpc": ("master", "worker", "two workers", "master and one", "group"),
    "fsdp": ("master", "rank", "two ranks", "group"),
}


@dataclass(frozen=True, slots=True)
class Strike:
    """A signal for some processes of a run.

    Attributes:
        signal: Which signal.
        victim: Who gets it. The master of fsdp is rank 0; the process group are all ranks of fsdp,
            but not the workers of rpc, which have sessions of their own.
        when: In which stage, or after what, of the run.
        fraction: Which moment of that stage, or which part or line, from 0 to 1.
        other: Which of the workers or other ranks, where one of them is meant; modulo their number.
        is_hurried: Whether the next start does not wait until all that this one made is gone.
    """

    signal: Signal
    victim: Victim
    when: When
    fraction: float
    other: int = 0
    is_hurried: bool = False

    def __str__(self) -> str:
        return f"SIG{self.signal} for {self.victim}, {self.when} {self.fraction:.2f}"


@dataclass(frozen=True, slots=True)
class Plan:
    """One run.

    Attributes:
        number: Which of the runs.
        strategy: Of the command.
        strikes: The first for the first start, the next for the one after that.
    """

    number: int
    strategy: Strategy
    strikes: tuple[Strike, ...]

    def __str__(self) -> str:
        return f"[{self.number}] {self.strategy}: {'; '.join(map(str, self.strikes))}"


def draw(number: int, seed: int, strategies: Sequence[Strategy] = STRATEGIES) -> Plan:
    """Draw a run.

    Args:
        number: Which of the runs.
        seed: Of all runs.
        strategies: They take turns.

    Returns:
        The plan: the same for the same arguments.
    """
    dice = random.Random(f"{seed} {number}")
    strategy = strategies[number % len(strategies)]
    strikes = [_strike(dice, strategy)]
    while len(strikes) < MOST_STRIKES and dice.random() < ANOTHER:
        strikes.append(_strike(dice, strategy))
    return Plan(number, strategy, tuple(strikes))


def _strike(dice: random.Random, strategy: Strategy) -> Strike:
    when, fraction = dice.choice(get_args(When)), dice.random()
    if dice.random() < KILLED:
        victim, other = dice.choice(VICTIMS[strategy]), dice.randrange(1000)
        return Strike("KILL", victim, when, fraction, other, dice.random() < HURRIED)
    # Ctrl-C in a terminal reaches the whole group; who sends SIGTERM knows the first process.
    if dice.random() < 0.5:
        return Strike("TERM", "master", when, fraction)
    return Strike("INT", "group", when, fraction)

"""What is done to a run, drawn by a seed: whom it strikes, how, and at which moment.

began ── start ── met ── load ── ready ── prefill ── decode ── (prefill ...) ── done ── end ── left
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

Kind = Literal[
    *("kill", "stop", "restart"),
    *("kill_master", "nap_master", "interrupt", "interrupt_twice"),
]
Stage = Literal["start", "load", "prefill", "decode", "end"]
Start = Literal["hand", "local"]
Transport = Literal["zmq", "tensorpipe"]
TaskName = Literal["Generate", "Score"]
Sort = Literal["one", "two", "replicas", "last", "adopted"]

KINDS: tuple[Kind, ...] = get_args(Kind)
WORKERS_KINDS = KINDS[:3]
_WEIGHTS: dict[Kind, int] = {
    **{"kill": 8, "stop": 8, "restart": 3},
    **{"kill_master": 3, "nap_master": 1, "interrupt": 1, "interrupt_twice": 1},
}
_STAGES: dict[Stage, int] = {"start": 1, "load": 2, "prefill": 3, "decode": 4, "end": 1}
# Of ten plans, these are about more than one worker that is lost while others take over.
_SORTS: dict[int, Sort] = {2: "two", 4: "replicas", 6: "last", 7: "two", 9: "adopted"}


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that goes wrong.

    Attributes:
        kind: A worker is killed; stopped, and woken after a while or after the run; killed, and at
            once started again at the same address. Or the master is killed; stopped for less time
            than workers wait for; or interrupted, once or twice (Ctrl-C).
        worker: Which worker.
        stage: During which stage of the run.
        turn: Of stages that come more than once, which one: a share of their number.
        fraction: When, as a share of the stage's length without faults.
        awake_s: After how many seconds a stopped worker is woken; None is after the run.
    """

    kind: Kind
    worker: int
    stage: Stage
    turn: float
    fraction: float
    awake_s: float | None = None

    def __str__(self) -> str:
        who = "" if self.is_masters else f" w{self.worker}"
        woken = "" if self.awake_s is None else f" for {self.awake_s:.1f} s"
        return f"{self.kind}{who}{woken} in {self.stage}"

    @property
    def is_masters(self) -> bool:
        """Whether it strikes the master."""
        return self.kind not in WORKERS_KINDS


@dataclass(frozen=True, slots=True)
class Plan:
    """One run and what is done to it.

    Attributes:
        number: Its number in the whole.
        sort: One worker is lost; two in turn; one whose experts others hold as well; the last one,
            with nobody to take over; the last one, with a master that may adopt.
        start: Whether workers were started by hand, or the master starts its own.
        transport: How rows travel.
        task: What is computed.
        num_workers: How many workers it has.
        faults: What happens, in this order.
    """

    number: int
    sort: Sort
    start: Start
    transport: Transport
    task: TaskName
    num_workers: int
    faults: tuple[Fault, ...]

    def __str__(self) -> str:
        what = " + ".join(map(str, self.faults)) or "nothing"
        sort = "" if self.sort in ("one", "two") else f" ({self.sort})"
        return f"{self.number:3d} {self.start} {self.transport} {self.task.lower()}: {what}{sort}"


def draw(
    number: int,
    *,
    seed: int,
    kinds: Sequence[Kind],
    transports: Sequence[Transport],
    starts: Sequence[Start],
    num_workers: int,
    timeout_s: float,
    tasks: Sequence[TaskName],
) -> Plan:
    """Draw a plan; a function of its arguments.

    Args:
        number: The plan's number.
        seed: Seed of all plans.
        kinds: Which kinds of faults there are.
        transports: Which transports, in turns.
        starts: Which ways to start, in turns.
        num_workers: How many workers.
        timeout_s: Longest silence of a worker that is not lost.
        tasks: What may be computed; the first one mostly.

    Returns:
        The plan.
    """
    dice = random.Random(f"{seed} {number}")
    start = starts[number % len(starts)]
    transport = transports[number // len(starts) % len(transports)]
    task = tasks[0] if dice.random() < 0.8 else dice.choice(tasks)
    sort: Sort = _SORTS.get(number % 10, "one")
    if (sort == "two" and num_workers < 3) or (sort == "replicas" and num_workers < 2):
        sort = "one"
    if sort in ("last", "adopted"):
        num_workers = 1
    lethal = [kind for kind in kinds if kind in WORKERS_KINDS]
    if sort != "one" and not lethal:
        sort = "one"
    allowed = [
        kind
        for kind in (kinds if sort == "one" else lethal)
        if kind != "restart" or (start == "hand" and sort != "adopted")
    ]
    struck = dice.sample(range(num_workers), 2 if sort == "two" else 1)
    faults = [
        _draw_fault(dice, worker, allowed, sort=sort, task=task, timeout_s=timeout_s)
        for worker in struck
    ]
    order = list(_STAGES)
    faults.sort(key=lambda fault: (order.index(fault.stage), fault.turn, fault.fraction))
    return Plan(number, sort, start, transport, task, num_workers, tuple(faults))


def _draw_fault(
    dice: random.Random,
    worker: int,
    kinds: Sequence[Kind],
    *,
    sort: Sort,
    task: TaskName,
    timeout_s: float,
) -> Fault:
    (kind,) = dice.choices(kinds, [_WEIGHTS[kind] for kind in kinds])
    stages = dict(_STAGES)
    if task == "Score":
        del stages["decode"]
    is_mild = sort == "one"
    if not is_mild:  # so that it counts
        del stages["start"], stages["end"]
    if sort == "replicas":  # what is read after that was not to be read
        del stages["load"]
    (stage,) = dice.choices(list(stages), list(stages.values()))
    fault = Fault(kind, worker, stage, turn=dice.random(), fraction=dice.random())
    if kind == "nap_master":
        return replace(fault, awake_s=dice.uniform(0.1, 0.7) * timeout_s)
    if kind != "stop" or not is_mild or dice.random() < 0.4:
        return fault
    return replace(fault, awake_s=dice.uniform(0.1, 2.0) * timeout_s)

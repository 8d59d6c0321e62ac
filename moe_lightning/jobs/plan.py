"""The plan of a job: which rows are computed together, and what decides their answers.

5 batches, one writer:     0  1  2  3  4
5 batches, two writers:    0  1  2  3         and batch 4 in two pieces, numbers 5 and 6
"""

import hashlib
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray


class WorkUnit(NamedTuple):
    """Rows that are computed together and committed as one part.

    Attributes:
        number: Of the batch in the plan; for a piece, a number beyond those of the plan.
        rows: Row numbers that are still to do.
    """

    number: int
    rows: NDArray[np.int64]


@dataclass(frozen=True)
class JobPlan:
    """What a job is to do.

    Attributes:
        identity: What decides the answers: input, model, task, options, versions. Plain JSON.
        num_rows: Rows of the input, good and bad. None if they are not known before the run; such a
            job cannot be resumed.
        batches: Row numbers of each batch.
    """

    identity: Mapping[str, Any] = field(default_factory=dict)
    num_rows: int | None = None
    batches: Sequence[NDArray[np.int64]] = ()

    def lines(self) -> Iterator[bytes]:
        """The batches as JSON lines; line by line what ``batches.jsonl`` holds."""
        for rows in self.batches:
            yield b"%s\n" % json.dumps(rows.tolist(), separators=(",", ":")).encode()

    def batches_sha256(self) -> str:
        """Hash of the batches."""
        digest = hashlib.sha256()
        for line in self.lines():
            digest.update(line)
        return digest.hexdigest()


def work_units(
    batches: Sequence[NDArray[np.int64]],
    *,
    num_ranks: int = 1,
    is_done_N: NDArray[np.bool_] | None = None,
    alone: Collection[int] = (),
) -> list[WorkUnit]:
    """What is left of a plan for so many ranks that work side by side.

    As many whole batches as there are full rounds of ranks; the rows of the rest, fewer than ranks,
    are dealt to all ranks. What belongs together depends on the plan and the number of ranks only,
    not on what is done: a resumed run computes the same rows together as an undisturbed one.

    Args:
        batches: Row numbers of each batch.
        num_ranks: Ranks with rows of their own.
        is_done_N: For each of the input's N rows, whether it is done. None: none is.
        alone: Rows that each get a unit of their own, at the end.

    Returns:
        The units that have rows to do, in order.
    """
    num_whole = len(batches) - len(batches) % num_ranks
    units = [WorkUnit(number, batches[number]) for number in range(num_whole)]
    if num_whole < len(batches):
        rest = np.concatenate(batches[num_whole:])
        units += [WorkUnit(len(batches) + r, rest[r::num_ranks]) for r in range(num_ranks)]
    if alone:
        own = np.array(sorted(alone), dtype=np.int64)
        units = [WorkUnit(number, rows[~np.isin(rows, own)]) for number, rows in units]
        first = len(batches) + num_ranks
        units += [WorkUnit(first + n, own[n : n + 1]) for n in range(len(own))]
    if is_done_N is not None:
        units = [WorkUnit(number, rows[~is_done_N[rows]]) for number, rows in units]
    return [unit for unit in units if len(unit.rows)]


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What is not the same in two identities.

    Args:
        before: That of the job.
        now: That of this run.

    Returns:
        A line for each value that differs: ``model.dtype: float32, now bfloat16``.
    """
    old, new = dict(_flat(before)), dict(_flat(now))
    return [
        f"{name}: {_show(old, name)}, now {_show(new, name)}"
        for name in sorted(old.keys() | new.keys())
        if old.get(name, _MISSING) != new.get(name, _MISSING)
    ]


_MISSING = object()


def _flat(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for name, each in value.items():
            yield from _flat(each, f"{prefix}.{name}" if prefix else str(name))
    else:
        yield prefix, value


def _show(values: Mapping[str, Any], name: str) -> str:
    return json.dumps(values[name], ensure_ascii=False) if name in values else "not there"

"""Entering a place: which job is there, and whether this run goes on with it or begins another."""

import json
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from moe_lightning.errors import UsageError
from moe_lightning.jobs.part_writer import SUSPECTS
from moe_lightning.jobs.plan import JobPlan, differences
from moe_lightning.jobs.storage import LOCK, Storage

PLAN, SUCCESS, ERRORS = "job/plan.json", "_SUCCESS", "errors.jsonl"
_LAYOUT = 1  # raise it when what the files hold changes


def enter(storage: Storage, plan: JobPlan, *, restart: bool, make_id: Callable[[], str]) -> str:
    """Go on with the job that is there if it is this one; begin a new one otherwise.

    Args:
        storage: Where; locked.
        plan: What is to do. One that does not know its rows always begins anew.
        restart: Whether to forget what another job did there.
        make_id: Makes the name of a new job.

    Returns:
        The name of the job's folder.

    Raises:
        UsageError: If another job is there, and has done something.
    """
    stored = json.loads(storage.read(PLAN) or b"null")
    tidy(storage, None if stored is None else stored["id"])  # a full disk needs the space now
    facts = {
        "layout": _LAYOUT,
        "identity": plan.identity,
        "num_rows": plan.num_rows,
        "num_batches": len(plan.batches),
        "batches_sha256": plan.batches_sha256(),
    }
    if stored is not None and not restart and plan.num_rows is not None:
        found = _differences(stored, facts)
        if found and has_begun(storage, stored["id"]):
            raise _other_job(found)
        restart = bool(found)
    else:
        restart = True
    if not restart:
        id: str = stored["id"]
    else:
        storage.remove(SUCCESS)  # from here on what is there is no result
        if stored is not None and plan.num_rows is not None:
            for name in ("predictions.jsonl", "predictions.parquet", ERRORS):
                storage.remove(name)
        id = make_id()
        with storage.writer(f"job/{id}/batches.jsonl") as file:
            for line in plan.lines():
                file.write(line)
        begun = datetime.now(UTC).isoformat(timespec="seconds")
        fields = {"id": id, "begun": begun, **facts}
        storage.write(PLAN, json.dumps(fields, indent=2).encode() + b"\n")
    tidy(storage, id)
    return id


def tidy(storage: Storage, id: str | None) -> None:
    """Remove what is not of a job: what was forgotten or never begun, and temporary files.

    Args:
        storage: Where; locked.
        id: The job; None for none.
    """
    for name in storage.names("job"):
        if name not in (PLAN, LOCK, f"job/{id}"):
            storage.remove_folder(name)


def has_begun(storage: Storage, id: str) -> bool:
    """Whether anything was committed to a job, or learnt of its rows, ever."""
    success = json.loads(storage.read(SUCCESS) or b"{}")
    return success.get("job") == id or any(
        any(storage.logs(f"job/{id}/{kind}").values()) for kind in ("ledger", SUSPECTS)
    )


def _differences(stored: dict[str, Any], facts: dict[str, Any]) -> list[str]:
    if stored.get("layout") != _LAYOUT:
        return [f"layout: {stored.get('layout')}, now {_LAYOUT}"]
    found = differences(stored["identity"], json.loads(json.dumps(facts["identity"])))
    counts = ("num_rows", "num_batches", "batches_sha256")
    if not found and any(stored[name] != facts[name] for name in counts):
        return ["the planned batches are others"]
    return found


def _other_job(found: list[str]) -> UsageError:
    lines = "\n  ".join(found)
    return UsageError(
        f"--output_dir holds another job, of which this one differs in\n  {lines}\nChoose another "
        "--output_dir, go back to what it was, or say --restart to forget what was done there."
    )

"""A run over a file of rows as a job that survives: planned, committed batch by batch, resumed.

    plan ──▶ Job.open ──▶ rows still to do ──▶ PartWriter.commit ... ──▶ Job.finish ──▶ predictions
             lock, epoch,                      a part, then a line       in input order, by
             ledger, parts                     of the ledger             rename; _SUCCESS

Nothing here imports torch, or knows what a row is computed with.
"""

from moe_lightning.jobs.job import Job, Outcome
from moe_lightning.jobs.local_storage import LocalStorage
from moe_lightning.jobs.part_writer import PartWriter
from moe_lightning.jobs.patience import Patience
from moe_lightning.jobs.plan import JobPlan, WorkUnit, work_units
from moe_lightning.jobs.storage import Storage
from moe_lightning.jobs.storages import open_storage

__all__ = [
    "Job",
    "JobPlan",
    "LocalStorage",
    "Outcome",
    "PartWriter",
    "Patience",
    "Storage",
    "WorkUnit",
    "open_storage",
    "work_units",
]

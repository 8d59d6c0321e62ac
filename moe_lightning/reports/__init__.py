"""The report of a run: one page made of the files that the run wrote. It knows nothing of how."""

from moe_lightning.reports.page import write_report

__all__ = ["write_report"]

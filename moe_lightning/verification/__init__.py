"""verify: the same rows under a strategy and under unmodified transformers, compared part by part.

configured run, watched ──▶ a folder of captured rows ──▶ reference, rows ──▶ outcome
(all ranks, real batches)                                 alone, end to end   (places that
Watched, Watching, Capture                                Comparison, Faults   are wrong)
"""

from moe_lightning.verification.capture import Capture
from moe_lightning.verification.options import ReferenceOptions
from moe_lightning.verification.outcome import Outcome
from moe_lightning.verification.reference import check_room, reference_bytes
from moe_lightning.verification.task import Watched
from moe_lightning.verification.verify import open_reference, verify
from moe_lightning.verification.watching import Configured, Watching, parts_folder

__all__ = [
    "Capture",
    "Configured",
    "Outcome",
    "ReferenceOptions",
    "Watched",
    "Watching",
    "check_room",
    "open_reference",
    "parts_folder",
    "reference_bytes",
    "verify",
]

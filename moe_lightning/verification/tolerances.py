"""What differences are right, by the precision of what is configured.

Relative differences of one part alone (a layer, its experts, its router, the head), given the same
inputs: rounding errors of fp32 are below 1e-5, and every lossy setting adds what it is documented
to cost, with room for the worst position among thousands.
"""

from dataclasses import dataclass
from typing import Any

import torch

DTYPES = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
BACKENDS = {"cpu_half": 5e-3, "cpu_int8": 1e-1}
WIRES = {"float16": 5e-3, "bfloat16": 2e-2, "int8": 5e-2}
END_TO_END = 4.0
"""End to end, the differences of all layers add up; they are random, not all alike."""


@dataclass(frozen=True, slots=True)
class Tolerance:
    """The largest relative differences that are right.

    Attributes:
        part: Of a part alone.
        end_to_end: Of the logits, from the token ids on.
        reasons: What they are made of, for people.
    """

    part: float
    end_to_end: float
    reasons: tuple[str, ...]

    @property
    def is_exact(self) -> bool:
        """Whether no more than rounding errors of fp32 are right."""
        return self.end_to_end <= DTYPES[torch.float32]


def choose_tolerance(
    *,
    dtype: torch.dtype,
    experts_backend: str,
    wires: tuple[str, ...] = (),
    given: float | None = None,
) -> Tolerance:
    """The tolerance of a configuration.

    Args:
        dtype: Precision that the configured model computes in.
        experts_backend: How its experts are computed.
        wires: Precisions of rows on their way, one for each lossy direction.
        given: The user's own; None goes by the rest.

    Returns:
        The tolerance.
    """
    if given is not None:
        return Tolerance(given, given, ("--tolerance",))
    terms = [(str(dtype).removeprefix("torch."), DTYPES.get(dtype, DTYPES[torch.bfloat16]))]
    if experts_backend in BACKENDS:
        terms.append((experts_backend, BACKENDS[experts_backend]))
    terms += [(f"{wire} on the wire", WIRES[wire]) for wire in wires if wire in WIRES]
    part = sum(size for _, size in terms)
    # A lossless configuration keeps the promise of equal answers: 1e-4 end to end as well.
    is_exact = part == DTYPES[torch.float32]
    reasons = tuple(f"{name} {size:g}" for name, size in terms)
    return Tolerance(part, part if is_exact else END_TO_END * part, reasons)


def lossy_wires(strategy: Any) -> tuple[str, ...]:
    """The precisions of rows on their way, where a strategy shortens them, one a direction."""
    found = []
    wire = getattr(strategy, "wire", None)
    for name in ("dispatch_dtype", "combine_dtype"):
        value = getattr(wire, name, "working")
        if value != "working":
            found.append(str(value))
    exchanged = getattr(getattr(strategy, "exchange", None), "wire_dtype", None)
    if exchanged is not None:
        found += [str(exchanged).removeprefix("torch.")] * 2
    return tuple(found)

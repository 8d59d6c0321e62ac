"""The names of the backends, for options."""

from typing import Literal, get_args

BackendName = Literal[
    "auto", "reference", "grouped_mm", "cpu_packed", "cpu_half", "cpu_int8", "triton"
]
BACKEND_NAMES: tuple[str, ...] = get_args(BackendName)

"""The names of the backends, for options."""

from typing import Literal

BackendName = Literal["auto", "reference", "grouped_mm"]

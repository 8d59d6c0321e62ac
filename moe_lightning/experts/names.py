"""The names of the backends, apart from their code so that the command line can be parsed without torch."""

from typing import Literal

BackendName = Literal["auto", "reference", "grouped_mm"]

"""Estimate: what one strategy needs on some devices, and whether it fits. No torch."""

from collections.abc import Mapping
from dataclasses import dataclass, field

TOO_MUCH = "too much"
Options = Mapping[str, int | str | list[str]]


@dataclass(frozen=True, slots=True)
class Estimate:
    """What one strategy needs.

    Attributes:
        name: What ``--trainer.strategy`` calls it.
        options: Its options, where they are not the defaults.
        device_bytes: Weights on the fullest device, in training with gradients and optimizer.
        bytes_per_token: What travels for a token and layer: when decoding, when reading prompts; in
            training, in both places, for a step.
        why_not: Why it cannot be used; empty if it can.
        tokens_per_s: At most so many tokens a second on all devices together, decoding and reading
            prompts; in training, in both places, of a step. None where rates are not known.
    """

    name: str
    device_bytes: int
    options: Options = field(default_factory=dict)
    bytes_per_token: tuple[float, float] = (0.0, 0.0)
    why_not: str = ""
    tokens_per_s: tuple[float | None, float | None] = (None, None)

    @property
    def fits(self) -> bool:
        """Whether it can be used."""
        return not self.why_not

    @property
    def is_too_large(self) -> bool:
        """Whether it cannot be used for nothing but its size."""
        return self.why_not.endswith(TOO_MUCH)

    @property
    def label(self) -> str:
        """Name and options, for a table."""
        words = [f"{name}={_short(value)}" for name, value in self.options.items()]
        return " ".join([self.name, *words])

    @property
    def command(self) -> str:
        """Name and options, for a command line."""
        words = [f"--trainer.strategy {self.name}"]
        for name, value in self.options.items():
            text = f'"[{",".join(value)}]"' if isinstance(value, list) else value
            words.append(f"--trainer.strategy.{name} {text}")
        return " ".join(words)


def _short(value: int | str | list[str]) -> str:
    if not isinstance(value, list):
        return str(value)
    shown = value if len(value) < 4 else [value[0], "...", value[-1]]
    return f"[{','.join(shown)}]"

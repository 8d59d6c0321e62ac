"""RowFolder: what the configured strategy computed for a row, on disk until the reference is there.

    parts/00000003/row.json        ids, new tokens
                  /embeddings.pt   what the first layer gets
                  /layer-0000.pt   what each layer gives
                  /experts-0000.pt what experts get and give
                  /logits.pt

Every rank writes what it computes, under names of the row: ranks that share a model each add their
layers. Tensors hold the positions of the row alone, in the precision they were computed in.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from moe_lightning.files import atomic_writer, write_atomically


@dataclass(frozen=True, slots=True)
class RowFacts:
    """What is known of a row besides its tensors.

    Attributes:
        row: Position in the input.
        id: The row's id.
        token_ids: The prompt, as far as it was used.
        num_cut: Tokens of the prompt that were left out.
        new_token_ids: What was generated.
        error: Why there is no answer; None if there is one.
    """

    row: int
    id: str | int
    token_ids: list[int]
    num_cut: int
    new_token_ids: list[int]
    error: str | None


class RowFolder:
    """The captured tensors of one row.

    Args:
        parent: The folder of all rows.
        row: Position of the row in the input.
    """

    def __init__(self, parent: Path, row: int) -> None:
        self.path = parent / f"{row:08d}"

    def save_facts(self, facts: RowFacts) -> None:
        """Write what is known of the row."""
        self.path.mkdir(exist_ok=True)
        write_atomically(self.path / "row.json", json.dumps(asdict(facts)))

    def facts(self) -> RowFacts:
        """Read it again."""
        return RowFacts(**json.loads((self.path / "row.json").read_text()))

    def save(self, name: str, **values: Any) -> None:
        """Write some tensors, and plain values, under a name."""
        self.path.mkdir(exist_ok=True)
        with atomic_writer(self.path / f"{name}.pt") as file:
            torch.save({key: _own(value) for key, value in values.items()}, file)

    def load(self, name: str) -> dict[str, Any]:
        """Read what was saved under a name; empty if nothing was."""
        path = self.path / f"{name}.pt"
        if not path.is_file():
            return {}
        return cast(dict[str, Any], torch.load(path, map_location="cpu", weights_only=True))


def layer_name(layer: int) -> str:
    """Where a layer's output is."""
    return f"layer-{layer:04d}"


def experts_name(layer: int) -> str:
    """Where the inputs and outputs of a layer's experts are."""
    return f"experts-{layer:04d}"


def all_rows(parent: Path) -> list[RowFolder]:
    """The rows of a folder, in the order of the input."""
    return [RowFolder(parent, int(path.name)) for path in sorted(parent.iterdir())]


def _own(value: Any) -> Any:
    # A slice would be saved with all that it is a slice of.
    return value.detach().cpu().clone() if isinstance(value, Tensor) else value

"""Which tensor of a model each tensor on disk goes into, as transformers' converters see it.

Private names of transformers used here, as of 5.23: ``rename_source_key``, ``dot_natural_key``.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)


@dataclass(frozen=True, slots=True)
class Target:
    """Where a tensor on disk goes. Tensors with the same target are converted together.

    Attributes:
        name: Name in the model; the first of them if a converter splits the tensor.
        pattern: The pattern of the converter that takes the tensor, with a ``*`` where experts are
            numbered; None if the tensor is at most renamed.
    """

    name: str
    pattern: str | None

    @property
    def layer(self) -> int | None:
        """Index of the decoder layer; None outside all layers."""
        return next((int(part) for part in self.name.split(".") if part.isdigit()), None)


def find_targets(model: PreTrainedModel, names: Iterable[str]) -> dict[str, Target]:
    """Find where tensors on disk go.

    Args:
        model: The model, on any device.
        names: Names on disk.

    Returns:
        The target of each name, whether the model has it or not.
    """
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    prefix, state = model.base_model_prefix, model.state_dict()
    targets = {}
    # In the order of convert_and_load_state_dict_in_model: some renamings depend on it.
    for name in sorted(names, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, prefix, state)
        if target not in state and name in state:
            target, pattern = rename_source_key(name, [], [], prefix, state)
        targets[name] = Target(target, pattern)
    return targets

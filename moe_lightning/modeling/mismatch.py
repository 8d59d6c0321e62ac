"""Telling a user in which tensors a checkpoint and its config differ, and probably why.

Plain names and shapes in, one message out. How they were found is the business of ``preflight``.
"""

import re
from collections import Counter
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from moe_lightning.modeling.safetensors_header import TensorInfo

_NUM_SHOWN = 5
_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.")
_EXPERT = re.compile(r"^(.*\.experts\.)(\d+)(\..+)$")
# What families call the same size in their configs.
NUM_EXPERTS_NAMES = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
TOP_K_NAMES = ("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_top_k")


@dataclass(slots=True)
class Mismatch:
    """How the tensors on disk differ from those that the config derives.

    Args:
        missing: Names of tensors that should be on disk, in the disk's naming where it is known.
        wrong: Name, shape found and shape wanted of tensors of the wrong shape.
        extra: Tensors that have no place in the model.
        other: Anything else, each a sentence without a full stop.
    """

    missing: list[str] = field(default_factory=list)
    wrong: list[tuple[str, Sequence[int], Sequence[int]]] = field(default_factory=list)
    extra: list[str] = field(default_factory=list)
    other: list[str] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.missing or self.wrong or self.extra or self.other)

    def describe(self, tensors: Mapping[str, TensorInfo]) -> str:
        """Say how many tensors differ in which way, and name the first few.

        Args:
            tensors: The tensors on disk, for the files' names.

        Returns:
            One line for each kind of difference.
        """

        def place(name: str) -> str:
            return f"{name} in {tensors[name].file.name}" if name in tensors else name

        wrong = [
            f"{place(n)} is {list(has)} instead of {list(want)}" for n, has, want in self.wrong
        ]
        kinds = (
            ("missing", self.missing),
            ("of the wrong shape", wrong),
            ("that the model has no place for", [place(name) for name in self.extra]),
        )
        lines = [
            f"{len(items)} tensor{'s' if len(items) > 1 else ''} {kind}: {_first(items)}"
            for kind, items in kinds
            if items
        ]
        return "\n  ".join(lines + self.other[:_NUM_SHOWN])


def _first(items: Sequence[str]) -> str:
    return ", ".join(items[:_NUM_SHOWN]) + (", ..." if len(items) > _NUM_SHOWN else "")


def missing_experts(names: Iterable[str]) -> list[str]:
    """Find experts that are left out of a numbering.

    transformers would move the experts after a gap one place down without a word.

    Args:
        names: Names of tensors on disk.

    Returns:
        Names that close the gaps, for example ``...experts.2.up_proj.weight`` where 1 and 3 exist.
    """
    numbers_of: dict[tuple[str, str], set[int]] = {}
    for name in names:
        if match := _EXPERT.match(name):
            numbers_of.setdefault((match[1], match[3]), set()).add(int(match[2]))
    return [
        f"{prefix}{number}{suffix}"
        for (prefix, suffix), numbers in numbers_of.items()
        # A number can be absurd; never list more gaps than there are experts.
        for number in range(min(max(numbers), 2 * len(numbers)))
        if number not in numbers
    ]


def probable_cause(
    config: object, names: Iterable[str], mismatch: Mismatch, *, written: Container[str]
) -> str:
    """Say which size in config.json contradicts the tensors, if one does, and what to do.

    Args:
        config: The text model's config.
        names: Names of tensors on disk, without those that the family ignores on purpose.
        mismatch: How the tensors differ.
        written: The names that config.json itself uses, of several for the same size.

    Returns:
        Cause and remedy, in whole sentences.
    """
    names = list(names)
    sizes = [
        *_layer_sizes(config, names, mismatch),
        *_expert_sizes(config, names, mismatch, written),
        *_embedding_sizes(config, mismatch),
    ]
    if not sizes:
        return (
            "Cause: config.json and the safetensors files are not of the same checkpoint, or "
            "tensors were lost or changed when they were written. Download or convert the "
            "checkpoint again."
        )
    causes = [
        f"config.json says {name}={says}, but the tensors {found}" for name, says, found in sizes
    ]
    return (
        f"Cause: {'; '.join(causes)}. Correct {' and '.join(name for name, _, _ in sizes)} in "
        "config.json, or download config.json and the safetensors files again."
    )


def _layer_sizes(
    config: object, names: Iterable[str], mismatch: Mismatch
) -> list[tuple[str, int, str]]:
    says = getattr(config, "num_hidden_layers", None)
    layers = {int(match[1]) for name in names if (match := _LAYER.search(name))}
    if not isinstance(says, int) or not layers:
        return []
    num_layers = max(layers) + 1
    suspects = [*mismatch.missing, *mismatch.extra]
    beyond = min(says, num_layers)
    is_suspect = any(int(match[1]) >= beyond for name in suspects if (match := _LAYER.search(name)))
    if num_layers == says or not is_suspect:
        return []
    return [("num_hidden_layers", says, f"are of {num_layers} layers (0 to {num_layers - 1})")]


def _expert_sizes(
    config: object, names: Iterable[str], mismatch: Mismatch, written: Container[str]
) -> list[tuple[str, int, str]]:
    last_of: dict[tuple[str, str], int] = {}
    for name in names:
        if match := _EXPERT.match(name):
            key = (match[1], match[3])
            last_of[key] = max(last_of.get(key, 0), int(match[2]))
    says = first_size(config, NUM_EXPERTS_NAMES, written=written)
    if says is None:
        return []
    if not last_of:
        # All experts of a layer in one tensor.
        fused = [
            has[0]
            for _, has, want in mismatch.wrong
            if want and want[0] == says[1] != has[0] and has[1:] == want[1:]
        ]
        return [(*says, f"are of {fused[0]} experts a layer")] if fused else []
    # Most layers decide: one lost or added expert must not put the blame on the config.
    num_experts = Counter(last_of.values()).most_common(1)[0][0] + 1
    if num_experts == says[1]:
        return []
    return [(*says, f"are of {num_experts} experts a layer (0 to {num_experts - 1})")]


def _embedding_sizes(config: object, mismatch: Mismatch) -> list[tuple[str, int, str]]:
    sizes = []
    for name, has, want in mismatch.wrong:
        if not name.endswith(("embed_tokens.weight", "wte.weight")) or len(has) != 2:
            continue
        for dim, key in enumerate(("vocab_size", "hidden_size")):
            if has[dim] != want[dim] and has[::-1] != want:
                sizes.append((key, want[dim], f"say {has[dim]} ({name})"))
    return [size for size in sizes if getattr(config, size[0], None) == size[1]]


def first_size(
    config: object, names: Sequence[str], *, written: Container[str]
) -> tuple[str, int] | None:
    """Find a size in a config under one of the names that families give it.

    Args:
        config: The config.
        names: The names to try.
        written: The names that config.json itself uses; these are tried first.

    Returns:
        The name and the size; None if the config has none of them.
    """
    for name in sorted(names, key=lambda name: name not in written):
        value = getattr(config, name, None)
        if isinstance(value, int) and not isinstance(value, bool):
            return name, value
    return None

"""Does a checkpoint hold exactly the tensors of the model that its config describes?

    names and shapes on disk ──▶ transformers' own loader, on meta tensors ──▶ what is left over

Nothing but headers is read, except by ``check_values``. The files themselves are checked by
``checkpoint_files``, before; both checks are offered here.

Private names of transformers used here, as of transformers 5.23: ``revert_weight_conversion``,
``_adjust_missing_and_unexpected_keys``, ``all_tied_weights_keys``, and the fields of what
``convert_and_load_state_dict_in_model`` returns.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    convert_and_load_state_dict_in_model,
    revert_weight_conversion,
)
from transformers.modeling_utils import LoadStateDictConfig

from moe_lightning.errors import CheckpointError
from moe_lightning.modeling.checkpoint_files import check_files, check_tokenizer
from moe_lightning.modeling.mismatch import (
    NUM_EXPERTS_NAMES,
    TOP_K_NAMES,
    Mismatch,
    first_size,
    missing_experts,
    probable_cause,
)
from moe_lightning.modeling.quiet import quiet_transformers
from moe_lightning.modeling.safetensors_header import PLAIN_FLOATS, TensorInfo
from moe_lightning.modeling.tensor_names import find_targets

if TYPE_CHECKING:
    from moe_lightning.modeling.checkpoint import CheckpointView

__all__ = ["check_files", "check_model", "check_tokenizer", "check_values"]

_CHUNK_ELEMENTS = 2**24


@dataclass(frozen=True, slots=True)
class _Outcome:
    """What transformers' loader makes of a checkpoint; all names are the model's.

    ``target_of`` maps the tensors on disk that are not ignored on purpose to the model's names.
    """

    target_of: dict[str, str]
    missing: set[str]
    unexpected: set[str]
    mismatched: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]
    errors: dict[str, str]


def check_model(view: "CheckpointView", model: PreTrainedModel) -> None:
    """Check that a checkpoint holds exactly the tensors that a model needs. Reads no weights.

    Args:
        view: The opened checkpoint.
        model: The model of the view's config, freshly built on the meta device. It is used up.

    Raises:
        CheckpointError: If a tensor is missing, does not belong to the model, or has the wrong
            shape or dtype; the message names the first few, counts them, and says what to do.
    """
    config = model.config.get_text_config()
    _check_top_k(view, config)
    wanted: dict[str, Tensor] = dict(model.state_dict())
    outcome = _try_loading(view, model)
    mismatch = _find_mismatch(view, model, wanted, outcome)
    if mismatch:
        raise CheckpointError(
            f"{view.path}: the tensors do not fit the model that config.json describes "
            f"({type(model).__name__}).\n  {mismatch.describe(view.tensors)}\n"
            f"{probable_cause(config, outcome.target_of, mismatch, written=view.config_keys)}"
        )
    _check_dtypes(view, wanted, outcome)


def check_values(view: "CheckpointView", names: Iterable[str] | None = None) -> None:
    """Read tensors once and check that every number is finite; shows progress on stderr.

    Args:
        view: The opened checkpoint.
        names: Tensors to read; None means all.

    Raises:
        CheckpointError: If a tensor holds a NaN or an infinity; the message names file and tensor.
    """
    slices = view.slices(view.tensors if names is None else names)
    infos = {name: view.tensors[name] for name in slices}
    num_bytes = sum(info.end - info.start for info in infos.values())
    with tqdm(total=num_bytes, unit="B", unit_scale=True, desc="Checking weights", delay=1) as bar:
        # In the order of the disk.
        for info in sorted(infos.values(), key=lambda info: (info.file, info.start)):
            for part in _in_parts(slices[info.name], info):
                _check_finite(part, info)
                bar.update(part.numel() * part.element_size())


def _in_parts(piece: Any, info: TensorInfo) -> Iterator[Tensor]:
    if not info.shape or prod(info.shape) == 0:
        yield piece[...]
        return
    num_rows = max(1, _CHUNK_ELEMENTS // max(1, prod(info.shape[1:])))
    for start in range(0, info.shape[0], num_rows):
        yield piece[start : start + num_rows]


def _check_finite(part: Tensor, info: TensorInfo) -> None:
    if not part.is_floating_point() and not part.is_complex():
        return
    # 8-bit floats have no isfinite.
    part = part.float() if part.element_size() == 1 else part
    if part.isfinite().all():
        return
    num_nan, num_inf = int(part.isnan().sum()), int(part.isinf().sum())
    raise CheckpointError(
        f"{info.file}: tensor {info.name!r} holds numbers that are not finite (NaN: {num_nan}, "
        f"infinite: {num_inf}, in {part.numel():,} numbers read). Every answer would be NaN. The "
        "training diverged or the file was damaged: use an earlier checkpoint, or download it "
        "again."
    )


def _check_top_k(view: "CheckpointView", config: object) -> None:
    num_experts = first_size(config, NUM_EXPERTS_NAMES, written=view.config_keys)
    top_k = first_size(config, TOP_K_NAMES, written=view.config_keys)
    if num_experts is None or top_k is None or 1 <= top_k[1] <= num_experts[1]:
        return
    raise CheckpointError(
        f"{view.path / 'config.json'}: {top_k[0]}={top_k[1]}, but a token can only be sent to 1 to "
        f"{num_experts[1]} experts ({num_experts[0]}={num_experts[1]}). Correct config.json, or "
        "download it again."
    )


def _check_dtypes(view: "CheckpointView", wanted: Mapping[str, Tensor], outcome: _Outcome) -> None:
    for name, target in outcome.target_of.items():
        info = view.tensors[name]
        if wanted[target].is_floating_point() and info.dtype not in PLAIN_FLOATS:
            raise CheckpointError(
                f"{info.file}: tensor {name!r} is {info.dtype}, but the model wants a plain float "
                f"({', '.join(sorted(PLAIN_FLOATS))}): the weights are quantized, and config.json "
                "does not say how. Use an unquantized version of the checkpoint."
            )


def _try_loading(view: "CheckpointView", model: PreTrainedModel) -> _Outcome:
    tensors = {
        name: torch.empty(info.shape, dtype=torch.float32, device="meta")
        for name, info in view.tensors.items()
    }
    load_config = LoadStateDictConfig(
        dtype=torch.float32,
        device_map={"": "meta"},
        weight_mapping=get_model_conversion_mapping(model),
    )
    with quiet_transformers():
        try:
            targets = find_targets(model, view.tensors)
            info, _ = convert_and_load_state_dict_in_model(model, tensors, load_config)
        except Exception as error:
            # Most failures are collected; what is left here names no tensor.
            raise CheckpointError(
                f"{view.path}: transformers cannot fit the tensors into {type(model).__name__}: "
                f"{error}. Check that config.json and the files are of the same checkpoint."
            ) from error
        unexpected = set(info.unexpected_keys)
        model._adjust_missing_and_unexpected_keys(info)
    ignored = unexpected - info.unexpected_keys
    return _Outcome(
        target_of={n: target.name for n, target in targets.items() if target.name not in ignored},
        missing=_without_tied(info.missing_keys, model),
        unexpected=info.unexpected_keys,
        mismatched={name: (tuple(has), tuple(want)) for name, has, want in info.mismatched_keys},
        errors=info.conversion_errors,
    )


def _without_tied(missing: set[str], model: PreTrainedModel) -> set[str]:
    """Drop names whose tensor is tied to one that is there, whichever of them was saved."""
    groups: dict[str, set[str]] = defaultdict(set)
    for target, source in model.all_tied_weights_keys.items():
        groups[source] |= {source, target}
    tied = {name for group in groups.values() if not group <= missing for name in group}
    return missing - tied


def _find_mismatch(
    view: "CheckpointView", model: PreTrainedModel, wanted: Mapping[str, Tensor], outcome: _Outcome
) -> Mismatch:
    names = outcome.target_of
    mismatch = Mismatch(
        missing=missing_experts(names),
        extra=[name for name, target in names.items() if target in outcome.unexpected],
    )
    faulty = outcome.missing | outcome.mismatched.keys() | outcome.errors.keys()
    shapes = _shapes_on_disk(model, wanted, names)
    found = find_targets(model, {**shapes, **dict.fromkeys(mismatch.missing)})
    targets = {name: target.name for name, target in found.items()}
    for name, shape in shapes.items():
        if targets[name] in faulty and name not in names:
            mismatch.missing.append(name)
        elif targets[name] in faulty and view.tensors[name].shape != shape:
            mismatch.wrong.append((name, view.tensors[name].shape, shape))
    if shapes:
        mismatch.extra += [n for n, target in names.items() if target in faulty and n not in shapes]
    mismatch.missing = list(dict.fromkeys(mismatch.missing))
    explained = {targets[name] for name in mismatch.missing}
    explained |= {targets[name] for name, _, _ in mismatch.wrong}
    explained |= {names[name] for name in mismatch.extra}
    unexplained = faulty - explained
    mismatch.missing += sorted(outcome.missing & unexplained)
    mismatch.wrong += [
        (name, has, want)
        for name, (has, want) in sorted(outcome.mismatched.items())
        if name in unexplained
    ]
    mismatch.other += [
        f"{name} cannot be made of the tensors on disk: {message.strip().splitlines()[-1]}"
        for name, message in sorted(outcome.errors.items())
        if name in unexplained
    ]
    mismatch.other += _told_twice(names)
    if outcome.unexpected and not mismatch.extra:
        mismatch.other.append(f"the model has no place for {min(outcome.unexpected)}")
    return mismatch


def _shapes_on_disk(
    model: PreTrainedModel, wanted: Mapping[str, Tensor], names: Mapping[str, str]
) -> dict[str, tuple[int, ...]]:
    """The names and shapes that save_pretrained would write, if the files follow that layout."""
    tied = {name for name in model.all_tied_weights_keys if name not in names}
    try:
        state = {name: tensor for name, tensor in wanted.items() if name not in tied}
        layout = revert_weight_conversion(model, state)
    except Exception:
        # Only for a better message: some conversions cannot be reverted on meta.
        return {}
    shapes = {name: tuple(tensor.shape) for name, tensor in layout.items()}
    return shapes if 2 * len(shapes.keys() & names.keys()) >= len(names) else {}


def _told_twice(names: Mapping[str, str]) -> list[str]:
    """Tensors on disk of which one would silently overwrite the other."""
    sources: dict[str, list[str]] = defaultdict(list)
    for name, target in names.items():
        sources[target].append(name)
    return [
        f"{target} is there twice, as {found[0]} and as {found[1]}"
        for target, found in sources.items()
        if len(found) > 1 and target in found
    ]

"""From captured rows to an outcome; on one process, once the configured model is gone."""

import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm.auto import tqdm

from moe_lightning.errors import UsageError
from moe_lightning.modeling.checkpoint import CheckpointView, open_checkpoint
from moe_lightning.verification.comparison import Comparison
from moe_lightning.verification.faults import Faults
from moe_lightning.verification.folder import RowFacts, all_rows
from moe_lightning.verification.options import ReferenceOptions
from moe_lightning.verification.outcome import Outcome, reference_name
from moe_lightning.verification.reference import Reference, check_room, reference_bytes
from moe_lightning.verification.tolerances import choose_tolerance
from moe_lightning.verification.watching import Configured


def open_reference(options: ReferenceOptions, configured: CheckpointView) -> CheckpointView:
    """The reference's checkpoint.

    Args:
        options: What the user says about the reference.
        configured: The configured checkpoint.

    Returns:
        The opened checkpoint.

    Raises:
        UsageError: If it is of another model, or the device is no device.
    """
    try:
        torch.empty(0, device=options.device)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        reason = str(error).splitlines()[0]
        raise UsageError(
            f"--reference.device {options.device} cannot be used here: {reason}"
        ) from error
    if options.checkpoint is None:
        return configured
    view = open_checkpoint(options.checkpoint)
    for name in ("model_type", "num_hidden_layers", "hidden_size", "vocab_size"):
        own, other = (getattr(v.config.get_text_config(), name, None) for v in (configured, view))
        if own != other:
            raise UsageError(
                f"--reference.checkpoint {options.checkpoint}: its {name} is {other}, that of "
                f"--model.checkpoint {own}. Only checkpoints of the same shape can be compared."
            )
    return view


def verify(
    parent: Path,
    configured: Configured,
    view: CheckpointView,
    options: ReferenceOptions,
    *,
    tolerance: float | None = None,
    notes: Sequence[str] = (),
    shows_progress: bool = True,
) -> Outcome:
    """Compare what was captured with the reference.

    Args:
        parent: Folder of the captured rows.
        configured: What was configured.
        view: The reference's checkpoint.
        options: What the user says about the reference.
        tolerance: The largest relative difference that is right; None goes by what is configured.
        notes: More for people to know.
        shows_progress: Whether to show a progress bar on stderr.

    Returns:
        The outcome.

    Raises:
        UsageError: If there are no rows, or the reference does not fit into memory.
    """
    folders = all_rows(parent)
    if not folders:
        raise UsageError("there are no rows to compare. Give some with --data.input.")
    dtype, device = getattr(torch, options.dtype), torch.device(options.device)
    check_room(reference_bytes(view, dtype), device)
    if shows_progress:
        print("verify: loading the reference", file=sys.stderr)
    reference = Reference(
        view.path, weights_dtype=configured.weights_dtype, dtype=dtype, device=device
    )
    chosen = choose_tolerance(
        dtype=configured.dtype,
        experts_backend=configured.experts_backend,
        wires=configured.wires,
        given=tolerance,
    )
    comparison = Comparison(reference, chosen)
    facts = [folder.facts() for folder in folders]
    answered = [folder for folder, row in zip(folders, facts, strict=True) if row.error is None]
    for folder in tqdm(answered, desc="verify", unit="row", disable=not shows_progress):
        comparison.add(folder)
    faults = Faults(
        comparison,
        answered,
        configured.slots_of,
        {row.id: row.error for row in facts if row.error is not None},
    )
    return Outcome(
        configured,
        comparison,
        faults.find(),
        num_rows=len(folders),
        num_tokens=sum(len(row.token_ids) for row in facts),
        num_cut=_num_cut(facts),
        reference=reference_name(
            options.device,
            options.dtype,
            str(configured.weights_dtype).removeprefix("torch."),
        ),
        notes=[*notes, *_cut_note(facts)],
    )


def _num_cut(facts: Sequence[RowFacts]) -> int:
    return sum(row.num_cut > 0 for row in facts)


def _cut_note(facts: Sequence[RowFacts]) -> list[str]:
    number = _num_cut(facts)
    if not number:
        return []
    length = max(len(row.token_ids) for row in facts)
    return [f"note: {number} prompts are longer than {length} tokens and were cut there"]

"""From a checkpoint and this machine to a strategy: what ``MoEStrategy.select`` does.

The rules live in ``selection``, what devices there are in ``surroundings``.
"""

import sys
from collections.abc import Sequence

import torch
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.strategies import Strategy
from transformers import PreTrainedConfig

from moe_lightning.modeling.model_sizes import measure, read_config
from moe_lightning.modeling.precision import DtypeName, choose_dtype
from moe_lightning.strategies.selection import Choice, select
from moe_lightning.strategies.surroundings import look_around, num_launched, this_machine


def choose(
    config: PreTrainedConfig,
    devices: Sequence[torch.device],
    *,
    training: bool = False,
    num_nodes: int = 1,
    dtype: DtypeName = "auto",
    precision: str = "32-true",
    experts_backend: str = "auto",
    lora_rank: int | None = None,
) -> Choice:
    """Choose a strategy for a model on devices of this machine and others like it.

    Args:
        config: The checkpoint's config.
        devices: The devices of this machine to use.
        training: Whether it trains.
        num_nodes: Machines.
        dtype: Precision of the weights, as for the module.
        precision: The trainer's precision.
        experts_backend: How experts are computed in inference.
        lora_rank: Rank of the adapters that train; None trains every weight.

    Returns:
        The choice.

    Raises:
        UsageError: If nothing fits.
        CheckpointError: If the model cannot be built.
    """
    cluster = look_around(devices, num_nodes=num_nodes, training=training)
    sizes = measure(
        config,
        dtype=choose_dtype(
            dtype,
            torch.device(cluster.kind),
            config,
            is_training=training,
            precision=precision,
        ),
        experts_backend="auto" if training else experts_backend,
        device_type=cluster.kind,
        lora_rank=lora_rank if training else None,
    )
    return select(
        sizes,
        cluster,
        training=training,
        is_mixed=training and "mixed" in precision,
        has_ranks=num_launched() > 1 or (training and cluster.num_devices > 1),
    )


def select_strategy(
    checkpoint: str,
    *,
    devices: Sequence[torch.device] | None = None,
    training: bool = False,
    num_nodes: int = 1,
    dtype: DtypeName = "auto",
    precision: str = "32-true",
    experts_backend: str = "auto",
) -> Strategy:
    """Choose a strategy for a checkpoint, and say why on stderr of rank 0.

    Args:
        checkpoint: A Hugging Face directory, a hub id, or ``demo``. Its weights are not read.
        devices: The devices of this machine to use; None is every GPU, or the CPU.
        training: Whether it trains.
        num_nodes: Machines.
        dtype: Precision of the weights, as for the module.
        precision: The trainer's precision.
        experts_backend: How experts are computed in inference.

    Returns:
        A new strategy for ``Trainer(strategy=...)``.

    Raises:
        UsageError: If nothing fits.
        CheckpointError: If the checkpoint cannot be used.
    """
    devices = this_machine() if devices is None else devices
    choice = choose(
        read_config(checkpoint),
        devices,
        training=training,
        num_nodes=num_nodes,
        dtype=dtype,
        precision=precision,
        experts_backend=experts_backend,
    )
    say_why(choice)
    return choice.build(devices)


def say_why(choice: Choice) -> None:
    """Print the three reasons on stderr, on rank 0."""
    if rank_zero_only.rank == 0:  # type: ignore[attr-defined]
        print("\n".join(f"moe_auto: {line}" for line in choice.reasons), file=sys.stderr)

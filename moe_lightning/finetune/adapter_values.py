"""What adapters start from, the same numbers however the model is shared out.

Every expert's A is drawn on its own, from a seed of its name and number, so a rank makes only the
rows that it holds. B is zero: the adapters add nothing until they are trained. Or both come from a
PEFT adapter, of which a rank keeps only its rows.

Private name used here: ``_is_hf_initialized`` of transformers 5.23 is set on what was filled, as
loading would give it random values otherwise.
"""

import math
import zlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from moe_lightning.errors import CheckpointError
from moe_lightning.experts.adapters import LORA_A, LORA_B
from moe_lightning.finetune.adapter_layout import expert_keys
from moe_lightning.finetune.local_parts import local_box, local_part
from moe_lightning.finetune.lora import LoRA, adapter_names, train_adapters_only
from moe_lightning.modeling.expert_rows import ExpertRows


def initialise_adapters(
    model: PreTrainedModel,
    lora: LoRA,
    rows: Mapping[str, ExpertRows],
    *,
    device: torch.device,
) -> None:
    """Give all adapters of a model, or of a rank's share of it, their first values.

    Adapters on meta become parameters on the device; others are filled where they are. At the end
    adapters have gradients and nothing else does, whatever loading has made of it.

    Args:
        model: The model that :func:`~moe_lightning.finetune.lora.add_adapters` was called with, on
            meta, loaded or sharded; changed in place.
        lora: The same options.
        rows: Which experts the rows of the experts' adapters are, by the name of the parameter.
        device: Where adapters on meta go.

    Raises:
        CheckpointError: If an adapter to start from cannot be read or does not fit.
    """
    for name in adapter_names(model):
        module_name, _, own_name = name.rpartition(".")
        module = model.get_submodule(module_name)
        parameter: nn.Parameter = getattr(module, own_name)
        box = local_box(parameter)
        if own_name not in (LORA_A, LORA_B):
            assert name in rows, f"{name} is of experts, but not which"
            adapted = [
                projection[: -len(LORA_A) - 1]
                for projection, _ in module.named_parameters(recurse=False)
                if projection.endswith(f"_{LORA_A}")
            ]
            key = expert_keys(module_name, tuple(adapted))[name]
            local = _experts_values(name, key, parameter, rows[name], box, lora)
        else:
            local = _linear_values(name, parameter, box, lora)
        local = local.to(parameter.dtype)
        if not parameter.is_meta:
            with torch.no_grad():
                local_part(parameter).copy_(local)
        else:
            parameter = nn.Parameter(_like(parameter, local.to(device)))
            setattr(module, own_name, parameter)
        parameter._is_hf_initialized = True  # type: ignore[attr-defined]
    train_adapters_only(model)


def _linear_values(name: str, parameter: Tensor, box: tuple[slice, ...], lora: LoRA) -> Tensor:
    """The local part of a linear layer's A or B."""
    module, _, letter = name.rpartition(".")
    if lora.source is not None:
        whole = lora.source.linear(module, letter)
        _check_shape(lora, name, whole, parameter.shape)
        return whole[box]
    if letter == LORA_B:
        return torch.zeros(parameter.shape, device="cpu")[box]
    return _random(lora.seed, name, parameter.shape)[box]


def _experts_values(
    name: str,
    key: str,
    parameter: Tensor,
    rows: ExpertRows,
    box: tuple[slice, ...],
    lora: LoRA,
) -> Tensor:
    """The local part of A or B of a projection of experts."""
    assert len(rows.expert_ids) == parameter.shape[0], f"{name}: a row is not known"
    expert_ids = rows.expert_ids[box[0]]
    shape = parameter.shape[1:]
    if lora.source is not None:
        read = lora.source.experts_a if name.endswith(LORA_A) else lora.source.experts_b
        picked = read(key, expert_ids, num_experts=rows.num_experts)
        _check_shape(lora, name, picked, (len(expert_ids), *shape))
    elif expert_ids and name.endswith(LORA_A):
        picked = torch.stack([_random(lora.seed, f"{name}:{e}", shape) for e in expert_ids])
    else:
        picked = torch.zeros((len(expert_ids), *shape))
    return picked[(slice(None), *box[1:])]


def _random(seed: int, name: str, shape: torch.Size) -> Tensor:
    """Uniform in +-1/sqrt(inputs), as PEFT and nn.Linear start (Kaiming with a = sqrt(5))."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}:{name}".encode()))
    bound = 1 / math.sqrt(shape[-1])
    return torch.empty(shape, device="cpu").uniform_(-bound, bound, generator=generator)


def _like(parameter: Tensor, local: Tensor) -> Tensor:
    """A local part as the kind of tensor that the parameter is."""
    if not isinstance(parameter, DTensor):
        return local.contiguous()
    return DTensor.from_local(
        local.contiguous(),
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )


def _check_shape(
    lora: LoRA, name: str, tensor: Tensor, wanted: torch.Size | tuple[int, ...]
) -> None:
    if tensor.shape != torch.Size(wanted):
        assert lora.source is not None, "only a file's tensors can have another shape"
        raise CheckpointError(
            f"{lora.source.path}: the adapter's {name} is {list(tensor.shape)} and the model needs "
            f"{list(wanted)}: it was made for another model."
        )

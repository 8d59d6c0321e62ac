"""A rank's share of a model and its optimizer as named tensors that fit any number of ranks.

    dense parameter, buffer      <name>                                    a DTensor, or whole
    one row per expert           <name>::expert<e>                         one tensor per expert
    state of the optimizer       optimizer.state.<either of these>.<key>

Experts are numbered as in the model, so neither the ranks that share them, nor placement or
replicas are in the names. The tensors are views of the model's: what reads into them fills it.
Files and directories live in ``training_checkpoint``. Private names of torch used here, as of 2.13:
``compute_local_shape_and_global_offset``.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.optim import Optimizer

from moe_lightning.errors import UsageError
from moe_lightning.modeling.expert_rows import ExpertRows

OPTIMIZER = "optimizer.state."
# What an optimizer decides for the ranks it runs on, not what was trained with.
_OF_THE_RUN = ("params", "foreach", "fused", "capturable", "differentiable")


def expert_key(name: str, expert: int) -> str:
    """The name of one expert's row of a parameter."""
    return f"{name}::expert{expert}"


def without_expert(key: str) -> tuple[str, int | None]:
    """The inverse of :func:`expert_key`; other names have no expert."""
    name, separator, expert = key.rpartition("::expert")
    return (name, int(expert)) if separator and expert.isdigit() else (key, None)


class Share:
    """Named tensors of this rank.

    Attributes:
        tensors: What is saved, or read into, by name.
    """

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._moved: list[tuple[DTensor, DTensor]] = []

    def add(self, name: str, tensor: Tensor, rows: ExpertRows | None, *, form: str = "{}") -> None:
        """Add a tensor; all ranks that share it must call this together.

        Args:
            name: Its name in the model.
            tensor: Any; shared ones are cut into whole rows first, if they are cut otherwise.
            rows: What its rows are, if they are experts.
            form: Puts the name into that of a state of the optimizer.
        """
        tensor = tensor.detach()
        held = _in_rows(tensor, is_of_experts=rows is not None)
        if held is not tensor:
            assert isinstance(held, DTensor), "others stay"
            assert isinstance(tensor, DTensor), "others stay"
            self._moved.append((tensor, held))
        if rows is None:
            self.tensors[form.format(name)] = held
            return
        local, (first, *_) = local_part(held)
        ids = rows.expert_ids[first : first + local.shape[0]]
        for expert, row in zip(ids, local, strict=True):
            self.tensors[form.format(expert_key(name, expert))] = row

    def finish_reading(self) -> None:
        """Bring what was cut otherwise back; all ranks call this together."""
        for tensor, held in self._moved:
            back = held.redistribute(placements=tensor.placements)
            tensor.to_local().copy_(back.to_local())
        self._moved.clear()


def local_part(tensor: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """This rank's part of a tensor.

    Args:
        tensor: Whole, or cut into consecutive parts.

    Returns:
        The part, and where it begins in each dim.
    """
    if not isinstance(tensor, DTensor):
        return tensor, (0,) * tensor.ndim
    _, offset = compute_local_shape_and_global_offset(
        tensor.shape, tensor.device_mesh, tensor.placements
    )
    return tensor.to_local(), tuple(offset)


def _in_rows(tensor: Tensor, *, is_of_experts: bool) -> Tensor:
    """The same tensor, cut into consecutive parts, and of experts between rows only."""
    if not isinstance(tensor, DTensor):
        return tensor
    placements: list[Placement] = []
    for placement in tensor.placements:
        if placement.is_replicate():
            placements.append(Replicate())
        else:
            dim = getattr(placement, "dim", None)
            assert dim is not None, f"a parameter cannot be {placement}"
            placements.append(Shard(0 if is_of_experts else dim))
    if tuple(placements) == tuple(tensor.placements):
        return tensor
    # Tensor parallelism cuts within rows. Only this tensor is on its way, between its own ranks.
    moved: DTensor = tensor.redistribute(placements=placements)
    return moved


@dataclass(frozen=True, slots=True)
class ModelTensors:
    """The parameters and buffers that a model saves.

    Attributes:
        tensors: Each once, by name.
        aliases: Further names of tied tensors, to the name in ``tensors``.
    """

    tensors: dict[str, Tensor]
    aliases: dict[str, str]


def model_tensors(model: nn.Module) -> ModelTensors:
    """The parameters and buffers that a model saves; FSDP's are sharded again by this.

    Args:
        model: The model, or this rank's share of it.

    Returns:
        They, in the order of the model.
    """
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    names: dict[int, str] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if not isinstance(tensor, Tensor):
            continue
        if id(tensor) in names:
            aliases[name] = names[id(tensor)]
        else:
            names[id(tensor)] = name
            tensors[name] = tensor
    return ModelTensors(tensors, aliases)


@dataclass(frozen=True, slots=True)
class OptimizerState:
    """The state of an optimizer, by names of parameters.

    Attributes:
        tensors: By name of the parameter, its states.
        groups: Names of the parameters and their hyperparameters.
    """

    tensors: dict[str, dict[str, Tensor]]
    groups: list[dict[str, Any]]


def optimizer_state(optimizer: Optimizer, parameters: Mapping[str, Tensor]) -> OptimizerState:
    """Name the state of an optimizer.

    Args:
        optimizer: The optimizer.
        parameters: The model's parameters by name.

    Returns:
        The state; parameters that have none are left out.

    Raises:
        UsageError: If a state is neither a number nor of its parameter's shape.
    """
    names = {id(parameter): name for name, parameter in parameters.items()}
    tensors: dict[str, dict[str, Tensor]] = {}
    groups = []
    for group in optimizer.param_groups:
        own = [names[id(parameter)] for parameter in group["params"]]
        hyperparameters = {k: v for k, v in group.items() if k not in _OF_THE_RUN}
        groups.append({"names": own, "hyperparameters": hyperparameters})
        for name, parameter in zip(own, group["params"], strict=True):
            states = optimizer.state.get(parameter, {})
            for key, value in states.items():
                _check_state(optimizer, key, value, parameter)
            if states:
                tensors[name] = dict(states)
    return OptimizerState(tensors, groups)


def _check_state(optimizer: Optimizer, key: str, value: object, parameter: Tensor) -> None:
    is_number = isinstance(value, Tensor) and value.ndim == 0
    if not is_number and not (isinstance(value, Tensor) and value.shape == parameter.shape):
        raise UsageError(
            f"the state {key!r} of {type(optimizer).__name__} is neither a number nor of its "
            "parameter's shape, and cannot be saved over ranks. Use AdamW, SGD or another "
            "optimizer that works element by element."
        )


def restore_groups(
    optimizer: Optimizer, parameters: Mapping[str, Tensor], groups: Sequence[Mapping[str, Any]]
) -> None:
    """Give the groups of an optimizer the hyperparameters that their parameters had.

    Args:
        optimizer: The optimizer; changed in place. Its groups need not be the saved ones.
        parameters: The model's parameters by name.
        groups: As in :class:`OptimizerState`.
    """
    names = {id(parameter): name for name, parameter in parameters.items()}
    saved = {name: group["hyperparameters"] for group in groups for name in group["names"]}
    for group in optimizer.param_groups:
        known = [saved[n] for n in (names[id(p)] for p in group["params"]) if n in saved]
        if known:
            group.update(known[0])


def make_state(
    optimizer: Optimizer, parameters: Mapping[str, Tensor], sizes: Mapping[str, Mapping[str, int]]
) -> dict[str, dict[str, Tensor]]:
    """Make room for saved state.

    Args:
        optimizer: The optimizer; its state is replaced.
        parameters: The model's parameters by name.
        sizes: For each parameter with saved state, the states and their number of dims.

    Returns:
        The states by name of the parameter, all zero.
    """
    of_group = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    made: dict[str, dict[str, Tensor]] = {}
    optimizer.state.clear()
    for name, parameter in parameters.items():
        if id(parameter) not in of_group or name not in sizes:
            continue
        group = of_group[id(parameter)]
        on_device = bool(group.get("capturable") or group.get("fused"))
        made[name] = {}
        for key, num_dims in sizes[name].items():
            if num_dims:
                made[name][key] = torch.zeros_like(parameter, requires_grad=False)
            else:  # as Optimizer.load_state_dict places steps
                device = parameter.device if on_device else torch.device("cpu")
                made[name][key] = torch.zeros((), device=device)
        optimizer.state[parameter] = made[name]
    return made

"""PEFT's names and layouts of LoRA adapters, and ours.

    ours                               PEFT's
    <linear>.lora_A      [P, in]       base_model.model.<linear>.lora_A.weight       the same
    <experts>.<projection>_lora_A      base_model.model.<experts>[.base_layer].lora_A.weight
                         [E, P, X]     [E * P, X]    expert after expert
    <experts>.<projection>_lora_B      base_model.model.<experts>[.base_layer].lora_B.weight
                         [E, Y, P]     [Y, P * E]    the experts innermost

PEFT adapts a parameter by wrapping its module, once per parameter: the first that the module has is
innermost, one ``base_layer`` deeper for each that follows. See ``ParamWrapper`` in
peft/tuners/lora/layer.py and ``_inject_parameters`` in peft/tuners/tuners_utils.py, 0.21.2.
"""

from torch import Tensor

from moe_lightning.experts.adapters import LORA_A, LORA_B

_PREFIX = "base_model.model."


def linear_key(name: str, letter: str) -> str:
    """PEFT's name of one matrix of a linear layer's adapter."""
    return f"{_PREFIX}{name}.{letter}.weight"


def expert_keys(layer: str, projections: tuple[str, ...]) -> dict[str, str]:
    """PEFT's names of the adapters of a layer's experts.

    Args:
        layer: The name of the experts module.
        projections: Its adapted parameters, in the order in which the module has them.

    Returns:
        PEFT's name by ours, which is ``<layer>.<projection>_lora_A`` or ``_lora_B``.
    """
    keys = {}
    for depth, projection in enumerate(reversed(projections)):
        for letter in (LORA_A, LORA_B):
            inner = f"{layer}{'.base_layer' * depth}.{letter}.weight"
            keys[f"{layer}.{projection}_{letter}"] = f"{_PREFIX}{inner}"
    return keys


def experts_to_peft(tensor: Tensor, letter: str) -> Tensor:
    """One matrix of all experts, as PEFT keeps it.

    Args:
        tensor: A ``[E, P, X]`` or B ``[E, Y, P]``.
        letter: ``lora_A`` or ``lora_B``.

    Returns:
        A ``[E * P, X]``, or B ``[Y, P * E]``.
    """
    return tensor.flatten(0, 1) if letter == LORA_A else tensor.permute(1, 2, 0).flatten(1)


def experts_from_peft(matrix: Tensor, letter: str, *, num_experts: int) -> Tensor:
    """The inverse of :func:`experts_to_peft`.

    Args:
        matrix: A ``[E * P, X]``, or B ``[Y, P * E]``.
        letter: ``lora_A`` or ``lora_B``.
        num_experts: E.

    Returns:
        A ``[E, P, X]`` or B ``[E, Y, P]``.
    """
    if letter == LORA_A:
        return matrix.reshape(num_experts, -1, matrix.shape[1])
    return matrix.reshape(matrix.shape[0], -1, num_experts).permute(2, 0, 1)

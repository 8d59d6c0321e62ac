"""Model FLOPs utilisation: the arithmetic that the model asks for, over what the devices could do.

A forward of a token takes 2 FLOPs for each weight that it meets: all dense ones but the input
embedding, and those of its top-k experts; a training step takes three times that, or twice where
only adapters train. Attention's products of queries, keys and values come on top and are left out,
so the figure is a lower bound. As in PaLM's appendix B (https://arxiv.org/abs/2204.02311), without
its term for attention.
"""

import torch
from transformers import PretrainedConfig

from moe_lightning.modeling.model_sizes import measure
from moe_lightning.placement.footprint import ModelSizes

# Dense bfloat16 and float16 in TFLOP/s, without sparsity, from the makers' data sheets. The first
# name that a device's name contains counts.
PEAKS = (
    ("B200", 2250),
    ("GH200", 989),
    ("H200", 989),
    ("H100 PCIe", 756),
    ("H100 NVL", 835),
    ("H100", 989),
    ("H20", 148),
    ("A100", 312),
    ("A800", 312),
    ("L40S", 362),
    ("L40", 181),
    ("L4", 121),
    ("A10G", 70),
    ("A10", 125),
    ("RTX 4090", 165),
    ("MI300X", 1307),
    ("MI250X", 383),
)


def peak_flops(device_name: str, dtype: torch.dtype) -> float | None:
    """What a device could do.

    Args:
        device_name: As ``torch.cuda.get_device_name`` says.
        dtype: Of the computation.

    Returns:
        FLOP/s; None where it is not known, float32 among it.
    """
    if dtype not in (torch.bfloat16, torch.float16):
        return None
    for name, tflops in PEAKS:
        if name in device_name:
            return tflops * 1e12
    return None


def flops_per_token(config: PretrainedConfig, *, training: bool, lora: bool = False) -> float:
    """FLOPs of a token.

    Args:
        config: The checkpoint's configuration.
        training: Whether there is a backward.
        lora: Whether only adapters train: the gradients of the weights are not computed then.
    """
    passes = 1 if not training else 2 if lora else 3
    return 2.0 * passes * active_weights(measure(config, dtype=torch.float32))


def active_weights(sizes: ModelSizes) -> float:
    """Weights that a token meets: all but the input embedding and experts that are not its own."""
    itemsize: int = getattr(torch, sizes.dtype).itemsize
    head_bytes = sizes.head_bytes or sizes.embedding_bytes  # shared weights are multiplied once
    num_bytes: float = sizes.other_bytes + head_bytes
    for layer in sizes.layers:
        num_bytes += layer.dense_bytes
        if layer.num_experts:
            num_bytes += layer.expert_bytes * min(1.0, sizes.top_k / layer.num_experts)
    return num_bytes / itemsize

"""Which backends can compute experts on this machine, tried on a layer of the demo's shape."""

import torch
from torch import Tensor, nn

from moe_lightning.experts.backends import make_backend, reference, why_not
from moe_lightning.experts.names import BACKEND_NAMES
from moe_lightning.experts.packed import PackedExperts
from moe_lightning.modeling.loading import build_on_meta
from moe_lightning.modeling.model_sizes import read_config
from moe_lightning.modeling.seam import find_moe_layers

ROUNDING = {torch.float32: 1e-4, torch.bfloat16: 3e-2}  # relative; far above what is measured
NUM_ROWS = 8


def backends_here(problems: list[str]) -> list[tuple[str, str]]:
    """What each backend can do here; ``auto`` computes, and is compared with ``reference``.

    Args:
        problems: A wrong result is added.

    Returns:
        Name and words for each.
    """
    devices = {torch.device("cpu"): torch.float32}
    if torch.cuda.is_available():
        devices[torch.device("cuda", 0)] = torch.bfloat16
    lines = []
    for device, dtype in devices.items():
        where = f"{device.type}, {str(dtype).removeprefix('torch.')}"
        experts = _experts_of_demo(device, dtype)
        for name in BACKEND_NAMES:
            if name in ("auto", "reference"):
                continue
            reason = None if name == "grouped_mm" else why_not(name, experts)
            lines.append((f"{name} ({where})", reason or "usable"))
        lines.append((f"auto ({where})", _try_auto(experts, where, problems)))
    return lines


def _experts_of_demo(device: torch.device, dtype: torch.dtype) -> nn.Module:
    layer = find_moe_layers(build_on_meta(read_config("demo"), dtype=dtype))[0]
    experts = layer.experts.to_empty(device=device).requires_grad_(False)
    generator = torch.Generator(device).manual_seed(0)
    for parameter in experts.parameters():
        parameter.normal_(std=0.05, generator=generator)
    return experts


@torch.inference_mode()
def _try_auto(experts: nn.Module, where: str, problems: list[str]) -> str:
    rows_RD, index_RK, weights_RK = _rows(experts)
    wanted_RD = reference(experts, rows_RD, index_RK, weights_RK).float()
    backend = make_backend("auto", experts)
    got_RD = backend(rows_RD, index_RK, weights_RK).float()
    difference = float((got_RD - wanted_RD).norm() / wanted_RD.norm())
    name = "cpu_packed" if isinstance(backend, PackedExperts) else "grouped_mm"
    if not difference <= ROUNDING[rows_RD.dtype]:
        problems.append(
            f"experts are computed wrongly here ({where}, {name}: {difference:.1e} from the "
            "reference). Use --model.experts_backend reference, and report it, with all of this."
        )
    return f"{name}, {difference:.0e} from the reference"


def _rows(experts: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
    weight = next(experts.parameters())
    width = experts.hidden_dim
    assert isinstance(width, int), "the demo's experts know their width"
    generator = torch.Generator().manual_seed(1)
    rows_RD = torch.randn(NUM_ROWS, width, generator=generator).to(weight)
    num_experts = experts.num_experts
    assert isinstance(num_experts, int), "as transformers' experts have it"
    index_RK = torch.arange(2 * NUM_ROWS, device=weight.device).reshape(-1, 2) % num_experts
    return rows_RD, index_RK, torch.full_like(index_RK, 0.5, dtype=weight.dtype)

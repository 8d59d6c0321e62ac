"""What bench_experts.py computes: experts of one layer with random weights, rows and routing."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers.models.deepseek_v2.configuration_deepseek_v2 import DeepseekV2Config
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Experts
from transformers.models.gpt_oss.configuration_gpt_oss import GptOssConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.mixtral.configuration_mixtral import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.models.olmoe.configuration_olmoe import OlmoeConfig
from transformers.models.olmoe.modeling_olmoe import OlmoeExperts
from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

RoutingName = Literal["uniform", "zipf"]
STD = 0.02  # of weights: what transformers initialises models with

# Family: config, experts, and what its config calls expert width and number of experts.
FAMILIES: dict[str, tuple[type, type[nn.Module], str, str]] = {
    "qwen3_moe": (Qwen3MoeConfig, Qwen3MoeExperts, "moe_intermediate_size", "num_experts"),
    "olmoe": (OlmoeConfig, OlmoeExperts, "intermediate_size", "num_experts"),
    "deepseek_v2": (
        *(DeepseekV2Config, DeepseekV2Experts),
        *("moe_intermediate_size", "n_routed_experts"),
    ),
    "mixtral": (MixtralConfig, MixtralExperts, "intermediate_size", "num_local_experts"),
    "gpt_oss": (GptOssConfig, GptOssExperts, "intermediate_size", "num_local_experts"),
}


@dataclass(frozen=True)
class Layer:
    """Sizes of the experts of one layer.

    Attributes:
        family: Which family's experts class computes them.
        hidden_size: Width of a row (D).
        expert_size: Inner width of an expert (F).
        num_experts: Experts (E).
        top_k: Experts per token (K).
    """

    family: str
    hidden_size: int
    expert_size: int
    num_experts: int
    top_k: int

    @property
    def expert_params(self) -> int:
        """Weights of one expert, without biases."""
        return 3 * self.hidden_size * self.expert_size

    def flop(self, tokens: int) -> int:
        """Floating-point operations for so many tokens."""
        return 2 * tokens * self.top_k * self.expert_params


LAYERS = {
    "Qwen3-30B-A3B": Layer("qwen3_moe", 2048, 768, 128, 8),
    "OLMoE-1B-7B": Layer("olmoe", 2048, 1024, 64, 8),
    "DeepSeek-V2-Lite": Layer("deepseek_v2", 2048, 1408, 64, 6),
    "Mixtral-8x7B/4": Layer("mixtral", 2048, 3584, 8, 2),
    "gpt-oss-20b/2": Layer("gpt_oss", 1440, 1440, 32, 4),
}
TINY_LAYERS = {  # for tests: named, never measured by default
    "tiny": Layer("qwen3_moe", 64, 32, 8, 2),
    "tiny-gpt-oss": Layer("gpt_oss", 64, 32, 8, 2),
}


def make_experts(layer: Layer, *, seed: int, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """The family's own experts module with random weights and biases."""
    make_config, make_module, width, count = FAMILIES[layer.family]
    config: Any = make_config(
        hidden_size=layer.hidden_size, **{width: layer.expert_size, count: layer.num_experts}
    )
    config._experts_implementation = "eager"
    with device:
        module = make_module(config).to(dtype).requires_grad_(False).eval()
        generator = torch.Generator(device).manual_seed(seed)
    for parameter in module.parameters():
        parameter.data.normal_(0.0, STD, generator=generator)
    return module


@dataclass
class Point:
    """One point of the benchmark: rows, and the experts that a router chose for them.

    Attributes:
        number: Position among the points of the layer.
        routing: How the experts were drawn.
        hidden_TD: Rows.
        index_TK: Experts of each row, all different.
        weights_TK: Router weights; those of a row add up to 1.
    """

    number: int
    routing: RoutingName
    hidden_TD: Tensor
    index_TK: Tensor
    weights_TK: Tensor

    @property
    def tokens(self) -> int:
        """Rows."""
        return len(self.hidden_TD)

    @property
    def num_distinct(self) -> int:
        """Experts that have rows."""
        return self.index_TK.unique().numel()


def make_points(
    layer: Layer,
    *,
    tokens: list[int],
    routings: list[RoutingName],
    seed: int,
    device: torch.device,
    dtype: torch.dtype,
) -> list[Point]:
    """Draw the rows and the routing of all points of a layer."""
    generator = torch.Generator().manual_seed(seed)
    points = []
    for routing in routings:
        for num_tokens in tokens:
            hidden_TD = torch.randn(num_tokens, layer.hidden_size, generator=generator)
            index_TK = draw_experts(layer, num_tokens, routing, generator)
            logits_TK = torch.randn(num_tokens, layer.top_k, generator=generator)
            points.append(
                Point(
                    number=len(points),
                    routing=routing,
                    hidden_TD=hidden_TD.to(device, dtype),
                    index_TK=index_TK.to(device),
                    weights_TK=logits_TK.softmax(dim=-1).to(device, dtype),
                )
            )
    return points


def draw_experts(
    layer: Layer, num_tokens: int, routing: RoutingName, generator: torch.Generator
) -> Tensor:
    """Draw K different experts for each row, uniformly or by Zipf's law with exponent 1.

    The K largest of log-probability + Gumbel noise are a draw without replacement (Kool et al.,
    "Stochastic Beams and Where to Find Them", 2019).
    """
    log_share_E = torch.zeros(layer.num_experts)
    if routing == "zipf":
        rank_E = torch.randperm(layer.num_experts, generator=generator) + 1
        log_share_E = -rank_E.log()
    uniform_TE = torch.rand(num_tokens, layer.num_experts, generator=generator)
    gumbel_TE = -(-uniform_TE.clamp(1e-9, 1 - 1e-7).log()).log()
    return (log_share_E + gumbel_TE).topk(layer.top_k, dim=-1).indices


def pairs_bytes(layer: Layer, tokens: int, dtype: torch.dtype) -> int:
    """Bytes that an implementation needs which copies an expert for every (token, k) pair."""
    return tokens * layer.top_k * layer.expert_params * dtype.itemsize

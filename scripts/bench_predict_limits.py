"""The least time that the model's arithmetic takes: bytes over bandwidth, or operations over rate.

The rates are those of bench_experts_machine.py, measured in the same run.
"""

from dataclasses import dataclass, field

import torch
from bench_experts_machine import Rates

from moe_lightning import MoELightningModule
from moe_lightning.experts.backends import bytes_per_weight
from moe_lightning.modeling.seam import find_moe_layers

BYTES_PER_DENSE_WEIGHT = 4  # of all contestants, and of the KV cache: fp32


@dataclass
class Forward:
    """One forward of the model in a profiled run.

    Attributes:
        num_tokens: Real tokens.
        num_head_rows: Rows that went through the output embedding.
        kv_tokens: Tokens of the KV cache that a decode step reads.
        is_prefill: Whether it is no decode step.
        hit_experts: Distinct experts, per MoE layer.
    """

    num_tokens: int
    num_head_rows: int
    kv_tokens: int
    is_prefill: bool
    hit_experts: list[int] = field(default_factory=list)

    @property
    def part(self) -> str:
        """What the report calls it."""
        return "prefill" if self.is_prefill else "decode steps"


class Limits:
    """The sizes of a model, as one backend stores and computes it.

    Weights of an expert count in the bytes that the backend stores them in, and its operations at
    the rate of int8 where it computes in int8; all else is fp32. A packed model's parameters have
    their shapes still, so that they can be counted.

    Args:
        module: The module, loaded.
        backend: How its experts are computed.
    """

    def __init__(self, module: MoELightningModule, backend: str) -> None:
        assert module.model is not None
        model = module.model
        layers = find_moe_layers(model)
        config = model.config.get_text_config()
        embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
        first = layers[0].experts
        self.expert_params = sum(p.numel() for p in first.parameters()) // layers[0].num_experts
        self.bytes_per_expert_weight = bytes_per_weight(backend, torch.float32, "cpu")
        self.is_int8 = self.bytes_per_expert_weight == 1
        self.num_params = sum(p.numel() for p in model.parameters())
        routed = sum(layer.num_experts for layer in layers) * self.expert_params
        self.head_params = head.numel()
        # Of an untied input embedding only the rows of the tokens are read.
        self.dense_params = self.num_params - routed - embedding.numel()
        if head is not embedding:
            self.dense_params -= head.numel()
        self.active_expert_params = len(layers) * config.num_experts_per_tok * self.expert_params
        heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
        head_dim = getattr(config, "head_dim", config.hidden_size // config.num_attention_heads)
        self.kv_params_per_token = 2 * heads * head_dim * config.num_hidden_layers

    def least_s(self, forward: Forward, rates: Rates) -> float:
        """Weights (dense ones and the experts hit), KV cache, and operations of one forward."""
        params = self.dense_params + self.head_params * (forward.num_head_rows > 0)
        params += self.kv_params_per_token * forward.kv_tokens
        expert_params = self.expert_params * sum(forward.hit_experts)
        num_bytes = BYTES_PER_DENSE_WEIGHT * params + self.bytes_per_expert_weight * expert_params
        flop = 2 * self.dense_params * forward.num_tokens
        flop += 2 * self.head_params * forward.num_head_rows
        expert_flop = 2 * self.active_expert_params * forward.num_tokens
        expert_rate = rates.float_flop_per_s
        if self.is_int8 and rates.int8_flop_per_s is not None:
            expert_rate = max(expert_rate, rates.int8_flop_per_s)
        compute_s = flop / rates.float_flop_per_s + expert_flop / expert_rate
        return max(num_bytes / rates.read_bytes_per_s, compute_s)

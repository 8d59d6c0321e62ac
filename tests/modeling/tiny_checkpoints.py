"""Tiny random checkpoints of every promised family, as save_pretrained writes them."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

_SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "num_experts_per_tok": 2,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
_DENSE_AND_MOE = {"intermediate_size": 48, "moe_intermediate_size": 24}
_DEEPSEEK = {
    **_DENSE_AND_MOE,
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "n_group": 1,
    "topk_group": 1,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {"intermediate_size": 24, "num_local_experts": 4},
    "qwen2_moe": {**_DENSE_AND_MOE, "shared_expert_intermediate_size": 40, "num_experts": 4},
    "qwen3_moe": {**_DENSE_AND_MOE, "num_experts": 4, "head_dim": 8},
    "olmoe": {"intermediate_size": 24, "num_experts": 4},
    "deepseek_v2": {**_DEEPSEEK, "q_lora_rank": None},
    "deepseek_v3": {**_DEEPSEEK, "q_lora_rank": 16},
    "gpt_oss": {"intermediate_size": 24, "num_local_experts": 4, "head_dim": 8},
    "glm4_moe": {
        **_DENSE_AND_MOE,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "head_dim": 8,
        "n_group": 1,
        "topk_group": 1,
    },
    "granitemoe": {"intermediate_size": 24, "num_local_experts": 4},
    "phimoe": {"intermediate_size": 24, "num_local_experts": 4},
}


def save_tiny(
    family: str,
    path: Path,
    *,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str = "1GB",
    **changes: Any,
) -> PreTrainedModel:
    """Write a checkpoint of a family to a directory, and return the model that was written."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**_SIZES, **FAMILIES[family], **changes})
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.save_pretrained(path, max_shard_size=max_shard_size)
    return model


def build_on_meta(config: Any) -> PreTrainedModel:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)

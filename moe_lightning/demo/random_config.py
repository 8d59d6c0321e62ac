"""The configuration of a random checkpoint: generic sizes translated to a family's own names."""

from dataclasses import dataclass, fields
from typing import Any

from moe_lightning.errors import UsageError

# The names under which the families keep the same size.
_NAMES: dict[str, tuple[str, ...]] = {
    "hidden_size": ("hidden_size",),
    "num_layers": ("num_hidden_layers",),
    "num_heads": ("num_attention_heads",),
    "vocab_size": ("vocab_size",),
    "num_experts": ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"),
    "top_k": ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k"),
}

# Settings that the published checkpoints of a family have and its default configuration has not:
# each of them is a term that a wrong implementation could drop.
_FAMILY_SETTINGS: dict[str, dict[str, object]] = {
    "qwen3_moe": {"norm_topk_prob": True},
    "deepseek_v2": {"routed_scaling_factor": 1.5},
    "glm4_moe": {"attention_bias": True, "use_qk_norm": True, "routed_scaling_factor": 1.5},
    "granitemoe": {
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.5,
        "attention_multiplier": 0.25,
        "logits_scaling": 2.0,
    },
    "phimoe": {"attention_bias": True, "lm_head_bias": True},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSize:
    """The sizes of a random checkpoint, in names common to all families.

    Args:
        hidden_size: The width of the residual stream.
        num_layers: The number of decoder layers.
        num_experts: The number of routed experts of a layer.
        top_k: The number of experts that a token goes to.
        expert_size: The inner width of one expert.
        num_heads: The number of attention heads; it divides `hidden_size`.
        num_kv_heads: The number of key and value heads (not used by latent attention).
        vocab_size: The number of token ids.
        max_positions: The number of positions.
        tie: Whether the output layer shares the weights of the embedding.
    """

    hidden_size: int
    num_layers: int
    num_experts: int
    top_k: int
    expert_size: int
    num_heads: int
    num_kv_heads: int
    vocab_size: int
    max_positions: int
    tie: bool

    def __post_init__(self) -> None:
        for name in self.__slots__:
            if name != "tie" and getattr(self, name) < 1:
                raise UsageError(f"{name} is {getattr(self, name)}: give a positive number.")
        for name, divisor in (("hidden_size", "num_heads"), ("num_heads", "num_kv_heads")):
            if getattr(self, name) % getattr(self, divisor):
                raise UsageError(
                    f"{name} {getattr(self, name)} is not a multiple of {divisor} "
                    f"{getattr(self, divisor)}: change one of them."
                )
        if (self.hidden_size // self.num_heads) % 2:
            raise UsageError(
                f"hidden_size {self.hidden_size} over num_heads {self.num_heads} makes heads of "
                f"{self.hidden_size // self.num_heads}, and rotary positions need an even width: "
                "change one of them."
            )
        if self.top_k > self.num_experts:
            raise UsageError(
                f"top_k {self.top_k} is more than num_experts {self.num_experts}: lower top_k."
            )


def make_config(
    family: str,
    size: ModelSize,
    *,
    token_ids: dict[str, int | None],
    overrides: dict[str, object],
) -> Any:
    """Build the `transformers` configuration of a family from generic sizes.

    Args:
        family: The `model_type` of the family, such as `qwen3_moe`.
        size: The sizes.
        token_ids: The ids of the special tokens: `bos_token_id`, `eos_token_id`, `pad_token_id`.
        overrides: Settings of the family's own configuration that replace what was derived.

    Returns:
        The configuration object.

    Raises:
        UsageError: The family is unknown, or its configuration has no place for one of the sizes.
    """
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    if family not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise UsageError(
            f"family '{family}' is not a causal language model that this transformers knows: "
            "give a model_type such as mixtral, qwen3_moe, olmoe, deepseek_v3 or gpt_oss."
        )
    defaults = AutoConfig.for_model(family)
    known = {field.name for field in fields(defaults)}
    settings: dict[str, object] = {}
    for generic, names in _NAMES.items():
        own = [name for name in names if name in known]
        if not own:
            raise UsageError(
                f"family '{family}': {type(defaults).__name__} has no setting for {generic} "
                f"(looked for {', '.join(names)}), so it can't be made from generic sizes: choose "
                "another family."
            )
        settings[own[0]] = getattr(size, generic)
    optional = _attention_settings(size, defaults, known) | _expert_settings(size, defaults, known)
    optional |= _rope_settings(size, defaults)
    optional |= _FAMILY_SETTINGS.get(family, {})
    settings |= {name: value for name, value in optional.items() if name in known}
    if unknown := overrides.keys() - known:
        raise UsageError(
            f"overrides {sorted(unknown)}: {type(defaults).__name__} has no such settings."
        )
    try:
        return AutoConfig.for_model(family, **(settings | token_ids | overrides))
    except Exception as error:  # whatever a family's own validation raises
        raise UsageError(
            f"family '{family}' refuses the sizes: {error}. Change them, or give overrides."
        ) from error


def _attention_settings(size: ModelSize, defaults: Any, known: set[str]) -> dict[str, object]:
    head_dim = size.hidden_size // size.num_heads
    settings: dict[str, object] = {
        "max_position_embeddings": size.max_positions,
        "num_key_value_heads": size.num_kv_heads,
        "head_dim": head_dim,
        "tie_word_embeddings": size.tie,
        "initializer_range": size.hidden_size**-0.5,
    }
    if "kv_lora_rank" in known:  # latent attention: keys of two parts, one of them rotated
        del settings["head_dim"]
        settings |= {
            "num_key_value_heads": size.num_heads,
            "kv_lora_rank": max(8, size.hidden_size // 4),
            "q_lora_rank": max(8, size.hidden_size // 2),
            "qk_nope_head_dim": head_dim,
            "qk_rope_head_dim": max(2, head_dim // 4 * 2),
            "v_head_dim": head_dim,
        }
    # Full attention where it is the family's default.
    if size.max_positions < 1024 and getattr(defaults, "sliding_window", None) is not None:
        # A window that no input reaches would leave the sliding layers of gpt-oss untested.
        settings["sliding_window"] = max(8, size.max_positions // 4)
    return settings


def _rope_settings(size: ModelSize, defaults: Any) -> dict[str, object]:
    """Stretched rotary positions (gpt-oss) keep their factor, and so their original length."""
    rope = getattr(defaults, "rope_parameters", None) or {}
    if "original_max_position_embeddings" not in rope or not rope.get("factor"):
        return {}
    original = max(1, round(size.max_positions / rope["factor"]))
    factor = size.max_positions / original
    return {
        "rope_parameters": rope | {"original_max_position_embeddings": original, "factor": factor}
    }


def _expert_settings(size: ModelSize, defaults: Any, known: set[str]) -> dict[str, object]:
    settings: dict[str, object] = {
        "intermediate_size": size.expert_size,
        "num_mtp_layers": 0,
        "num_nextn_predict_layers": 0,
    }
    if "moe_intermediate_size" in known:
        settings |= {
            "moe_intermediate_size": size.expert_size,
            "intermediate_size": 2 * size.expert_size,
            "shared_expert_intermediate_size": 2 * size.expert_size,
        }
    if "first_k_dense_replace" in known:
        settings["first_k_dense_replace"] = 1 if size.num_layers > 1 else 0
    if getattr(defaults, "n_group", None) is not None:
        is_grouped = size.num_experts % 2 == 0 and size.num_experts // 2 >= max(2, size.top_k)
        settings |= {"n_group": 2 if is_grouped else 1, "topk_group": 1}
    return settings

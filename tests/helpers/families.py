"""The architectures that the engine is proven on: tiny random models, and what they may share."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import transformers

from tests.helpers.registry import LAYERS, VOCABULARY, WINDOW, config_class, tiny_settings
from tracker.engine.scoring.model import DEPTH_ONLY, FULL, Sharing

SMALL_CONFIG = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MIXED_LAYERS = ["sliding_attention", "full_attention", "full_attention", "sliding_attention"]
FULL_FIRST = ["full_attention", "sliding_attention"] * 2
HYBRID_LAYERS = ["linear_attention", "full_attention"] * 2


@dataclass(frozen=True)
class Family:
    """One architecture.

    Attributes:
        name: Its name in the tests.
        registry_name: The registry's name of its configuration's class.
        changes: What its configuration has other than the registry's tiny one.
        sharing: What the self-check must find exact.
        sublayers: Whether its layers are an attention and an MLP, each adding to the stream.
    """

    name: str
    registry_name: str
    changes: dict[str, Any]
    sharing: Sharing
    sublayers: bool

    def config(self) -> Any:
        """Make a tiny configuration."""
        settings = {**tiny_settings(self.registry_name), **self.changes}
        return config_class(self.registry_name)(**settings)

    def model(self, seed: int = 0) -> Any:
        """Make a random model in float32, its weights large enough that every layer matters."""
        torch.manual_seed(seed)
        config = self.config()
        config.initializer_range = 0.3
        model = transformers.AutoModelForCausalLM.from_config(config)
        return model.float().eval().requires_grad_(False)


def _family(
    name: str,
    registry_name: str | None = None,
    sharing: Sharing = FULL,
    sublayers: bool = True,
    **changes: Any,
) -> Family:
    return Family(name, registry_name or name, changes, sharing, sublayers)


ALL_FAMILIES = [
    # Rotary positions, one kind of layer, in sequence and in parallel.
    _family("llama"),
    _family("llama_eager", "llama", attn_implementation="eager"),
    _family("qwen2", num_key_value_heads=2),
    _family("qwen3", num_key_value_heads=2),
    _family("phi3", sliding_window=None),
    _family("olmo2"),
    _family("stablelm_parallel", "stablelm", num_key_value_heads=2, use_parallel_residual=True),
    _family("granite", logits_scaling=2.0, residual_multiplier=0.7),
    _family("cohere", logit_scale=0.25),
    _family("glm"),
    _family("glm4"),
    _family("smollm3"),
    _family("gpt_neox"),
    _family("gptj"),
    _family("phi"),
    _family("falcon"),
    _family("falcon_new", "falcon", new_decoder_architecture=True, num_kv_heads=2),
    # Learned positions.
    _family("gpt2"),
    _family("opt"),
    _family("opt_350m", "opt", word_embed_proj_dim=16, do_layer_norm_before=False, sublayers=False),
    # Sliding windows: in every layer, in some, with soft-capping, with positions of their own.
    _family("mistral"),
    _family(
        "qwen2_sliding", "qwen2", num_key_value_heads=2, use_sliding_window=True,
        sliding_window=WINDOW,
    ),
    _family("gemma2", layer_types=MIXED_LAYERS),
    _family("gemma3", "gemma3_text", layer_types=["sliding_attention"] * LAYERS),
    _family("gemma3_mixed", "gemma3_text", layer_types=MIXED_LAYERS),
    _family("cohere2", layer_types=FULL_FIRST, logit_scale=1.0),
    _family("olmo3", layer_types=MIXED_LAYERS),
    _family("exaone4", num_key_value_heads=2, sliding_window=WINDOW, layer_types=MIXED_LAYERS),
    _family("gpt_oss", layer_types=MIXED_LAYERS),
    # Its local attention counts tokens in the row, whatever their positions are.
    _family("gpt_neo", sharing=DEPTH_ONLY),
    # Experts.
    _family("mixtral"),
    _family("qwen2_moe", num_key_value_heads=2, layer_types=["full_attention"] * LAYERS),
    _family("qwen3_moe"),
    _family(
        "llama4", "llama4_text", no_rope_layer_interval=4, floor_scale=8192,
        layer_types=[*["chunked_attention"] * 3, "full_attention"],
    ),
    _family("deepseek_v3"),
    # ALiBi: positions are distances, which a model takes from a mask that it builds itself.
    _family("falcon_alibi", "falcon", sharing=DEPTH_ONLY, alibi=True),
    _family("bloom", sharing=DEPTH_ONLY),
    _family("mpt", sharing=DEPTH_ONLY),
    # Recurrent: a token's state is that of the token before it, whatever a mask says.
    _family("mamba", sharing=DEPTH_ONLY, sublayers=False),
    _family("mamba2", sharing=DEPTH_ONLY, sublayers=False),
    # Eager attention without a mask is not causal: here a layer of the wrong kind shows.
    _family("jamba_eager", "jamba", sharing=DEPTH_ONLY, attn_implementation="eager"),
    _family("recurrent_gemma", sharing=DEPTH_ONLY),
    _family("zamba2", intermediate_size=48, sharing=DEPTH_ONLY, sublayers=False),
    _family(
        "bamba_eager", "bamba", mamba_n_groups=2, attn_implementation="eager", sharing=DEPTH_ONLY,
        sublayers=False,
    ),
    _family("qwen3_next", sharing=DEPTH_ONLY, layer_types=HYBRID_LAYERS),
    _family("lfm2", sharing=DEPTH_ONLY),
    _family("falcon_h1", mamba_n_groups=2, sharing=DEPTH_ONLY, sublayers=False),
    _family(
        "granite_hybrid", "granitemoehybrid", mamba_n_groups=2, layer_types=HYBRID_LAYERS,
        sharing=DEPTH_ONLY, sublayers=False,
    ),
]  # fmt: skip
FAMILIES = {family.name: family for family in ALL_FAMILIES}


def tiny_model(family: str, **changes: Any) -> Any:
    """Make a random model of a family, with weights large enough that layers matter."""
    plain = FAMILIES[family]
    return replace(plain, changes={**plain.changes, **changes}).model()

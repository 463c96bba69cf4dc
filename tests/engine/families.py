"""The architectures that the engine is proven on: tiny random models, and what they may share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers

from tracker.engine.scoring.sharing import DEPTH_ONLY, FULL, Sharing

VOCABULARY = 97
LAYERS = 4
WINDOW = 5
"""Tokens that a sliding window sees: fewer than any document of the tests has."""
SMALL = {
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
EQUAL_HEADS = {name: value for name, value in SMALL.items() if name != "num_key_value_heads"}
GPT2 = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": LAYERS, "n_head": 4, "n_positions": 256}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
MAMBA = {"mamba_d_state": 4, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 2}
MIXED = ["sliding_attention", "full_attention", "full_attention", "sliding_attention"]
LOCAL = {"sliding_window": WINDOW, "layer_types": MIXED}
HYBRID = ["linear_attention", "full_attention"] * 2


@dataclass(frozen=True)
class Family:
    """One architecture.

    Attributes:
        name: Its name in the tests.
        config: Makes a tiny configuration.
        sharing: What the self-check must find exact.
        sublayers: Whether its layers are an attention and an MLP, each adding to the stream.
    """

    name: str
    config: Callable[[], Any]
    sharing: Sharing = FULL
    sublayers: bool = True

    def model(self, seed: int = 0) -> Any:
        """Make a random model in float32, its weights large enough that every layer matters."""
        torch.manual_seed(seed)
        config = self.config()
        config.initializer_range = 0.3
        model = transformers.AutoModelForCausalLM.from_config(config)
        return model.float().eval().requires_grad_(False)


def _family(
    name: str, kind: str, *sets: dict[str, Any], sharing: Sharing = FULL, sublayers: bool = True
) -> Family:
    """Describe a family by its configuration's class and some sets of settings."""
    settings = {key: value for each in sets for key, value in each.items()}
    return Family(name, lambda: getattr(transformers, kind)(**settings), sharing, sublayers)


EAGER = {"attn_implementation": "eager"}
ALL = [
    # Rotary positions, one kind of layer, in sequence and in parallel.
    _family("llama", "LlamaConfig", SMALL),
    _family("llama_eager", "LlamaConfig", SMALL, EAGER),
    _family("qwen2", "Qwen2Config", SMALL),
    _family("qwen3", "Qwen3Config", SMALL, {"head_dim": 8}),
    _family("gemma", "GemmaConfig", SMALL, {"head_dim": 8}),
    _family("phi3", "Phi3Config", SMALL),
    _family("olmo2", "Olmo2Config", SMALL),
    _family("stablelm", "StableLmConfig", SMALL),
    _family("stablelm_parallel", "StableLmConfig", SMALL, {"use_parallel_residual": True}),
    _family(
        "granite", "GraniteConfig", SMALL, {"logits_scaling": 2.0, "residual_multiplier": 0.7}
    ),
    _family("cohere", "CohereConfig", SMALL, {"logit_scale": 0.25}),
    _family("glm", "GlmConfig", SMALL, {"head_dim": 8}),
    _family("glm4", "Glm4Config", SMALL, {"head_dim": 8}),
    _family("smollm3", "SmolLM3Config", SMALL, {"no_rope_layer_interval": 2}),
    _family("gpt_neox", "GPTNeoXConfig", EQUAL_HEADS),
    _family(
        "gpt_neox_sequential", "GPTNeoXConfig", EQUAL_HEADS, {"use_parallel_residual": False}
    ),
    _family("gptj", "GPTJConfig", GPT2, {"rotary_dim": 4}),
    _family("phi", "PhiConfig", SMALL),
    _family("falcon", "FalconConfig", EQUAL_HEADS),
    _family(
        "falcon_new", "FalconConfig", EQUAL_HEADS,
        {"new_decoder_architecture": True, "num_kv_heads": 2},
    ),
    # Learned positions.
    _family("gpt2", "GPT2Config", GPT2),
    _family("opt", "OPTConfig", EQUAL_HEADS, {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    _family(
        "opt_350m", "OPTConfig", EQUAL_HEADS,
        {"ffn_dim": 48, "word_embed_proj_dim": 16, "do_layer_norm_before": False}, sublayers=False,
    ),
    # Sliding windows: in every layer, in some, with soft-capping, with positions of their own.
    _family("mistral", "MistralConfig", SMALL, {"sliding_window": WINDOW}),
    _family("starcoder2", "Starcoder2Config", SMALL, {"sliding_window": WINDOW}),
    _family("phi3_sliding", "Phi3Config", SMALL, {"sliding_window": WINDOW}),
    _family(
        "qwen2_sliding", "Qwen2Config", SMALL,
        {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 2},
    ),
    _family("gemma2", "Gemma2Config", SMALL, LOCAL, {"head_dim": 8}),
    _family("gemma3", "Gemma3TextConfig", SMALL, {"head_dim": 8, "sliding_window": WINDOW}),
    _family("gemma3_mixed", "Gemma3TextConfig", SMALL, LOCAL, {"head_dim": 8}),
    _family("cohere2", "Cohere2Config", SMALL, LOCAL, {"logit_scale": 1.0}),
    _family("olmo3", "Olmo3Config", SMALL, LOCAL),
    _family("exaone4", "Exaone4Config", SMALL, LOCAL),
    _family(
        "gpt_oss", "GptOssConfig", SMALL, LOCAL,
        {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    _family(
        "gpt_neo", "GPTNeoConfig",
        {"vocab_size": VOCABULARY, "hidden_size": 32, "num_layers": LAYERS, "num_heads": 4},
        {"attention_types": [[["global", "local"], 2]], "window_size": WINDOW},
        # Its local attention counts tokens in the row, whatever their positions are.
        sharing=DEPTH_ONLY,
    ),
    # Experts.
    _family(
        "mixtral", "MixtralConfig", SMALL, {"num_local_experts": 4, "num_experts_per_tok": 2}
    ),
    _family(
        "qwen2_moe", "Qwen2MoeConfig", SMALL, EXPERTS, {"shared_expert_intermediate_size": 24}
    ),
    _family("qwen3_moe", "Qwen3MoeConfig", SMALL, EXPERTS, {"head_dim": 8}),
    _family(
        "llama4", "Llama4TextConfig", SMALL, {"head_dim": 8, "intermediate_size_mlp": 48},
        {"num_local_experts": 4, "num_experts_per_tok": 1, "attention_chunk_size": 8},
    ),
    _family(
        "deepseek_v3", "DeepseekV3Config", {**SMALL, "num_key_value_heads": 4},
        {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8},
        {"v_head_dim": 8, "moe_intermediate_size": 24, "first_k_dense_replace": 1},
        {"n_routed_experts": 4, "n_shared_experts": 1, "n_group": 2, "topk_group": 1},
        {"num_experts_per_tok": 2},
    ),
    # ALiBi: positions are distances, which a model takes from a mask that it builds itself.
    _family("falcon_alibi", "FalconConfig", EQUAL_HEADS, {"alibi": True}, sharing=DEPTH_ONLY),
    _family(
        "bloom", "BloomConfig",
        {"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": LAYERS, "n_head": 4},
        sharing=DEPTH_ONLY,
    ),
    _family(
        "mpt", "MptConfig", {"vocab_size": VOCABULARY, "d_model": 32, "n_layers": LAYERS},
        {"n_heads": 4, "max_seq_len": 256}, sharing=DEPTH_ONLY,
    ),
    # Recurrent: a token's state is that of the token before it, whatever a mask says.
    _family(
        "mamba", "MambaConfig",
        {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": LAYERS, "state_size": 4},
        sharing=DEPTH_ONLY, sublayers=False,
    ),
    _family(
        "mamba2", "Mamba2Config",
        {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": LAYERS, "state_size": 4},
        {"num_heads": 8, "head_dim": 8, "n_groups": 2, "chunk_size": 16},
        sharing=DEPTH_ONLY, sublayers=False,
    ),
    _family(
        "jamba", "JambaConfig", SMALL, {"attn_layer_period": 2, "attn_layer_offset": 1},
        {"num_experts": 4, "mamba_d_state": 4}, sharing=DEPTH_ONLY,
    ),
    # Eager attention without a mask is not causal: here a layer of the wrong kind shows.
    _family(
        "jamba_eager", "JambaConfig", SMALL, {"attn_layer_period": 2, "attn_layer_offset": 1},
        {"num_experts": 4, "mamba_d_state": 4}, EAGER, sharing=DEPTH_ONLY,
    ),
    _family(
        "recurrent_gemma", "RecurrentGemmaConfig", SMALL, {"attention_window_size": WINDOW},
        {"block_types": ["recurrent", "attention"], "w_init_variance_scale": 1.0},
        sharing=DEPTH_ONLY,
    ),
    _family(
        "zamba2", "Zamba2Config", SMALL, {"layers_block_type": ["linear_attention", "hybrid"] * 2},
        {"mamba_d_state": 4, "n_mamba_heads": 8, "chunk_size": 16},
        sharing=DEPTH_ONLY, sublayers=False,
    ),
    _family(
        "bamba_eager", "BambaConfig", SMALL, MAMBA, EAGER,
        {"attn_layer_indices": [1, 3], "mamba_chunk_size": 16}, sharing=DEPTH_ONLY, sublayers=False,
    ),
    _family(
        "qwen3_next", "Qwen3NextConfig", SMALL, EXPERTS,
        {"head_dim": 8, "shared_expert_intermediate_size": 24, "linear_key_head_dim": 8},
        {"linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4},
        {"layer_types": HYBRID}, sharing=DEPTH_ONLY,
    ),
    _family(
        "lfm2", "Lfm2Config", SMALL, {"layer_types": ["conv", "full_attention"] * 2},
        sharing=DEPTH_ONLY,
    ),
    _family(
        "falcon_h1", "FalconH1Config", SMALL, MAMBA, {"mamba_chunk_size": 16, "mamba_d_ssm": 64},
        sharing=DEPTH_ONLY, sublayers=False,
    ),
    _family(
        "granite_hybrid", "GraniteMoeHybridConfig", SMALL, MAMBA,
        {"mamba_chunk_size": 16, "num_local_experts": 4, "num_experts_per_tok": 2},
        {"shared_intermediate_size": 24, "layer_types": HYBRID},
        sharing=DEPTH_ONLY, sublayers=False,
    ),
]  # fmt: skip
FAMILIES = {family.name: family for family in ALL}

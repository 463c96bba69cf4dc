"""Every causal language model of the installed transformers, tiny.

A family is an entry of transformers' registry. Its tiny configuration is the class's own, with
`SIZES` in place of what it has of them, and with what `SPECIAL` says where that does not build.
`tests/tools/variants.py` changes one thing of it each.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as FAMILY_NAMES

VOCABULARY = 97
LAYERS = 4
MAX_POSITIONS = 256
"""Positions that a model has, more than any document of the survey."""
ORIGINAL_LENGTH = 24
"""Length behind which rotary factors that depend on the call change."""
WINDOW = 5
CHUNK = 8
STD = 0.3
"""So large that no layer's removal goes unseen."""

_SIZES: tuple[tuple[Any, str], ...] = (
    # Words.
    (VOCABULARY, "vocab_size unpadded_vocab_size vocab_size_per_layer_input"),
    (0, "pad_token_id"),
    (1, "bos_token_id"),
    (2, "eos_token_id"),
    # Widths.
    (32, "hidden_size embedding_size word_embed_proj_dim lru_width"),
    (8, "hidden_size_per_layer_input"),
    (
        48,
        "intermediate_size intermediate_size_mlp dense_intermediate_size "
        "prefix_dense_intermediate_size ffn_hidden_size ffn_dim n_inner dff dim_ff",
    ),
    # Depths and heads.
    (LAYERS, "num_hidden_layers"),
    (4, "num_attention_heads swa_num_attention_heads num_heads rotary_dim"),
    (2, "num_key_value_heads swa_num_key_value_heads"),
    (
        8,
        "head_dim swa_head_dim global_head_dim attention_head_dim dim_head kv_channels "
        "query_pre_attn_scalar",
    ),
    # Low ranks.
    (16, "q_lora_rank kv_lora_rank qk_head_dim router_hidden_size"),
    (8, "o_lora_rank qk_rope_head_dim qk_nope_head_dim v_head_dim hc_lowrank"),
    (4, "gated_norm_rank laurel_rank adapter_rank loop_gate_rank d_rel"),
    # Experts.
    (4, "num_experts num_local_experts n_routed_experts moe_num_experts"),
    (2, "zero_expert_num num_experts_per_tok moe_topk moe_k n_group"),
    (1, "topk_group n_shared_experts num_dense_layers first_k_dense_replace"),
    (
        24,
        "moe_intermediate_size expert_ffn_hidden_size shared_expert_intermediate_size "
        "shared_experts_intermediate_size moe_shared_expert_intermediate_size "
        "shared_intermediate_size",
    ),
    # Lengths, windows and chunks, all shorter than the documents.
    (MAX_POSITIONS, "max_position_embeddings n_ctx max_seq_len"),
    (
        WINDOW,
        "sliding_window sliding_window_size window_size attention_window_size keep_window_size",
    ),
    (2 * WINDOW, "local_attention"),
    (
        CHUNK,
        "attention_chunk_size chunk_size mamba_chunk_size block_size floor_scale "
        "log_scaling_n_floor",
    ),
    (16, "rel_extent"),
    (2, "rescale_every no_rope_layer_interval global_attn_every_n_layers"),
    # Sparse attention by an index of its own.
    # Many heads: an index of few is often exactly zero, and its top-k a tie.
    (32, "index_n_heads"),
    (16, "index_head_dim"),
    (6, "index_topk"),
    (4, "index_block_size"),
    (2, "index_topk_blocks"),
    # Recurrent states.
    (4, "state_size ssm_state_size mamba_d_state linear_num_heads linear_num_value_heads"),
    (
        8,
        "mamba_n_heads mamba_num_heads mamba_d_head mamba_head_dim n_mamba_heads "
        "linear_head_dim linear_key_head_dim linear_value_head_dim",
    ),
    (64, "mamba_d_ssm"),
    (2, "n_groups linear_num_key_heads layer_group_size max_window_layers"),
    # Weights.
    (STD, "initializer_range init_std"),
    (1.0, "w_init_variance_scale"),
    ("float32", "dtype"),
)
SIZES = {name: value for value, names in _SIZES for name in names.split()}
"""What a tiny model has of each setting that its class has by one of these names."""

ABSENT_STAYS_ABSENT = {
    "q_lora_rank", "sliding_window", "n_group", "topk_group", "n_inner", "embedding_size",
    "intermediate_size", "hidden_size_per_layer_input", "prefix_dense_intermediate_size",
    "ffn_hidden_size", "unpadded_vocab_size",
}  # fmt: skip
"""Settings that a class leaves out by default, which then mean something else."""

OTHER_PART = {
    "num_hidden_layers": 2,
    "depth": 2,
    "num_blocks": 2,
    "image_size": 28,
    "patch_size": 14,
}
"""What the other part of a model that also sees or hears has: other depths than the text's."""

SPECIAL_SETTINGS: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1, 3]},
    "blt": {
        "encoder_hash_byte_group_vocab": 50,
        "encoder_config": {"hidden_size_global": 32},
        "decoder_config": {"hidden_size_global": 32},
    },
    "cohere_compass_text": {
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 10000.0}
            for kind in ("full_attention", "sliding_attention")
        },
    },
    "dbrx": {
        "attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 24, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v2": {"n_group": 2, "topk_group": 1},
    "dots1": {"sliding_window": WINDOW},
    "dots3_note_text": {
        "q_lora_rank": 16, "swa_num_attention_heads": 4, "swa_num_key_value_heads": 4,
        "swa_q_lora_rank": 16, "swa_kv_lora_rank": 16, "swa_head_dim": 16, "sliding_window": WINDOW,
        "swa_qk_nope_head_dim": 8, "swa_v_head_dim": 8, "head_dim": 16,
    },
    "dots3_note": {
        "vision_config": {"adapter_in_dim": 32, "adapter_out_dim": 32},
        "audio_config": {"adapter_input_size": 32, "adapter_out_dim": 32},
    },
    "fuyu": {"text_config": "persimmon"},
    "gemma3": {"vision_config": "siglip_vision_model"},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "gemma4_text": {
        "global_head_dim": 8, "num_global_key_value_heads": 2, "num_experts": 4, "top_k_experts": 2,
    },
    "gemma4_unified": {"vision_config": {"mm_embed_dim": 32, "mm_posemb_size": 16}},
    "gemma4_unified_text": {"global_head_dim": 8, "num_global_key_value_heads": 2},
    "got_ocr2": {"text_config": "qwen2"},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granite_swa": {"layer_rope_theta": [1e4, 50.0, 1e3, 5.0]},
    "granitemoe_swa": {"layer_rope_theta": [1e4, 50.0, 1e3, 5.0]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "laguna": {"num_attention_heads_per_layer": [4, 8, 2, 4]},
    "longcat_flash": {"num_layers": LAYERS},
    "mamba2": {"num_heads": 8},
    "ministral3": {
        "rope_parameters": {
            "rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "llama_4_scaling_beta": 0.1,
            "original_max_position_embeddings": ORIGINAL_LENGTH, "mscale": 1.0,
            "mscale_all_dim": 1.0, "beta_fast": 32.0, "beta_slow": 1.0,
        },
    },
    "moshi": {"audio_encoder_config": "mimi", "audio_vocab_size": 32},
    "moss_transcribe_diarize": {"text_config": "qwen3"},
    "qwen4_exp_text": {
        "indexer_n_heads": 8, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 8,
        "indexer_compress_ratio": 4,
    },
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
}  # fmt: skip
"""What a family needs besides to build and to run."""

EXTRA_KINDS: dict[str, dict[str, list[Any]]] = {
    "dots1": {"layer_types": ["full_attention", "sliding_attention"]},
    "glm_moe_dsa": {"indexer_types": ["full", "shared"]},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "zamba": {"layers_block_type": ["linear_attention", "hybrid"]},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"]},
}
"""Kinds of layers that a family knows and its default does not use, in an order that runs."""

_NOT_BUILT = {
    "reads in both directions: an encoder": (
        "bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "electra", "ernie",
        "megatron-bert", "reformer", "rembert", "roberta", "roberta-prelayernorm", "roc_bert",
        "roformer", "xlm", "xlm-roberta", "xlm-roberta-xl", "xmod",
    ),
    "the decoder half of an encoder and a decoder": (
        "bart", "bigbird_pegasus", "blenderbot", "blenderbot-small", "marian", "mbart", "musicgen",
        "musicgen_melody", "mvp", "pegasus", "plbart", "prophetnet", "trocr", "whisper",
    ),
    "predicts in permuted order: its hidden states see the future": ("xlnet",),
    "drafts for another model, whose hidden states it reads": (
        "gemma4_assistant", "gemma4_unified_assistant",
    ),
    "its vision part needs another package; its text part is gemma3n_text": ("gemma3n",),
}  # fmt: skip
NOT_BUILT = {family: why for why, names in _NOT_BUILT.items() for family in names}
"""Entries of the registry that are no decoder-only model of text, and why."""


@dataclass(frozen=True)
class Variant:
    """One tiny model.

    Attributes:
        family: The registry's name of its configuration's class.
        name: What is varied; `plain` for nothing.
        settings: What its configuration is made from.
        seed: For its weights.
    """

    family: str
    name: str
    settings: dict[str, Any] = field(hash=False)
    seed: int = 0

    def __str__(self) -> str:
        return f"{self.family}, {self.name}"

    def config(self) -> Any:
        """Make the configuration."""
        return config_class(self.family)(**copy_settings(self.settings))

    def model(self) -> Any:
        """Make the model, its weights random and large, in float32."""
        torch.manual_seed(self.seed)
        config = self.config()
        model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
        generator = torch.Generator().manual_seed(self.seed + 1)
        for weights in model.parameters():
            weights.requires_grad_(False)
            if _is_constant(weights) and not (weights.ndim == 1 and bool((weights == 1).all())):
                weights.normal_(0, STD, generator=generator)
        return model


def config_class(family: str) -> Any:
    """Find the class of a family's configuration."""
    return CONFIG_MAPPING[family]


def families() -> list[str]:
    """Name every family that is built."""
    return [family for family in FAMILY_NAMES if family not in NOT_BUILT]


def make_registered(family: str, **changes: Any) -> Any:
    """Make a family's tiny model, with other settings."""
    return Variant(family, "plain", tiny_settings(family) | changes).model()


def tiny_settings(family: str) -> dict[str, Any]:
    """Choose the settings of a family's plain variant."""
    return _tiny_settings(config_class(family), family)


def _tiny_settings(config_type: Any, family: str) -> dict[str, Any]:
    defaults, names = default_settings(config_type), config_type.attribute_map
    settings: dict[str, Any] = {}
    for name, value in SIZES.items():
        native = name if name in defaults else names.get(name)
        if native not in defaults or (name in ABSENT_STAYS_ABSENT and defaults[native] is None):
            continue
        settings[native] = value
    for name in ("num_key_value_heads", "swa_num_key_value_heads", "num_kv_heads"):
        default = defaults.get(name)
        n_heads = defaults.get(name.replace("key_value", "attention"))
        if name in settings and default is not None:
            settings[name] = 4 if default == n_heads else 1 if default == 1 else 2
    if "kv_lora_rank" in settings and "num_key_value_heads" in settings:
        settings["num_key_value_heads"] = 4
    for name in ("num_experts_per_tok", "moe_topk"):
        if defaults.get(name) == 1:
            settings[name] = 1
    special = SPECIAL_SETTINGS.get(family, {})
    for name, sub_config in config_type.sub_configs.items():
        part_config = special.get(name, sub_config)
        kind = CONFIG_MAPPING[part_config] if isinstance(part_config, str) else sub_config
        if not (isinstance(kind, type) and dataclasses.is_dataclass(kind)):
            continue
        settings[name] = _tiny_settings(kind, kind.model_type)
        if name in ("vision_config", "audio_config"):
            settings[name] |= {k: v for k, v in OTHER_PART.items() if k in default_settings(kind)}
        if isinstance(part_config, str):
            settings[name]["model_type"] = part_config
        elif isinstance(part_config, dict):
            settings[name] |= part_config
    parts = config_type.sub_configs
    settings |= {k: v for k, v in special.items() if k not in parts or v is None}
    for name, kinds in layer_kinds(config_type, family).items():
        if name not in special and len(kinds) > 1:
            settings[name] = alternate_kinds(kinds)
    return settings


@cache
def default_settings(config_type: Any) -> dict[str, Any]:
    """Return the settings of a configuration's class and their defaults."""
    defaults = {entry.name: entry.default for entry in dataclasses.fields(config_type)}
    return {n: None if value is dataclasses.MISSING else value for n, value in defaults.items()}


@cache
def _default(config_type: Any) -> Any:
    try:
        return config_type()
    except Exception:  # noqa: BLE001 - some have no valid default
        return None


def layer_kinds(config_type: Any, family: str) -> dict[str, list[Any]]:
    """Find a configuration's lists with one entry a layer, and the kinds of entries of each."""
    default, names = _default(config_type), default_settings(config_type)
    depth = getattr(default, "num_hidden_layers", None)
    kinds = {
        name: list(dict.fromkeys(value))
        for name, value in (vars(default) if default is not None else {}).items()
        if name in names and isinstance(value, (list, tuple)) and len(value) == depth
        if all(isinstance(entry, str) for entry in value)
    }
    window = getattr(default, "sliding_window", None) is not None
    layer_types = kinds.get("layer_types")
    attention = {"full_attention", "sliding_attention"}
    if window and layer_types and {*layer_types} <= attention:
        kinds["layer_types"] = [*layer_types, *(attention - {*layer_types})]
    return kinds | EXTRA_KINDS.get(family, {})


def alternate_kinds(kinds: list[Any], offset: int = 0) -> list[Any]:
    return [kinds[(offset + layer) % len(kinds)] for layer in range(LAYERS)]


def copy_settings(settings: Any) -> Any:
    """Copy settings, which a configuration may change; those of a part become its class."""
    if isinstance(settings, dict):
        return {key: copy_settings(value) for key, value in settings.items()}
    return list(settings) if isinstance(settings, list) else settings


def _is_constant(weights: torch.Tensor) -> bool:
    return weights.is_floating_point() and bool((weights == weights.flatten()[0]).all())

"""Variants of the registry's families: one thing of a configuration changed in each.

A window, a chunk, the order of the kinds of layers, the kind of rotary positions, a switch. What a
class refuses is no variant of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tests.helpers.registry import (
    LAYERS,
    ORIGINAL_LENGTH,
    Variant,
    alternate_kinds,
    config_class,
    copy_settings,
    default_settings,
    layer_kinds,
    tiny_settings,
)

SWITCHES = (
    "tie_word_embeddings", "use_parallel_residual", "parallel_attn", "alibi", "multi_query",
    "new_decoder_architecture", "use_sliding_window", "do_layer_norm_before", "is_moe",
    "scale_attn_by_inverse_layer_idx", "attn_temperature_tuning", "use_long_context",
    "use_mem_rope", "use_shared_attention_adapter", "mamba_rms_norm", "use_qk_norm",
    "attention_k_eq_v", "enable_moe_block", "use_double_wide_mlp", "norm_topk_prob",
    "rope_interleave", "qk_layernorm", "add_out_norm", "prefix_lm", "mup_enabled", "gating",
    "kda_safe_gate",
)  # fmt: skip
"""Settings that are turned over, each in a variant of its own."""

VALUES: dict[str, tuple[Any, ...]] = {
    "sliding_window": (17,),
    "sliding_window_size": (17,),
    "attention_window_size": (17,),
    "window_size": (3, 17),
    "local_attention": (6, 34),
    "keep_window_size": (2, 17),
    "attention_chunk_size": (5, 17),
    "chunk_size": (32,),
    "mamba_chunk_size": (32,),
    "block_size": (32,),
    "floor_scale": (3, 20),
    "log_scaling_n_floor": (3, 20),
    "index_topk": (2, 40),
    "rel_extent": (4,),
    "no_rope_layers": ([1, 0, 1, 0], [0, 1, 0, 1]),
    "no_rope_layer_interval": (3,),
    "first_k_dense_replace": (0, 2),
    "num_dense_layers": (2,),
    "interleave_moe_layer_step": (2,),
    "decoder_sparse_step": (2,),
    "mlp_only_layers": ([0], [1, 3]),
    "num_kv_shared_layers": (0, 2),
    "num_key_value_heads": (1,),
    "rescale_every": (0, 3),
    "attention_multiplier": (0.5,),
    "residual_multiplier": (0.7,),
    "position_embedding_type": ("rope",),
    "topk_method": ("group_limited_greedy",),
    "expert_layer_period": (1,),
    "q_lora_rank": (None,),
    "attn_logit_softcapping": (5.0,),
    "partial_rotary_factor": (0.5,),
    "num_mem_blocks": (2,),
    "loop_num_passes": (1,),
    "n_recurrent_loops": (1,),
}
"""Values that a setting takes, each in a variant of its own."""

ROPE_KINDS = ("linear", "dynamic", "yarn", "longrope", "llama3", "proportional")


def variants(family: str) -> Iterator[Variant]:
    """Make a family's variants, the plain one first."""
    config_type = config_class(family)
    plain = tiny_settings(family)
    yield Variant(family, "plain", plain)
    for name, changed in _list_changes(config_type, plain, family):
        yield Variant(family, name, {**plain, **changed})


def find_variant(family, name):
    return next(variant for variant in variants(family) if variant.name == name)


def _list_changes(
    config_type: Any, plain: dict[str, Any], family: str
) -> Iterator[tuple[str, dict[str, Any]]]:
    defaults = default_settings(config_type)
    yield "eager", {"attn_implementation": "eager"}
    for name, kinds in layer_kinds(config_type, family).items():
        if len(kinds) < 2:
            continue
        for offset, kind in enumerate(kinds):
            yield f"{name} {kind} first", {name: alternate_kinds(kinds, offset)}
            yield f"{name} all {kind}", {name: [kind] * LAYERS}
            other_kind = kinds[(offset + 1) % len(kinds)]
            yield f"{name} {kind} around {other_kind}", {name: [kind, other_kind, other_kind, kind]}
    for name in SWITCHES:
        if name in defaults and isinstance(defaults[name], bool):
            yield f"{name} {not defaults[name]}", {name: not defaults[name]}
    for name, values in VALUES.items():
        for value in values:
            if name in defaults and plain.get(name, defaults[name]) != value:
                yield f"{name} {value}", {name: value}
    if "rope_parameters" in defaults:
        for rope in ROPE_KINDS:
            changed = _change_rope(config_type, plain, rope)
            if changed:
                yield f"rope {rope}", changed
                if rope == "longrope":
                    yield f"rope {rope}, eager", {**changed, "attn_implementation": "eager"}


def _change_rope(config_type: Any, plain: dict[str, Any], rope: str) -> dict[str, Any] | None:
    """Change the kind of rotary positions, in every kind of layer that has some."""
    try:
        config = config_type(**copy_settings(plain))
    except Exception:  # noqa: BLE001 - the plain variant says so
        return None
    rope_settings = getattr(config, "rope_parameters", None)
    if not rope_settings:
        return None
    width = getattr(config, "qk_rope_head_dim", None) or getattr(config, "head_dim", None) or 8

    def change(old: dict[str, Any]) -> dict[str, Any]:
        kept_names = ["rope_theta", "llama_4_scaling_beta"]
        # Gemma 4's proportional positions mean another thing by it.
        kept_names += ["partial_rotary_factor"] * (old.get("rope_type") != "proportional")
        new = {k: old[k] for k in kept_names if old.get(k) is not None}
        if int(width * new.get("partial_rotary_factor", 1.0)) < 4:
            new["partial_rotary_factor"] = 0.5
        pairs = int(width * new.get("partial_rotary_factor", 1.0)) // 2
        kind_settings: dict[str, Any] = {
            "linear": {"factor": 4.0},
            "dynamic": {"factor": 4.0},
            "yarn": {"factor": 4.0, "original_max_position_embeddings": ORIGINAL_LENGTH},
            "longrope": {
                "short_factor": [1.0 + 0.1 * i for i in range(pairs)],
                "long_factor": [3.0 + 1.5 * i for i in range(pairs)],
                # PhiMoE's own.
                "short_mscale": 1.1,
                "long_mscale": 1.3,
                "original_max_position_embeddings": ORIGINAL_LENGTH,
            },
            "llama3": {
                "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                "original_max_position_embeddings": ORIGINAL_LENGTH,
            },
            "proportional": {},
        }[rope]  # fmt: skip
        return {"rope_type": rope, **new, **kind_settings}

    nested = all(isinstance(value, dict) or value is None for value in rope_settings.values())
    changed: dict[str, Any] = {
        "rope_parameters": {k: v and change(v) for k, v in rope_settings.items()} if nested
        else change(rope_settings)
    }  # fmt: skip
    if rope == "dynamic":
        name = config_type.attribute_map.get("max_position_embeddings", "max_position_embeddings")
        changed[name] = ORIGINAL_LENGTH
    if "original_max_position_embeddings" in default_settings(config_type):
        changed["original_max_position_embeddings"] = ORIGINAL_LENGTH
    return changed

"""Variants of the registry's families: one thing of a configuration changed in each.

A window, a chunk, the order of the kinds of layers, the kind of rotary positions, a switch. What a
class refuses is no variant of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tests.helpers.registry import (
    LAYERS,
    ORIGINAL,
    Variant,
    alternate,
    config_class,
    default_settings,
    fresh,
    kinds_of,
    tiny,
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

ROPES = ("linear", "dynamic", "yarn", "longrope", "llama3", "proportional")


def variants(family: str) -> Iterator[Variant]:
    """Make a family's variants, the plain one first."""
    own = config_class(family)
    plain = tiny(family)
    yield Variant(family, "plain", plain)
    for name, changed in _changes(own, plain, family):
        yield Variant(family, name, {**plain, **changed})


def find(family, name):
    return next(variant for variant in variants(family) if variant.name == name)


def _changes(own: Any, plain: dict[str, Any], family: str) -> Iterator[tuple[str, dict[str, Any]]]:
    defaults = default_settings(own)
    yield "eager", {"attn_implementation": "eager"}
    for name, kinds in kinds_of(own, family).items():
        if len(kinds) < 2:
            continue
        for first, kind in enumerate(kinds):
            yield f"{name} {kind} first", {name: alternate(kinds, first)}
            yield f"{name} all {kind}", {name: [kind] * LAYERS}
            other = kinds[(first + 1) % len(kinds)]
            yield f"{name} {kind} around {other}", {name: [kind, other, other, kind]}
    for name in SWITCHES:
        if name in defaults and isinstance(defaults[name], bool):
            yield f"{name} {not defaults[name]}", {name: not defaults[name]}
    for name, values in VALUES.items():
        for value in values:
            if name in defaults and plain.get(name, defaults[name]) != value:
                yield f"{name} {value}", {name: value}
    if "rope_parameters" in defaults:
        for rope in ROPES:
            changed = _rope(own, plain, rope)
            if changed:
                yield f"rope {rope}", changed
                if rope == "longrope":
                    yield f"rope {rope}, eager", {**changed, "attn_implementation": "eager"}


def _rope(own: Any, plain: dict[str, Any], rope: str) -> dict[str, Any] | None:
    """Change the kind of rotary positions, in every kind of layer that has some."""
    try:
        config = own(**fresh(plain))
    except Exception:  # noqa: BLE001 - the plain variant says so
        return None
    given = getattr(config, "rope_parameters", None)
    if not given:
        return None
    width = getattr(config, "qk_rope_head_dim", None) or getattr(config, "head_dim", None) or 8

    def change(old: dict[str, Any]) -> dict[str, Any]:
        kept = ["rope_theta", "llama_4_scaling_beta"]
        # Gemma 4's proportional positions mean another thing by it.
        kept += ["partial_rotary_factor"] * (old.get("rope_type") != "proportional")
        new = {k: old[k] for k in kept if old.get(k) is not None}
        if int(width * new.get("partial_rotary_factor", 1.0)) < 4:
            new["partial_rotary_factor"] = 0.5
        pairs = int(width * new.get("partial_rotary_factor", 1.0)) // 2
        more: dict[str, Any] = {
            "linear": {"factor": 4.0},
            "dynamic": {"factor": 4.0},
            "yarn": {"factor": 4.0, "original_max_position_embeddings": ORIGINAL},
            "longrope": {
                "short_factor": [1.0 + 0.1 * i for i in range(pairs)],
                "long_factor": [3.0 + 1.5 * i for i in range(pairs)],
                # PhiMoE's own.
                "short_mscale": 1.1,
                "long_mscale": 1.3,
                "original_max_position_embeddings": ORIGINAL,
            },
            "llama3": {
                "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                "original_max_position_embeddings": ORIGINAL,
            },
            "proportional": {},
        }[rope]  # fmt: skip
        return {"rope_type": rope, **new, **more}

    nested = all(isinstance(value, dict) or value is None for value in given.values())
    changed: dict[str, Any] = {
        "rope_parameters": {k: v and change(v) for k, v in given.items()} if nested
        else change(given)
    }  # fmt: skip
    if rope == "dynamic":
        name = own.attribute_map.get("max_position_embeddings", "max_position_embeddings")
        changed[name] = ORIGINAL
    if "original_max_position_embeddings" in default_settings(own):
        changed["original_max_position_embeddings"] = ORIGINAL
    return changed

"""A miniature of a model: its own class, layers and pattern, with small widths and random weights.

Sharing breaks because of an architecture's code or the pattern of its layers, not because of its
weights, so it can be checked on a model that costs nearly nothing.

Its configuration is the model's, made small: same layers and pattern, few heads and experts.
"""

from __future__ import annotations

import copy
import math
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import combinations, product
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from tracker.core.errors import attempt
from tracker.core.model_parts import CHOSEN, ROUTED
from tracker.models.layers import find_layers
from tracker.models.pruned import Shapes, shapes

NumberPath = tuple[str, ...]
"""Path of a number in a text model's configuration."""
VOCABULARY = 128
HEADS = 4
HEAD = 8
"""Minimum width of the widest head, if it was wider."""
QUERIES_AND_KEYS = (
    ("num_attention_heads", "num_key_value_heads"),
    ("num_attention_heads", "num_kv_heads"),
    ("num_attention_heads", "num_query_groups"),
    ("num_attention_heads_per_layer", "num_key_value_heads"),
    ("swa_num_attention_heads", "swa_num_key_value_heads"),
    ("linear_num_value_heads", "linear_num_key_heads"),
    ("linear_num_heads", ""),
)
HEAD_SIZES = (
    "head_dim", "dim_head", "d_head", "kv_channels", "attention_head_dim", "swa_head_dim",
    "swa_v_head_dim", "v_head_dim", "qk_head_dim", "qk_nope_head_dim", "qk_rope_head_dim",
    "index_head_dim", "rotary_dim", "linear_head_dim", "linear_key_head_dim",
    "linear_value_head_dim",
)  # fmt: skip
"""Sizes divided by one divisor, so that parts of a head stay parts of it."""
LIKE_HIDDEN = (
    "attention_hidden_size", "embedding_dim", "embedding_size", "lru_width", "mamba_d_ssm",
    "word_embed_proj_dim",
)  # fmt: skip
"""Sizes reduced like the hidden size."""
MAMBA = (
    ("num_heads", "head_dim", "n_groups"),
    ("mamba_n_heads", "mamba_d_head", "mamba_n_groups"),
    ("mamba_num_heads", "mamba_head_dim", "n_groups"),
    ("n_mamba_heads", "mamba_headdim", "mamba_ngroups"),
)
"""Number of heads of a state space model, their width, and the number of their groups."""
BETWEEN = (
    "block_multiple_of", "d_inner", "decoder_ffn_dim", "dense_intermediate_size",
    "depthwise_seperable_out_channel", "dff", "dim_ff", "encoder_ffn_dim", "expert_ffn_hidden_size",
    "ext_pw_out_channel", "ffn_dim", "ffn_hidden_size", "ffn_round_up_to_multiple_of",
    "intermediate_size", "intermediate_size_mlp", "mlp_dim", "moe_intermediate_size",
    "moe_shared_expert_intermediate_size", "n_inner", "nemo_conv_channels",
    "shared_expert_intermediate_size", "shared_experts_intermediate_size",
    "shared_intermediate_size",
)  # fmt: skip
EXPERTS = (*ROUTED, "zero_expert_num")
GROUPS = ("n_group", "num_expert_group")
RANKS = (
    "adapter_rank", "attention_lora_dim", "gate_lora_rank", "gated_norm_rank",
    "hidden_size_per_layer_input", "kv_lora_rank", "laurel_rank", "loop_gate_rank", "mamba_dt_rank",
    "o_lora_rank", "q_lora_rank", "router_hidden_size", "time_step_rank",
)  # fmt: skip
DEPTHS = ("depth", "encoder_layers", "num_hidden_layers", "num_layers")
VOCABULARIES = (
    "pronunciation_vocab_size", "shape_vocab_size", "unpadded_vocab_size", "vocab_size",
    "vocab_size_per_layer_input",
)  # fmt: skip
BLOCKS = ("chunk_size", "mamba_chunk_size")
"""Block sizes of a state space model's sums, which affect only the padding of texts."""
STATES = ("mamba_d_state", "ssm_state_size", "state_size")


def _sizes(config: PreTrainedConfig, name: str) -> list[int]:
    """List the sizes under a name in a configuration: one, one per layer, or none."""
    name = config.attribute_map.get(name, name)
    said = [vars(config).get(name), *(layer.get(name) for layer in _uneven(config).values())]
    flat = [each for one in said for each in (one if isinstance(one, (list, tuple)) else (one,))]
    return [each for each in flat if type(each) is int and each > 0]


def _change(config: PreTrainedConfig, names: Iterable[str], small: Callable[[int], int]) -> None:
    """Change all sizes under some names in a configuration, each once."""

    def one(value: object) -> object:
        if isinstance(value, (list, tuple)):
            return type(value)(one(each) for each in value)
        return small(value) if type(value) is int and value > 0 else value

    # A class may use an alias for a name.
    own = {config.attribute_map.get(name, name) for name in names}
    uneven = {
        int(index): {name: one(value) if name in own else value for name, value in layer.items()}
        for index, layer in _uneven(config).items()
    }
    for name in own & vars(config).keys():
        setattr(config, name, one(vars(config)[name]))
    if uneven:
        config.per_layer_config = uneven


def _uneven(config: PreTrainedConfig) -> dict[str, dict[str, Any]]:
    """Return the sizes that single layers define for themselves."""
    if not getattr(config, "is_heterogeneous", False):
        return {}
    uneven: dict[str, dict[str, Any]] = config.to_dict()["per_layer_config"]
    return uneven


def _at_most(most: int, *names: str) -> Callable[[Any], None]:
    return lambda config: _change(config, names, lambda value: min(value, most))


def _heads(config: PreTrainedConfig) -> None:
    """Set four query heads; as many key-value heads, or two, or one; each about 8 wide."""
    before = copy.copy(config)
    sizes = [each for name in HEAD_SIZES for each in _sizes(config, name)]
    hidden = (_sizes(config, "hidden_size") or [0])[0]
    heads = (_sizes(config, "num_attention_heads") or [0])[0]
    # The width of a head if the configuration does not name it.
    size = (_sizes(config, "head_dim") or [hidden // heads if heads else HEAD])[0]
    turned = [int(size * part + 0.5) for part in _parts(vars(config)) if 0 < part <= 1]
    sizes += [size, *turned]
    common = math.gcd(*sizes)
    divisors = [n for n in range(1, max(sizes) // HEAD + 1) if common % (2 * n) == 0]
    divisor = max(divisors, default=1)
    wide = HEADS * HEAD if heads else 2 * HEAD
    if heads and heads * size in (hidden, 2 * hidden):
        wide = min(heads, HEADS) * (size // divisor) * hidden // (heads * size)
    _change(config, HEAD_SIZES, lambda value: value // divisor)
    for queries, keys in QUERIES_AND_KEYS:
        if many := _sizes(config, queries):
            _change(config, [keys], partial(_few_keys, many=many))
    _change(config, {pair[0] for pair in QUERIES_AND_KEYS}, lambda value: min(value, HEADS))
    if hidden:
        _hidden(config, before, min(wide, hidden))
    _change_rotary(getattr(config, "rope_parameters", None), divisor)


def _few_keys(keys: int, many: Sequence[int]) -> int:
    return min(keys, HEADS if keys in many else 2)


def _parts(settings: Mapping[str, Any]) -> Iterator[float]:
    """Yield the shares of a head with rotary positions, from all levels of the settings."""
    for name, value in settings.items():
        if isinstance(value, dict):
            yield from _parts(value)
        elif name == "partial_rotary_factor" and value is not None:
            yield value


def _hidden(config: PreTrainedConfig, before: PreTrainedConfig, wide: int) -> None:
    """Set the hidden size and the sizes that depend on it."""
    hidden = before.hidden_size
    _change(config, ["hidden_size", *LIKE_HIDDEN], lambda value: value * wide // hidden)
    if hasattr(config, "state_size"):
        _change(config, ["intermediate_size"], lambda value: value * wide // hidden)
    for many, size, groups in MAMBA:
        for heads, each in zip(_sizes(config, many), _sizes(before, size), strict=False):
            inner = heads * each * wide // hidden
            setattr(config, many, inner // min(inner, HEAD))
            setattr(config, size, min(inner, HEAD))
            _change(config, [groups], lambda value: min(value, 2))


def _change_rotary(rotary: Any, divisor: int) -> None:
    """Reduce rotary factors to one per pair of dimensions, and the sections of axes likewise."""
    for name, value in rotary.items() if isinstance(rotary, dict) else ():
        if isinstance(value, dict):
            _change_rotary(value, divisor)
        elif isinstance(value, (list, tuple)):
            if name.endswith("_section"):
                ends = [sum(value[: i + 1]) // divisor for i in range(len(value))]
                rotary[name] = [b - a for a, b in zip([0, *ends], ends, strict=False)]
            elif name.endswith("_factor"):
                rotary[name] = value[::divisor]


def _between(config: PreTrainedConfig) -> None:
    # In a state space model, this size depends on the hidden size.
    if not hasattr(config, "state_size"):
        _at_most(16, *BETWEEN)(config)


def _experts(config: PreTrainedConfig) -> None:
    """Set four experts of which a token gets two; two groups, one of them chosen."""
    _change(config, EXPERTS, lambda value: min(value, 4))
    _change(config, (*CHOSEN, *GROUPS), lambda value: min(value, 2))
    _change(config, ["topk_group"], lambda _: 1)


def _words(config: PreTrainedConfig) -> None:
    """Set a small vocabulary that includes every special token."""
    _change(config, VOCABULARIES, lambda value: min(value, VOCABULARY))
    rare = VOCABULARY
    for name, value in list(vars(config).items()):
        if name == "pad_token_id" and value is not None:
            config.pad_token_id = 0
        elif name.endswith(("_token_id", "_token_index")) and value is not None:
            several = isinstance(value, (list, tuple))
            if any(each >= VOCABULARY for each in (value if several else [value])):
                rare -= 1
                setattr(config, name, type(value)([rare]) if several else rare)


SHRINK: tuple[Callable[[Any], None], ...] = (
    _heads,
    _between,
    _experts,
    _at_most(8, *RANKS),
    _at_most(8, *STATES),
    _at_most(2, "o_groups"),
    _at_most(16, *BLOCKS),
)
"""Reductions that can be applied independently."""


def small_config(config: PreTrainedConfig, shrink: Sequence[Callable[[Any], None]]) -> Any | None:
    """Copy a configuration reduced by some of `SHRINK`; None if the configuration refuses."""
    small = copy.deepcopy(config)
    small.__dict__.pop("quantization_config", None)
    text = small.get_text_config()

    def apply() -> None:
        for part in {id(each): each for each in (small, text, *vars(small).values())}.values():
            if not isinstance(part, PreTrainedConfig):
                continue
            _words(part)
            for each in shrink:
                each(part)
            # A vision part, for example: the model is built with it and runs without it.
            if part is not small and part is not text:
                _change(part, DEPTHS, lambda _: 1)

    refusal = attempt(apply)  # a configuration may refuse a value
    return None if isinstance(refusal, Exception) else small


def numbers(config: PreTrainedConfig) -> Iterator[tuple[NumberPath, float]]:
    """Yield the numbers of a text configuration with paths, nested ones too: whole, from 4 on."""

    def walk(path: NumberPath, value: Any) -> Iterator[tuple[NumberPath, float]]:
        if isinstance(value, dict):
            for name, item in value.items():
                yield from walk((*path, name), item)
        elif type(value) in (int, float) and 4 <= value < math.inf and value == int(value):
            yield path, value

    for name, value in vars(config).items():
        if not name.startswith("_"):
            yield from walk((name,), value)


def with_numbers(config: PreTrainedConfig, chosen: dict[NumberPath, float]) -> Any:
    """Copy a model's configuration with the numbers at some paths of its text part changed."""
    changed = copy.deepcopy(config)
    text = changed.get_text_config()
    for (first, *rest), value in chosen.items():
        if not rest:
            setattr(text, first, value)
            continue
        inside = getattr(text, first)
        for name in rest[:-1]:
            inside = inside[name]
        inside[rest[-1]] = value
    return changed


LARGEST = 8_000_000
"""Number of weights above which a model is no miniature."""
NEVER_FIRST = 2
"""Maximum number of reductions that may be left out so that the others work."""


def miniature(model: PreTrainedModel) -> Any | None:
    """Build a model of the same class whose layers hold the same modules; None if none runs."""
    pattern = _pattern(model)
    for left in range(NEVER_FIRST + 1):
        for unchanged in combinations(SHRINK, left):
            config = small_config(model.config, [s for s in SHRINK if s not in unchanged])
            small = None if config is None else build(type(model), config)
            if small is not None and _pattern(small) == pattern:
                return small
    return None


def build(kind: type, config: PreTrainedConfig, wanted: Shapes | None = None) -> Any | None:
    """Build a model of transformers with random weights, the same ones for the same shapes.

    It is in float64, or in float32 if its class computes in nothing wider. None if it cannot be
    built, is large, returns NaN, or has other shapes than those wanted.
    """
    model = attempt(partial(_build, kind, config, wanted))
    return None if isinstance(model, Exception) else model  # the configuration of another class


def _build(kind: type, config: PreTrainedConfig, wanted: Shapes | None) -> Any | None:
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        with torch.device("meta"):
            planned = kind(copy.deepcopy(config))
        if sum(p.numel() for p in planned.parameters()) > LARGEST:
            return None
        if wanted is not None and shapes(planned) != wanted:
            return None
        for positive, dtype in product((False, True), (torch.float64, torch.float32)):
            torch.default_generator.manual_seed(0)  # of the CPU alone
            own = copy.deepcopy(config)
            if dtype == torch.float64:
                # The usual one, all experts in one call, supports no dtype wider than float32.
                own._experts_implementation = "batched_mm"
            model = kind(own).to(dtype).eval().requires_grad_(False)
            _draw(model, positive)
            if _runs(model):
                return model
    return None


def _runs(model: nn.Module) -> bool:
    """Return whether a model's logits are finite, except for tokens that are never predicted."""
    ids = torch.arange(8)[None] + 3
    with torch.inference_mode():
        output = attempt(lambda: copy.deepcopy(model)(ids, use_cache=False).logits[0])
    if isinstance(output, Exception):
        return False
    logits: Tensor = output
    said = logits[:, (logits != -torch.inf).any(0)]
    return bool(len(logits) == 8 and said.numel() and said.isfinite().all())


@torch.no_grad()
def _draw(model: nn.Module, positive: bool) -> None:
    """Draw weights with which every layer has an effect and nothing explodes.

    With `positive`, matrices that the class makes positive throughout stay so, like gains.
    """
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        if parameter.ndim < 2:
            parameter.add_(0.1 * noise)
        elif positive and bool((parameter > 0).all()):
            parameter.mul_((0.1 * noise).exp())
        else:
            parameter.copy_(noise / parameter.shape[-1] ** 0.5)


def _pattern(model: PreTrainedModel) -> list[list[tuple[str, str]]]:
    """List the modules of each layer; the number of experts does not count."""
    # Parts of a weight with an adapter, which see no other token; and experts but the first.
    beside = re.compile(r"(^|\.)(base_layer|lora_[^.]*|0*[1-9]\d*)(\.|$)")
    return [
        [
            (path, type(getattr(module, "base_layer", module)).__name__)
            for path, module in layer.named_modules()
            if not beside.search(path)
        ]
        for layer in find_layers(model)
    ]

"""Build a miniature of a model, which has the same class but small random weights.

A miniature has as many layers as the model, but smaller sizes and fewer heads and experts. Tests
whose results depend only on the architecture run on a miniature.
"""

from __future__ import annotations

import copy
import math
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial, reduce
from itertools import accumulate, chain, combinations, pairwise, product
from operator import getitem
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from tracker.models.hooks import TRANSFORMERS_LOCK
from tracker.models.layers import find_layers
from tracker.models.pruned import TensorShapes, tensor_shapes
from tracker.schema.errors import attempt
from tracker.schema.model_parts import EXPERT_COUNT_KEYS, TOKEN_EXPERT_KEYS

NumberPath = tuple[str, ...]
"""Path of a number in a text model's configuration."""
MINIATURE_VOCABULARY = 128
MINIATURE_HEADS = 4
MIN_HEAD_WIDTH = 8
"""Minimum width of the widest head, if the model's head is wider."""
QUERY_AND_KEY_COUNTS = (
    ("num_attention_heads", "num_key_value_heads"),
    ("num_attention_heads", "num_kv_heads"),
    ("num_attention_heads", "num_query_groups"),
    ("num_attention_heads_per_layer", "num_key_value_heads"),
    ("swa_num_attention_heads", "swa_num_key_value_heads"),
    ("linear_num_value_heads", "linear_num_key_heads"),
    ("linear_num_heads", ""),
)
HEAD_SIZE_KEYS = (
    "head_dim", "dim_head", "d_head", "kv_channels", "attention_head_dim", "swa_head_dim",
    "swa_v_head_dim", "v_head_dim", "qk_head_dim", "qk_nope_head_dim", "qk_rope_head_dim",
    "index_head_dim", "rotary_dim", "linear_head_dim", "linear_key_head_dim",
    "linear_value_head_dim",
)  # fmt: skip
"""Keys of sizes that are divided by one divisor, so that parts of a head still fit into the
head."""
HIDDEN_SIZE_KEYS = (
    "attention_hidden_size", "embedding_dim", "embedding_size", "lru_width", "mamba_d_ssm",
    "word_embed_proj_dim",
)  # fmt: skip
"""Keys of sizes that are reduced like the hidden size."""
MAMBA_HEAD_KEYS = (
    ("num_heads", "head_dim", "n_groups"),
    ("mamba_n_heads", "mamba_d_head", "mamba_n_groups"),
    ("mamba_num_heads", "mamba_head_dim", "n_groups"),
    ("n_mamba_heads", "mamba_headdim", "mamba_ngroups"),
)
"""Keys of a state space model's number of heads, width of a head, and number of groups of heads."""
MLP_SIZE_KEYS = (
    "block_multiple_of", "d_inner", "decoder_ffn_dim", "dense_intermediate_size",
    "depthwise_seperable_out_channel", "dff", "dim_ff", "encoder_ffn_dim", "expert_ffn_hidden_size",
    "ext_pw_out_channel", "ffn_dim", "ffn_hidden_size", "ffn_round_up_to_multiple_of",
    "intermediate_size", "intermediate_size_mlp", "mlp_dim", "moe_intermediate_size",
    "moe_shared_expert_intermediate_size", "n_inner", "nemo_conv_channels",
    "shared_expert_intermediate_size", "shared_experts_intermediate_size",
    "shared_intermediate_size",
)  # fmt: skip
ALL_EXPERT_KEYS = (*EXPERT_COUNT_KEYS, "zero_expert_num")
RANK_KEYS = (
    "adapter_rank", "attention_lora_dim", "gate_lora_rank", "gated_norm_rank",
    "hidden_size_per_layer_input", "kv_lora_rank", "laurel_rank", "loop_gate_rank", "mamba_dt_rank",
    "o_lora_rank", "q_lora_rank", "router_hidden_size", "time_step_rank",
)  # fmt: skip
DEPTH_KEYS = ("depth", "encoder_layers", "num_hidden_layers", "num_layers")
VOCABULARY_KEYS = (
    "pronunciation_vocab_size", "shape_vocab_size", "unpadded_vocab_size", "vocab_size",
    "vocab_size_per_layer_input",
)  # fmt: skip


def _sizes(config: PreTrainedConfig, name: str) -> list[int]:
    """Return all positive integers that a configuration contains under the key `name`.

    The key can have a single number or a list as its value, and other values for single layers.
    """
    name = config.attribute_map.get(name, name)
    values = [settings.get(name) for settings in (vars(config), *_layer_sizes(config).values())]
    flat_values = chain.from_iterable(v if isinstance(v, (list, tuple)) else [v] for v in values)
    return [size for size in flat_values if type(size) is int and size > 0]


def _resize(config: PreTrainedConfig, names: Iterable[str], shrink: Callable[[int], int]) -> None:
    """Replace each value of some configuration keys by `shrink(value)`."""

    def shrink_value(value: object) -> object:
        if isinstance(value, (list, tuple)):
            return type(value)(shrink_value(entry) for entry in value)
        return shrink(value) if type(value) is int and value > 0 else value

    # A class may use an alias for a name.
    true_names = {config.attribute_map.get(name, name) for name in names}
    by_layer = {
        int(index): sizes | {name: shrink_value(sizes[name]) for name in true_names & sizes.keys()}
        for index, sizes in _layer_sizes(config).items()
    }
    for name in true_names & vars(config).keys():
        setattr(config, name, shrink_value(vars(config)[name]))
    if by_layer:
        config.per_layer_config = by_layer


def _layer_sizes(config: PreTrainedConfig) -> dict[str, dict[str, Any]]:
    """Return layer → configuration values of the layer; {} if no layer has values of its own."""
    if not getattr(config, "is_heterogeneous", False):
        return {}
    by_layer: dict[str, dict[str, Any]] = config.to_dict()["per_layer_config"]
    return by_layer


def _limit(config: PreTrainedConfig, names: Iterable[str], maximum: int) -> None:
    """Limit the values of some configuration keys to `maximum`."""
    _resize(config, names, lambda value: min(value, maximum))


def _shrink_heads(config: PreTrainedConfig) -> None:
    """Reduce the number of heads to at most four, and their width to about 8."""
    original = copy.copy(config)
    hidden = next(iter(_sizes(config, "hidden_size")), 0)
    n_heads = next(iter(_sizes(config, "num_attention_heads")), 0)
    # The width of a head if the configuration does not name it.
    usual_width = hidden // n_heads if n_heads else MIN_HEAD_WIDTH
    head_width = next(iter(_sizes(config, "head_dim")), usual_width)
    shares = (share for share in _rotary_shares(vars(config)) if 0 < share <= 1)
    sizes = [size for name in HEAD_SIZE_KEYS for size in _sizes(config, name)]
    sizes += [head_width, *(int(head_width * share + 0.5) for share in shares)]
    # One divisor for all, so that parts of a head stay parts of it, and rotary ones stay even.
    common = math.gcd(*sizes)
    divisors = (n for n in range(1, max(sizes) // MIN_HEAD_WIDTH + 1) if common % (2 * n) == 0)
    divisor = max(divisors, default=1)
    width = (MINIATURE_HEADS if n_heads else 2) * MIN_HEAD_WIDTH
    if n_heads and n_heads * head_width in (hidden, 2 * hidden):
        heads_width = min(n_heads, MINIATURE_HEADS) * (head_width // divisor)
        width = heads_width * hidden // (n_heads * head_width)
    _resize(config, HEAD_SIZE_KEYS, lambda value: value // divisor)
    for query_name, key_name in QUERY_AND_KEY_COUNTS:
        n_queries = _sizes(config, query_name)
        _resize(config, [key_name] * bool(n_queries), partial(_small_key_count, n_queries))
    _limit(config, {query_name for query_name, _ in QUERY_AND_KEY_COUNTS}, MINIATURE_HEADS)
    if hidden:
        _shrink_hidden_size(config, original, min(width, hidden))
    _change_rotary(getattr(config, "rope_parameters", None), divisor)


def _small_key_count(n_queries: Sequence[int], n_keys: int) -> int:
    return min(n_keys, MINIATURE_HEADS if n_keys in n_queries else 2)


def _rotary_shares(settings: Mapping[str, Any]) -> Iterator[float]:
    """Yield all values of `partial_rotary_factor` in nested settings."""
    for name, value in settings.items():
        if isinstance(value, dict):
            yield from _rotary_shares(value)
        elif name == "partial_rotary_factor" and value is not None:
            yield value


def _shrink_hidden_size(config: PreTrainedConfig, original: PreTrainedConfig, width: int) -> None:
    """Set the hidden size to `width`, and reduce all sizes that depend on the hidden size."""
    hidden = original.hidden_size
    is_state_space = hasattr(config, "state_size")
    names = ["hidden_size", *HIDDEN_SIZE_KEYS, *["intermediate_size"] * is_state_space]
    _resize(config, names, lambda value: value * width // hidden)
    for count_name, size_name, group_name in MAMBA_HEAD_KEYS:
        counts, sizes = _sizes(config, count_name), _sizes(original, size_name)
        for n_heads, head_size in zip(counts, sizes, strict=False):
            inner_size = n_heads * head_size * width // hidden
            setattr(config, count_name, inner_size // min(inner_size, MIN_HEAD_WIDTH))
            setattr(config, size_name, min(inner_size, MIN_HEAD_WIDTH))
            _limit(config, [group_name], 2)


def _change_rotary(rope: Any, divisor: int) -> None:
    """Adapt the RoPE settings to heads that are `divisor` times narrower."""
    for name, value in rope.items() if isinstance(rope, dict) else ():
        if isinstance(value, dict):
            _change_rotary(value, divisor)
        elif isinstance(value, (list, tuple)) and name.endswith("_section"):
            ends = [end // divisor for end in accumulate(value)]
            rope[name] = [stop - start for start, stop in pairwise([0, *ends])]
        elif isinstance(value, (list, tuple)) and name.endswith("_factor"):
            rope[name] = value[::divisor]


def _shrink_mlp(config: PreTrainedConfig) -> None:
    # In a state space model, this size depends on the hidden size.
    if not hasattr(config, "state_size"):
        _limit(config, MLP_SIZE_KEYS, 16)


def _shrink_experts(config: PreTrainedConfig) -> None:
    """Reduce the number of experts to at most 4, and to at most 2 per token."""
    _limit(config, ALL_EXPERT_KEYS, 4)
    _limit(config, (*TOKEN_EXPERT_KEYS, "n_group", "num_expert_group"), 2)
    _limit(config, ["topk_group"], 1)


def _shrink_vocabulary(config: PreTrainedConfig) -> None:
    """Reduce the vocabulary, and assign new ids to special tokens."""
    _limit(config, VOCABULARY_KEYS, MINIATURE_VOCABULARY)
    free_token = MINIATURE_VOCABULARY
    for name, value in list(vars(config).items()):
        if name == "pad_token_id" and value is not None:
            config.pad_token_id = 0
        elif name.endswith(("_token_id", "_token_index")) and value is not None:
            is_list = isinstance(value, (list, tuple))
            if any(token >= MINIATURE_VOCABULARY for token in (value if is_list else [value])):
                free_token -= 1
                setattr(config, name, type(value)([free_token]) if is_list else free_token)


REDUCTIONS: tuple[Callable[[Any], None], ...] = (
    _shrink_heads,
    _shrink_mlp,
    _shrink_experts,
    partial(_limit, names=RANK_KEYS, maximum=8),
    partial(_limit, names=("mamba_d_state", "ssm_state_size", "state_size"), maximum=8),
    partial(_limit, names=("o_groups",), maximum=2),
    # Block sizes of a state space model's sums, which affect only the padding of texts.
    partial(_limit, names=("chunk_size", "mamba_chunk_size"), maximum=16),
)
"""Reductions that can be applied independently."""


def shrink_config(
    config: PreTrainedConfig, reductions: Iterable[Callable[[Any], None]]
) -> Any | None:
    """Return a copy of a configuration with reduced sizes.

    Returns None if the class of the configuration refuses a reduced size.
    """
    reduced = copy.deepcopy(config)
    vars(reduced).pop("quantization_config", None)
    text_config = reduced.get_text_config()

    def apply() -> None:
        parts = {id(value): value for value in (reduced, text_config, *vars(reduced).values())}
        for part in parts.values():
            if isinstance(part, PreTrainedConfig):
                for reduction in (_shrink_vocabulary, *reductions):
                    reduction(part)
                # A vision part, for example: the model is built with it and runs without it.
                if part is not reduced and part is not text_config:
                    _limit(part, DEPTH_KEYS, 1)

    refusal = attempt(apply)  # a configuration may refuse a value
    return None if isinstance(refusal, Exception) else reduced


def find_numbers(config: PreTrainedConfig) -> Iterator[tuple[NumberPath, float]]:
    """Yield the path and the value of each whole number ≥ 4 in a configuration."""

    def walk(path: NumberPath, value: Any) -> Iterator[tuple[NumberPath, float]]:
        if isinstance(value, dict):
            for name, item in value.items():
                yield from walk((*path, name), item)
        elif type(value) in (int, float) and 4 <= value < math.inf and value == int(value):
            yield path, value

    for name, value in vars(config).items():
        if not name.startswith("_"):
            yield from walk((name,), value)


def replace_numbers(config: PreTrainedConfig, new_numbers: dict[NumberPath, float]) -> Any:
    """Return a copy of a configuration with the new values `new_numbers` (path → number)."""
    new_config = copy.deepcopy(config)
    for (*parents, name), value in new_numbers.items():
        text_config = new_config.get_text_config()
        if parents:
            reduce(getitem, parents, vars(text_config))[name] = value
        else:
            setattr(text_config, name, value)
    return new_config


MAX_MINIATURE_SIZE = 8_000_000
"""Maximum number of weights of a miniature."""
MAX_SKIPPED = 2
"""Maximum number of reductions that may be left out to make the others work."""


def build_miniature(model: PreTrainedModel) -> Any | None:
    """Build a small random model with the class and the modules of `model`.

    Returns None if no smaller model can be built, or if its modules differ from the model's.
    """
    pattern = _module_pattern(model)
    for n_skipped in range(MAX_SKIPPED + 1):
        for skipped in combinations(REDUCTIONS, n_skipped):
            reductions = [reduction for reduction in REDUCTIONS if reduction not in skipped]
            config = shrink_config(model.config, reductions)
            small_model = None if config is None else build_random_model(type(model), config)
            if small_model is not None and _module_pattern(small_model) == pattern:
                return small_model
    return None


def build_random_model(
    model_class: type, config: PreTrainedConfig, shapes: TensorShapes | None = None
) -> Any | None:
    """Build a transformers model with random weights, in float64 if possible, else in float32.

    Models with equal tensor shapes get equal weights. If `shapes` is given, the tensors must have
    these shapes. The function returns None if it cannot build a model, if the model is too large,
    or if logits are not finite.
    """
    model = attempt(partial(_build_random_model, model_class, config, shapes))
    return None if isinstance(model, Exception) else model  # the configuration of another class


def _build_random_model(
    model_class: type, config: PreTrainedConfig, shapes: TensorShapes | None
) -> Any | None:
    # The lock also protects the random state and the warnings, which threads share.
    with TRANSFORMERS_LOCK, warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        with torch.device("meta"):
            meta_model = model_class(copy.deepcopy(config))
        if sum(p.numel() for p in meta_model.parameters()) > MAX_MINIATURE_SIZE:
            return None
        if shapes is not None and tensor_shapes(meta_model) != shapes:
            return None
        for positive, dtype in product((False, True), (torch.float64, torch.float32)):
            torch.default_generator.manual_seed(0)  # of the CPU alone
            own_config = copy.deepcopy(config)
            if dtype == torch.float64:
                # The usual one, all experts in one call, supports no dtype wider than float32.
                own_config._experts_implementation = "batched_mm"
            model = model_class(own_config).to(dtype).eval().requires_grad_(False)
            _draw_weights(model, positive)
            if _has_finite_logits(model):
                return model
    return None


def _has_finite_logits(model: nn.Module) -> bool:
    """Return whether a model computes finite logits.

    Tokens whose logit is -inf at every position are ignored.
    """
    ids = torch.arange(8)[None] + 3
    with torch.inference_mode():
        output = attempt(lambda: copy.deepcopy(model)(ids, use_cache=False).logits[0])
    if isinstance(output, Exception):
        return False
    logits: Tensor = output
    predicted = logits[:, (logits != -torch.inf).any(0)]
    return bool(len(logits) == 8 and predicted.numel() and predicted.isfinite().all())


@torch.no_grad()
def _draw_weights(model: nn.Module, positive: bool) -> None:
    """Draw random weights that give every layer an effect without overflows.

    If `positive` is true, matrices with only positive initial values get positive weights.
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


def _module_pattern(model: PreTrainedModel) -> list[list[tuple[str, str]]]:
    """List the names and classes of the modules of each layer."""
    # Parts of a weight with an adapter, which see no other token; and experts but the first.
    ignored_path = re.compile(r"(^|\.)(base_layer|lora_[^.]*|0*[1-9]\d*)(\.|$)")
    return [
        [
            (path, type(getattr(module, "base_layer", module)).__name__)
            for path, module in layer.named_modules()
            if not ignored_path.search(path)
        ]
        for layer in find_layers(model)
    ]

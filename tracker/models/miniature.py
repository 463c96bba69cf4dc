"""A miniature of a model: its own class, layers and pattern, with small widths and random weights.

What sharing may break lies in the code of an architecture and in the pattern of its layers, not in
its weights; so it can be attacked on a model that costs nearly nothing.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Sequence
from itertools import combinations
from typing import Any

import torch
from torch import nn

from tracker.models.layers import find_layers

VOCABULARY = 128
LARGEST = 40_000_000
"""Weights above which a model is no miniature."""
NEVER_FIRST = 4
"""How many kinds of width may stay as they are, so that the rest can be made small."""


def _heads(config: Any) -> None:
    """Two heads of keys and values, at most four of queries; each as wide as before."""
    heads, hidden = config.num_attention_heads, config.hidden_size
    kept = getattr(config, "num_key_value_heads", None) or heads
    size = getattr(config, "head_dim", None) or hidden // heads
    few = min(2, kept)
    many = few * min(2, heads // kept)
    config.num_attention_heads = many
    if getattr(config, "num_key_value_heads", None):
        config.num_key_value_heads = few
    config.hidden_size = many * size


def _between(config: Any) -> None:
    for name in (
        "intermediate_size",
        "intermediate_size_mlp",
        "moe_intermediate_size",
        "shared_expert_intermediate_size",
        "shared_intermediate_size",
        "ffn_dim",
        "n_inner",
    ):
        value = getattr(config, name, None)
        if isinstance(value, int) and value > 0:
            setattr(config, name, min(value, 96))
        elif isinstance(value, (list, tuple)):
            setattr(config, name, type(value)(min(each, 96) for each in value))


def _experts(config: Any) -> None:
    for name in ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"):
        value = getattr(config, name, None)
        if isinstance(value, int) and value > 0:
            groups = getattr(config, "n_group", None) or 1
            setattr(config, name, min(value, max(8, 2 * groups)))


def _ranks(config: Any) -> None:
    for name in ("q_lora_rank", "kv_lora_rank", "attention_lora_dim", "gate_lora_rank"):
        value = getattr(config, name, None)
        if isinstance(value, int) and value > 0:
            setattr(config, name, min(value, 32))


def _words(config: Any) -> None:
    for name in ("vocab_size", "vocab_size_per_layer_input"):
        if isinstance(getattr(config, name, None), int):
            setattr(config, name, min(getattr(config, name), VOCABULARY))
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        if getattr(config, name, None) is not None:
            setattr(config, name, 0 if name == "pad_token_id" else 1)


WIDTHS: tuple[Callable[[Any], None], ...] = (_words, _heads, _between, _experts, _ranks)
"""What can be made small, each for itself."""


def miniature(model: Any) -> Any | None:
    """Make a model's miniature.

    Args:
        model: A causal language model of transformers.

    Returns:
        A model of the same class whose layers hold the same modules, as `build` makes it; None
        where none can be built that runs.
    """
    pattern = _pattern(model)
    for left in range(NEVER_FIRST):
        for unchanged in combinations(WIDTHS[1:], left):
            config = _small_config(model.config, [w for w in WIDTHS if w not in unchanged])
            small = None if config is None else build(type(model), config)
            if small is not None and _pattern(small) == pattern:
                return small
    return None


def _small_config(config: Any, widths: Sequence[Callable[[Any], None]]) -> Any | None:
    small = copy.deepcopy(config)
    small.__dict__.pop("quantization_config", None)
    text = small.get_text_config()
    for other in vars(small).values():
        # A part that sees pictures, say: the model is built with it and runs without it.
        if hasattr(other, "num_hidden_layers") and other is not text:
            other.num_hidden_layers = 1
    try:
        for shrink in widths:
            shrink(text)
    except (AttributeError, TypeError, ZeroDivisionError):
        return None
    return small


def build(kind: type, config: Any) -> Any | None:
    """Build a model with random weights, the same ones for the same shapes.

    Args:
        kind: A class of transformers.
        config: Its configuration.

    Returns:
        The model in float64, or in float32 where its class computes in nothing wider; None where
        it cannot be built, is large, or does not run.
    """
    try:
        with warnings.catch_warnings(), torch.random.fork_rng():
            warnings.simplefilter("ignore")
            with torch.device("meta"):
                if sum(p.numel() for p in kind(copy.deepcopy(config)).parameters()) > LARGEST:
                    return None
            for dtype in (torch.float64, torch.float32):
                torch.manual_seed(0)
                model = kind(copy.deepcopy(config)).to(dtype).eval().requires_grad_(False)
                _draw(model)
                if dtype == torch.float32 or _runs(model):
                    return model if _runs(model) else None
    except Exception:  # noqa: BLE001 - whatever a class says to a configuration that is not its own
        return None
    return None


def _runs(model: nn.Module) -> bool:
    try:
        with torch.inference_mode():
            copy.deepcopy(model)(torch.arange(8)[None] + 3, use_cache=False)
    except Exception:  # noqa: BLE001 - the same
        return False
    return True


@torch.no_grad()
def _draw(model: nn.Module) -> None:
    """Draw weights with which every layer says something and nothing explodes."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        if parameter.ndim > 1:
            parameter.copy_(noise / parameter.shape[-1] ** 0.5)
        else:
            parameter.add_(0.1 * noise)


def _pattern(model: Any) -> list[list[tuple[str, str]]]:
    """For each layer the modules that it holds; how many experts does not count."""

    def modules(layer: nn.Module) -> Iterator[tuple[str, str]]:
        for path, module in layer.named_modules():
            if not any(part.isdigit() and int(part) > 0 for part in path.split(".")):
                yield path, type(module).__name__

    return [list(modules(layer)) for layer in find_layers(model)]


def numbers(config: Any) -> Iterator[tuple[tuple[str, ...], float]]:
    """List the numbers of a configuration, nested ones too.

    Args:
        config: A text model's configuration.

    Yields:
        The path of a number, and the number: whole ones from 4 on.
    """

    def walk(path: tuple[str, ...], value: Any) -> Iterator[tuple[tuple[str, ...], float]]:
        if isinstance(value, dict):
            for name, item in value.items():
                yield from walk((*path, name), item)
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            if value >= 4 and value == int(value):
                yield path, value

    for name, value in vars(config).items():
        if not name.startswith("_"):
            yield from walk((name,), value)


def with_numbers(config: Any, chosen: dict[tuple[str, ...], float]) -> Any:
    """Copy a configuration with some numbers changed.

    Args:
        config: The whole model's configuration.
        chosen: Path in the text model's configuration → number.

    Returns:
        The copy.
    """
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

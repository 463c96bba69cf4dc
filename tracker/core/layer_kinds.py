"""Kinds of layers, as a model's configuration names them: `sliding_attention`, `mamba`, ….

A configuration says them in a list of words, one a layer, that stands in its file or that its class
computes from a layer's place (`attn_layer_period`, `full_attention_interval`). Of every model there
are `odd` and `even` layers.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from tracker.core.errors import ModelError, did_you_mean

LISTS = ("layer_types", "layers_block_type", "attention_layers", "mlp_layer_types")
"""Of a configuration: what each layer is, each in words of its own."""
HALVES = ("even", "odd")
"""Kinds that every model has: layers 0, 2, …, and 1, 3, …."""


def kinds_of(config: Any) -> Mapping[str, tuple[int, ...]]:
    """List the kinds of layers that a configuration names.

    Args:
        config: Of the text model, as transformers reads it.

    Returns:
        Kind → its layers, 0-based, ascending. A layer may be of several kinds: Jamba's are
        `linear_attention` and `mamba`. Empty where all layers are alike.
    """
    total = config.num_hidden_layers
    found: dict[str, list[int]] = {}
    for name in LISTS:
        words = getattr(config, name, None)
        if not isinstance(words, (list, tuple)) or len(words) != total:
            continue
        for layer, word in enumerate(words):
            if isinstance(word, str) and layer not in found.setdefault(word, []):
                found[word].append(layer)
    return {kind: tuple(sorted(layers)) for kind, layers in found.items()}


def layers_of_kind(config: Any, words: Collection[str]) -> tuple[int, ...]:
    """Find the layers that are of one of some kinds.

    Args:
        config: Of the text model, as transformers reads it.
        words: The kinds, as the configuration names them; or `odd`, `even`.

    Returns:
        The layers, 0-based, ascending.

    Raises:
        ModelError: The model has no such kind; names those that it has.

    Examples:
        >>> from types import SimpleNamespace
        >>> config = SimpleNamespace(num_hidden_layers=3, layer_types=["conv", "moe", "conv"])
        >>> layers_of_kind(config, ["conv"]), layers_of_kind(config, ["odd"])
        ((0, 2), (1,))
    """
    kinds = {half: tuple(range(n, config.num_hidden_layers, 2)) for n, half in enumerate(HALVES)}
    kinds = {**kinds, **kinds_of(config)}
    for word in words:
        if word not in kinds:
            own = ", ".join(f"{kind} ({len(kinds[kind])})" for kind in kinds if kind not in HALVES)
            has = f"its kinds are {own}" if own else "its configuration names none"
            raise ModelError(
                f"the model has no layers of kind {word!r}: {has}; odd and even are kinds of "
                f"every model.{did_you_mean(word, kinds)}"
            )
    return tuple(sorted({layer for word in words for layer in kinds[word]}))

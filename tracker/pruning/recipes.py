"""How other tools make the same model, and what they are told where plain transformers cannot."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from itertools import pairwise

import yaml

from tracker.config import Component
from tracker.identities import ModelIdentity
from tracker.models.sources import ModelSource


def recipes(
    source: ModelSource,
    base: ModelIdentity,
    kept: Sequence[int],
    removed: Sequence[int],
    resized: Sequence[str] = (),
) -> dict[str, str]:
    """Say how mergekit and llama.cpp make a model: tool → what it is given.

    mergekit reads safetensors, llama.cpp GGUF: the base in the other form is called by its name.
    There is nothing where a configuration has entries that are `resized`, which neither does.
    """
    if resized:
        return {}
    file = source.gguf_file
    # mergekit's own way to write a revision.
    path = f"{base.source}@{base.revision}" if base.revision else base.source
    return {
        "mergekit": mergekit(source.name if file else path, base.dtype, kept),
        "llama.cpp": llama_quantize(file or f"{source.name}.gguf", removed),
    }


def why_none(resized: Sequence[str]) -> str:
    """Say why no tool is told how to make a model."""
    return (
        "None: mergekit and llama.cpp change how many layers there are and nothing else, and this "
        f"configuration says more of each: {', '.join(resized)}."
    )


def mergekit(base: str, dtype: str, kept: Sequence[int]) -> str:
    """Write a passthrough configuration: ranges of kept layers, half-open."""
    slices = [
        {"sources": [{"model": base, "layer_range": [first, stop]}]} for first, stop in runs(kept)
    ]
    said = {"slices": slices, "merge_method": "passthrough", "dtype": dtype}
    return yaml.safe_dump(said, sort_keys=False, default_flow_style=None, width=1000)


def runs(kept: Sequence[int]) -> list[tuple[int, int]]:
    """Put ascending layers into half-open ranges."""
    breaks = [place for place, (one, next_) in enumerate(pairwise(kept), 1) if next_ != one + 1]
    bounds = [0, *breaks, len(kept)]
    return [(kept[start], kept[stop - 1] + 1) for start, stop in pairwise(bounds)]


def llama_quantize(file: str, removed: Sequence[int]) -> str:
    """Write the command of llama.cpp (b5740 and later); COPY quantises nothing."""
    layers = ",".join(map(str, sorted(removed)))
    return f"llama-quantize --prune-layers {layers} {shlex.quote(file)} pruned.gguf COPY"


def skip_lists(component: Component, layers: Sequence[int]) -> str:
    """Write what LLM-Drop's own model classes read from a configuration."""
    lists = {"drop_attn_list": "attention", "drop_mlp_list": "mlp"}
    return json.dumps({name: list(layers) if component == of else [] for name, of in lists.items()})

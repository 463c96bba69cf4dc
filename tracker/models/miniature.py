"""A miniature of a model: its own class, layers and pattern, with small widths and random weights.

What sharing may break lies in the code of an architecture and in the pattern of its layers, not in
its weights; so it can be checked on a model that costs nearly nothing.
"""

from __future__ import annotations

import copy
import re
import warnings
from itertools import combinations, product
from typing import Any

import torch
from torch import nn

from tracker.models.layers import find_layers
from tracker.models.pruned import duplicate
from tracker.models.reloaded import Shapes, shapes
from tracker.models.shrinking import SHRINK, small_config

LARGEST = 8_000_000
"""Weights above which a model is no miniature."""
NEVER_FIRST = 2
"""How many kinds of width may stay as they are, so that the rest can be made small."""


def miniature(model: Any) -> Any | None:
    """Make a model of the same class whose layers hold the same modules; None if none runs."""
    pattern = _pattern(model)
    for left in range(NEVER_FIRST + 1):
        for unchanged in combinations(SHRINK, left):
            config = small_config(model.config, [s for s in SHRINK if s not in unchanged])
            small = None if config is None else build(type(model), config)
            if small is not None and _pattern(small) == pattern:
                return small
    return None


def build(kind: type, config: Any, wanted: Shapes | None = None) -> Any | None:
    """Build a model of transformers with random weights, the same ones for the same shapes.

    It is in float64, or in float32 where its class computes in nothing wider; None where it cannot
    be built, is large, says no numbers, or has others than the wanted shapes.
    """
    try:
        with warnings.catch_warnings(), torch.random.fork_rng():
            warnings.simplefilter("ignore")
            with torch.device("meta"):
                planned = kind(copy.deepcopy(config))
            if sum(p.numel() for p in planned.parameters()) > LARGEST:
                return None
            if wanted is not None and shapes(planned) != wanted:
                return None
            for positive, dtype in product((False, True), (torch.float64, torch.float32)):
                torch.manual_seed(0)
                own = copy.deepcopy(config)
                if dtype == torch.float64:
                    # The usual one, all experts in one call, knows no wider numbers than float32.
                    own._experts_implementation = "batched_mm"
                model = kind(own).to(dtype).eval().requires_grad_(False)
                _draw(model, positive)
                if _runs(model):
                    return model
    except Exception:  # noqa: BLE001 - whatever a class says to a configuration that is not its own
        return None
    return None


def _runs(model: nn.Module) -> bool:
    """Whether it says numbers, but of tokens that are never said: NaN would agree with anything."""
    try:
        with torch.inference_mode():
            logits = duplicate(model)(torch.arange(8)[None] + 3, use_cache=False).logits[0]
    except Exception:  # noqa: BLE001 - the same
        return False
    said = logits[:, (logits != -torch.inf).any(0)]
    return bool(len(logits) == 8 and said.numel() and said.isfinite().all())


@torch.no_grad()
def _draw(model: nn.Module, positive: bool) -> None:
    """Draw weights with which every layer says something and nothing explodes.

    With `positive`, matrices that the class makes positive throughout stay so, as gains would.
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


def _pattern(model: Any) -> list[list[tuple[str, str]]]:
    """For each layer the modules that it holds; how many experts does not count."""
    # Inside a weight with an adapter, which sees no other token; or an expert but the first.
    beside = re.compile(r"(^|\.)(base_layer|lora_[^.]*|0*[1-9]\d*)(\.|$)")
    return [
        [
            (path, type(getattr(module, "base_layer", module)).__name__)
            for path, module in layer.named_modules()
            if not beside.search(path)
        ]
        for layer in find_layers(model)
    ]

"""What the intact model does with single experts: how often they are asked, how much they add."""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tracker.core.changes import Change
from tracker.core.documents import Document
from tracker.core.proxies import OF_EXPERTS, widened
from tracker.engine.scoring.rows import measured_texts
from tracker.engine.scoring.sweep import Engine
from tracker.models.hooks import replaced_forward
from tracker.models.parts.experts import Experts, single_outputs

_ROUNDING = 0.05
"""Of what all experts of a token give: what two ways of adding it up may differ by."""


@torch.inference_mode()
def expert_load(
    engine: Engine, document: Document, parts: Collection[Change]
) -> dict[Change, tuple[float, ...]]:
    """Observe some experts while the intact model reads a document.

    The document is read once more, and each token passes its experts a second time, one by one: so
    the norm of what an expert gives is known before it is weighed.

    Args:
        engine: The engine, whose model reads.
        document: What it reads: context and gold continuation, or the windows of a rolling text.
        parts: The experts.

    Returns:
        Of each expert, in the order of `OF_EXPERTS`, a sum over the document's tokens: of gate ×
        ‖output‖ over those that are routed to it, and how many these are. The first is NaN where
        what one expert gives cannot be told from what others give.
    """
    layers, anatomy = engine.loaded.layers, engine.anatomy
    found = {layer: anatomy.at(Experts, layer) for layer in {part.layer for part in parts}}
    sums = {
        layer: torch.zeros(len(OF_EXPERTS), own.count, dtype=torch.float64)
        for layer, own in found.items()
    }
    for tokens, measured in measured_texts(document, engine.max_length):
        with ExitStack() as stack:
            for layer, own in found.items():
                held = layers[layer].get_submodule(own.held)
                noting = partial(_noting, held.forward, sums[layer], measured)
                stack.enter_context(replaced_forward(held, noting))
            engine.run(tokens)
    return {part: tuple(sums[part.layer][:, part.number].tolist()) for part in parts}


def _noting(
    forward: Callable[..., Tensor], sums: Tensor, measured: int, *args: Any, **kwargs: Any
) -> Tensor:
    """Call what holds a layer's experts, and add to their sums what it does with a text."""
    output = forward(*args, **kwargs)
    total = torch.zeros_like(output, dtype=torch.float32).flatten(0, -2)
    seen = []
    for numbers, gates, alone in single_outputs(forward, args, kwargs):
        total += gates[:, None].float() * alone.float()
        seen.append((numbers, widened(gates) * widened(alone.float().norm(dim=-1))))
    whole = output.float().flatten(0, -2)
    told_apart = (total - whole).norm() <= _ROUNDING * whole.norm()
    for numbers, figures in seen:
        # A number beyond the last is none: of experts that are elsewhere.
        there = (numbers < sums.shape[1]).cpu() & (torch.arange(len(numbers)) >= measured)
        experts, values = numbers.cpu()[there].long(), figures.cpu().double()[there]
        sums[0].index_add_(0, experts, values if told_apart else torch.full_like(values, torch.nan))
        sums[1].index_add_(0, experts, torch.ones_like(values))
    return output

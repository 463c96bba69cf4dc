"""How far the residual stream turns over any stretch of layers, in one plain forward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tracker.core.documents import Document
from tracker.core.proxies import OBSERVED, angular_distance, widened
from tracker.engine.refusal import RefusalError
from tracker.engine.scoring.rows import measured_texts
from tracker.engine.scoring.sweep import Engine
from tracker.models.hooks import all_of, call_protected, first_of, replaced_forward


@torch.inference_mode()
def span_similarity(engine: Engine, document: Document) -> dict[str, Tensor]:
    """Measure how layers, and stretches of layers, turn the residual stream in a document.

    Args:
        engine: The engine, whose model reads.
        document: What it reads: context and gold continuation, or the windows of a rolling text.

    Returns:
        Sums over the document's tokens, float64. `tokens` []: how many there are. Of each layer
        [layers]: every proxy of its input and output by which a strategy prunes. Of each stretch
        [layers, layers]: `angular_distance` between the input of the first layer and the
        output of the last one, which is the second index; 0 where it comes before the first.

    Raises:
        RefusalError: The model's layers do not hand on one state a token.
    """
    layers = len(engine.loaded.layers)
    observed = {proxy.name: proxy for proxy in OBSERVED if proxy.strategy}
    found = {
        "tokens": torch.zeros((), dtype=torch.float64),
        **{name: torch.zeros(layers, dtype=torch.float64) for name in observed},
        "angular_distance": torch.zeros(layers, layers, dtype=torch.float64),
    }
    for tokens, measured in measured_texts(document, engine.max_length):
        with _watched(engine.loaded.layers) as seen:
            engine.run(tokens)
        if len(seen) != layers or any(len(each) != len(tokens) for pair in seen for each in pair):
            raise RefusalError("its layers do not run once each, on one state a token")
        states = [[state[measured:] for state in pair] for pair in seen]
        found["tokens"] += len(tokens) - measured
        for first, (before, after) in enumerate(states):
            for name, proxy in observed.items():
                found[name][first] += widened(proxy.of_token(before, after)).sum().cpu()
            for last in range(first, layers):
                angle = widened(angular_distance(before, states[last][1])).sum().cpu()
                found["angular_distance"][first, last] += angle
    return found


@contextmanager
def _watched(layers: nn.ModuleList) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Take down what goes into each layer and what comes out of it, [tokens, width]."""
    seen: list[tuple[Tensor, Tensor]] = []

    def call(layer: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        before, output = call_protected(layer, forward, args, kwargs)
        after = first_of(output)
        # Several residual streams side by side are one state.
        seen.append((before.flatten(0, 1).flatten(1), after.flatten(0, 1).flatten(1)))
        return output

    with all_of(replaced_forward(each, partial(call, each, each.forward)) for each in layers):
        yield seen

"""Naive versions of what searches rank layers by."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import combinations_with_replacement
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.helpers.engines import gold_tokens
from tests.helpers.truth import find_layer_list, pruned_copy
from tests.search.conftest import LAYERS, Truth
from tracker.search.scores import PartSet


def one_larger_sets(removed: PartSet) -> list[PartSet]:
    return [tuple(sorted((*removed, n))) for n in range(LAYERS) if n not in removed]


def document_tokens(truth: Truth) -> Iterator[Tensor]:
    """Yield the tokens of each document that proxies read."""
    for document in truth.documents:
        yield torch.tensor([gold_tokens(document)])


@contextmanager
def hooked_layers(
    model: Any, hook: Callable[[int, Tensor, Tensor], Tensor | None]
) -> Iterator[None]:
    """Call with the place, the input and the output of each layer; what it gives is the output."""

    def call(index: int, module: Any, args: Any, output: Any) -> Any:
        state = output[0] if isinstance(output, tuple) else output
        changed = hook(index, args[0], state)
        changed = state if changed is None else changed
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    layers = enumerate(find_layer_list(model))
    handles = [layer.register_forward_hook(partial(call, index)) for index, layer in layers]
    yield
    for handle in handles:
        handle.remove()


def text_loss(model: Any, ids: Tensor) -> float:
    """Return the negative log-likelihood of all tokens but the first."""
    with torch.no_grad():
        logits = model(ids).logits[0, :-1].double()
    return float(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum"))


def span_figures(
    model: Any, truth: Truth, figure_of: Callable[[Tensor, Tensor], Tensor]
) -> list[list[float]]:
    """Compute a figure of each span of layers, averaged over all tokens."""
    total = len(find_layer_list(model))
    sums, tokens = torch.zeros(total, total, dtype=torch.float64), 0
    for ids in document_tokens(truth):
        states: list[tuple[Tensor, Tensor]] = []

        def see(_: int, x: Tensor, y: Tensor, states: Any = states) -> None:
            states.append((x[0].double(), y[0].double()))

        with hooked_layers(model, see):
            text_loss(model, ids)
        tokens += ids.shape[1]
        for i, j in combinations_with_replacement(range(total), 2):
            sums[i, j] += figure_of(states[i][0], states[j][1]).sum()
    return (sums / tokens).tolist()


def cosine_similarity(states: Tensor, new_states: Tensor) -> Tensor:
    return torch.nn.functional.cosine_similarity(states, new_states, dim=-1)


def relative_update(states: Tensor, new_states: Tensor) -> Tensor:
    return (new_states - states).norm(dim=-1) / states.norm(dim=-1)


def mean_loss(model: Any, truth: Truth) -> float:
    """Return the mean negative log-likelihood of a predicted token."""
    texts = list(document_tokens(truth))
    return sum(text_loss(model, ids) for ids in texts) / sum(ids.shape[1] - 1 for ids in texts)


def naive_proxy(name: str, truth: Truth, removed: PartSet) -> dict[int, float]:
    """Compute a proxy of each layer of a really pruned model, by its index in the intact one."""
    model = pruned_copy(truth.model, removed)
    remaining = [n for n in range(LAYERS) if n not in removed]
    if name == "perplexity":
        pruned = [pruned_copy(truth.model, (*removed, layer)) for layer in remaining]
        figures = [mean_loss(changed, truth) - mean_loss(model, truth) for changed in pruned]
    elif name == "taylor":
        figures = gate_derivatives(model.double(), truth)
    elif name == "cosine":
        figures = [1 - value for value in np.diag(span_figures(model, truth, cosine_similarity))]
    else:
        figures = [*np.diag(span_figures(model, truth, relative_update))]
    return dict(zip(remaining, figures, strict=True))


def gate_derivatives(model: Any, truth: Truth) -> list[float]:
    """Compute each document's derivative by a gate on a layer's update, by small steps."""
    step, derivatives = 1e-3, []

    def move(layer: int, gate: float, index: int, x: Tensor, y: Tensor) -> Tensor | None:
        return x + gate * (y - x) if index == layer else None

    for layer in range(len(find_layer_list(model))):
        total = 0.0
        for ids in document_tokens(truth):
            values = []
            for gate in (1 + step, 1 - step):
                with hooked_layers(model, partial(move, layer, gate)):
                    values.append(text_loss(model, ids))
            total += abs(values[0] - values[1]) / (2 * step) / (ids.shape[1] - 1)
        derivatives.append(total / len(truth.documents))
    return derivatives

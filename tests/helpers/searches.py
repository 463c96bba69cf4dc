"""Naive versions of what searches rank layers by."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import combinations_with_replacement
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.helpers.engines import gold_tokens
from tests.helpers.truth import exported, layers_of
from tests.search.conftest import LAYERS, Truth
from tracker.search.scores import Set


def grown(removed: Set) -> list[Set]:
    return [tuple(sorted((*removed, n))) for n in range(LAYERS) if n not in removed]


def texts(truth: Truth) -> Iterator[Tensor]:
    """Yield the tokens of each document that proxies read."""
    for document in truth.documents:
        yield torch.tensor([gold_tokens(document)])


@contextmanager
def hooked(model: Any, hook: Callable[[int, Tensor, Tensor], Tensor | None]) -> Iterator[None]:
    """Call with the place, the input and the output of each layer; what it gives is the output."""

    def of(place: int) -> Callable[..., Any]:
        def hook_of(module: Any, args: Any, output: Any) -> Any:
            after = output[0] if isinstance(output, tuple) else output
            other = hook(place, args[0], after)
            changed = after if other is None else other
            return (changed, *output[1:]) if isinstance(output, tuple) else changed

        return hook_of

    handles = [one.register_forward_hook(of(at)) for at, one in enumerate(layers_of(model))]
    yield
    for handle in handles:
        handle.remove()


def loss(model: Any, ids: Tensor) -> float:
    """Return the negative log-likelihood of all tokens but the first."""
    with torch.no_grad():
        logits = model(ids).logits[0, :-1].double()
    return float(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum"))


def turned(model: Any, truth: Truth, of: Callable[[Tensor, Tensor], Tensor]) -> list[list[float]]:
    """Compute a figure of each span of layers, averaged over all tokens."""
    total = len(layers_of(model))
    sums, tokens = torch.zeros(total, total, dtype=torch.float64), 0
    for ids in texts(truth):
        seen: list[tuple[Tensor, Tensor]] = []

        def see(place: int, before: Tensor, after: Tensor, seen: Any = seen) -> None:
            seen.append((before[0].double(), after[0].double()))

        with hooked(model, see):
            loss(model, ids)
        tokens += ids.shape[1]
        for i, j in combinations_with_replacement(range(total), 2):
            sums[i, j] += of(seen[i][0], seen[j][1]).sum()
    return (sums / tokens).tolist()


def cosine(before: Tensor, after: Tensor) -> Tensor:
    return torch.nn.functional.cosine_similarity(before, after, dim=-1)


def relative(before: Tensor, after: Tensor) -> Tensor:
    return (after - before).norm(dim=-1) / before.norm(dim=-1)


def perplexity(model: Any, truth: Truth) -> float:
    """Return the mean negative log-likelihood of a predicted token."""
    read = list(texts(truth))
    return sum(loss(model, ids) for ids in read) / sum(ids.shape[1] - 1 for ids in read)


def naive_proxy(name: str, truth: Truth, removed: Set) -> dict[int, float]:
    """Compute a proxy of each layer of a really pruned model, by its index in the intact one."""
    model = exported(truth.model, removed)
    left = [n for n in range(LAYERS) if n not in removed]
    if name == "perplexity":
        without = [exported(truth.model, (*removed, layer)) for layer in left]
        before = perplexity(model, truth)
        figures = [perplexity(each, truth) - before for each in without]
    elif name == "taylor":
        figures = gates(model.double(), truth)
    elif name == "cosine":
        figures = [1 - each for each in np.diag(turned(model, truth, cosine))]
    else:
        figures = [*np.diag(turned(model, truth, relative))]
    return dict(zip(left, figures, strict=True))


def gates(model: Any, truth: Truth) -> list[float]:
    """Compute each document's derivative by a gate on a layer's update, by small steps."""
    step, found = 1e-3, []
    for gated in range(len(layers_of(model))):
        total = 0.0
        for ids in texts(truth):
            values = []
            for gate in (1 + step, 1 - step):

                def move(place: int, before: Tensor, after: Tensor, gate: float = gate) -> Any:
                    return before + gate * (after - before) if place == gated else None  # noqa: B023

                with hooked(model, move):
                    values.append(loss(model, ids))
            total += abs(values[0] - values[1]) / (2 * step) / (ids.shape[1] - 1)
        found.append(total / len(truth.documents))
    return found

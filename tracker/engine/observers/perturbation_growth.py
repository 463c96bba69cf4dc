"""Follow the effect of a perturbed layer on the residual stream of every later layer.

The perturbations are streams of one forward pass, as ablations are. Each forks behind the layer
that it perturbs, so all of them cost n · L(L−1)/2 layer passes instead of n · L².
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from tracker.core.changes import INTACT, Ablation
from tracker.core.documents import Document
from tracker.engine.forward.layer import ForwardPass
from tracker.engine.forward.streams import LayerStep, StreamPlan
from tracker.engine.refusal import RefusalError
from tracker.engine.scoring.rows import measured_texts
from tracker.engine.scoring.sweep import Engine
from tracker.models.hooks import all_of, first_of

REMOVED, SHUFFLED, RANDOM = 0, 1, 2
"""Indices of a layer's perturbations; random directions come last, one per draw."""
_CLOSE = {torch.float64: 1e-6, torch.float32: 1e-3}
_IN_HALVES = 0.1
"""Tolerance between two ways of computing, as a share of the largest difference, by precision."""


def perturbation_growth(
    engine: Engine, document: Document, draws: int, seed: int = 0
) -> dict[str, NDArray[np.float64]]:
    """Follow the perturbations of every layer through all later ones, in one document.

    Let h be the intact residual stream behind each of the L layers, and f a layer's update. The
    stream behind the layer is perturbed in each token by the norm of f, in one of these ways:

    - *removed*: h − f, the layer's output is its input;
    - *random*: h + a direction that is uniform on the sphere, drawn for each token;
    - *shuffled*: h − the update of another token of the text, scaled to the token's own norm.

    Behind every later layer m the relative difference ‖h′ₘ − hₘ‖ / ‖hₘ‖ is computed in each token,
    and averaged over the tokens on which the proxies are measured. *carried* is its value if the
    later layers passed the perturbation on unchanged: ‖f‖ / ‖hₘ‖.

    Directions are drawn in float32 on the CPU, by seed, document, layer and draw, and added in the
    precision of the model.

    Args:
        engine: The model.
        document: The document: context and gold continuation, or the windows of a rolling text.
        draws: Number of random directions for each layer.
        seed: Seed of the directions.

    Returns:
        `removed`, `shuffled` and `carried` [2, layers, layers] and `random` [2, draws, layers,
        layers]: the perturbed layer, then the layer behind which the difference is taken, NaN if
        that comes earlier. First comes the mean over all tokens, then without the first one of the
        text, which often has a norm far beyond the others'. NaN if no token is left, or if a
        hidden state is not finite or all zeros.

    Raises:
        RefusalError: The model is not built the way that this needs.
    """
    total = len(engine.loaded.layers)
    sums = torch.zeros(2, RANDOM + draws + 1, total, total, dtype=torch.float64)
    counts = torch.zeros(2, dtype=torch.float64)
    for number, (tokens, measured) in enumerate(measured_texts(document, engine.max_length)):
        directions = _Directions(f"{seed}/{document.task}/{document.index}/{number}", draws)
        found = _followed(engine, tokens, directions, range(total))
        for place, first in enumerate((measured, max(1, measured))):
            sums[place] += found[..., first:].double().sum(-1)
            counts[place] += len(tokens) - first
    means = np.asarray((sums / counts[:, None, None, None]).numpy())
    later = np.arange(total) >= np.arange(total)[:, None]
    means = np.where(later, means, np.nan)
    return {
        "removed": means[:, REMOVED],
        "shuffled": means[:, SHUFFLED],
        "random": means[:, RANDOM:-1],
        "carried": means[:, -1],
    }


@torch.inference_mode()
def verify_growth(engine: Engine, document: Document, draws: int, seed: int = 0) -> None:
    """Check the middle layer's perturbations against separate plain forward passes.

    Arguments are those of `perturbation_growth`. Raises RefusalError if the two ways differ by
    more than rounding.
    """
    loaded, layer = engine.loaded, len(engine.loaded.layers) // 2
    if layer == 0:
        return
    tokens, _ = next(measured_texts(document, engine.max_length))
    directions = _Directions(f"{seed}/{document.task}/{document.index}/0", draws)
    shared = _followed(engine, tokens, directions, range(layer, layer + 1))[:-1, layer, layer:]
    ids = torch.tensor([tokens], device=loaded.device)
    intact = _plain(engine, ids)

    def differences(state: Tensor) -> Tensor:
        behind = zip(_plain(engine, ids, layer, state)[layer:], intact[layer:], strict=True)
        return torch.stack([_relative(other - own, own) for other, own in behind])

    perturbed = directions.perturbed(layer, intact[layer - 1], intact[layer])
    plain = torch.stack([differences(state) for state in perturbed])
    within = _CLOSE.get(loaded.model.dtype, _IN_HALVES) * float(plain.max())
    if not torch.allclose(shared, plain, rtol=0, atol=within, equal_nan=True):
        raise RefusalError("its layers compute something else for several streams than for one")


def _followed(
    engine: Engine, tokens: Sequence[int], directions: _Directions, layers: range
) -> Tensor:
    """Follow some layers' perturbations [perturbations + carried, layers, layers, tokens].

    Entries without a difference are zeros.
    """
    total, each = len(engine.loaded.layers), directions.of_a_layer
    size = max(1, (engine.streams(len(tokens)) - 1) // each)
    found = torch.zeros(each + 1, total, total, len(tokens))
    for start in range(0, len(layers), size):
        _Pass(engine, layers[start : start + size], directions, found).run(tokens)
    return found


@dataclass(frozen=True)
class _Directions:
    """The perturbations of the layers of one text, always the same for the same name."""

    name: str
    draws: int

    @property
    def of_a_layer(self) -> int:
        """The number of perturbations of each layer."""
        return RANDOM + self.draws

    def perturbed(self, layer: int, before: Tensor, after: Tensor) -> list[Tensor]:
        """Return the stream behind a layer perturbed in each way; all states [tokens, …]."""
        update = _wide(after) - _wide(before)
        size = _norm(update)
        states = [before, _wide(after) - _directed(update[self._others(layer, len(after))], size)]
        for draw in range(self.draws):
            noise = torch.randn(after.shape, generator=self._generator(f"{layer}/{draw}"))
            states.append(_wide(after) + _directed(noise.to(update), size))
        return [state.to(after.dtype) for state in states]

    def _others(self, layer: int, tokens: int) -> Tensor:
        """Return another token for each: all of them in one random circle."""
        circle = torch.randperm(tokens, generator=self._generator(f"{layer}/shuffled"))
        others = torch.empty_like(circle)
        others[circle] = circle.roll(1)
        return others

    def _generator(self, what: str) -> torch.Generator:
        digest = hashlib.sha256(f"{self.name}/{what}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:8]) >> 1)


@dataclass
class _Pass:
    """One forward pass in which some layers are perturbed; differences are added to `found`.

    The state behind the layers perturbed so far is [streams, tokens, …]: the intact stream, then
    the perturbations of each of these layers.
    """

    engine: Engine
    group: range
    directions: _Directions
    found: Tensor
    _sizes: dict[int, Tensor] = field(default_factory=dict)
    _seen: int = 0

    def run(self, tokens: Sequence[int]) -> None:
        """Run the pass over a text."""
        loaded = self.engine.loaded
        with (
            torch.inference_mode(),
            ForwardPass(loaded.layers, self._plan()).installed(),
            _after_each(loaded.layers, self._behind),
        ):
            self.engine.run(tokens)
        if self._seen != len(loaded.layers):
            raise RefusalError(f"its {len(loaded.layers)} layers run {self._seen} times in a pass")

    def _plan(self) -> StreamPlan:
        """Plan all perturbations as streams that skip the layer at first."""
        steps, streams = [], 1
        for layer in range(len(self.engine.loaded.layers)):
            new = self.directions.of_a_layer if layer in self.group else 0
            done = (*[INTACT] * streams, *[Ablation.of(removed=[layer])] * new)
            steps.append(LayerStep(streams, (0,) * new, done))
            streams += new
        return StreamPlan(tuple(steps), ())

    def _behind(self, layer: int, states: Tensor) -> None:
        """Perturb the stream behind a layer, and measure how far all streams are from it."""
        self._seen += 1
        if states.shape[1] != self.found.shape[-1]:
            raise RefusalError(f"its layers pass on {tuple(states.shape)}, not [texts, tokens, …]")
        intact, each = states[0], self.directions.of_a_layer
        if layer in self.group:
            before = states[-each].clone()
            states[-each:] = torch.stack(self.directions.perturbed(layer, before, intact))
            self._sizes[layer] = _norm(_wide(intact) - _wide(before))
        norm = _norm(intact)
        for origin, streams in zip(self._sizes, torch.split(states[1:], each), strict=False):
            self.found[:-1, origin, layer] = _relative(streams - intact, intact).cpu()
            carried = self._sizes[origin].to(norm.device) / norm
            self.found[-1, origin, layer] = carried.flatten(1)[:, 0].cpu()


def _after_each(
    layers: nn.ModuleList, look: Callable[[int, Tensor], None]
) -> AbstractContextManager[None]:
    """Call `look` with each layer's number and output, which it may change in place."""

    def hook(index: int, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        look(index, first_of(output))

    return all_of(layer.register_forward_hook(partial(hook, n)) for n, layer in enumerate(layers))


def _plain(
    engine: Engine, ids: Tensor, layer: int | None = None, state: Tensor | None = None
) -> list[Tensor]:
    """Return the stream behind each layer [tokens, …], with one of them replaced by `state`."""
    behind: list[Tensor] = []

    def look(index: int, states: Tensor) -> None:
        if index == layer and state is not None:
            states[0] = state
        behind.append(states[0].clone())

    engine.put_back()
    with _after_each(engine.loaded.layers, look):
        engine.loaded.model(input_ids=ids, use_cache=False)
    return behind


def _wide(state: Tensor) -> Tensor:
    """Return the state in float32 or wider."""
    return state.to(torch.promote_types(state.dtype, torch.float32))


def _norm(state: Tensor) -> Tensor:
    """Compute each token's norm [tokens, 1, …]; several parallel residual streams are one state."""
    over = tuple(range(1, state.ndim))
    norm: Tensor = torch.linalg.vector_norm(_wide(state), dim=over, keepdim=True)
    return norm


def _directed(direction: Tensor, size: Tensor) -> Tensor:
    """Scale each token's direction to a size; zero if it has no direction."""
    norm = _norm(direction)
    return direction * torch.where(norm > 0, size / norm, 0)


def _relative(difference: Tensor, intact: Tensor) -> Tensor:
    """Compute ‖difference‖ / ‖intact‖ [..., tokens]; NaN where the intact stream is all zeros."""
    over = tuple(range(-intact.ndim + 1, 0))
    size = torch.linalg.vector_norm(_wide(intact), dim=over)
    share = torch.linalg.vector_norm(_wide(difference), dim=over) / size
    return torch.where(size > 0, share, torch.nan)

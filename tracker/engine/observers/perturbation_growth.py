"""Measure how a perturbation of one layer's output changes the states after later layers.

All perturbations are computed in one batch. After each layer, the perturbed outputs of this layer
join the batch.
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

from tracker.engine.forward.layer import ForwardPass
from tracker.engine.forward.streams import LayerStep, StreamPlan
from tracker.engine.refusal import RefusalError
from tracker.engine.scoring.rows import measured_texts
from tracker.engine.scoring.sweep import Engine
from tracker.models.hooks import enter_all, first_output
from tracker.schema.changes import INTACT, Ablation
from tracker.schema.documents import Document

REMOVED, SHUFFLED, RANDOM = 0, 1, 2
"""Indices of a layer's perturbations; the random directions, one per draw, come last."""
_TOLERANCES = {torch.float64: 1e-6, torch.float32: 1e-3}
_HALF_TOLERANCE = 0.1
"""Tolerance between two ways of computing in half precision, relative to the largest difference."""


def perturbation_growth(
    engine: Engine, document: Document, draws: int, seed: int = 0
) -> dict[str, NDArray[np.float64]]:
    """Measure how perturbing each layer's output changes the states after later layers.

    For one layer, let h be the residual stream of the intact model after the layer, and f the
    update that the layer adds. The perturbation is a vector with the norm of f at each token. There
    are three kinds of perturbations:

    - `removed`: h′ = h − f, which is the input of the layer.
    - `random`: h′ = h + r, where r has a random direction that is drawn for each token.
    - `shuffled`: h′ = h − g, where g is the update of another token, scaled to the norm of f.

    Let hₘ and h′ₘ be the intact and the perturbed stream after layer m. The function averages the
    relative difference ‖h′ₘ − hₘ‖ / ‖hₘ‖ over the tokens. The mean of ‖f‖ / ‖hₘ‖ (`carried`) is
    what the relative difference would be if later layers did not change the perturbation.

    Args:
        engine: The engine of the model.
        document: The document that is read: context and gold continuation, or the windows of a
            rolling text.
        draws: Number of random directions for each layer.
        seed: Seed of the random directions.

    Returns:
        Means: `removed`, `shuffled` and `carried` [2, layers, layers], and `random` [2, draws,
        layers, layers]. The first axis has two entries: the mean over all tokens, and the mean
        without the text's first token. The last two axes are the perturbed layer and the measured
        layer; the mean is NaN if the measured layer comes before the perturbed layer. A mean is NaN
        if there are no tokens, or if a hidden state is not finite or all zeros.

    Raises:
        RefusalError: The structure of the model does not allow this measurement.
    """
    n_layers = len(engine.loaded.layers)
    sums = torch.zeros(2, RANDOM + draws + 1, n_layers, n_layers, dtype=torch.float64)
    counts = torch.zeros(2, dtype=torch.float64)
    for number, (tokens, start) in enumerate(measured_texts(document, engine.max_length)):
        directions = _Directions(f"{seed}/{document.task}/{document.index}/{number}", draws)
        differences = _follow_perturbations(engine, tokens, directions, range(n_layers))
        for index, first_token in enumerate((start, max(1, start))):
            sums[index] += differences[..., first_token:].double().sum(-1)
            counts[index] += len(tokens) - first_token
    means = np.asarray((sums / counts[:, None, None, None]).numpy())
    is_later = np.arange(n_layers) >= np.arange(n_layers)[:, None]
    means = np.where(is_later, means, np.nan)
    return {
        "removed": means[:, REMOVED],
        "shuffled": means[:, SHUFFLED],
        "random": means[:, RANDOM:-1],
        "carried": means[:, -1],
    }


@torch.inference_mode()
def verify_batching(engine: Engine, document: Document, draws: int, seed: int = 0) -> None:
    """Test whether perturbations in one batch give the same results as separate passes.

    Only the model's middle layer is perturbed, with `draws` random directions. Raises RefusalError
    if the results differ by more than rounding errors.
    """
    loaded, layer = engine.loaded, len(engine.loaded.layers) // 2
    if layer == 0:
        return
    tokens, _ = next(measured_texts(document, engine.max_length))
    directions = _Directions(f"{seed}/{document.task}/{document.index}/0", draws)
    differences = _follow_perturbations(engine, tokens, directions, range(layer, layer + 1))
    ids = torch.tensor([tokens], device=loaded.device)
    intact_states = _plain_states(engine, ids)

    def plain_differences(state: Tensor) -> Tensor:
        later_states = _plain_states(engine, ids, layer, state)[layer:]
        pairs = zip(later_states, intact_states[layer:], strict=True)
        return torch.stack([_distance(x - y, y) for x, y in pairs])

    states = directions.perturb(layer, intact_states[layer - 1], intact_states[layer])
    expected = torch.stack([plain_differences(state) for state in states])
    atol = _TOLERANCES.get(loaded.model.dtype, _HALF_TOLERANCE) * float(expected.max())
    result = differences[:-1, layer, layer:]
    if not torch.allclose(result, expected, rtol=0, atol=atol, equal_nan=True):
        raise RefusalError(
            "the layers give different results for a batch of states than for a single state"
        )


def _follow_perturbations(
    engine: Engine, tokens: Sequence[int], directions: _Directions, layers: range
) -> Tensor:
    """Measure for each token how perturbations of `layers` change the states after later layers.

    Returns relative differences [perturbations + 1, perturbed layer, later layer, tokens]. The last
    entry of the first axis is `carried`, as defined in `perturbation_growth`. Entries for layers
    before the perturbed layer are zero.
    """
    n_layers, n_perturbations = len(engine.loaded.layers), directions.n_per_layer
    size = max(1, (engine.count_streams(len(tokens)) - 1) // n_perturbations)
    differences = torch.zeros(n_perturbations + 1, n_layers, n_layers, len(tokens))
    for start in range(0, len(layers), size):
        _PerturbedPass(engine, layers[start : start + size], directions, differences).run(tokens)
    return differences


@dataclass(frozen=True)
class _Directions:
    """Generator of perturbed layer outputs for one text, with `name` as random seed."""

    name: str
    draws: int

    @property
    def n_per_layer(self) -> int:
        """Number of perturbations of a layer: `removed`, `shuffled` and the random directions."""
        return RANDOM + self.draws

    def perturb(self, layer: int, inputs: Tensor, outputs: Tensor) -> list[Tensor]:
        """Return a layer's output [tokens, …] after each perturbation, given its in- and outputs.

        The perturbations are: the layer removed, its update replaced by another token's, and random
        directions.
        """
        wide = _widen(outputs)
        update = wide - _widen(inputs)
        size, other_tokens = _token_norms(update), self._shuffle(layer, len(outputs))
        states = [inputs, wide - _scale(update[other_tokens], size)]
        for draw in range(self.draws):
            noise = torch.randn(outputs.shape, generator=self._make_generator(f"{layer}/{draw}"))
            states.append(wide + _scale(noise.to(update), size))
        return [state.to(outputs.dtype) for state in states]

    def _shuffle(self, layer: int, tokens: int) -> Tensor:
        """Shuffle the token positions so that no token keeps its position."""
        token_order = torch.randperm(tokens, generator=self._make_generator(f"{layer}/shuffled"))
        source_tokens = torch.empty_like(token_order)
        source_tokens[token_order] = token_order.roll(1)
        return source_tokens

    def _make_generator(self, purpose: str) -> torch.Generator:
        digest = hashlib.sha256(f"{self.name}/{purpose}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:8]) >> 1)


@dataclass
class _PerturbedPass:
    """A forward pass that perturbs layers, and measures the effects on later layers.

    The hidden state after a layer has the shape [streams, tokens, …]. Stream 0 is the intact model,
    and each perturbation of a layer in `group` adds a stream.
    """

    engine: Engine
    group: range
    directions: _Directions
    differences: Tensor
    _update_norms: dict[int, Tensor] = field(default_factory=dict)
    _n_seen: int = 0

    def run(self, tokens: Sequence[int]) -> None:
        """Read a text, and store the effects of all perturbations in `differences`."""
        loaded = self.engine.loaded
        with (
            torch.inference_mode(),
            ForwardPass(loaded.layers, self._plan()).install(),
            _hook_outputs(loaded.layers, self._perturb_states),
        ):
            self.engine.run_text(tokens)
        if self._n_seen != (n_layers := len(loaded.layers)):
            raise RefusalError(
                f"the {n_layers} layers run {self._n_seen} times in one forward pass"
            )

    def _plan(self) -> StreamPlan:
        """Plan a batch with a new part (stream) for each perturbation, from its layer on."""
        steps, n_streams = [], 1
        for layer in range(len(self.engine.loaded.layers)):
            n_new = self.directions.n_per_layer if layer in self.group else 0
            ablations = (*[INTACT] * n_streams, *[Ablation.from_changes(removed=[layer])] * n_new)
            steps.append(LayerStep(n_streams, (0,) * n_new, ablations))
            n_streams += n_new
        return StreamPlan(tuple(steps), ())

    def _perturb_states(self, layer: int, states: Tensor) -> None:
        """Perturb the output of a layer, and store how far all states are from the intact state.

        `states` is the output of all streams, and is changed in place.
        """
        self._n_seen += 1
        if states.shape[1] != self.differences.shape[-1]:
            shape = tuple(states.shape)
            raise RefusalError(f"the layers return shape {shape}, not [texts, tokens, …]")
        intact, n_perturbations = states[0], self.directions.n_per_layer
        if layer in self.group:
            inputs = states[-n_perturbations].clone()
            states[-n_perturbations:] = torch.stack(self.directions.perturb(layer, inputs, intact))
            self._update_norms[layer] = _token_norms(_widen(intact) - _widen(inputs))
        norm = _token_norms(intact)
        groups = torch.split(states[1:], n_perturbations)
        for (origin, size), streams in zip(self._update_norms.items(), groups, strict=False):
            self.differences[:-1, origin, layer] = _distance(streams - intact, intact).cpu()
            share = size.to(norm.device) / norm
            self.differences[-1, origin, layer] = share.flatten(1)[:, 0].cpu()


def _hook_outputs(
    layers: nn.ModuleList, visit: Callable[[int, Tensor], None]
) -> AbstractContextManager[None]:
    """Call `visit(number, output)` whenever a layer has run in a `with` block.

    `visit` can change the output in place.
    """

    def hook(index: int, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        visit(index, first_output(output))

    hooks = enumerate(layers)
    return enter_all(layer.register_forward_hook(partial(hook, n)) for n, layer in hooks)


def _plain_states(
    engine: Engine, ids: Tensor, layer: int | None = None, state: Tensor | None = None
) -> list[Tensor]:
    """Return each layer's output in an ordinary forward pass, without streams.

    If `state` is given, it replaces the output of `layer`.
    """
    layer_states: list[Tensor] = []

    def visit(layer_index: int, states: Tensor) -> None:
        if layer_index == layer and state is not None:
            states[0] = state
        layer_states.append(states[0].clone())

    engine.restore_state()
    with _hook_outputs(engine.loaded.layers, visit):
        engine.loaded.model(input_ids=ids, use_cache=False)
    return layer_states


def _widen(state: Tensor) -> Tensor:
    """Convert a state to float32, unless the dtype already has higher precision."""
    return state.to(torch.promote_types(state.dtype, torch.float32))


def _token_norms(state: Tensor) -> Tensor:
    """Compute the norm of each token's state, with the shape [tokens, 1, …]."""
    dims = tuple(range(1, state.ndim))
    norm: Tensor = torch.linalg.vector_norm(_widen(state), dim=dims, keepdim=True)
    return norm


def _scale(direction: Tensor, size: Tensor) -> Tensor:
    """Scale each token's vector to the norm in `size`; zero vectors stay zero."""
    norm = _token_norms(direction)
    return direction * torch.where(norm > 0, size / norm, 0)


def _distance(difference: Tensor, intact: Tensor) -> Tensor:
    """Compute ‖difference‖ / ‖intact‖ for each token; NaN where the intact state is all zeros."""
    dims = tuple(range(-intact.ndim + 1, 0))
    size = torch.linalg.vector_norm(_widen(intact), dim=dims)
    share = torch.linalg.vector_norm(_widen(difference), dim=dims) / size
    return torch.where(size > 0, share, torch.nan)

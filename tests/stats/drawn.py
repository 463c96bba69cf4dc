"""Drawn series and drops of documents, and the looks of sequential procedures at them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

from tracker.stats.confidence import MeanSequences
from tracker.stats.stopping import SmallestMean

Array = NDArray[np.float64]
Noise = Callable[[np.random.Generator, tuple[int, ...]], Array]
BLOCK = 32
NOISES: dict[str, Noise] = {
    "normal": lambda dice, shape: dice.normal(0, 1, shape),
    "skewed": lambda dice, shape: dice.exponential(1, shape) - 1,
    "heavy": lambda dice, shape: dice.standard_t(4, shape) / 2**0.5,
}


def ar1(rng: np.random.Generator, rho: float, count: int, layers: int) -> Array:
    """Stationary Gaussian series of first order, variance 1, one a row."""
    series = rng.normal(size=(count, layers))
    for layer in range(1, layers):
        series[:, layer] = rho * series[:, layer - 1] + math.sqrt(1 - rho**2) * series[:, layer]
    return series


def drops(n_documents: int, lost_share: float, won_share: float) -> Array:
    """Paired differences of so many documents: shares lost and won, the rest ties."""
    n_lost, n_won = round(n_documents * lost_share), round(n_documents * won_share)
    return np.repeat([1.0, -1.0, 0.0], [n_lost, n_won, n_documents - n_lost - n_won])


def draw_layers(
    rng: np.random.Generator, n_documents: int, lost_shares: Iterable[float], won_share: float
) -> Array:
    """Draw drops `[documents, layers]`; each layer has its own order, share lost and share won."""
    return np.stack(
        [rng.permutation(drops(n_documents, lost_share, won_share)) for lost_share in lost_shares],
        axis=1,
    )


def shuffled(values: Array, count: int, seed: int = 0) -> Array:
    """`count` random orders of one population, as columns."""
    rng = np.random.default_rng(seed)
    return np.stack([rng.permutation(values) for _ in range(count)], axis=1)


def add_blocks(sequence: MeanSequences, values: Array, block: int = BLOCK) -> Iterator[int]:
    """Look after every block; yields how many documents were seen."""
    for start in range(0, len(values), block):
        sequence.add(values[start : start + block])
        yield min(start + block, len(values))


def missed_means(sequence: MeanSequences, values: Array) -> Array:
    """Which series' means some look's interval missed."""
    is_missed, means = np.zeros(values.shape[1], dtype=bool), values.mean(axis=0)
    for _ in add_blocks(sequence, values):
        is_missed |= (sequence.low > means + 1e-9) | (sequence.high < means - 1e-9)
    return is_missed


def error_rate(values: Array, level: float, half_width: float | None = None) -> float:
    """Return the share of series that the intervals miss, each by itself."""
    sequence = MeanSequences(*values.shape, level=level, family=1, half_width=half_width)
    return float(missed_means(sequence, values).mean())


def race_smallest(values: Array, tolerance: float) -> SmallestMean:
    """Look until it is decided, at nobody who is out."""
    race = SmallestMean(len(values), values.shape[1], tolerance=tolerance)
    while race.open.any() and race.looked < len(values):
        block = values[race.looked :][:BLOCK]
        race.update(np.where(race.open, block, np.nan))
    return race

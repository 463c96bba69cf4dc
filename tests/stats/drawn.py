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


def ar1(generator: np.random.Generator, rho: float, count: int, layers: int) -> Array:
    """Stationary Gaussian series of first order, variance 1, one a row."""
    series = generator.normal(size=(count, layers))
    for layer in range(1, layers):
        series[:, layer] = rho * series[:, layer - 1] + math.sqrt(1 - rho**2) * series[:, layer]
    return series


def drops(documents: int, lost: float, won: float) -> Array:
    """Paired differences of so many documents: shares lost and won, the rest ties."""
    lose, win = round(documents * lost), round(documents * won)
    return np.repeat([1.0, -1.0, 0.0], [lose, win, documents - lose - win])


def layers_of(
    dice: np.random.Generator, documents: int, lost: Iterable[float], won: float
) -> Array:
    """Draw drops `[documents, layers]`; each layer has its own order, share lost and share won."""
    return np.stack([dice.permutation(drops(documents, one, won)) for one in lost], axis=1)


def shuffled(values: Array, count: int, seed: int = 0) -> Array:
    """`count` random orders of one population, as columns."""
    generator = np.random.default_rng(seed)
    return np.stack([generator.permutation(values) for _ in range(count)], axis=1)


def looks(sequence: MeanSequences, values: Array, block: int = BLOCK) -> Iterator[int]:
    """Look after every block; yields how many documents were seen."""
    for start in range(0, len(values), block):
        sequence.add(values[start : start + block])
        yield min(start + block, len(values))


def missed(sequence: MeanSequences, values: Array) -> Array:
    """Which series' means some look's interval missed."""
    found, mean = np.zeros(values.shape[1], dtype=bool), values.mean(axis=0)
    for _ in looks(sequence, values):
        found |= (sequence.low > mean + 1e-9) | (sequence.high < mean - 1e-9)
    return found


def errors(values: Array, level: float, within: float | None = None) -> float:
    """Return the share of series that the intervals miss, each by itself."""
    sequence = MeanSequences(*values.shape, level=level, together=1, within=within)
    return float(missed(sequence, values).mean())


def race_smallest(values: Array, within: float, population: int | None = None) -> SmallestMean:
    """Look until it is decided, at nobody who is out."""
    race = SmallestMean(population or len(values), values.shape[1], within=within)
    while race.open.any() and race.looked < len(values):
        some = values[race.looked :][:BLOCK]
        race.look(np.where(race.open, some, np.nan))
    return race

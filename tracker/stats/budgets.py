"""How well a measure orders the layers for what it costs: every measure with the same compute.

A cheap measure sees more documents for the same compute than a dear one. Which of them to use
depends on how much there is to spend, so measures are compared at equal cost, on documents that the
truth does not rest on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from tracker.stats.arrays import Array, Numbers, divided
from tracker.stats.rank_agreement import row_coefficients
from tracker.stats.resampling import SEED

DRAWS = 100


@dataclass(frozen=True)
class LayerMeasure:
    """Something that orders the layers.

    Attributes:
        values: `[documents, layers]`, each document's figures.
        weights: `[documents]`, by which they are averaged.
        price: What one document costs, in forward passes.
    """

    values: Array
    weights: Array
    price: float

    def means(self) -> Array:
        """Average over the documents `[layers]`."""
        return np.asarray(self.weights @ _known(self) / self.weights.sum(), dtype=np.float64)


def at_equal_cost(
    measures: Mapping[str, LayerMeasure], truth: LayerMeasure, budgets: Sequence[float]
) -> dict[str, list[float]]:
    """Say how well each measure predicts the truth on other documents, for what may be spent.

    The documents are halved at random, `DRAWS` times. The truth is taken on one half; a measure
    sees as many documents of the other half as a budget pays for.

    Args:
        measures: Name → measure, all on the same documents.
        truth: What is to be predicted; its price counts for nothing.
        budgets: What may be spent, in forward passes.

    Returns:
        Name → for each budget the mean over halves of Spearman's coefficient; NaN where a budget
        pays for no document, or for more than there are, or where fewer than half of the halves
        have a coefficient.
    """
    count = len(truth.values)
    half = count // 2
    generator = np.random.default_rng(SEED)
    orders = [generator.permutation(count) for _ in range(DRAWS)]
    targets = np.array([_running(truth, order[half:])[-1] for order in orders])
    means = {}
    for name, measure in measures.items():
        drawn = np.full((DRAWS, len(budgets)), np.nan)
        paid = [int(budget / measure.price) for budget in budgets]
        fits = [i for i, documents in enumerate(paid) if 1 <= documents <= half]
        if fits:
            last = [paid[i] - 1 for i in fits]
            rows = np.concatenate([_running(measure, order[:half])[last] for order in orders])
            # In one call: ranking a table takes hardly longer than ranking a row.
            values = row_coefficients(rows, targets.repeat(len(fits), axis=0), "spearman")
            drawn[:, fits] = values.reshape(DRAWS, len(fits))
        known = np.isfinite(drawn).sum(axis=0)
        enough = np.where(2 * known >= DRAWS, known, 0)
        means[name] = divided(np.nansum(drawn, axis=0), enough).tolist()
    return means


def _running(measure: LayerMeasure, order: Numbers) -> Array:
    """Weighted means of the first 1, 2, … documents of an order `[documents, layers]`."""
    weights = measure.weights[order]
    sums = np.cumsum(weights[:, None] * _known(measure)[order], axis=0)
    return divided(sums, np.cumsum(weights)[:, None])


def _known(measure: LayerMeasure) -> Array:
    """The values, where they weigh something."""
    return np.where(measure.weights[:, None] > 0, measure.values, 0.0)

"""What the study `calibration` computes: how well samples of documents agree on an order."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from tracker.core.estimates import Estimate
from tracker.core.formats import counted, measure_of
from tracker.core.proxies import OBSERVED, PROXIES
from tracker.stats.arrays import Array, Numbers, per_token
from tracker.stats.rank_agreement import overlap, rounded, row_coefficients
from tracker.stats.reliability import (
    differ,
    disjoint_means,
    documents_needed,
    positive_estimate,
    spearman_brown,
)
from tracker.stats.resampling import SEED
from tracker.stats.support import holm
from tracker.studies.base import FEWEST, SIGNIFICANT, Subject, side

DRAWS = 400
"""Pairs of samples behind each figure."""
JACKKNIFE_DRAWS = 100
"""The same where a tenth of the documents is left out."""
SHOWN = (5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000)
"""The sizes that a table and an answer have, besides half of the documents."""
DISAGREE = "two halves agree no surer than chance"
TOO_FEW = "two samples of this size would share documents"
SIZES = sorted({math.ceil(s * 10**p) for p in range(6) for s in (1, 1.5, 2, 3, 5, 7)})
"""The sizes that are drawn, as far as there are documents."""
_TIED = "in most samples of this size all layers are tied"


@dataclass(frozen=True)
class Ranked:
    """What ranks the layers: figures of every document.

    Attributes:
        name: What the figures are.
        values: `[documents, layers]`; larger ranks higher.
        weights: `[documents]`, how much each counts in a layer's mean.
        strata: `[documents]`, each one's task, and its cell where there are several.
        reason: Why they rank nothing; empty where they do.
    """

    name: str
    values: Array
    weights: Array
    strata: NDArray[np.generic]
    reason: str = ""


@dataclass(frozen=True)
class Curve:
    """How well samples agree on the order of the layers.

    Attributes:
        name: What ranks the layers.
        documents: How many there are.
        layers: How many are ranked.
        sizes: Sizes of samples, ascending.
        apart: Two samples without a common document: each statistic of every draw, by name,
            `[draws, sizes]`; NaN for more than half of the documents.
        within: A sample beside all documents, likewise.
        needed: How many documents reach the wanted reliability; undefined where two halves agree no
            surer than chance.
        p_value: That of a test whether the layers differ at all.
        extrapolated: Whether these are more than half of the documents.
    """

    name: str
    documents: int
    layers: int
    sizes: tuple[int, ...]
    apart: dict[str, Array]
    within: dict[str, Array]
    needed: Estimate
    p_value: float
    extrapolated: bool

    @property
    def half(self) -> int:
        """Half of the documents: the largest size of which there are two samples."""
        return self.documents // 2

    @property
    def tops(self) -> list[tuple[str, str, int]]:
        """The overlaps among the statistics: name, its end (top or bottom), how many layers."""
        parted = ((name, *name.split()) for name in self.apart if " " in name)
        return [(name, end, int(k)) for name, end, k in parted]

    def agreement(self, n: int, statistic: str = "spearman", apart: bool = True) -> Estimate:
        """The mean statistic at a size, with the middle 95 % of the draws."""
        if apart and n > self.half:
            return Estimate(None, reason=TOO_FEW)
        drawn = (self.apart if apart else self.within)[statistic][:, self.sizes.index(n)]
        mean = _mean(drawn)
        if math.isnan(mean):
            return Estimate(None, reason=_TIED)
        low, high = np.quantile(drawn[np.isfinite(drawn)], [0.025, 0.975])
        return Estimate(mean, low=float(low), high=float(high))

    @property
    def doubt(self) -> str:
        """Why nothing follows from how well two halves agree; empty where something does."""
        measured = self.agreement(self.half)
        if measured.low is None:
            return measured.reason or ""
        return "" if side(measured) > 0 and self.p_value < SIGNIFICANT else DISAGREE

    def predicted(self, n: float) -> float | None:
        """The rank correlation of two samples of any size, by Spearman and Brown."""
        measured = self.agreement(self.half).value
        if self.doubt or measured is None:
            return None
        return spearman_brown(measured, n / self.half)


def measures(subject: Subject) -> list[Ranked]:
    """What can rank the layers of a cell; the drop comes first."""
    cell = subject.outcomes()
    layers = [run.layer for run in cell.whole_layers]
    strata = np.array(cell.tasks)
    few = ""
    if len(strata) < 2 or len(layers) < FEWEST:
        measured = f"{counted(len(strata), 'document')} and {counted(len(layers), 'layer')}"
        few = f"{measured} are measured: too few to rank"
    ablations = [cell.ablation(run) for run in cell.whole_layers]
    metric, gold = cell.by_metric(ablations), cell.by_gold_logprob(ablations)
    found = [
        Ranked(measure_of(subject.record).change, metric.drops, metric.weights, strata),
        Ranked(PROXIES["gold_logprob_drop"].label, gold.drops, gold.weights, strata),
    ]
    for proxy in OBSERVED:
        means = proxy.of(per_token(cell.proxy_sums(proxy)[:, layers], cell.tokens))
        weights = cell.tokens / max(cell.tokens.sum(), 1)
        found.append(Ranked(proxy.label, means, weights, strata, cell.not_observed(proxy)))
    return [replace(r, reason=few or r.reason or _unusable(r)) for r in found]


def _unusable(ranked: Ranked) -> str:
    counted = ranked.values[ranked.weights > 0]
    if bad := int((~np.isfinite(counted).all(axis=1)).sum()):
        return f"{bad} of {len(ranked.values)} documents have no finite figure"
    if not len(counted):
        return "no document counts"
    if np.ptp(rounded(_mean_figures(ranked))) == 0:
        return f"it is the same in all {ranked.values.shape[1]} layers"
    return ""


def joined(parts: Sequence[Ranked]) -> Ranked:
    """Put cells together, so that each counts alike."""
    reason = next((part.reason for part in parts if part.reason), "")
    if len(parts) == 1 or reason:
        return replace(parts[0], reason=reason)
    return Ranked(
        parts[0].name,
        np.concatenate([part.values for part in parts]),
        np.concatenate([part.weights / len(parts) for part in parts]),
        np.concatenate([[f"{n}/{task}" for task in p.strata] for n, p in enumerate(parts)]),
    )


def _mean_figures(ranked: Ranked) -> Array:
    """The layers' figures from all documents."""
    counted = ranked.weights > 0
    return np.average(ranked.values[counted], axis=0, weights=ranked.weights[counted])


def curve_of(ranked: Ranked, wanted: float) -> Curve:
    """Draw samples of every size, and find which reaches the wanted reliability."""
    documents, layers = ranked.values.shape
    sizes = tuple(sorted({*(n for n in SIZES if n < documents), documents // 2}))
    values, weights, strata = ranked.values, ranked.weights, ranked.strata
    first, second = disjoint_means(values, weights, strata, sizes, DRAWS, SEED)
    whole = np.broadcast_to(_mean_figures(ranked), first.shape)
    # Name the statistics: correlations, and the top and bottom five layers, or quarter of all.
    ks = sorted({k for k in (5, math.ceil(layers / 4)) if k < layers})
    statistics = ["spearman", "kendall", *(f"{end} {k}" for end in ("top", "bottom") for k in ks)]

    def needed(chosen: Numbers) -> tuple[float, bool]:
        half = len(chosen) // 2
        few = [n for n in sizes if n < half] + [half]
        part = values[chosen], weights[chosen], strata[chosen]
        samples = disjoint_means(*part, few, JACKKNIFE_DRAWS, SEED)
        means = [_mean(drawn) for drawn in _statistic("spearman", *samples).T]
        return documents_needed(few, means, wanted)

    estimate = positive_estimate(lambda chosen: needed(chosen)[0], strata, SEED)
    _, extrapolated = needed(np.arange(documents))
    curve = Curve(
        ranked.name,
        documents,
        layers,
        sizes,
        {name: _statistic(name, first, second) for name in statistics},
        {name: _statistic(name, first, whole) for name in statistics},
        Estimate(None, reason=DISAGREE) if estimate.value is None else estimate,
        differ(values, weights, SEED),
        extrapolated,
    )
    return _doubted(curve)


def judged(curves: Sequence[Curve]) -> list[Curve]:
    """Let numbers of documents stand where layers differ in all of a study's tests (Holm)."""
    adjusted = holm([curve.p_value for curve in curves])
    return [
        _doubted(replace(curve, p_value=p))
        for curve, p in zip(curves, adjusted, strict=True)
        if p is not None
    ]


def _doubted(curve: Curve) -> Curve:
    return replace(curve, needed=Estimate(None, reason=curve.doubt)) if curve.doubt else curve


def _statistic(name: str, first: Array, second: Array) -> Array:
    """Compare rankings `[draws, sizes, layers]`: `[draws, sizes]`."""
    a, b = (means.reshape(-1, means.shape[2]) for means in (first, second))
    end, _, k = name.partition(" ")
    sign = -1 if end == "bottom" else 1
    values = overlap(sign * a, sign * b, int(k)) if k else row_coefficients(a, b, name)
    return values.reshape(first.shape[:2])


def _mean(values: Array) -> float:
    """Average what is defined; NaN where less than half is."""
    defined = values[np.isfinite(values)]
    return float(defined.mean()) if 2 * len(defined) >= len(values) else math.nan

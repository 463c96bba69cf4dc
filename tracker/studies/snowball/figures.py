"""What the study `snowball` computes of one cell: growth a layer, and what it explains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tracker.core.estimates import Estimate
from tracker.core.proxies import PROXIES
from tracker.core.records import CellRecord
from tracker.ledger.aligned import AlignedOutcomes
from tracker.measuring.observing import Observed
from tracker.stats.correlation import (
    correlate,
    correlation_difference,
    partial_correlate,
)
from tracker.stats.growth import growths
from tracker.stats.multiple import holm
from tracker.stats.proxies import per_token, proxy_means
from tracker.stats.rank_agreement import places
from tracker.stats.resampling import SEED
from tracker.studies.base import SIGNIFICANT, Subject

Array = NDArray[np.float64]
ALL, LATER = 0, 1
"""Places of the means over all tokens, and over all but the first of a text."""
LAST = "no layer follows it"
COSINE = "cosine score"
END = "difference before the head"


@dataclass(frozen=True)
class Grown:
    """How the differences of one way to perturb grow, over the same documents.

    Attributes:
        paths: Relative difference of each perturbed layer behind each later one [layers, layers],
            the geometric mean over documents; NaN before the layer.
        total: For each layer, by what factor it is larger before the head than behind the layer.
        p_values: Of each layer's growth, adjusted over layers by Holm's method.
    """

    paths: Array
    total: list[Estimate]
    p_values: list[float | None]

    @property
    def signs(self) -> list[int | None]:
        """Whether each layer's difference grows (1), shrinks (−1), or neither for sure (0).

        Sure is an interval without 1 and an adjusted p-value below 0.05. None = undefined.
        """
        return [_sign(one, p) for one, p in zip(self.total, self.p_values, strict=True)]

    def a_layer(self, layer: int) -> float | None:
        """The factor of each later layer, on geometric average."""
        value = self.total[layer].value
        return None if value is None else float(value ** (1 / (len(self.total) - 1 - layer)))

    def growing_steps(self, layer: int) -> int:
        """Count the later layers in which it becomes larger."""
        return int((np.diff(np.log(self.paths[layer, layer:])) > 0).sum())

    @property
    def median(self) -> float:
        """The layers' median factor; NaN where none is defined."""
        defined = [one.value for one in self.total if one.value is not None]
        return float(np.median(defined)) if defined else np.nan


@dataclass(frozen=True)
class Tokens:
    """What is found where the same tokens are averaged.

    Attributes:
        removed: Of layers that are removed.
        random: Of random directions of the same norm.
        shuffled: Of other tokens' updates of the same norm.
        beside: For each layer, its removal's growth as a multiple of that of random directions.
        beside_p: Its p-values, adjusted over layers by Holm's method.
        handed_on: For each layer, how many times as large its removal's difference is before the
            head as if the later layers had handed it on as it was.
        ratios: Of each document, by what factor each layer's removal grows [documents, layers].
    """

    removed: Grown
    random: Grown
    shuffled: Grown
    beside: list[Estimate]
    beside_p: list[float | None]
    handed_on: list[Estimate]
    ratios: Array

    @property
    def beside_signs(self) -> list[int | None]:
        """Whether removal grows more (1) or less (−1) than random directions, or neither (0)."""
        return [_sign(one, p) for one, p in zip(self.beside, self.beside_p, strict=True)]


@dataclass(frozen=True)
class Explained:
    """What orders the layers of a cell as their accuracy drops do.

    Attributes:
        layers: The layers whose drop and figures are defined.
        drops: Their accuracy drops.
        cosine: Their cosine scores.
        predictors: Name → how it orders them.
        better: Name → by how much its coefficient is above that of the cosine score.
        partial: Name → its correlation with the drop, the cosine score held fixed, over the layers
            that others follow.
        followed: How many these are.
    """

    layers: list[int]
    drops: Array
    cosine: Array
    predictors: Mapping[str, Estimate]
    better: Mapping[str, Estimate]
    partial: Mapping[str, Estimate]
    followed: int

    def ranks(self, values: Array) -> dict[int, int]:
        """Layer → its place from the largest value; equal ones share the first of theirs."""
        return dict(zip(self.layers, places(values), strict=True))


@dataclass(frozen=True)
class Figures:
    """All that is computed of a cell.

    Attributes:
        cell: Its record.
        documents: Documents that it rests on.
        left_out: Documents with a hidden state that is not finite, or with too few tokens.
        tokens: With all tokens, and without the first.
        explained: None where no whole single layer's drop is measured.
    """

    cell: CellRecord
    documents: int
    left_out: int
    tokens: tuple[Tokens, Tokens]
    explained: Explained | None

    @property
    def layers(self) -> int:
        """How many the model has."""
        return self.cell.model.layers


def figures(subject: Subject, observed: Observed) -> Figures | None:
    """Compute everything of a cell; None where fewer than two documents are left."""
    outcomes = AlignedOutcomes(subject.store, subject.store.views.of(subject.request))
    measured = {place: row for row, place in enumerate(observed.documents)}
    rows = [measured.get(place) for place in outcomes.documents]
    later = np.triu(np.ones(observed.arrays["removed"].shape[-2:], dtype=bool))
    usable = np.array(
        [
            row is not None
            and all(np.isfinite(array[row][..., later]).all() for array in observed.arrays.values())
            for row in rows
        ]
    )
    if usable.sum() < 2:
        return None
    chosen = [row for row, use in zip(rows, usable, strict=True) if use and row is not None]
    arrays = {name: array[chosen] for name, array in observed.arrays.items()}
    strata = np.array(outcomes.tasks)[usable]
    return Figures(
        cell=subject.record,
        documents=len(chosen),
        left_out=len(rows) - len(chosen),
        tokens=(_tokens(arrays, strata, ALL), _tokens(arrays, strata, LATER)),
        explained=_explained(outcomes.only(usable), arrays),
    )


def _tokens(arrays: Mapping[str, Array], strata: NDArray[np.str_], place: int) -> Tokens:
    removed, shuffled, carried = (
        arrays[name][:, place] for name in ("removed", "shuffled", "carried")
    )
    drawn = arrays["random"][:, place].mean(axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios, by_chance = (_ends(each) / _starts(each) for each in (removed, drawn))
    beside = _estimates(by_chance, ratios, strata)
    return Tokens(
        removed=_grown(removed, strata),
        random=_grown(drawn, strata),
        shuffled=_grown(shuffled, strata),
        beside=beside,
        beside_p=holm([one.p_value for one in beside]),
        handed_on=_estimates(_ends(carried), _ends(removed), strata),
        ratios=ratios,
    )


def _grown(differences: Array, strata: NDArray[np.str_]) -> Grown:
    total = _estimates(_starts(differences), _ends(differences), strata)
    with np.errstate(divide="ignore", invalid="ignore"):
        paths = np.exp(np.log(differences).mean(axis=0))
    return Grown(paths, total, holm([one.p_value for one in total]))


def _estimates(first: Array, last: Array, strata: NDArray[np.str_]) -> list[Estimate]:
    """The growth of each layer that others follow."""
    some = growths(first[:, :-1], last[:, :-1], strata, SEED)
    return [*some, Estimate(None, reason=LAST)]


def _starts(differences: Array) -> Array:
    """Right behind the perturbed layer [documents, layers]."""
    return np.asarray(np.diagonal(differences, axis1=1, axis2=2))


def _ends(differences: Array) -> Array:
    """Before the head [documents, layers]."""
    return differences[:, :, -1]


def _sign(one: Estimate, p_value: float | None) -> int | None:
    if one.value is None or one.low is None or one.high is None or p_value is None:
        return None
    sure = p_value < SIGNIFICANT and not one.low <= 1 <= one.high
    return int(np.sign(one.value - 1)) if sure else 0


def _explained(cell: AlignedOutcomes, arrays: Mapping[str, Array]) -> Explained | None:
    """Set differences and growth beside the drops, on the same resampled documents."""
    if not cell.whole_layers:
        return None
    layers = [run.layer for run in cell.whole_layers]
    paired = cell.by_metric([cell.ablation(run) for run in cell.whole_layers])
    proxy = PROXIES["cosine_score"]
    sums = cell.proxy_sums(proxy)[:, layers]
    cosine = proxy.of(proxy_means(sums, cell.tokens))
    drop = paired.mean_drops
    drawn_drop = cell.resampled(paired.drops, paired.weights)
    drawn_cosine = proxy.of(cell.resampled(per_token(sums, cell.tokens), cell.tokens))
    with np.errstate(divide="ignore", invalid="ignore"):
        removed = np.log(arrays["removed"][:, ALL])[:, layers]
        drawn = np.log(arrays["random"][:, ALL].mean(axis=1))[:, layers]
        start = np.log(_starts(arrays["removed"][:, ALL]))[:, layers]
    ends = {
        "difference behind the layer": start,
        END: removed[:, :, -1],
        f"{END}, random directions": drawn[:, :, -1],
    }
    series = {COSINE: (cosine, drawn_cosine)} | {
        name: (values.mean(axis=0), cell.resampled(values)) for name, values in ends.items()
    }
    predictors = {
        name: correlate(
            value, drop, coefficient="spearman", resampled_proxy=rows, resampled_drop=drawn_drop
        )
        for name, (value, rows) in series.items()
    }
    better = {
        name: correlation_difference(
            (value, rows), (cosine, drawn_cosine), (drop, drawn_drop), "spearman"
        )
        for name, (value, rows) in series.items()
        if name != COSINE
    }
    inner = [i for i, layer in enumerate(layers) if layer < arrays["removed"].shape[-1] - 1]
    behind = np.array([arrays["removed"].shape[-1] - 1 - layers[i] for i in inner], dtype=float)
    growths = {
        "growth after removal": removed[:, :, -1] - start,
        "growth of random directions": drawn[:, :, -1] - start,
    }
    pairs: dict[str, tuple[Array, Array]] = {
        name: (values.mean(axis=0)[inner], cell.resampled(values)[:, inner])
        for name, values in growths.items()
    }
    pairs["layers that follow"] = (behind, behind[None])
    partial = {
        name: partial_correlate(
            value,
            drop[inner],
            cosine[inner],
            resampled=(rows, drawn_drop[:, inner], drawn_cosine[:, inner]),
        )
        for name, (value, rows) in pairs.items()
    }
    return Explained(layers, drop, cosine, predictors, better, partial, len(inner))


def underrated(explained: Explained, most: int) -> Sequence[int]:
    """Find the layers that cosine underrates most, then those that it overrates, by ranks."""
    by_cosine, by_drop = explained.ranks(explained.cosine), explained.ranks(explained.drops)
    order = sorted(explained.layers, key=lambda layer: by_drop[layer] - by_cosine[layer])
    half = min(most, len(order)) // 2
    return [*order[: most - half], *order[len(order) - half :]] if len(order) > most else order

"""What the study `snowball` computes of one cell: growth a layer, and what it explains."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tracker.analysis.aligned import AlignedOutcomes
from tracker.core.estimates import Estimate
from tracker.core.proxies import PROXIES
from tracker.core.records import CellRecord
from tracker.measuring.observing import Observed
from tracker.stats.arrays import Array, per_token, proxy_means
from tracker.stats.correlation import correlate, correlation_difference, partial_correlate
from tracker.stats.growth import growths
from tracker.stats.rank_agreement import places
from tracker.stats.resampling import SEED
from tracker.stats.support import holm, pairs, ranks, together
from tracker.studies.base import SIGNIFICANT, Subject, lined_up, side
from tracker.studies.layout import labelled

ALL, LATER = 0, 1
"""Places of the means over all tokens, and over all but the first of a text."""
LAST = "no layer follows it"
COSINE, END = "cosine score", "difference before the head"
GROWTH, FOLLOWING = "growth after removal", "layers that follow"


@dataclass(frozen=True)
class Growth:
    """By what factor something grows behind each layer, over the same documents.

    Attributes:
        factors: Of each layer; undefined for the last one.
        p_values: Adjusted over layers by Holm's method.
    """

    factors: list[Estimate]
    p_values: list[float | None]

    @property
    def signs(self) -> list[int | None]:
        """Whether it grows behind each layer (1), shrinks (−1), or neither for sure (0).

        Sure is an interval without 1 and an adjusted p-value below 0.05. None = undefined.
        """
        return [
            None if p is None or factor.low is None else side(factor, 1) * (p < SIGNIFICANT)
            for factor, p in zip(self.factors, self.p_values, strict=True)
        ]

    def ranks(self, documents: int) -> list[tuple[int, int]]:
        """Between which ranks each defined factor lies, 1 for the largest; all of them at once."""
        logs = [_log(factor) for factor in self.factors if factor.value is not None]
        return ranks(together(logs, [documents] * len(logs), pairs(len(logs))))

    @property
    def defined(self) -> list[float]:
        """The factors that are defined."""
        return [factor.value for factor in self.factors if factor.value is not None]

    @property
    def median(self) -> float:
        """The layers' median factor; NaN where none is defined."""
        return float(np.median(self.defined)) if self.defined else np.nan


@dataclass(frozen=True)
class Tokens:
    """What is found where the same tokens are averaged: how differences grow up to the head.

    Attributes:
        removed: Of layers that are removed.
        random: Of random directions of the same norm.
        shuffled: Of other tokens' updates of the same norm.
        beside: For each layer, its removal's growth as a multiple of that of random directions.
        handed_on: For each layer, how many times as large its removal's difference is before the
            head as if the later layers had handed it on as it was.
        paths: Relative difference of each removed layer behind each later one [layers, layers], the
            geometric mean over documents; NaN before the layer.
        ratios: Of each document, by what factor each layer's removal grows [documents, layers].
    """

    removed: Growth
    random: Growth
    shuffled: Growth
    beside: Growth
    handed_on: Growth
    paths: Array
    ratios: Array

    @property
    def a_layer(self) -> list[float | None]:
        """The factor of each later layer, on geometric average, by removed layer."""
        last, factors = len(self.paths) - 1, self.removed.factors
        return [
            None if factor.value is None else float(factor.value ** (1 / (last - layer)))
            for layer, factor in enumerate(factors)
        ]

    @property
    def growing_steps(self) -> list[str | None]:
        """The later layers in which a removal's difference becomes larger, such as `2 of 3`."""
        steps = [np.diff(np.log(path[layer:])) > 0 for layer, path in enumerate(self.paths)]
        return [
            None if factor.value is None else f"{int(larger.sum())} of {len(larger)}"
            for factor, larger in zip(self.removed.factors, steps, strict=True)
        ]


@dataclass(frozen=True)
class Predictor:
    """The agreement of an order of layers with the drops, and beside that of the cosine score."""

    name: str = labelled("of each layer")
    beside: str = labelled("beside")
    found: Estimate = labelled("Spearman", "coefficient")
    p_value: Estimate = labelled("p", "p")
    better: Estimate = labelled("better than cosine by", "coefficient")
    layers: int = labelled("layers", "count")


@dataclass(frozen=True)
class Explanation:
    """What orders the layers of a cell as their accuracy drops do.

    Attributes:
        layers: The layers whose drop and figures are defined.
        drops: Their accuracy drops.
        cosine: Their cosine scores.
        predictors: How figures order them as the drops do, then what correlates with the drop
            where the cosine score is held fixed, over the layers that others follow.
    """

    layers: list[int]
    drops: Array
    cosine: Array
    predictors: list[Predictor]

    @property
    def by_cosine(self) -> dict[int, int]:
        """Layer → its place from the largest cosine score; equal ones share the first of theirs."""
        return dict(zip(self.layers, places(self.cosine), strict=True))

    @property
    def by_drop(self) -> dict[int, int]:
        """The same by the drops."""
        return dict(zip(self.layers, places(self.drops), strict=True))

    def underrated(self, most: int) -> Sequence[int]:
        """Find the layers that cosine underrates most, then those that it overrates, by ranks."""
        by_cosine, by_drop = self.by_cosine, self.by_drop
        order = sorted(self.layers, key=lambda layer: by_drop[layer] - by_cosine[layer])
        half = min(most, len(order)) // 2
        return [*order[: most - half], *order[len(order) - half :]] if len(order) > most else order


@dataclass(frozen=True)
class Figures:
    """All that is computed of a cell.

    Attributes:
        record: All that its outcomes say.
        documents: Documents that it rests on.
        left_out: Documents with a hidden state that is not finite, or with too few tokens.
        tokens: What is found with all tokens.
        later: The same without the first token of each text.
        explained: None where no whole single layer's drop is measured.
    """

    record: CellRecord
    documents: int
    left_out: int
    tokens: Tokens
    later: Tokens
    explained: Explanation | None

    @property
    def layers(self) -> int:
        """How many the model has."""
        return self.record.model.layers


def _log(factor: Estimate) -> Estimate:
    """Take a factor's logarithm, on which its interval is about symmetric."""
    value, low, high = (
        math.log(end) if end else None for end in (factor.value, factor.low, factor.high)
    )
    return Estimate(value, low, high)


def figures(subject: Subject, observed: Observed) -> Figures | None:
    """Compute everything of a cell; None where fewer than two documents are left."""
    outcomes = subject.outcomes()
    arrays = lined_up(observed, outcomes)
    later = np.triu(np.ones(arrays["removed"].shape[-2:], dtype=bool))
    count = len(outcomes.tasks)
    finite = [np.isfinite(array[..., later]).reshape(count, -1) for array in arrays.values()]
    usable = np.asarray(np.concatenate(finite, axis=1).all(axis=1))
    documents = int(usable.sum())
    if documents < 2:
        return None
    arrays = {name: array[usable] for name, array in arrays.items()}
    arrays["random"] = arrays["random"].mean(axis=2)
    strata = np.array(outcomes.tasks)[usable]
    return Figures(
        record=subject.record,
        documents=documents,
        left_out=count - documents,
        tokens=_tokens(arrays, strata, ALL),
        later=_tokens(arrays, strata, LATER),
        explained=_explained(outcomes.only(usable), arrays),
    )


def _tokens(arrays: Mapping[str, Array], strata: NDArray[np.str_], place: int) -> Tokens:
    removed, random, shuffled, carried = (
        arrays[name][:, place] for name in ("removed", "random", "shuffled", "carried")
    )

    def growth(first: Array, last: Array) -> Growth:
        """Compare what is at each layer that others follow."""
        factors = growths(first[:, :-1], last[:, :-1], strata, SEED)
        factors.append(Estimate(None, reason=LAST))
        return Growth(factors, holm([factor.p_value for factor in factors]))

    with np.errstate(divide="ignore", invalid="ignore"):
        ratios, by_chance = (_ends(each) / _starts(each) for each in (removed, random))
        paths = np.exp(np.log(removed).mean(axis=0))
    return Tokens(
        removed=growth(_starts(removed), _ends(removed)),
        random=growth(_starts(random), _ends(random)),
        shuffled=growth(_starts(shuffled), _ends(shuffled)),
        beside=growth(by_chance, ratios),
        handed_on=growth(_ends(carried), _ends(removed)),
        paths=paths,
        ratios=ratios,
    )


def _starts(differences: Array) -> Array:
    """Right behind the perturbed layer [documents, layers]."""
    return np.asarray(np.diagonal(differences, axis1=1, axis2=2))


def _ends(differences: Array) -> Array:
    """Before the head [documents, layers]."""
    return differences[:, :, -1]


def _explained(cell: AlignedOutcomes, arrays: Mapping[str, Array]) -> Explanation | None:
    """Set differences and growth beside the drops, on the same resampled documents."""
    if not cell.whole_layers:
        return None
    layers = [run.layer for run in cell.whole_layers]
    paired = cell.by_metric([cell.ablation(run) for run in cell.whole_layers])
    proxy = PROXIES["cosine_score"]
    sums = cell.proxy_sums(proxy)[:, layers]
    cosine = proxy.of(proxy_means(sums, cell.tokens))
    drawn_cosine = proxy.of(cell.resampled(per_token(sums, cell.tokens), cell.tokens))
    with_drawn = (cosine, drawn_cosine)
    drop, drawn_drop = paired.mean_drops, cell.resampled(paired.drops, paired.weights)
    removed, random = arrays["removed"][:, ALL], arrays["random"][:, ALL]
    with np.errstate(divide="ignore", invalid="ignore"):
        start, end, by_chance = (
            np.log(differences)[:, layers]
            for differences in (_starts(removed), _ends(removed), _ends(random))
        )

    def series(values: Array) -> tuple[Array, Array]:
        """The mean over documents of each layer, and that of each resample of them."""
        return values.mean(axis=0), cell.resampled(values)

    ends = {
        "difference behind the layer": series(start),
        END: series(end),
        f"{END}, random directions": series(by_chance),
    }
    following = float(removed.shape[-1] - 1) - np.array(layers)
    growth = {
        GROWTH: series(end - start),
        "growth of random directions": series(by_chance - start),
        FOLLOWING: (following, following[None]),
    }
    inner = following > 0
    rows = []

    def add(name: str, beside: str, found: Estimate, better: Estimate, layers: int) -> None:
        p = Estimate(found.p_value, reason=found.reason)
        rows.append(Predictor(name, beside, found, p, better, layers))

    for name, (values, drawn) in {COSINE: with_drawn, **ends}.items():
        found = correlate(values, drop, coefficient="spearman", resampled=(drawn, drawn_drop))
        better = Estimate(None, reason="it is the one compared with")
        if name != COSINE:
            both = (values, drawn), with_drawn, (drop, drawn_drop)
            better = correlation_difference(*both, "spearman")
        add(name, "drop", found, better, len(layers))
    none = Estimate(None, reason="a partial correlation is compared with none")
    for name, (values, drawn) in growth.items():
        resampled = (drawn[:, inner], drawn_drop[:, inner], drawn_cosine[:, inner])
        found = partial_correlate(values[inner], drop[inner], cosine[inner], resampled=resampled)
        add(name, "drop, cosine score held fixed", found, none, int(inner.sum()))
    return Explanation(layers, drop, cosine, rows)

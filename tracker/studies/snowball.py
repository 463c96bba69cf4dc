"""Study: test whether later layers amplify the effect of a removed layer."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from tracker.analysis.aligned import AlignedOutcomes
from tracker.analysis.claims import ranks_in
from tracker.core.documents import Document
from tracker.core.estimates import Estimate, Unit
from tracker.core.findings import FoundChart, LineChart, MapChart, gaps
from tracker.core.formats import interval, measure_of
from tracker.core.grouping import grouped
from tracker.core.proxies import PROXIES
from tracker.core.records import CellRecord
from tracker.core.tables import Column, Table, Value, table
from tracker.engine.observers.perturbation_growth import perturbation_growth, verify_growth
from tracker.engine.refusal import tried
from tracker.engine.scoring.sweep import Engine
from tracker.ledger.shards import Arrays
from tracker.measuring.observing import Observe, Observed
from tracker.stats.arrays import Array, per_token, proxy_means
from tracker.stats.correlation import correlate, correlation_difference, partial_correlate
from tracker.stats.effects import fewest_to_show, growths, unequal_growth
from tracker.stats.rank_agreement import places
from tracker.stats.resampling import SEED
from tracker.stats.support import holm, pairs, ranks, together
from tracker.studies.base import (
    SIGNIFICANT,
    Study,
    StudyContext,
    StudyResult,
    Subject,
    observe,
    study_texts,
)
from tracker.studies.layout import figure_table, labelled, line_chart
from tracker.studies.registry import SnowballSettings

ALL, LATER = 0, 1
"""Places of the means over all tokens, and over all but the first of a text."""
LAST = "no layer follows it"
COSINE, END = "cosine score", "difference before the head"
GROWTH, FOLLOWING = "growth after removal", "layers that follow"
TEXTS = study_texts("snowball")


@dataclass(frozen=True)
class Growth:
    """Growth factors after each layer, over the same documents.

    Attributes:
        factors: Factor of each layer; undefined for the last layer.
        p_values: p-values adjusted over layers by Holm's method.
    """

    factors: list[Estimate]
    p_values: list[float | None]

    @property
    def signs(self) -> list[int | None]:
        """Sign of the growth behind each layer: 1, −1, or 0 where neither is sure.

        Sure is an interval without 1 and an adjusted p-value below 0.05. None = undefined.
        """
        return [
            None if p is None or factor.low is None else factor.side(1) * (p < SIGNIFICANT)
            for factor, p in zip(self.factors, self.p_values, strict=True)
        ]

    def ranks(self, documents: int) -> list[tuple[int, int]]:
        """Compute the possible ranks of the defined factors, simultaneous; 1 for the largest."""
        logs = [_log(factor) for factor in self.factors if factor.value is not None]
        return ranks(together(logs, [documents] * len(logs), pairs(len(logs))))

    def extremes(self, documents: int) -> tuple[int, list[int], list[int]]:
        """Find the layers whose factors are surely among the largest, and the smallest one.

        Returns the number of largest layers considered, those surely among them, the largest first,
        and the layer that is surely behind all others.
        """
        layers = [layer for layer, factor in enumerate(self.factors) if factor.value is not None]
        between = dict(zip(layers, self.ranks(documents), strict=True))
        first = max(1, min(_FIRST, len(layers) // 2))
        largest = [layer for layer in layers if between[layer][1] <= first]
        largest.sort(key=lambda layer: -(self.factors[layer].value or 0))
        return first, largest, [layer for layer in layers if between[layer][0] == len(layers)]

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
    """Growth of differences up to the head, averaged over the same tokens.

    Attributes:
        removed: Growth after removed layers.
        random: Growth of random directions of the same norm.
        shuffled: Growth of other tokens' updates of the same norm.
        beside: Growth of each layer's removal, as a multiple of that of random directions.
        handed_on: Size of each removal's difference before the head, as a multiple of its size if
            later layers had passed it on unchanged.
        paths: Relative difference of each removed layer after each later one [layers, layers], as
            the geometric mean over documents; NaN before the layer.
        ratios: Growth factor of each layer's removal for each document [documents, layers].
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
    """Agreement of an order of layers with the drops, compared with that of the cosine score."""

    name: str = labelled("of each layer")
    beside: str = labelled("beside")
    found: Estimate = labelled("Spearman", "coefficient")
    p_value: Estimate = labelled("p", "p")
    better: Estimate = labelled("better than cosine by", "coefficient")
    layers: int = labelled("layers", "count")


@dataclass(frozen=True)
class Explanation:
    """Predictors of the order of a cell's layers by their drops.

    Attributes:
        layers: Layers whose drop and predictors are defined.
        drops: Their accuracy drops.
        cosine: Their cosine scores.
        predictors: Correlations of figures with the drops, then partial correlations with the
            cosine score held fixed, over all layers except the last.
    """

    layers: list[int]
    drops: Array
    cosine: Array
    predictors: list[Predictor]

    @property
    def found(self) -> dict[str, Predictor]:
        """The predictors by name."""
        return {row.name: row for row in self.predictors}

    @property
    def is_ordered(self) -> bool:
        """True where the cosine score and the difference before the head order the layers."""
        return None not in (self.found[COSINE].found.value, self.found[END].found.value)

    @property
    def by_cosine(self) -> dict[int, int]:
        """Layer → its place from the largest cosine score; equal ones share the first of theirs."""
        return dict(zip(self.layers, places(self.cosine), strict=True))

    @property
    def by_drop(self) -> dict[int, int]:
        """The ranks of the layers by their drops."""
        return dict(zip(self.layers, places(self.drops), strict=True))

    def underrated(self, most: int) -> Sequence[int]:
        """Find the layers that cosine underrates most, then those that it overrates, by ranks."""
        by_cosine, by_drop = self.by_cosine, self.by_drop
        order = sorted(self.layers, key=lambda layer: by_drop[layer] - by_cosine[layer])
        half = min(most, len(order)) // 2
        return [*order[: most - half], *order[len(order) - half :]] if len(order) > most else order


@dataclass(frozen=True)
class Figures:
    """Figures of a cell.

    Attributes:
        record: Record of the cell.
        documents: Number of documents.
        left_out: Documents with a hidden state that is not finite, or with too few tokens.
        tokens: Growth over all tokens.
        later: Growth without the first token of each text.
        explained: Predictors of the drops; None if no whole single layer's drop is measured.
    """

    record: CellRecord
    documents: int
    left_out: int
    tokens: Tokens
    later: Tokens
    explained: Explanation | None

    @property
    def layers(self) -> int:
        """Number of the model's layers."""
        return self.record.model.layers


def _log(factor: Estimate) -> Estimate:
    """Return a factor's logarithm, on which its interval is about symmetric."""
    value, low, high = (
        math.log(end) if end else None for end in (factor.value, factor.low, factor.high)
    )
    return Estimate(value, low, high)


def figures(subject: Subject, observed: Observed) -> Figures | None:
    """Compute everything of a cell; None where fewer than two documents are left."""
    outcomes = subject.outcomes()
    arrays = observed.of(outcomes.documents)
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
        """Compute the growth from each layer to the head, except for the last layer."""
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
    """Correlate differences and growth with the drops, on the same resampled documents."""
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
        """Return the mean over documents of each layer, and that of each resample."""
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


NOT_MEASURED = "its removal is not measured; add the layer to 'layer' in the file"
MAX_PATHS = 6
"""Layers whose paths are drawn, half of them underrated by cosine, half overrated."""
_FIRST = 3
"""Layers are named if they are surely among this many whose removals grow most."""
_VERDICTS = {1: "grows", -1: "shrinks", 0: "undecided", None: None}


class Snowball(Study[SnowballSettings]):
    """Each layer removed, and perturbed as much at random, followed through all later layers."""

    name = "snowball"
    question = "Do later layers amplify what the removal of a layer changes?"
    intact = True
    layers = 1
    texts = TEXTS

    def answer(self, context: StudyContext, subjects: list[Subject]) -> StudyResult:
        """Answer; models that are refused or not finite are recorded as lacking."""
        cells: list[Figures] = []
        result = StudyResult()
        for subject in subjects:
            title = subject.request.title
            key = f"snowball-{self.settings.draws}"
            observed, why = tried(partial(observe, subject, key, context, self._begin))
            if observed is None:
                result.lack(title, TEXTS.one("refused", why))
                continue
            cell = figures(subject, observed)
            result.lack(title, *_lacking(cell, context.input.source))
            cells += [cell] if cell is not None else []
        models = grouped(cells, lambda cell: cell.record.model.key).values()
        for some in models:
            result.add(*_answers(some, self.settings.draws))
        result.add(*([summary(cells)] if cells else []))
        for some in models:
            if len(some) > 1:
                title = (
                    f"{some[0].record.model.name}: growth after each layer's removal, by benchmark"
                )
                growths = {cell.record.benchmark.title: cell.tokens.removed for cell in some}
                result.add(growth_chart(title, "removed", growths))
        for cell in cells:
            result.add(layer_table(cell), predictor_table(cell), *charts_of(cell))
        return result

    def _begin(self, engine: Engine) -> Observe:
        verified = False

        def watch(document: Document) -> Arrays:
            nonlocal verified
            if not verified:
                verify_growth(engine, document, self.settings.draws)
                verified = True
            return perturbation_growth(engine, document, self.settings.draws)

        return watch


# Sentences


def _lacking(cell: Figures | None, file: str) -> list[str]:
    """Describe the unanswered questions of a cell, and how to answer them."""
    needed = 0 if cell is None else fewest_to_show(len(cell.tokens.removed.defined), SIGNIFICANT)
    known = cell.explained.layers if cell and cell.explained else []
    absent = 0 if cell is None else cell.layers - len(known)
    return TEXTS.all("lacking", cell, needed, absent, file)


def _answers(cells: Sequence[Figures], draws: int) -> Iterator[str]:
    """Yield the sentences of one model: growth, comparison with chance, predicted drops."""
    yield _verdict(cells)
    for cell in cells:
        yield from TEXTS.all("cell", cell, draws)
    if len(cells) > 1:
        yield _between(cells)
    pairs = [
        pair
        for cell in cells
        for pair in zip(cell.tokens.removed.signs, cell.later.removed.signs, strict=True)
    ]
    changed = sum(first != later for first, later in pairs)
    yield TEXTS.one("without_the_first", cells, changed, len(pairs) - len(cells))


def _verdict(cells: Sequence[Figures]) -> str:
    signs = Counter(sign for cell in cells for sign in cell.tokens.removed.signs)
    layers = signs.total() - signs[None]
    handed_on = [factor for cell in cells for factor in cell.tokens.handed_on.defined]
    median = float(np.median(handed_on)) if handed_on else np.nan
    name = cells[0].record.model.name
    return TEXTS.one("verdict", name, signs[1], signs[-1], layers, median)


def _between(cells: Sequence[Figures]) -> str:
    """Return in how many layers growth differs between the benchmarks of one model."""
    tasks = Counter(task.name for cell in cells for task in cell.record.benchmark.tasks)
    twice = [name for name, times in tasks.items() if times > 1]
    layers = range(0 if twice else cells[0].layers - 1)
    tests = holm([unequal_growth([c.tokens.ratios[:, layer] for c in cells]) for layer in layers])
    adjusted = [p for p in tests if p is not None]
    return TEXTS.one("between", [c.record.benchmark.title for c in cells], twice, adjusted)


# Tables and charts


def layer_table(cell: Figures) -> Table:
    """Build the table of differences after each layer and before the head, and of drops."""
    tokens, explained, runs = cell.tokens, cell.explained, cell.record.runs_of()
    factors, signs = tokens.removed.factors, tokens.removed.signs
    by_cosine, by_drop = explained.by_cosine if explained else {}, drop_ranks(cell)

    def beside(label: str, values: Sequence[Value], unit: Unit = "times") -> Column[int]:
        """State a column that is undefined where the growth is not, for the same reason."""

        def entry(layer: int) -> Value:
            value = values[layer]
            return Estimate(None, reason=factors[layer].reason or LAST) if value is None else value

        return Column(label, unit, entry)

    def drop(layer: int) -> Estimate:
        run = runs.get(layer)
        return run.drop if run else Estimate(None, reason=NOT_MEASURED)

    def values(growth: Growth) -> list[float | None]:
        return [factor.value for factor in growth.factors]

    return table(
        f"{cell.record.heading}: the relative difference after each layer's removal",
        [
            Column("layer", "count", lambda layer: layer),
            Column("behind it", "percent", lambda i: tokens.paths[i, i], "not finite"),
            Column("before the head", "percent", lambda i: tokens.paths[i, -1], "not finite"),
            Column("growth", "times", factors.__getitem__),
            beside("a layer", tokens.a_layer),
            beside("growing steps", tokens.growing_steps, "text"),
            beside("verdict", [_VERDICTS[sign] for sign in signs], "text"),
            beside("random", values(tokens.random)),
            beside("other tokens'", values(tokens.shuffled)),
            beside("as handed on", values(tokens.handed_on)),
            Column("drop", measure_of(cell.record).form, drop),
            Column("cosine rank", "count", by_cosine.get, NOT_MEASURED),
            Column("drop rank", "count", by_drop.get, NOT_MEASURED, interval=True),
        ],
        range(len(factors)),
        *TEXTS.all("layer_notes", cell.documents),
    )


def drop_ranks(cell: Figures) -> dict[int, Estimate]:
    """Return the possible ranks of each layer by its drop, simultaneous; 1 for the largest."""
    if cell.explained is None:
        return {}
    layers, runs = cell.explained.layers, cell.record.runs_of()
    between = ranks_in(cell.record, [runs[layer] for layer in layers])
    return {
        layer: Estimate(cell.explained.by_drop[layer], *ends)
        for layer, ends in zip(layers, between, strict=True)
    }


def predictor_table(cell: Figures) -> Table:
    """Build the table of the predictors of the drops, and of partial correlations."""
    return figure_table(
        Predictor,
        f"{cell.record.heading}: what orders the layers as their drops do",
        cell.explained.predictors if cell.explained else [],
        *TEXTS.all("predictor_notes"),
    )


def summary(cells: Sequence[Figures]) -> Table:
    """Build the table with one row for each cell."""

    def explained(label: str, name: str) -> Column[Figures]:
        def value(cell: Figures) -> Estimate | None:
            rows = cell.explained.predictors if cell.explained else []
            return next((row.found for row in rows if row.name == name), None)

        return Column(label, "coefficient", value, NOT_MEASURED)

    none = "no layer's growth is defined"
    return table(
        "Does it snowball?",
        [
            Column("model", "text", lambda cell: cell.record.model.name),
            Column("benchmark", "text", lambda cell: cell.record.benchmark.title),
            Column("documents", "count", lambda cell: cell.documents),
            Column("layers that grow", "count", lambda cell: cell.tokens.removed.signs.count(1)),
            Column("shrink", "count", lambda cell: cell.tokens.removed.signs.count(-1)),
            Column("undecided", "count", lambda cell: cell.tokens.removed.signs.count(0)),
            Column("median growth", "times", lambda cell: cell.tokens.removed.median, none),
            Column("of random directions", "times", lambda cell: cell.tokens.random.median, none),
            Column("removal grows more", "count", lambda cell: cell.tokens.beside.signs.count(1)),
            Column("less", "count", lambda cell: cell.tokens.beside.signs.count(-1)),
            explained("cosine ~ drop", COSINE),
            explained("before the head ~ drop", END),
            explained("growth ~ drop given cosine", GROWTH),
        ],
        cells,
        "~: Spearman's coefficient over layers, with 95 % intervals over documents.",
    )


def growth_chart(title: str, layer: str, growths: Mapping[str, Growth]) -> LineChart:
    """Build a chart of growth by layer; the last layer has none, and is left out."""
    lines = {name: growth.factors[:-1] for name, growth in growths.items()}
    count = len(next(iter(lines.values())))
    axes = (f"{layer} layer (0-based)", "before the head ÷ behind the layer")
    return line_chart(title, axes, "times", range(count), lines, log_y=True)


def charts_of(cell: Figures) -> Iterator[FoundChart]:
    """Yield charts of growth compared with chance, some paths, and the number of doublings."""
    tokens, paths, total = cell.tokens, cell.tokens.paths, cell.layers
    growths = {"removed": tokens.removed, "random directions": tokens.random}
    growths |= {"other tokens' updates": tokens.shuffled}
    title = f"{cell.record.heading}: growth of a removal and of random directions"
    yield growth_chart(title, "perturbed", growths)
    yield line_chart(
        f"{cell.record.heading}: paths of layers whose measured ranks are furthest apart",
        ("behind layer (0-based)", "relative difference to the intact stream"),
        "percent",
        range(total),
        {name: paths[layer] for layer, name in _drawn(cell)},
        log_y=True,
    )
    with np.errstate(divide="ignore", invalid="ignore"):
        doublings = np.log2(paths / np.diagonal(paths)[:, None])
    yield MapChart(
        title=f"{cell.record.heading}: how often the relative difference has doubled",
        x="behind layer (0-based)",
        y="removed layer (0-based)",
        name="doublings",
        unit="coefficient",
        columns=tuple(range(total)),
        rows=tuple(map(str, range(total))),
        values=tuple(map(gaps, doublings)),
    )


def _drawn(cell: Figures) -> Iterator[tuple[int, str]]:
    """Choose layers, each with its name in the legend."""
    explained = cell.explained
    if explained is None:
        even = np.linspace(0, cell.layers - 1, MAX_PATHS).round()
        for layer in np.unique(even).astype(int).tolist():
            yield layer, f"layer {layer}"
        return
    by_cosine, by_drop = explained.by_cosine, drop_ranks(cell)
    for layer in explained.underrated(MAX_PATHS):
        between = interval(by_drop[layer].low, by_drop[layer].high, "{:.0f}".format)
        yield layer, f"layer {layer}: rank {by_cosine[layer]} by cosine, {between} by drop"

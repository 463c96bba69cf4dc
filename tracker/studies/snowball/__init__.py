"""Do later layers amplify what a layer's removal changes?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import partial

import numpy as np

from tracker.analysis.claims import ranks_in
from tracker.core.documents import Document
from tracker.core.estimates import Estimate, Unit
from tracker.core.findings import FoundChart, LineChart, MapChart, gaps
from tracker.core.formats import interval, measure_of, p_value, three_digits, with_interval
from tracker.core.grouping import grouped
from tracker.core.tables import Column, Table, Value, table
from tracker.engine.observers.perturbation_growth import perturbation_growth, verify_growth
from tracker.engine.refusal import tried
from tracker.engine.scoring.sweep import Engine
from tracker.ledger.shards import Arrays
from tracker.measuring.observing import Observe
from tracker.stats.growth import fewest_to_show, unequal_growth
from tracker.stats.support import holm
from tracker.studies.base import (
    SIGNIFICANT,
    Study,
    StudyContext,
    StudyResult,
    Subject,
    observe,
    side,
)
from tracker.studies.layout import figure_table, line_chart
from tracker.studies.registry import SnowballSettings
from tracker.studies.snowball.figures import (
    COSINE,
    END,
    FOLLOWING,
    GROWTH,
    LAST,
    Figures,
    Growth,
    Predictor,
    figures,
)

NOT_MEASURED = "its removal is not measured; add the layer to 'layer' in the file"
MAX_PATHS = 6
"""Layers whose paths are drawn, half of them underrated by cosine, half overrated."""
_FIRST = 3
"""A layer that is surely among so many whose removals grow most is named."""
_VERDICTS = {1: "grows", -1: "shrinks", 0: "undecided", None: None}


class Snowball(Study[SnowballSettings]):
    """Each layer removed, and perturbed as much at random, followed through all later layers."""

    name = "snowball"
    question = "Do later layers amplify what the removal of a layer changes?"
    intact = True
    layers = 1
    assumptions = (
        "Relative difference: ‖h′ − h‖ / ‖h‖ behind a layer, h the intact residual stream before "
        "any final norm; the mean over the tokens of context and gold continuation, then the "
        "geometric mean over documents. A removed layer's output is its input.",
        "Random directions: uniform on the sphere, {draws} drawn for each token and layer by seed "
        "and document, as long as the layer's own update in that token, added to its output. "
        "Other tokens' updates: of another token of the text, scaled to the same norm.",
        "Growth: relative difference before the head over that right behind the layer; documents "
        "are independent. It snowballs where the factor is above 1 by Wilcoxon's signed rank test "
        "of the documents' log ratios (Wilcoxon 1945; symmetric where nothing grows), adjusted "
        "over the layers of a benchmark by Holm's method (1979) to 5 %, and its interval "
        "excludes 1. Intervals: expanded percentiles of resampled documents (Hesterberg 2015).",
        "Layers are a series and no independent sample: p-values of correlations are against "
        "surrogate series as smooth over depth. Intervals of correlations keep the layers and draw "
        "the documents anew; the partial coefficient is Spearman's, linear in ranks.",
    )

    @property
    def words(self) -> dict[str, str]:
        """The number of random directions."""
        return {"draws": str(self.settings.draws)}

    def answer(self, context: StudyContext, subjects: list[Subject]) -> StudyResult:
        """Answer; what a model refuses, or is not finite in it, is lacking."""
        cells: list[Figures] = []
        result = StudyResult()
        for subject in subjects:
            title = subject.request.title
            key = f"snowball-{self.settings.draws}"
            observed, why = tried(partial(observe, subject, key, context, self._begin))
            if observed is None:
                result.lack(
                    title, f"{why}; its perturbations cannot be followed, use another model"
                )
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


def _lacking(cell: Figures | None, file: str) -> Iterator[str]:
    """Yield what of a cell could not be answered, with what to do."""
    if cell is None:
        yield (
            "fewer than two documents have finite hidden states and two tokens; try dtype: "
            "{value: float32}, or more documents"
        )
        return
    if cell.left_out:
        yield (
            f"{cell.left_out} documents are left out, their hidden states are not finite or they "
            "have one token; try dtype: {value: float32}"
        )
    if reason := _too_few(cell):
        yield reason
    if absent := cell.layers - len(cell.explained.layers if cell.explained else []):
        yield (
            f"the {measure_of(cell.record).change} of {absent} of {cell.layers} layers; add them "
            f"to 'layer' in {file}"
        )


def _too_few(cell: Figures) -> str:
    """Return that so few documents leave every layer undecided; empty where they do not."""
    tests = len(cell.tokens.removed.defined)
    fewest = fewest_to_show(tests, SIGNIFICANT)
    if cell.documents >= fewest:
        return ""
    return (
        f"so few documents ({cell.documents}) leave all {tests} layers undecided, whatever they "
        f"show; Wilcoxon's test, adjusted for so many, needs {fewest}; raise 'sample' or 'limit'"
    )


def _answers(cells: Sequence[Figures], draws: int) -> Iterator[str]:
    """Yield the sentences of one model: whether it happens, against chance, what it explains."""
    yield _verdict(cells)
    for cell in cells:
        where = f"{cell.record.model.name} on {cell.record.benchmark.title} "
        where += f"({cell.documents} documents)"
        for sentence in (_most(cell), _against_chance(cell, draws), *_explains(cell)):
            yield f"{where}: {sentence}."
    if len(cells) > 1:
        yield _between(cells)
    yield _without_the_first(cells)


def _verdict(cells: Sequence[Figures]) -> str:
    model = cells[0].record.model.name
    signs = Counter(sign for cell in cells for sign in cell.tokens.removed.signs)
    grow, shrink, of = signs[1], signs[-1], signs[1] + signs[-1] + signs[0]
    if not of:
        return f"{model}: no layer's growth is defined."
    if grow == of:
        verdict = "every layer snowballs, as the paper has it"
    elif 2 * grow > of:
        verdict = "the snowball effect is there in most layers, as the paper has it"
    elif shrink > grow and 2 * (grow + shrink) > of:
        verdict = "the snowball effect is the exception and not the rule here, against the paper"
    else:
        verdict = "whether most layers snowball is open; raise 'sample' or 'limit'"
    handed_on = [factor for cell in cells for factor in cell.tokens.handed_on.defined]
    return (
        f"{model}: {verdict}. From right behind a removed layer to the last layer, the relative "
        f"difference to the intact residual stream grows in {grow} of {of} cases and shrinks in "
        f"{shrink}. It ends {three_digits(float(np.median(handed_on)))} times (median) as large as "
        "if later layers had handed it on as it was; but the stream grows too."
    )


def _most(cell: Figures) -> str:
    factors = cell.tokens.removed.factors
    defined = [layer for layer, factor in enumerate(factors) if factor.value is not None]
    if not defined:
        return str(factors[0].reason)

    def grown(layer: int) -> str:
        return f"layer {layer} ×{with_interval(factors[layer], three_digits)}"

    if len(defined) == 1:
        return f"growth is defined for one removal, that of {grown(defined[0])}"
    between = dict(zip(defined, cell.tokens.removed.ranks(cell.documents), strict=True))
    first = max(1, min(_FIRST, len(defined) // 2))
    most = [layer for layer in defined if between[layer][1] <= first]
    named = ", ".join(map(grown, sorted(most, key=lambda layer: -(factors[layer].value or 0))))
    sentence = "which removals grow most is open"
    if most:
        among = f"the {first} that grow most include" if first > 1 else "most grows"
        sentence = f"of all removals {among} that of {named}"
    for layer in defined:
        if between[layer][0] == len(defined):
            sentence += f"; least that of {grown(layer)}"
    return f"{sentence} (95 % confidence for all layers)"


def _against_chance(cell: Figures, draws: int) -> str:
    tokens = cell.tokens
    signs = tokens.beside.signs
    if not tokens.beside.defined:
        return "removal and random directions cannot be compared"
    return (
        f"a removal grows more than random directions of the same norm in {signs.count(1)} of "
        f"{len(signs) - signs.count(None)} layers, less in {signs.count(-1)} (median ratio "
        f"{three_digits(tokens.beside.median)}). Random directions ({draws} a token) snowball in "
        f"{tokens.random.signs.count(1)}, other tokens' updates in "
        f"{tokens.shuffled.signs.count(1)}"
    )


def _explains(cell: Figures) -> Iterator[str]:
    if cell.explained is None:
        return
    rows = {row.name: row for row in cell.explained.predictors}
    cosine, end, better = rows[COSINE].found, rows[END].found, rows[END].better
    if cosine.value is None or end.value is None:
        yield f"no order of the layers can be judged: {end.reason or cosine.reason}"
        return
    verdicts = {1: "a better", -1: "a worse", 0: "neither a surely better nor a surely worse"}
    yield (
        f"how far a removal moves the stream before the head is {verdicts[side(better)]} predictor "
        f"of the {measure_of(cell.record).change} than the cosine score. Spearman is "
        f"{with_interval(end)} against {with_interval(cosine)}, difference {with_interval(better)} "
        f"over {len(cell.explained.layers)} layers"
    )
    growth, depth = rows[GROWTH].found, rows[FOLLOWING].found
    if growth.value is None:
        yield f"what growth explains is undefined: {growth.reason}"
        return
    p = growth.p_value
    does = p is not None and p < SIGNIFICANT and growth.value > 0
    yield (
        f"growth {'explains part of' if does else 'is not shown to explain'} what the cosine score "
        "misjudges. With it held fixed, growth and drop correlate by "
        f"{with_interval(growth)}{'' if p is None else f', p = {p_value(p)}'}; for comparison, how "
        f"many layers follow correlates by {with_interval(depth)}"
    )


def _between(cells: Sequence[Figures]) -> str:
    tasks = Counter(task.name for cell in cells for task in cell.record.benchmark.tasks)
    if twice := [name for name, times in tasks.items() if times > 1]:
        return (
            f"Whether growth differs between benchmarks cannot be tested: {', '.join(twice)} "
            "stands in several, whose documents are not independent; ask for one of each."
        )
    layers = range(cells[0].layers - 1)
    tests = holm([unequal_growth([c.tokens.ratios[:, layer] for c in cells]) for layer in layers])
    adjusted = [p for p in tests if p is not None]
    names = ", ".join(cell.record.benchmark.title for cell in cells)
    if not adjusted:
        return (
            f"Whether growth differs between {names} cannot be tested: five documents of each are "
            "needed; raise 'sample' or 'limit'."
        )
    return (
        f"Growth is shown to depend on the benchmark in {sum(p < SIGNIFICANT for p in adjusted)} "
        f"of {len(adjusted)} layers ({names}; Kruskal–Wallis over documents, Holm over layers)."
    )


def _without_the_first(cells: Sequence[Figures]) -> str:
    signs = [
        pair
        for cell in cells
        for pair in zip(cell.tokens.removed.signs, cell.later.removed.signs, strict=True)
    ]
    medians = ", ".join(
        f"{cell.record.benchmark.title} ×{three_digits(cell.later.removed.median)}"
        for cell in cells
    )
    return (
        f"Without the first token of each text, whose norm is often far beyond the others', "
        f"{sum(first != later for first, later in signs)} of these {len(signs) - len(cells)} "
        f"verdicts change. Median growth is then {medians}."
    )


# Tables and charts


def layer_table(cell: Figures) -> Table:
    """Make the table of where differences begin and end, and what removals cost, by layer."""
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
        f"{cell.documents} documents; geometric means over them, growth with 95 % intervals "
        "from resampling them. Verdict: Wilcoxon's signed rank test, Holm over layers, 5 %, "
        "and an interval without 1.",
        "random, other tokens': growth of random directions and of other tokens' updates of "
        "the same norm. As handed on: how many times as large as if all later layers had "
        "handed the difference on as it was. Rank 1: the largest cosine score or drop. Drops "
        "have these ranks with 95 % confidence for all layers.",
    )


def drop_ranks(cell: Figures) -> dict[int, Estimate]:
    """Return the ranks of each layer by its drop, all at once; 1 has the largest."""
    if cell.explained is None:
        return {}
    layers, runs = cell.explained.layers, cell.record.runs_of()
    between = ranks_in(cell.record, [runs[layer] for layer in layers])
    return {
        layer: Estimate(cell.explained.by_drop[layer], *ends)
        for layer, ends in zip(layers, between, strict=True)
    }


def predictor_table(cell: Figures) -> Table:
    """Make the table of what orders the layers as their drops do, and what cosine leaves over."""
    return figure_table(
        Predictor,
        f"{cell.record.heading}: what orders the layers as their drops do",
        cell.explained.predictors if cell.explained else [],
        "Intervals: documents drawn anew. p: against series as smooth over depth that are "
        "unrelated; not adjusted for the number of rows.",
    )


def summary(cells: Sequence[Figures]) -> Table:
    """Make the table with one row a cell."""

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
    """Make a chart of growths by layer; the last layer has none, and no place on it."""
    lines = {name: growth.factors[:-1] for name, growth in growths.items()}
    count = len(next(iter(lines.values())))
    axes = (f"{layer} layer (0-based)", "before the head ÷ behind the layer")
    return line_chart(title, axes, "times", range(count), lines, log_y=True)


def charts_of(cell: Figures) -> Iterator[FoundChart]:
    """Yield charts of growth beside chance, some paths, and how often each difference doubles."""
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

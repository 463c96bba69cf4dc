"""The tables and charts of the study `snowball`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from tracker.core.estimates import Estimate, Unit
from tracker.core.findings import FoundChart, Line, LineChart, MapChart, gaps
from tracker.core.formats import interval, measure_of
from tracker.core.tables import Column, Table, Value, table
from tracker.report.leaderboard.claims import ranks_in
from tracker.studies.snowball.figures import COSINE, END, LAST, Explained, Figures, Growth

NOT_MEASURED = "its removal is not measured; add the layer to 'layer' in the file"
_VERDICTS = {1: "grows", -1: "shrinks", 0: "undecided", None: None}


def layer_table(each: Figures) -> Table:
    """One row a layer: where the difference begins and ends, and what its removal costs."""
    tokens, explained, runs = each.tokens, each.explained, each.record.runs_of()
    factors, signs = tokens.removed.factors, tokens.removed.signs

    def beside(label: str, value: Callable[[int], Value], unit: Unit = "times") -> Column[int]:
        """State a column that is undefined where the growth is not, for the same reason."""

        def entry(layer: int) -> Value:
            found = value(layer)
            return Estimate(None, reason=factors[layer].reason or LAST) if found is None else found

        return Column(label, unit, entry)

    def steps(layer: int) -> str | None:
        return None if factors[layer].value is None else tokens.growing_steps(layer)

    def drop(layer: int) -> Estimate:
        run = runs.get(layer)
        return run.drop if run else Estimate(None, reason=NOT_MEASURED)

    by_cosine = explained.by_cosine if explained else {}
    by_drop = drop_ranks(each)
    columns: tuple[Column[int], ...] = (
        Column("layer", "count", lambda layer: layer),
        Column("behind it", "percent", lambda i: tokens.paths[i, i], "not finite"),
        Column("before the head", "percent", lambda i: tokens.paths[i, -1], "not finite"),
        Column("growth", "times", factors.__getitem__),
        beside("a layer", tokens.a_layer),
        beside("growing steps", steps, "text"),
        beside("verdict", lambda layer: _VERDICTS[signs[layer]], "text"),
        beside("random", lambda layer: tokens.random.factors[layer].value),
        beside("other tokens'", lambda layer: tokens.shuffled.factors[layer].value),
        beside("as handed on", lambda layer: tokens.handed_on.factors[layer].value),
        Column("drop", measure_of(each.record).form, drop),
        Column("cosine rank", "count", by_cosine.get, NOT_MEASURED),
        Column("drop rank", "count", by_drop.get, NOT_MEASURED, interval=True),
    )
    return table(
        f"{each.record.heading}: the relative difference after each layer's removal",
        columns,
        range(len(factors)),
        f"{each.documents} documents; geometric means over them, growth with 95 % intervals "
        "from resampling them. Verdict: Wilcoxon's signed rank test, Holm over layers, 5 %, "
        "and an interval without 1.",
        "random, other tokens': growth of random directions and of other tokens' updates of "
        "the same norm. As handed on: how many times as large as if all later layers had "
        "handed the difference on as it was. Rank 1: the largest cosine score or drop. Drops "
        "have these ranks with 95 % confidence for all layers.",
    )


def drop_ranks(each: Figures) -> dict[int, Estimate]:
    """Find between which ranks each layer lies by its drop, all at once; 1 has the largest."""
    if each.explained is None:
        return {}
    runs = each.record.runs_of()
    between = ranks_in(each.record, [runs[layer] for layer in each.explained.layers])
    return {
        layer: Estimate(each.explained.by_drop[layer], *ends)
        for layer, ends in zip(each.explained.layers, between, strict=True)
    }


class _Predictor(NamedTuple):
    """A row: what orders the layers, beside what, how well, and by how much better than cosine."""

    name: str
    beside: str
    found: Estimate
    better: Estimate
    layers: int


def predictors(each: Figures) -> Table:
    """What orders the layers as their drops do, and what cosine leaves over."""
    rows: list[_Predictor] = []
    if (explained := each.explained) is not None:
        itself = Estimate(None, reason="it is the one compared with")
        none = Estimate(None, reason="a partial correlation is compared with none")
        for name, found in explained.predictors.items():
            better = explained.better.get(name, itself)
            rows.append(_Predictor(name, "drop", found, better, len(explained.layers)))
        held = "drop, cosine score held fixed"
        for name, found in explained.partial.items():
            rows.append(_Predictor(name, held, found, none, explained.followed))

    def p(row: _Predictor) -> Estimate:
        return Estimate(row.found.p_value, reason=row.found.reason)

    columns: tuple[Column[_Predictor], ...] = (
        Column("of each layer", "text", lambda row: row.name),
        Column("beside", "text", lambda row: row.beside),
        Column("Spearman", "coefficient", lambda row: row.found),
        Column("p", "p", p),
        Column("better than cosine by", "coefficient", lambda row: row.better),
        Column("layers", "count", lambda row: row.layers),
    )
    return table(
        f"{each.record.heading}: what orders the layers as their drops do",
        columns,
        rows,
        "Intervals: documents drawn anew. p: against series as smooth over depth that are "
        "unrelated; not adjusted for the number of rows.",
    )


def summary(found: Sequence[Figures]) -> Table:
    """One row a cell."""

    def explains(find: Callable[[Explained], Estimate]) -> Callable[[Figures], Estimate | None]:
        return lambda each: find(each.explained) if each.explained else None

    cosine = explains(lambda explained: explained.predictors[COSINE])
    end = explains(lambda explained: explained.predictors[END])
    growth = explains(lambda explained: explained.partial["growth after removal"])
    none = "no layer's growth is defined"
    columns: tuple[Column[Figures], ...] = (
        Column("model", "text", lambda each: each.record.model.name),
        Column("benchmark", "text", lambda each: each.record.benchmark.title),
        Column("documents", "count", lambda each: each.documents),
        Column("layers that grow", "count", lambda each: each.tokens.removed.signs.count(1)),
        Column("shrink", "count", lambda each: each.tokens.removed.signs.count(-1)),
        Column("undecided", "count", lambda each: each.tokens.removed.signs.count(0)),
        Column("median growth", "times", lambda each: each.tokens.removed.median, none),
        Column("of random directions", "times", lambda each: each.tokens.random.median, none),
        Column("removal grows more", "count", lambda each: each.tokens.beside.signs.count(1)),
        Column("less", "count", lambda each: each.tokens.beside.signs.count(-1)),
        Column("cosine ~ drop", "coefficient", cosine, NOT_MEASURED),
        Column("before the head ~ drop", "coefficient", end, NOT_MEASURED),
        Column("growth ~ drop given cosine", "coefficient", growth, NOT_MEASURED),
    )
    return table(
        "Does it snowball?",
        columns,
        found,
        "~: Spearman's coefficient over layers, with 95 % intervals over documents.",
    )


SHOWN = 6
"""Layers whose paths are drawn, half of them underrated by cosine, half overrated."""


def _line(name: str, growth: Growth) -> Line:
    # The last layer has none, and no place on these charts.
    return Line.of(name, growth.factors[:-1])


def beside_each_other(cells: Sequence[Figures]) -> LineChart:
    """Draw the growth of each layer on all benchmarks of a model."""
    return LineChart(
        title=f"{cells[0].record.model.name}: growth after each layer's removal, by benchmark",
        x="removed layer (0-based)",
        y="before the head ÷ behind the layer",
        unit="times",
        places=tuple(range(cells[0].layers - 1)),
        lines=tuple(_line(each.record.benchmark.title, each.tokens.removed) for each in cells),
        log_y=True,
    )


def charts_of(each: Figures) -> Iterator[FoundChart]:
    """Draw growth beside chance, some paths, and how often each difference doubles."""
    tokens, total = each.tokens, each.layers
    yield LineChart(
        title=f"{each.record.heading}: growth of a removal and of random directions",
        x="perturbed layer (0-based)",
        y="before the head ÷ behind the layer",
        unit="times",
        places=tuple(range(total - 1)),
        lines=(
            _line("removed", tokens.removed),
            _line("random directions", tokens.random),
            _line("other tokens' updates", tokens.shuffled),
        ),
        log_y=True,
    )
    paths = tokens.paths
    yield LineChart(
        title=f"{each.record.heading}: paths of layers whose measured ranks are furthest apart",
        x="behind layer (0-based)",
        y="relative difference to the intact stream",
        unit="percent",
        places=tuple(range(total)),
        lines=tuple(Line(name=name, values=gaps(paths[layer])) for layer, name in _drawn(each)),
        log_y=True,
    )
    with np.errstate(divide="ignore", invalid="ignore"):
        doublings = np.log2(paths / np.diagonal(paths)[:, None])
    yield MapChart(
        title=f"{each.record.heading}: how often the relative difference has doubled",
        x="behind layer (0-based)",
        y="removed layer (0-based)",
        name="doublings",
        unit="coefficient",
        columns=tuple(range(total)),
        rows=tuple(map(str, range(total))),
        values=tuple(map(gaps, doublings)),
    )


def _drawn(each: Figures) -> Iterator[tuple[int, str]]:
    """Choose layers, each with its name in the legend."""
    explained = each.explained
    if explained is None:
        for layer in np.unique(np.linspace(0, each.layers - 1, SHOWN).round()).astype(int).tolist():
            yield layer, f"layer {layer}"
        return
    by_cosine, by_drop = explained.by_cosine, drop_ranks(each)
    for layer in explained.underrated(SHOWN):
        between = interval(by_drop[layer].low, by_drop[layer].high, "{:.0f}".format)
        yield layer, f"layer {layer}: rank {by_cosine[layer]} by cosine, {between} by drop"

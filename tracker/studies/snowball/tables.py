"""The tables of the study `snowball`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from tracker.core.estimates import Estimate, Unit
from tracker.core.formats import measure_of
from tracker.core.tables import Column, Table, Value, estimate, table
from tracker.studies.snowball.figures import ALL, COSINE, END, LAST, Explained, Figures, Tokens

NOT_MEASURED = "its removal is not measured; add the layer to 'layer' in the file"
_VERDICTS = {1: "grows", -1: "shrinks", 0: "undecided"}


def layer_table(each: Figures) -> Table:
    """One row a layer: where the difference begins and ends, and what its removal costs."""
    tokens, explained, runs = each.tokens[ALL], each.explained, each.cell.runs_of()
    removed = tokens.removed
    by_cosine = explained.ranks(explained.cosine) if explained else {}
    by_drop = explained.ranks(explained.drops) if explained else {}

    def beside(label: str, value: Callable[[int], Value], unit: Unit = "times") -> Column[int]:
        """State a column that is undefined where the growth is not, for the same reason."""

        def entry(layer: int) -> Value:
            why = removed.total[layer].reason or LAST
            found = value(layer)
            return estimate(found, why) if found is None or isinstance(found, float) else found

        return Column(label, unit, entry)

    def steps(layer: int) -> str | None:
        if removed.total[layer].value is None:
            return None
        return f"{removed.growing_steps(layer)} of {len(removed.total) - 1 - layer}"

    def verdict(layer: int) -> str | None:
        sign = removed.signs[layer]
        return None if sign is None else _VERDICTS[sign]

    def drop(layer: int) -> Estimate:
        run = runs.get(layer)
        return run.drop if run else Estimate(None, reason=NOT_MEASURED)

    columns: tuple[Column[int], ...] = (
        Column("layer", "count", lambda layer: layer),
        Column("behind it", "percent", lambda i: removed.paths[i, i], "not finite"),
        Column("before the head", "percent", lambda i: removed.paths[i, -1], "not finite"),
        Column("growth", "times", removed.total.__getitem__),
        beside("a layer", removed.a_layer),
        beside("growing steps", steps, "text"),
        beside("verdict", verdict, "text"),
        beside("random", lambda layer: tokens.random.total[layer].value),
        beside("other tokens'", lambda layer: tokens.shuffled.total[layer].value),
        beside("as handed on", lambda layer: tokens.handed_on[layer].value),
        Column("drop", measure_of(each.cell).form, drop),
        Column("cosine rank", "count", by_cosine.get, NOT_MEASURED),
        Column("drop rank", "count", by_drop.get, NOT_MEASURED),
    )
    return table(
        f"{each.cell.heading}: the relative difference after each layer's removal",
        columns,
        range(len(removed.total)),
        (
            f"{each.documents} documents; geometric means over them, growth with 95 % intervals "
            "from resampling them. Verdict: Wilcoxon's signed rank test, Holm over layers, 5 %, "
            "and an interval without 1.",
            "random, other tokens': growth of random directions and of other tokens' updates of "
            "the same norm. As handed on: how many times as large as if all later layers had "
            "handed the difference on as it was. Rank 1: the largest cosine score or drop; equal "
            "ones share a rank.",
        ),
    )


class _Predictor(NamedTuple):
    """A row: what orders the layers, beside what, how well, and by how much better than cosine."""

    name: str
    beside: str
    found: Estimate
    better: Estimate
    layers: int


def predictors(each: Figures) -> Table:
    """What orders the layers as their drops do, and what cosine leaves over."""
    explained = each.explained
    rows: list[_Predictor] = []
    if explained is not None:
        itself = Estimate(None, reason="it is the one compared with")
        none = Estimate(None, reason="a partial correlation is compared with none")
        rows = [
            _Predictor(
                name, "drop", found, explained.better.get(name, itself), len(explained.layers)
            )
            for name, found in explained.predictors.items()
        ]
        held = "drop, cosine score held fixed"
        rows += [
            _Predictor(name, held, found, none, explained.followed)
            for name, found in explained.partial.items()
        ]

    def p(row: _Predictor) -> Estimate:
        return estimate(row.found.p_value, row.found.reason)

    columns: tuple[Column[_Predictor], ...] = (
        Column("of each layer", "text", lambda row: row.name),
        Column("beside", "text", lambda row: row.beside),
        Column("Spearman", "coefficient", lambda row: row.found),
        Column("p", "p", p),
        Column("better than cosine by", "coefficient", lambda row: row.better),
        Column("layers", "count", lambda row: row.layers),
    )
    return table(
        f"{each.cell.heading}: what orders the layers as their drops do",
        columns,
        rows,
        (
            "Intervals: documents drawn anew. p: against series as smooth over depth that are "
            "unrelated; not adjusted for the number of rows.",
        ),
    )


def summary(found: Sequence[Figures]) -> Table:
    """One row a cell."""

    def signs(of: Callable[[Tokens], Iterable[int | None]], sign: int) -> Callable[[Figures], int]:
        return lambda each: Counter(of(each.tokens[ALL]))[sign]

    def explains(find: Callable[[Explained], Estimate]) -> Callable[[Figures], Estimate | None]:
        return lambda each: find(each.explained) if each.explained else None

    def removed(tokens: Tokens) -> Iterable[int | None]:
        return tokens.removed.signs

    def beside(tokens: Tokens) -> Iterable[int | None]:
        return tokens.beside_signs

    none, unmeasured = "no layer's growth is defined", NOT_MEASURED
    growth = explains(lambda explained: explained.partial["growth after removal"])
    columns: tuple[Column[Figures], ...] = (
        Column("model", "text", lambda each: each.cell.model.name),
        Column("benchmark", "text", lambda each: each.cell.benchmark.title),
        Column("documents", "count", lambda each: each.documents),
        Column("layers that grow", "count", signs(removed, 1)),
        Column("shrink", "count", signs(removed, -1)),
        Column("undecided", "count", signs(removed, 0)),
        Column("median growth", "times", lambda each: each.tokens[ALL].removed.median, none),
        Column("of random directions", "times", lambda each: each.tokens[ALL].random.median, none),
        Column("removal grows more", "count", signs(beside, 1)),
        Column("less", "count", signs(beside, -1)),
        Column(
            "cosine ~ drop", "coefficient", explains(lambda e: e.predictors[COSINE]), unmeasured
        ),
        Column(
            "before the head ~ drop",
            "coefficient",
            explains(lambda e: e.predictors[END]),
            unmeasured,
        ),
        Column("growth ~ drop given cosine", "coefficient", growth, unmeasured),
    )
    return table(
        "Does it snowball?",
        columns,
        found,
        ("~: Spearman's coefficient over layers, with 95 % intervals over documents.",),
    )

"""The audit's tables and charts, of one model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

from scipy import stats

from tracker.core.estimates import Estimate, Unit
from tracker.core.findings import FoundChart, Line, LineChart, MapChart
from tracker.core.formats import counted, two_digits
from tracker.core.proxies import OF_LAYERS, passes
from tracker.core.tables import Column, Table, Value, table
from tracker.report.leaderboard.claims import ranks_in
from tracker.stats.rank_agreement import midranks, places
from tracker.stats.support import holm
from tracker.stats.task_dependence import BLOCK
from tracker.studies.audit.figures import MAJOR, RELIABLE, TOP, ModelAudit, Spreads, Summary, means
from tracker.studies.audit.measures import DROP, Audited, Ordering
from tracker.studies.base import FEWEST


def tables_of(audit: ModelAudit) -> list[Table]:
    """Every table of the model."""
    return [_proxies(audit), _benchmarks(audit), _disagreements(audit), *_variances(audit)]


def _proxies(audit: ModelAudit) -> Table:
    summaries = audit.summaries

    def column(label: str, unit: Unit, value: Callable[[Summary], Value]) -> Column[str]:
        def entry(proxy: str) -> Value:
            if proxy in summaries:
                return value(summaries[proxy])
            reasons = (cell.found[proxy].spearman.reason for cell in audit.cells)
            return Estimate(None, reason=next(filter(None, reasons), "undefined"))

        return Column(label, unit, entry)

    def inner(summary: Summary) -> Estimate:
        return Estimate(summary.inner, reason=_no_inner(summary.cells))

    def rank(summary: Summary) -> Estimate:
        best, worst = audit.ranks[summary.proxy]
        return Estimate(best, best, worst)

    total = audit.total
    columns = [
        Column("proxy", "text", _label),
        replace(column("its rank", "count", rank), interval=True),
        column("mean Spearman", "coefficient", lambda s: s.spearman),
        column("inner layers", "coefficient", inner),
        column("mean Kendall", "coefficient", lambda s: s.kendall),
        column(f"top-{TOP} overlap", "percent", lambda s: s.overlaps[0]),
        column(f"bottom-{TOP} overlap", "percent", lambda s: s.overlaps[1]),
        column("by chance", "percent", lambda s: s.overlaps[2]),
        column("passes, naive", "times", lambda s: passes(s.proxy, total, shared=False)),
        column("passes, shared", "times", lambda s: passes(s.proxy, total, shared=True)),
        column("p (Holm)", "p", lambda s: audit.adjusted[s.proxy]),
    ]
    dear = passes(DROP, total, shared=True)
    return table(
        f"{audit.name}: how well each proxy orders the layers by their {audit.drop}",
        columns,
        [*summaries, *(proxy for proxy in OF_LAYERS if proxy not in summaries)],
        f"{audit.on}. Intervals are 95 % from resampling documents, benchmarks as they "
        "are; inner layers leave out the first and last two. Ranks by mean Spearman, from "
        "paired differences, hold for all proxies at once.",
        "Passes are forward passes of the whole model a document, for all layers together: "
        "one by one on pruned models, or sharing the layers below the removed one. The "
        f"{audit.drop} itself takes {dear:g} shared, and once more its other answers.",
        "Sources: "
        + "; ".join(f"{p.label}: {p.source}" for p in OF_LAYERS.values() if p.source)
        + ".",
    )


def _no_inner(cells: Sequence[Audited]) -> str:
    if all(len(cell.inner) < FEWEST for cell in cells):
        return "fewer than three inner layers"
    return "the inner layers all have the same drop or the same proxy"


class _Tested(NamedTuple):
    """A row: a proxy on a benchmark, with its p-value adjusted."""

    cell: Audited
    proxy: str
    adjusted: float | None

    @property
    def found(self) -> Ordering:
        """How well it orders the layers."""
        return self.cell.found[self.proxy]

    def entry(self, value: float | None) -> Estimate:
        """Make an entry, or say why it is undefined."""
        return Estimate(value, reason=self.found.spearman.reason or _no_inner([self.cell]))


def _benchmarks(audit: ModelAudit) -> Table:
    tested = [(cell, proxy) for cell in audit.cells for proxy in OF_LAYERS]
    p_values = [cell.found[proxy].spearman.p_value for cell, proxy in tested]
    given = [p for p in p_values if p is not None]
    adjusted = iter(stats.false_discovery_control(given) if given else [])
    rows = [
        _Tested(cell, proxy, None if p is None else float(next(adjusted)))
        for (cell, proxy), p in zip(tested, p_values, strict=True)
    ]
    columns: tuple[Column[_Tested], ...] = (
        Column("benchmark", "text", lambda row: row.cell.label),
        Column("proxy", "text", lambda row: OF_LAYERS[row.proxy].label),
        Column("Spearman", "coefficient", lambda row: row.found.spearman),
        Column("inner layers", "coefficient", lambda row: row.entry(row.found.inner)),
        Column("Kendall", "coefficient", lambda row: row.entry(row.found.kendall)),
        Column("Pearson", "coefficient", lambda row: row.entry(row.found.pearson)),
        Column("p", "p", lambda row: row.entry(row.found.spearman.p_value)),
        Column("p (Benjamini-Hochberg)", "p", lambda row: row.entry(row.adjusted)),
    )
    return table(
        f"{audit.name}: every proxy beside the {audit.drop}, benchmark by benchmark",
        columns,
        rows,
        "p-values are those of Spearman's coefficient against series as smooth over depth; "
        "adjusted over all rows of the table.",
    )


def _disagreements(audit: ModelAudit) -> Table:
    def columns(words: Sequence[str], place: int) -> list[Column[str]]:
        """State four columns of ranks that differ (place 0), or do so majorly (1)."""
        differ, chance, shuffled, smooth = words
        return [
            Column(differ, "percent", lambda proxy: audit.orders[proxy][place].share),
            Column(chance, "percent", lambda proxy: audit.orders[proxy][place].chance),
            Column(shuffled, "p", lambda proxy: audit.orders[proxy][place].shuffled_p),
            Column(smooth, "p", lambda proxy: audit.orders[proxy][place].smooth_p),
        ]

    words = ("", " by chance", ": p, shuffled", ": p, as smooth")
    return table(
        f"{audit.name}: in how many layers the ranks differ",
        [
            Column("proxy", "text", _label),
            *columns(("ranks differ", "by chance", "p, shuffled", "p, as smooth"), 0),
            *columns([f"majorly{word}" for word in words], 1),
        ],
        audit.orders,
        f"Majorly: by more than {100 * MAJOR:.0f} % of the layers. Ties share their mean rank. "
        "p: how often orders that know nothing of each other differ as rarely, layers "
        "shuffled freely or as smooth over depth as they are; not adjusted.",
    )


def _variances(audit: ModelAudit) -> Iterator[Table]:
    if not audit.spreads:
        return
    tests = [spread.test for spread in audit.spreads.values()]
    p_values = holm([None if test is None else test.p_value for test in tests])
    adjusted = dict(zip(audit.spreads, p_values, strict=True))
    own = "it is what the proxies are held against"

    def column(
        label: str, unit: Unit, value: Callable[[Spreads], Value], otherwise: str = ""
    ) -> Column[str]:
        def entry(name: str) -> Value:
            found = value(audit.spreads[name])
            if found is None:
                return Estimate(None, reason=otherwise or audit.spreads[name].reason)
            return found

        return Column(label, unit, entry, own)

    def larger(spread: Spreads) -> str | None:
        return f"{spread.test.larger} of {spread.test.n} layers" if spread.test else None

    columns = [
        Column("measure", "text", _label),
        column("variance", "coefficient", lambda each: each.raw),
        column("drop varies more in", "text", larger, own),
        Column("Wilcoxon p (Holm)", "p", adjusted.__getitem__, own),
        column(f"p in blocks of {BLOCK}", "p", lambda s: s.test.block_p if s.test else None, own),
        column("variance where noise can be taken off", "coefficient", lambda s: s.noisy),
        column("variance without noise", "coefficient", lambda s: s.clean),
        column("drop's without noise exceeds it by", "coefficient", lambda s: s.excess),
    ]
    shares = ", ".join(
        f"{cell.label} {two_digits(audit.reliabilities[cell.label])}" for cell in audit.above_chance
    )
    yield table(
        f"{audit.name}: variance of a layer's z-score from benchmark to benchmark",
        columns,
        audit.spreads,
        f"{counted(len(audit.above_chance), 'benchmark')} above chance. z-scored over "
        "layers per benchmark; mean over layers: 0 = layers matter alike everywhere, "
        "1 = no two benchmarks have anything in common.",
        "Relevance is the drop on another scale, but for layers that fall below "
        "chance, so their z-scores are the same.",
        "Share of the spread of drops over layers that is not noise of the documents: "
        f"{shares}. Below {RELIABLE} a benchmark is left out where noise is taken off, "
        f"which leaves {counted(len(audit.reliable), 'benchmark')} for the last three "
        "columns. Their interval is the jackknife over documents.",
        "Wilcoxon's p takes layers as independent, which they are not: where it and "
        "the p of signs that change in blocks differ, trust the latter.",
    )


def _label(name: str) -> str:
    return OF_LAYERS[name].label if name in OF_LAYERS else name


def charts_of(audit: ModelAudit) -> list[FoundChart]:
    """Every chart of the model."""
    return [*_cost(audit), *_depth(audit), *_map(audit)]


def _cost(audit: ModelAudit) -> Iterator[FoundChart]:
    budgets, found, _ = audit.at_cost
    lines = [
        Line(name=audit.drop if name == DROP else _label(name), values=row)
        for name, row in found.items()
        if any(value is not None for value in row)
    ]
    if not lines:
        return
    yield LineChart(
        title=f"{audit.name}: what a proxy predicts for what it costs",
        x="forward passes spent on a benchmark",
        y="Spearman with the drop of other documents",
        unit="coefficient",
        places=tuple(budgets),
        lines=tuple(lines),
        log_x=True,
    )


def _depth(audit: ModelAudit) -> Iterator[FoundChart]:
    best = [proxy for proxy in audit.summaries if audit.ranks[proxy] == (1, 1)]
    named = [s for s in audit.summaries.values() if s.proxy in ("cosine_score", *best)]
    cells = [cell for cell in audit.cells if named and all(cell in s.cells for s in named)]
    if not cells:
        return
    profiles = {audit.drop: means(DROP, cells)}
    profiles |= {OF_LAYERS[s.proxy].label: means(s.proxy, cells) for s in named}
    yield LineChart(
        title=f"{audit.name}: measured ranks of the layers over depth, mean over benchmarks",
        x="layer (0-based)",
        y="rank, the least relevant is 1",
        unit="count",
        places=tuple(cells[0].layers),
        lines=tuple(
            Line(name=name, values=tuple(midranks(rows).mean(axis=0).tolist()))
            for name, rows in profiles.items()
        ),
    )


def _map(audit: ModelAudit) -> Iterator[FoundChart]:
    cells = [c for c in audit.cells if c.found["cosine_score"].spearman.value is not None]
    if not cells:
        return
    columns = sorted({layer for cell in cells for layer in cell.layers})
    values, shown = [], []
    for cell in cells:
        x, y = (midranks(cell.measures[name].means()) for name in ("cosine_score", DROP))
        at = dict(zip(cell.layers, (x - y).tolist(), strict=True))
        values.append(tuple(at.get(layer) for layer in columns))
        runs = cell.record.whole_layers
        between = ranks_in(cell.record, runs)
        scores = places([run.cosine_score for run in runs])
        off = {
            run.change.layer
            for run, score, (best, worst) in zip(runs, scores, between, strict=True)
            if not best <= score <= worst
        }
        shown.append(tuple(layer in off for layer in columns))
    yield MapChart(
        title=f"{audit.name}: ranks by cosine score beside those by the measured {audit.drop}",
        x="layer (0-based)",
        y="benchmark",
        name=f"ranks by cosine score above those by {audit.drop}",
        unit="count",
        columns=tuple(columns),
        rows=tuple(cell.label for cell in cells),
        values=tuple(values),
        shown=tuple(shown),
        shown_by=f"the cosine score gives a rank that is shown not to be that by {audit.drop}, "
        "with 95 % confidence for all layers of the benchmark",
    )

"""The audit: every proxy of a layer's relevance against the accuracy that its removal costs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from scipy import stats

from tracker.analysis.claims import ranks_in
from tracker.analysis.comparable import benchmark_labels, model_labels
from tracker.core.config import CellRequest
from tracker.core.errors import RequestError
from tracker.core.estimates import Estimate, Unit
from tracker.core.findings import FoundChart, LineChart, MapChart
from tracker.core.grouping import grouped
from tracker.core.proxies import OF_LAYERS, passes
from tracker.core.tables import Column, Table, Value, table
from tracker.stats.rank_agreement import midranks, places
from tracker.stats.support import holm
from tracker.stats.task_dependence import BLOCK
from tracker.studies.audit.figures import (
    DROP,
    MAJOR,
    RELIABLE,
    TOP,
    AuditedCell,
    ModelAudit,
    Spreads,
    Summary,
    means,
    pooled,
)
from tracker.studies.base import (
    FEWEST,
    Study,
    StudyContext,
    StudyResult,
    Subject,
    study_texts,
)
from tracker.studies.layout import figure_table, labelled, line_chart, rank_estimate
from tracker.studies.registry import AuditSettings

PAPER = (0.15, 0.46)
"""The paper's coefficients over inner layers and benchmarks, without their minus: y is the accuracy
after removal."""
PAPER_DIFFER, PAPER_MAJORLY = 0.938, 0.536
_AGAINST = "against the paper"
TEXTS = study_texts("audit", paper=PAPER, proxies=OF_LAYERS)


class Audit(Study[AuditSettings]):
    """Sets every proxy beside the accuracy drop, per model and benchmark, with what each costs."""

    name = "audit"
    question = (
        "Which proxy of a layer's relevance tells what removing the layer costs, and which is "
        "worth its compute?"
    )
    texts = TEXTS

    def requests(self, context: StudyContext) -> list[CellRequest]:
        """List the cells of the file, each with its whole single layers of the intact model."""
        cells: dict[CellRequest, None] = {}
        for cell in super().requests(context):
            layers = cell.changes.layers
            if cell.changes.exact is not None:  # a cap on the runs may leave none of these
                layers = cell.changes.whole_layers
            if layers:
                cells[replace(cell, removed=()).with_changes(layers=layers)] = None
        if not any(len(cell.changes.layers) >= FEWEST for cell in cells):
            raise RequestError(
                "the audit orders layers, and this file names fewer than three; write layer: "
                "{value: all}"
            )
        return list(cells)

    def answer(self, context: StudyContext, subjects: list[Subject]) -> StudyResult:
        """Compare, model by model."""
        by_model = grouped(subjects, lambda subject: subject.record.model.key).values()
        names = model_labels([mine[0].record.model for mine in by_model])
        result = StudyResult()
        for name, mine in zip(names, by_model, strict=True):
            labels = benchmark_labels([subject.record for subject in mine])
            cells = [AuditedCell(context, *pair) for pair in zip(mine, labels, strict=True)]
            audit = ModelAudit(name, cells)
            result.add(*answers_of(audit), *tables_of(audit), *charts_of(audit))
            result.lack(name, *lacking_of(audit))
        return result


# Sentences


def answers_of(audit: ModelAudit) -> list[str]:
    """Return the sentences of one model, contradictions of the paper first."""
    if not audit.summaries:
        return TEXTS.all("nothing", audit)
    sentences = _pooled(audit), _task(audit), _best(audit), TEXTS.one("worth", audit.at_cost)
    ordered = sorted(filter(None, sentences), key=lambda text: not text.startswith(_AGAINST))
    return [f"{audit.name}: {sentence}" for sentence in ordered]


def _pooled(audit: ModelAudit) -> str:
    """Build the paper's own figure: cosine over inner layers × benchmarks."""
    summary = audit.summaries.get("cosine_score")
    if summary is None or (found := pooled(summary.cells)) is None:
        return ""
    benchmarks = sum(bool(c.inner) and c.record.higher_is_better for c in summary.cells)
    return TEXTS.one("pooled", audit, summary.spearman, found, benchmarks)


def _task(audit: ModelAudit) -> str:
    """Describe whether relevance depends on the task more than cosine says: the paper's claim 3."""
    cosine, drop = (audit.spreads.get(name) for name in ("cosine_score", DROP))
    if cosine is None or drop is None or cosine.test is None:
        return ""
    return TEXTS.one("task", audit, cosine, drop)


def _best(audit: ModelAudit) -> str:
    """Return which proxy orders the layers best, where comparisons with all others show it."""
    if len(audit.summaries) == 1:
        return ""
    first = [name for name, (rank, _) in audit.ranks.items() if rank == 1]
    best, cosine = audit.summaries[first[0]], audit.summaries.get("cosine_score")
    times = passes(best.proxy, audit.total, shared=True)
    more = None if cosine in (None, best) else audit.apart(best, cosine)
    return TEXTS.one("best", audit, list(map(_label, first)), best.spearman, more, times)


def lacking_of(audit: ModelAudit) -> list[str]:
    """Describe the unanswered questions, and how to answer them."""
    return TEXTS.all("lacking", audit.left_out, audit.spreads.get(DROP))


# Tables and charts


def tables_of(audit: ModelAudit) -> list[Table]:
    """Return every table of the model."""
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

    total = audit.total
    columns = [
        Column("proxy", "text", _label),
        replace(
            column("its rank", "count", lambda s: rank_estimate(audit.ranks[s.proxy])),
            interval=True,
        ),
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
        *TEXTS.all("proxy_notes", audit, dear),
    )


def _no_inner(cells: Sequence[AuditedCell]) -> str:
    if all(len(cell.inner) < FEWEST for cell in cells):
        return "fewer than three inner layers"
    return "the inner layers all have the same drop or the same proxy"


@dataclass(frozen=True)
class ProxyOnBenchmark:
    """The agreement of a proxy with the drop on one benchmark."""

    benchmark: str = labelled("benchmark")
    proxy: str = labelled("proxy")
    spearman: Estimate = labelled("Spearman", "coefficient")
    inner: Estimate = labelled("inner layers", "coefficient")
    kendall: Estimate = labelled("Kendall", "coefficient")
    pearson: Estimate = labelled("Pearson", "coefficient")
    p_value: Estimate = labelled("p", "p")
    adjusted: Estimate = labelled("p (Benjamini-Hochberg)", "p")


def _benchmarks(audit: ModelAudit) -> Table:
    found = [(cell, proxy, cell.found[proxy]) for cell in audit.cells for proxy in OF_LAYERS]
    p_values = [order.spearman.p_value for *_, order in found]
    given = [p for p in p_values if p is not None]
    adjusted = iter(stats.false_discovery_control(given) if given else [])
    rows = []
    for (cell, proxy, order), p in zip(found, p_values, strict=True):
        reason = order.spearman.reason or _no_inner([cell])
        q = None if p is None else float(next(adjusted))
        figures = (order.inner, order.kendall, order.pearson, p, q)
        entries = (Estimate(figure, reason=reason) for figure in figures)
        rows.append(ProxyOnBenchmark(cell.label, _label(proxy), order.spearman, *entries))
    return figure_table(
        ProxyOnBenchmark,
        f"{audit.name}: every proxy beside the {audit.drop}, benchmark by benchmark",
        rows,
        *TEXTS.all("benchmark_notes"),
    )


def _disagreements(audit: ModelAudit) -> Table:
    def columns(words: Sequence[str], index: int) -> list[Column[str]]:
        """State four columns of ranks that differ (place 0), or do so majorly (1)."""
        differ, chance, shuffled, smooth = words
        return [
            Column(differ, "percent", lambda proxy: audit.orders[proxy][index].share),
            Column(chance, "percent", lambda proxy: audit.orders[proxy][index].chance),
            Column(shuffled, "p", lambda proxy: audit.orders[proxy][index].shuffled_p),
            Column(smooth, "p", lambda proxy: audit.orders[proxy][index].smooth_p),
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
        *TEXTS.all("disagreement_notes", MAJOR, PAPER_DIFFER, PAPER_MAJORLY),
    )


def _variances(audit: ModelAudit) -> Iterator[Table]:
    if not audit.spreads:
        return
    tests = [spread.test for spread in audit.spreads.values()]
    p_values = holm([None if test is None else test.p_value for test in tests])
    adjusted = dict(zip(audit.spreads, p_values, strict=True))
    compared = "it is what the proxies are held against"

    def column(
        label: str, unit: Unit, value: Callable[[Spreads], Value], otherwise: str = ""
    ) -> Column[str]:
        def entry(name: str) -> Value:
            found = value(audit.spreads[name])
            if found is None:
                return Estimate(None, reason=otherwise or audit.spreads[name].reason)
            return found

        return Column(label, unit, entry, compared)

    def larger(spread: Spreads) -> str | None:
        return f"{spread.test.larger} of {spread.test.n} layers" if spread.test else None

    columns = [
        Column("measure", "text", _label),
        column("variance", "coefficient", lambda each: each.raw),
        column("drop varies more in", "text", larger, compared),
        Column("Wilcoxon p (Holm)", "p", adjusted.__getitem__, compared),
        column(
            f"p in blocks of {BLOCK}", "p", lambda s: s.test.block_p if s.test else None, compared
        ),
        column("variance where noise can be taken off", "coefficient", lambda s: s.noisy),
        column("variance without noise", "coefficient", lambda s: s.clean),
        column("drop's without noise exceeds it by", "coefficient", lambda s: s.excess),
    ]
    yield table(
        f"{audit.name}: variance of a layer's z-score from benchmark to benchmark",
        columns,
        audit.spreads,
        *TEXTS.all("variance_notes", audit, RELIABLE),
    )


def _label(name: str) -> str:
    return OF_LAYERS[name].label if name in OF_LAYERS else name


def charts_of(audit: ModelAudit) -> list[FoundChart]:
    """Return every chart of the model."""
    return [*_cost(audit), *_depth(audit), *_map(audit)]


def _cost(audit: ModelAudit) -> Iterator[LineChart]:
    budgets, found, _ = audit.at_cost
    lines = {
        audit.drop if name == DROP else _label(name): row
        for name, row in found.items()
        if any(value is not None for value in row)
    }
    if lines:
        title = f"{audit.name}: what a proxy predicts for what it costs"
        axes = "forward passes spent on a benchmark", "Spearman with the drop of other documents"
        yield line_chart(title, axes, "coefficient", budgets, lines, log_x=True)


def _depth(audit: ModelAudit) -> Iterator[LineChart]:
    best = [proxy for proxy in audit.summaries if audit.ranks[proxy] == (1, 1)]
    named = [s for s in audit.summaries.values() if s.proxy in ("cosine_score", *best)]
    cells = [cell for cell in audit.cells if named and all(cell in s.cells for s in named)]
    if cells:
        profiles = {audit.drop: means(DROP, cells)}
        profiles |= {_label(s.proxy): means(s.proxy, cells) for s in named}
        yield line_chart(
            f"{audit.name}: measured ranks of the layers over depth, mean over benchmarks",
            ("layer (0-based)", "rank, the least relevant is 1"),
            "count",
            cells[0].layers,
            {name: midranks(rows).mean(axis=0) for name, rows in profiles.items()},
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

"""Study `audit`: compare every proxy of a layer's relevance with the measured accuracy drop."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from scipy import stats

from tracker.analysis.claims import cell_ranks
from tracker.analysis.comparable import benchmark_labels, model_labels
from tracker.schema.config import CellRequest
from tracker.schema.errors import RequestError
from tracker.schema.estimates import Estimate, FigureUnit
from tracker.schema.findings import LineChart, MapChart, StudyChart, line_chart
from tracker.schema.grouping import group_by
from tracker.schema.proxies import LAYER_PROXIES, proxy_cost
from tracker.schema.tables import Column, ColumnValue, Table, build_table
from tracker.stats.rank_agreement import midranks, min_ranks
from tracker.stats.support import holm
from tracker.stats.task_dependence import SIGN_BLOCK
from tracker.studies.audit.figures import (
    DROP,
    MAJOR_SHARE,
    MIN_RELIABILITY,
    TOP_LAYERS,
    AuditedCell,
    ModelAudit,
    ProxySummary,
    mean_profiles,
    pooled_correlation,
)
from tracker.studies.base import (
    MIN_LAYERS_RANKED,
    Study,
    StudyContext,
    StudyResult,
    Subject,
    study_texts,
)
from tracker.studies.layout import figure_table, labelled, rank_estimate
from tracker.studies.registry import AuditSettings

PAPER_CORRELATIONS = (0.15, 0.46)
"""Range of the paper's coefficients over inner layers and benchmarks, without the minus sign that
comes from correlating with accuracy after removal."""
PAPER_DIFFERENT, PAPER_MAJOR = 0.938, 0.536
_CONTRADICTION = "against the paper"
AUDIT_TEXTS = study_texts("audit", paper=PAPER_CORRELATIONS, proxies=LAYER_PROXIES)


class Audit(Study[AuditSettings]):
    """Study that compares proxies of a layer's relevance with measured accuracy drops."""

    name = "audit"
    question = (
        "Which proxy best predicts the accuracy drop when a layer is removed, and which proxy is "
        "worth its computing cost?"
    )
    texts = AUDIT_TEXTS

    def requests(self, context: StudyContext) -> list[CellRequest]:
        """List the experiment file's requests, limited to removals of single whole layers."""
        cells: dict[CellRequest, None] = {}
        for cell in super().requests(context):
            layers = cell.changes.layers
            if cell.changes.exact is not None:  # a cap on the runs may leave none of these
                layers = cell.changes.whole_layers
            if layers:
                cells[replace(cell, removed=()).with_changes(layers=layers)] = None
        if not any(len(cell.changes.layers) >= MIN_LAYERS_RANKED for cell in cells):
            raise RequestError(AUDIT_TEXTS.render("too_few_layers"))
        return list(cells)

    def answer(self, context: StudyContext, subjects: list[Subject]) -> StudyResult:
        """Compare proxies with accuracy drops for each model; return texts, tables and charts."""
        models = group_by(subjects, lambda subject: subject.record.model.key).values()
        names = model_labels([group[0].record.model for group in models])
        result = StudyResult()
        for name, group in zip(names, models, strict=True):
            labels = benchmark_labels([subject.record for subject in group])
            pairs = zip(group, labels, strict=True)
            audit = ModelAudit(name, [AuditedCell(context, *pair) for pair in pairs])
            result.add(*audit_answers(audit), *audit_tables(audit), *audit_charts(audit))
            result.lack(name, *list_unanswered(audit))
        return result


# Sentences


def audit_answers(audit: ModelAudit) -> list[str]:
    """Return the report's sentences about one model."""
    if not audit.summaries:
        return AUDIT_TEXTS.render_all("nothing", audit)
    worth = AUDIT_TEXTS.render("worth", audit.prediction_by_cost)
    sentences = (_pooled_sentence(audit), _task_sentence(audit), _best_sentence(audit), worth)
    ordered = sorted(filter(None, sentences), key=lambda text: not text.startswith(_CONTRADICTION))
    return [f"{audit.name}: {sentence}" for sentence in ordered]


def _pooled_sentence(audit: ModelAudit) -> str:
    """Describe the correlation of cosine score and drop over the inner layers of all benchmarks."""
    summary = audit.summaries.get("cosine_score")
    if summary is None or (correlation := pooled_correlation(summary.cells)) is None:
        return ""
    benchmarks = sum(bool(c.inner) and c.record.higher_is_better for c in summary.cells)
    return AUDIT_TEXTS.render("pooled", audit, summary.spearman, correlation, benchmarks)


def _task_sentence(audit: ModelAudit) -> str:
    """Describe whether accuracy drops vary more between tasks than the cosine score does."""
    cosine, drop = (audit.spreads.get(name) for name in ("cosine_score", DROP))
    if cosine is None or drop is None or cosine.test is None:
        return ""
    return AUDIT_TEXTS.render("task", audit, cosine, drop)


def _best_sentence(audit: ModelAudit) -> str:
    """Write a sentence that names the best proxy, or all proxies that could be the best."""
    if len(audit.summaries) == 1:
        return ""
    names = [name for name, (rank, _) in audit.ranks.items() if rank == 1]
    best, cosine = audit.summaries[names[0]], audit.summaries.get("cosine_score")
    passes = proxy_cost(best.proxy, audit.total, is_shared=True)
    gain = None if cosine in (None, best) else audit.compare_proxies(best, cosine)
    labels = list(map(_proxy_label, names))
    return AUDIT_TEXTS.render("best", audit, labels, best.spearman, gain, passes)


def list_unanswered(audit: ModelAudit) -> list[str]:
    """Return sentences about comparisons that could not be made because data are missing."""
    return AUDIT_TEXTS.render_all("lacking", audit.left_out, audit.spreads.get(DROP))


# Tables and charts


def audit_tables(audit: ModelAudit) -> list[Table]:
    """Build all tables of the report about one model."""
    tables = [_proxy_table(audit), _benchmark_table(audit), _disagreement_table(audit)]
    return [*tables, _variance_table(audit)] if audit.spreads else tables


def _proxy_table(audit: ModelAudit) -> Table:
    summaries, total = audit.summaries, audit.total

    def column(label: str, unit: FigureUnit, value: Callable[..., ColumnValue]) -> Column[str]:
        def entry(proxy: str) -> ColumnValue:
            return value(summaries[proxy]) if proxy in summaries else None

        return Column(label, unit, entry, reason)

    def reason(proxy: str) -> str:
        reasons = (cell.agreements[proxy].spearman.reason for cell in audit.cells)
        return next(filter(None, reasons), "undefined")

    def rank(summary: ProxySummary) -> Estimate:
        return rank_estimate(audit.ranks[summary.proxy])

    def inner(summary: ProxySummary) -> Estimate:
        return Estimate(summary.inner, reason=_inner_reason(summary.cells))

    columns = [
        Column("proxy", "text", _proxy_label),
        replace(column("its rank", "count", rank), interval=True),
        column("mean Spearman", "coefficient", lambda s: s.spearman),
        column("inner layers", "coefficient", inner),
        column("mean Kendall", "coefficient", lambda s: s.kendall),
        column(f"top-{TOP_LAYERS} overlap", "percent", lambda s: s.overlaps[0]),
        column(f"bottom-{TOP_LAYERS} overlap", "percent", lambda s: s.overlaps[1]),
        column("by chance", "percent", lambda s: s.overlaps[2]),
        column("passes, naive", "times", lambda s: proxy_cost(s.proxy, total, is_shared=False)),
        column("passes, shared", "times", lambda s: proxy_cost(s.proxy, total, is_shared=True)),
        column("p (Holm)", "p", lambda s: audit.adjusted[s.proxy]),
    ]
    return build_table(
        f"{audit.name}: agreement between the rankings of layers by proxy and by {audit.drop}",
        columns,
        [*summaries, *(proxy for proxy in LAYER_PROXIES if proxy not in summaries)],
        *AUDIT_TEXTS.render_all("proxy_notes", audit, proxy_cost(DROP, total, is_shared=True)),
    )


def _inner_reason(cells: Sequence[AuditedCell]) -> str:
    if all(len(cell.inner) < MIN_LAYERS_RANKED for cell in cells):
        return "fewer than three inner layers"
    return "all inner layers have the same drop or the same proxy score"


@dataclass(frozen=True)
class BenchmarkProxyRow:
    """Table row with the correlations of one proxy with the accuracy drop on one benchmark."""

    benchmark: str = labelled("benchmark")
    proxy: str = labelled("proxy")
    spearman: Estimate = labelled("Spearman", "coefficient")
    inner: Estimate = labelled("inner layers", "coefficient")
    kendall: Estimate = labelled("Kendall", "coefficient")
    pearson: Estimate = labelled("Pearson", "coefficient")
    p_value: Estimate = labelled("p", "p")
    adjusted: Estimate = labelled("p (Benjamini-Hochberg)", "p")


def _benchmark_table(audit: ModelAudit) -> Table:
    pairs = [(cell, proxy) for cell in audit.cells for proxy in LAYER_PROXIES]
    p_values = [cell.agreements[proxy].spearman.p_value for cell, proxy in pairs]
    defined = [p for p in p_values if p is not None]
    q_values = iter(stats.false_discovery_control(defined) if defined else [])
    rows = []
    for (cell, proxy), p in zip(pairs, p_values, strict=True):
        agreement = cell.agreements[proxy]
        reason = agreement.spearman.reason or _inner_reason([cell])
        q = None if p is None else float(next(q_values))
        figures = (agreement.inner, agreement.kendall, agreement.pearson, p, q)
        entries = (Estimate(figure, reason=reason) for figure in figures)
        names = cell.label, _proxy_label(proxy)
        rows.append(BenchmarkProxyRow(*names, agreement.spearman, *entries))
    title = f"{audit.name}: correlation of each proxy with the {audit.drop}, for each benchmark"
    return figure_table(BenchmarkProxyRow, title, rows, *AUDIT_TEXTS.render_all("benchmark_notes"))


def _disagreement_table(audit: ModelAudit) -> Table:
    units: dict[str, FigureUnit] = {"share": "percent", "chance": "percent"}
    units |= {"shuffled_p": "p", "smooth_p": "p"}
    labels = (
        ("ranks differ", "by chance", "p, shuffled", "p, as smooth"),
        ("majorly", "majorly by chance", "majorly: p, shuffled", "majorly: p, as smooth"),
    )

    def column(label: str, name: str, index: int) -> Column[str]:
        pairs = audit.disagreements
        return Column(label, units[name], lambda proxy: getattr(pairs[proxy][index], name))

    columns = [Column("proxy", "text", _proxy_label)]
    for index, group in enumerate(labels):
        columns += [column(*pair, index) for pair in zip(group, units, strict=True)]
    figures = (MAJOR_SHARE, PAPER_DIFFERENT, PAPER_MAJOR)
    notes = AUDIT_TEXTS.render_all("disagreement_notes", *figures)
    title = f"{audit.name}: share of layers whose ranks by proxy and by {audit.drop} differ"
    return build_table(title, columns, audit.disagreements, *notes)


def _variance_table(audit: ModelAudit) -> Table:
    spreads = audit.spreads
    tests = [spread.test for spread in spreads.values()]
    p_values = holm([None if test is None else test.p_value for test in tests])
    adjusted = dict(zip(spreads, p_values, strict=True))
    reference = "this row is the accuracy drop, with which all proxies are compared"

    def larger(name: str) -> str | None:
        test = spreads[name].test
        return f"{test.larger} of {test.n} layers" if test else None

    def block_p(name: str) -> float | None:
        test = spreads[name].test
        return test.block_p if test else None

    def variance(label: str, figure: str) -> Column[str]:
        return Column(label, "coefficient", lambda name: getattr(spreads[name], figure), reason)

    def reason(name: str) -> str:
        return spreads[name].reason or reference

    columns = [
        Column("measure", "text", _proxy_label),
        variance("variance", "raw"),
        Column("drop varies more in", "text", larger, reference),
        Column("Wilcoxon p (Holm)", "p", adjusted.__getitem__, reference),
        Column(f"p in blocks of {SIGN_BLOCK}", "p", block_p, reference),
        variance("variance on reliable benchmarks", "noisy"),
        variance("variance without noise", "clean"),
        variance("variance of the drop minus variance of the measure, without noise", "excess"),
    ]
    title = f"{audit.name}: variance over benchmarks of a layer's standardised relevance (z-score)"
    notes = AUDIT_TEXTS.render_all("variance_notes", audit, MIN_RELIABILITY)
    return build_table(title, columns, spreads, *notes)


def _proxy_label(name: str) -> str:
    return LAYER_PROXIES[name].label if name in LAYER_PROXIES else name


def audit_charts(audit: ModelAudit) -> list[StudyChart]:
    """Build all charts of the report about one model."""
    return [*_cost_charts(audit), *_depth_charts(audit), *_rank_maps(audit)]


def _cost_charts(audit: ModelAudit) -> Iterator[LineChart]:
    budgets, curves, _ = audit.prediction_by_cost
    labels = {name: audit.drop if name == DROP else _proxy_label(name) for name in curves}
    lines = {labels[name]: row for name, row in curves.items() if {*row} != {None}}
    if lines:
        title = f"{audit.name}: how well each proxy predicts the drop, by computing cost"
        axes = (
            "number of forward passes for one benchmark",
            "Spearman correlation with the drop on other documents",
        )
        yield line_chart(title, axes, "coefficient", budgets, lines, log_x=True)


def _depth_charts(audit: ModelAudit) -> Iterator[LineChart]:
    best = [name for name in audit.summaries if audit.ranks[name] == (1, 1)]
    summaries = [s for s in audit.summaries.values() if s.proxy in ("cosine_score", *best)]
    cells = [c for c in audit.cells if summaries and all(c in s.cells for s in summaries)]
    if cells:
        profiles = {audit.drop: mean_profiles(DROP, cells)}
        profiles |= {_proxy_label(s.proxy): mean_profiles(s.proxy, cells) for s in summaries}
        lines = {name: midranks(rows).mean(axis=0) for name, rows in profiles.items()}
        title = f"{audit.name}: mean rank of each layer over benchmarks"
        axes = ("layer (0-based)", "rank, the least relevant is 1")
        yield line_chart(title, axes, "count", cells[0].layers, lines)


def _rank_maps(audit: ModelAudit) -> Iterator[StudyChart]:
    cells = [c for c in audit.cells if c.agreements["cosine_score"].spearman.value is not None]
    if not cells:
        return
    columns = sorted({layer for cell in cells for layer in cell.layers})
    values, marks = [], []
    for cell in cells:
        x, y = (midranks(cell.measures[name].means()) for name in ("cosine_score", DROP))
        differences = dict(zip(cell.layers, (x - y).tolist(), strict=True))
        values.append(tuple(map(differences.get, columns)))
        runs = cell.record.whole_layers
        scores = min_ranks([run.cosine_score for run in runs])
        rows = zip(runs, scores, cell_ranks(cell.record, runs), strict=True)
        wrong = {run.change.layer for run, n, (best, worst) in rows if not best <= n <= worst}
        marks.append(tuple(layer in wrong for layer in columns))
    yield MapChart(
        title=f"{audit.name}: rank by cosine score minus rank by measured {audit.drop}",
        x="layer (0-based)",
        y="benchmark",
        name=f"rank by cosine score minus rank by {audit.drop}",
        unit="count",
        columns=tuple(columns),
        rows=tuple(cell.label for cell in cells),
        values=tuple(values),
        shown=tuple(marks),
        shown_by="the rank by cosine score differs significantly from the rank by "
        f"{audit.drop} (corrected for the number of layers)",
    )

"""The audit: every proxy of a layer's relevance against the accuracy that its removal costs."""

from __future__ import annotations

from tracker.core.config import CellRequest
from tracker.core.errors import RequestError
from tracker.core.findings import FoundChart
from tracker.core.formats import counted, ends, p_value, points, two_digits
from tracker.core.proxies import PROXIES, passes
from tracker.core.records import WHOLE_LAYER, Kind
from tracker.core.tables import Table
from tracker.report.wording import benchmark_labels, model_labels
from tracker.stats.resampling import bias_corrected_interval
from tracker.studies.audit.charts import charts_of
from tracker.studies.audit.figures import ModelAudit, Summary, pooled
from tracker.studies.audit.measures import DROP, audited
from tracker.studies.audit.tables import tables_of
from tracker.studies.base import (
    FEWEST,
    Study,
    StudyContext,
    StudyResult,
    Subject,
    grouped,
    removing_whole_layers,
)

PAPER = (0.15, 0.46)
"""The paper's coefficients over inner layers and benchmarks, without their minus: y is the accuracy
after removal."""
PAPER_DIFFER, PAPER_MAJORLY = 0.938, 0.536
_ONE_BENCHMARK = "needs two benchmarks of this model above chance"


class Audit(Study):
    """Sets every proxy beside the accuracy drop, per model and benchmark, with what each costs."""

    name = "audit"
    question = (
        "Which proxy of a layer's relevance tells what removing the layer costs, and which is "
        "worth its compute?"
    )
    about = """
    A proxy is a figure that stands in for the accuracy drop, as the cosine score does.
    This study removes each whole layer in EXPERIMENT, measures the accuracy that it costs, and sets
    the proxies beside it: cosine score, angular distance, relative update, first-order Taylor,
    logit-lens changes, perplexity, KL and Jensen-Shannon divergence, the gold answer's
    log-probability. It says how well each orders the layers, beside chance, and for how many
    forward passes; with two benchmarks or more also whether relevance depends on the task. At
    least three layers; better all of them.

    \b
    Examples:
      tracker study audit experiments/demo.yaml
      tracker study audit experiments/demo.yaml --results results --track none
    """
    settings = ()

    def requests(self, asked: StudyContext) -> list[CellRequest]:
        """List the cells of the file, each with its whole single layers of the intact model."""
        cells: dict[CellRequest, None] = {}
        for cell in asked.experiment.cells():
            only = cell.only and tuple(
                run for run in cell.only if Kind(run[0], run[1], run[3]) == WHOLE_LAYER
            )
            # A cap on the runs may leave none of these.
            if only != ():
                cells[removing_whole_layers(cell, removed=(), only=only)] = None
        if not any(len(cell.layers) >= FEWEST for cell in cells):
            raise RequestError(
                "the audit orders layers, and this file names fewer than three; write e.g. layer: "
                "{min: 0, max: 29}"
            )
        return list(cells)

    def say(self, asked: StudyContext, subjects: list[Subject]) -> StudyResult:
        """Compare, model by model."""
        by_model = grouped(subjects, lambda subject: subject.record.model.key)
        names = model_labels([mine[0].record.model for mine in by_model])
        answers: list[str] = []
        tables: list[Table] = []
        charts: list[FoundChart] = []
        lacking: list[str] = []
        for name, mine in zip(names, by_model, strict=True):
            labels = benchmark_labels([subject.record for subject in mine])
            audit = ModelAudit(name, audited(asked, mine, labels))
            answers += answers_of(audit)
            tables += tables_of(audit)
            charts += charts_of(audit)
            lacking += lacking_of(audit)
        return StudyResult(answers, tables, charts, lacking, _ASSUMPTIONS)


def answers_of(audit: ModelAudit) -> list[str]:
    """Sentences, contradictions of the paper first."""
    if not audit.summaries:
        return [f"{audit.name}: no proxy can be set beside a drop; the tables say why."]
    said = [*_pooled(audit), *_differ(audit), *_task(audit), _best(audit), *_worth(audit)]
    ordered = sorted(said, key=lambda each: not each[0])
    return [f"{audit.name}: {sentence}" for _, sentence in ordered]


def _pooled(audit: ModelAudit) -> list[tuple[bool, str]]:
    """The paper's own figure: cosine over inner layers × benchmarks."""
    summary = next((s for s in audit.summaries if s.proxy == "cosine_score"), None)
    if summary is None:
        return []
    found = pooled(summary.cells)
    if found is None:
        return []
    value, low, high = found
    benchmarks = sum(bool(c.inner) and c.record.higher_is_better for c in summary.cells)
    if low > PAPER[1]:
        verdict = f"more than in any of the paper's models (at most {PAPER[1]})"
    elif high < PAPER[0]:
        verdict = f"less than in any of the paper's models (at least {PAPER[0]})"
    else:
        verdict = f"not told apart from the paper's {PAPER[0]} to {PAPER[1]}"
    against = low > PAPER[1] or high < PAPER[0]
    start = "against the paper, " if against else ""
    return [
        (
            against,
            f"{start}over inner layers × {counted(benchmarks, 'benchmark')} the cosine score and "
            f"the accuracy drop correlate at r = {two_digits(value)}{ends(low, high)}, "
            f"{verdict}. Benchmark by benchmark, all layers, Spearman is "
            f"{_mean(summary)} on average ({audit.on}; Holm's p over all proxies "
            f"{p_value(audit.adjusted['cosine_score'])}).",
        )
    ]


def _differ(audit: ModelAudit) -> list[tuple[bool, str]]:
    if "cosine_score" not in audit.orders:
        return []
    exact, major = audit.orders["cosine_score"]
    return [
        (
            False,
            f"cosine score and {audit.drop} rank {points(exact.share)} % of layers apart, "
            f"where random orders rank {points(exact.chance)} % apart (the paper: "
            f"{points(PAPER_DIFFER)} %, without a chance level), and "
            f"{points(major.share)} % by more than a quarter of the layers, where random "
            f"orders do {points(major.chance)} % (p = {p_value(major.smooth_p)} of agreeing "
            f"better than chance; the paper: {points(PAPER_MAJORLY)} % by a threshold that it "
            "does not say).",
        )
    ]


def _task(audit: ModelAudit) -> list[tuple[bool, str]]:
    """Claim 3."""
    cosine, drop = (audit.spreads.get(name) for name in ("cosine_score", DROP))
    if cosine is None or drop is None or cosine.test is None:
        return []
    test, every = cosine.test, audit.above_chance
    sentence = (
        f"over {counted(len(every), 'benchmark')} a layer's z-scored accuracy drop varies by "
        f"{two_digits(drop.raw)}, its cosine score by {two_digits(cosine.raw)} (larger in "
        f"{test.larger} of {test.n} layers, Wilcoxon p = {p_value(test.p_value)}, in blocks of "
        f"neighbouring layers {p_value(test.block_p)})"
    )
    excess = cosine.excess
    if drop.clean is None or cosine.clean is None or excess is None or excess.value is None:
        return [(False, f"{sentence}; how much of it is noise of the documents is open.")]
    before = "without the noise of the documents the drop varies"
    if len(audit.reliable) < len(every):
        names = ", ".join(cell.label for cell in audit.reliable)
        before = (
            f"on the {len(audit.reliable)} of them whose drops are more signal than noise "
            f"({names}) the drop varies by {two_digits(drop.noisy or 0.0)}, and without the noise "
            "of the documents"
        )
    sentence += (
        f"; {before} by {two_digits(drop.clean)}, the cosine score by {two_digits(cosine.clean)}, "
        f"a difference of {two_digits(excess.value)}{ends(excess.low, excess.high)}, so that "
    )
    if excess.low is not None and excess.low > 0:
        return [(False, f"{sentence}relevance depends on the task more than cosine says.")]
    if excess.high is not None and excess.high < 0:
        sentence += "relevance depends on the task less than cosine says."
        return [(True, f"against the paper's third claim, {sentence}")]
    sentence += "whether relevance depends on the task more than cosine says is open."
    return [(False, sentence)]


def _best(audit: ModelAudit) -> tuple[bool, str]:
    best = audit.summaries[0]
    sentence = (
        f"{PROXIES[best.proxy].label} orders the layers best, with a mean Spearman of {_mean(best)}"
    )
    cosine = next((s for s in audit.summaries if s.proxy == "cosine_score"), None)
    if cosine is not None and cosine is not best and cosine.cells == best.cells:
        value = best.spearman - cosine.spearman
        low, high = bias_corrected_interval(value, best.resampled - cosine.resampled)
        sentence += (
            f": {two_digits(value)}{ends(low, high)} more than the cosine score, for "
            f"{passes(best.proxy, audit.total, shared=True):g} times its forward passes"
        )
    return False, f"{sentence}. It is the best of {len(audit.summaries)} on these documents."


def _worth(audit: ModelAudit) -> list[tuple[bool, str]]:
    """Which one to trust, by what there is to spend."""
    budgets, by_name, halved = audit.at_cost
    stretches: list[tuple[str, float, float, float]] = []
    for i, budget in enumerate(budgets):
        there = {name: row[i] for name, row in by_name.items() if row[i] is not None}
        if not there:
            continue
        best = max(there, key=lambda name: there[name] or 0.0)
        value = there[best] or 0.0
        if stretches and stretches[-1][0] == best:
            stretches[-1] = (best, stretches[-1][1], budget, value)
        else:
            stretches.append((best, budget, budget, value))
    if not stretches:
        return []
    parts = [
        f"{PROXIES[name].label if name in PROXIES else f'the {audit.drop} itself'} "
        f"{'at' if low == high else 'from'} {low:,.0f}"
        f"{'' if low == high else f' to {high:,.0f}'} (Spearman {two_digits(value)} at the end)"
        for name, low, high, value in stretches
    ]
    most = (
        ""
        if halved is None
        else (
            " The drop of half of the documents predicts that of the other half at "
            f"{two_digits(halved)}: it is noisy, and a proxy with less noise may do better."
        )
    )
    return [
        (
            False,
            "which to trust depends on the forward passes that there are to spend on a "
            f"benchmark; of other documents' drops the best predictor is {', '.join(parts)}."
            f"{most}",
        )
    ]


def _mean(summary: Summary) -> str:
    return f"{two_digits(summary.spearman)}{ends(summary.low, summary.high)}"


def lacking_of(audit: ModelAudit) -> list[str]:
    """What could not be said, with what to do."""
    said = []
    if audit.left_out:
        said.append(
            f"{audit.name}: means over benchmarks leave out what cannot stand beside the others: "
            f"{'; '.join(audit.left_out)}; give every benchmark once, with the same layers"
        )
    if not audit.spreads:
        said.append(
            f"{audit.name}: whether relevance depends on the task (claim 3) {_ONE_BENCHMARK}; "
            "add e.g. benchmark: {values: [arc_easy, piqa, hellaswag]} and run the same "
            "command again"
        )
    elif audit.spreads[DROP].clean is None:
        said.append(
            f"{audit.name}: how much of the drop's variance from benchmark to benchmark is "
            f"noise of the documents: {audit.spreads[DROP].reason}; raise sample: "
            "and run the same command again"
        )
    return said


_ASSUMPTIONS = (
    "Documents are drawn independently within each benchmark; intervals say what other documents "
    "would give for these layers and benchmarks, not what other benchmarks would.",
    "p-values of coefficients redraw one series as smooth over depth as it is (AR(1) under a "
    "monotonic function; Theiler et al. 1992), not freely shuffled; means over benchmarks relabel "
    "the layers of all benchmarks alike. Holm (1979) over proxies, Benjamini-Hochberg (1995) over "
    "proxies × benchmarks.",
    "Noise of the documents is taken off a variance as the sampling variance of each drop, from "
    "the documents' own drops; benchmarks share no documents. The interval of what is left is the "
    "jackknife over documents (Efron and Tibshirani 1993).",
    "A logit-lens change is a token whose most likely successor by the model's own final norm and "
    "head (nostalgebraist 2020) differs between a layer's input and its output. First-order Taylor "
    "is the size of the derivative of a document's loss by a gate on the layer's update, averaged "
    "over documents (Michel et al. 2019, Molchanov et al. 2019).",
)

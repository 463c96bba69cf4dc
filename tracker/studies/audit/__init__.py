"""The audit: every proxy of a layer's relevance against the accuracy that its removal costs."""

from __future__ import annotations

from tracker.core.changes import WHOLE_LAYER
from tracker.core.config import CellRequest
from tracker.core.errors import RequestError
from tracker.core.formats import counted, listed, p_value, points, two_digits, with_interval
from tracker.core.grouping import grouped
from tracker.core.proxies import OF_LAYERS, passes
from tracker.report.wording import benchmark_labels, model_labels
from tracker.studies.audit.figures import ModelAudit, pooled
from tracker.studies.audit.layout import charts_of, tables_of
from tracker.studies.audit.measures import DROP, Audited
from tracker.studies.base import (
    FEWEST,
    Study,
    StudyContext,
    StudyResult,
    Subject,
    removing_whole_layers,
    side,
)

PAPER = (0.15, 0.46)
"""The paper's coefficients over inner layers and benchmarks, without their minus: y is the accuracy
after removal."""
PAPER_DIFFER, PAPER_MAJORLY = 0.938, 0.536
_AGAINST = "against the paper"


class Audit(Study):
    """Sets every proxy beside the accuracy drop, per model and benchmark, with what each costs."""

    question = (
        "Which proxy of a layer's relevance tells what removing the layer costs, and which is "
        "worth its compute?"
    )

    def requests(self, asked: StudyContext) -> list[CellRequest]:
        """List the cells of the file, each with its whole single layers of the intact model."""
        cells: dict[CellRequest, None] = {}
        for cell in asked.experiment.cells():
            changes = cell.changes and tuple(c for c in cell.changes if c.kind == WHOLE_LAYER)
            # A cap on the runs may leave none of these.
            if changes != ():
                cells[removing_whole_layers(cell, removed=(), changes=changes)] = None
        if not any(len(cell.layers) >= FEWEST for cell in cells):
            raise RequestError(
                "the audit orders layers, and this file names fewer than three; write layer: "
                "{value: all}"
            )
        return list(cells)

    def say(self, asked: StudyContext, subjects: list[Subject]) -> StudyResult:
        """Compare, model by model."""
        by_model = grouped(subjects, lambda subject: subject.record.model.key).values()
        names = model_labels([mine[0].record.model for mine in by_model])
        result = StudyResult(_ASSUMPTIONS)
        for name, mine in zip(names, by_model, strict=True):
            labels = benchmark_labels([subject.record for subject in mine])
            cells = [Audited(asked, *pair) for pair in zip(mine, labels, strict=True)]
            audit = ModelAudit(name, cells)
            result.answers += answers_of(audit)
            result.tables += tables_of(audit)
            result.charts += charts_of(audit)
            result.lacking += lacking_of(audit)
        return result


def answers_of(audit: ModelAudit) -> list[str]:
    """Sentences, contradictions of the paper first."""
    if not audit.summaries:
        return [f"{audit.name}: no proxy can be set beside a drop; the tables say why."]
    sentences = (_pooled(audit), _differ(audit), _task(audit), _best(audit), _worth(audit))
    ordered = sorted(filter(None, sentences), key=lambda text: not text.startswith(_AGAINST))
    return [f"{audit.name}: {sentence}" for sentence in ordered]


def _pooled(audit: ModelAudit) -> str:
    """The paper's own figure: cosine over inner layers × benchmarks."""
    summary = audit.summaries.get("cosine_score")
    if summary is None or (found := pooled(summary.cells)) is None:
        return ""
    low, high = PAPER
    start, verdict = "", f"not told apart from the paper's {low} to {high}"
    if side(found, high) > 0:
        start, verdict = f"{_AGAINST}, ", f"more than in any of the paper's models (at most {high})"
    elif side(found, low) < 0:
        start, verdict = f"{_AGAINST}, ", f"less than in any of the paper's models (at least {low})"
    benchmarks = sum(bool(c.inner) and c.record.higher_is_better for c in summary.cells)
    return (
        f"{start}over inner layers × {counted(benchmarks, 'benchmark')} the cosine score and "
        f"the accuracy drop correlate at r = {with_interval(found)}: "
        f"{verdict}. Benchmark by benchmark, all layers, Spearman is "
        f"{with_interval(summary.spearman)} on average ({audit.on}; Holm's p over all proxies "
        f"{p_value(audit.adjusted['cosine_score'])})."
    )


def _differ(audit: ModelAudit) -> str:
    if "cosine_score" not in audit.orders:
        return ""
    exact, major = audit.orders["cosine_score"]
    return (
        f"cosine score and {audit.drop} give {points(exact.share)} % of the layers another rank, "
        f"random orders {points(exact.chance)} % (the paper: {points(PAPER_DIFFER)} %, without a "
        f"chance level). {points(major.share)} % are more than a quarter of the layers apart, "
        f"with random orders {points(major.chance)} % (p = {p_value(major.smooth_p)} of agreeing "
        f"better than chance; the paper: {points(PAPER_MAJORLY)} % by a threshold that it does "
        "not say)."
    )


def _task(audit: ModelAudit) -> str:
    """Claim 3."""
    cosine, drop = (audit.spreads.get(name) for name in ("cosine_score", DROP))
    if cosine is None or drop is None or cosine.test is None:
        return ""
    test, above = cosine.test, audit.above_chance
    sentence = (
        f"over {counted(len(above), 'benchmark')} a layer's z-scored accuracy drop varies by "
        f"{two_digits(drop.raw)}, its cosine score by {two_digits(cosine.raw)} (larger in "
        f"{test.larger} of {test.n} layers, Wilcoxon p = {p_value(test.p_value)}, with "
        f"neighbouring layers in blocks p = {p_value(test.block_p)})"
    )
    excess = cosine.excess
    if drop.clean is None or cosine.clean is None or excess is None or excess.value is None:
        return f"{sentence}. How much of it is noise of the documents is open."
    before = "Without the noise of the documents the drop varies"
    if len(audit.reliable) < len(above):
        names = ", ".join(cell.label for cell in audit.reliable)
        before = (
            f"On the {len(audit.reliable)} of them whose drops are more signal than noise "
            f"({names}) the drop varies by {two_digits(drop.noisy or 0.0)}, and without the noise "
            "of the documents"
        )
    sentence += (
        f". {before} by {two_digits(drop.clean)}, the cosine score by {two_digits(cosine.clean)}, "
        f"a difference of {with_interval(excess)}: "
    )
    if side(excess) > 0:
        return f"{sentence}relevance depends on the task more than cosine says."
    if side(excess) < 0:
        sentence += "relevance depends on the task less than cosine says."
        return f"{_AGAINST}'s third claim, {sentence}"
    return f"{sentence}whether relevance depends on the task more than cosine says is open."


def _best(audit: ModelAudit) -> str:
    """Return which proxy orders the layers best, where comparisons with all others show it."""
    if len(audit.summaries) == 1:
        return ""
    first = [name for name, (best, _) in audit.ranks.items() if best == 1]
    labels, of = [OF_LAYERS[name].label for name in first], len(audit.summaries)
    if len(first) > 1 and len(first) == of:
        return f"of {of} proxies none is shown to order the layers better than another."
    if len(first) > 1:
        return (
            f"which of {of} proxies orders the layers best is open; it may be "
            f"{listed(labels, 'or')}."
        )
    best, cosine = audit.summaries[first[0]], audit.summaries.get("cosine_score")
    sentence = (
        f"{labels[0]} orders the layers best of {of} proxies, with a mean Spearman of "
        f"{with_interval(best.spearman)}"
    )
    if cosine is not None and cosine is not best:
        sentence += (
            f": {with_interval(audit.apart(best, cosine))} more than the cosine score, for "
            f"{passes(best.proxy, audit.total, shared=True):g} times its forward passes"
        )
    return f"{sentence} (95 % confidence for all comparisons)."


def _worth(audit: ModelAudit) -> str:
    """Say how noisy the drop is that a proxy is to predict."""
    _, by_name, halved = audit.at_cost
    if not by_name or halved is None:
        return ""
    return (
        f"the drop of half of the documents predicts that of the other half at "
        f"{two_digits(halved)}. Where that is low, a proxy with less noise may do better. The "
        "chart shows what each predicts for its forward passes, without intervals: which to "
        "trust at a price is open."
    )


def lacking_of(audit: ModelAudit) -> list[str]:
    """What could not be said, with what to do."""
    lacking = []
    if audit.left_out:
        lacking.append(
            f"{audit.name}: means over benchmarks leave out what cannot stand beside the others: "
            f"{'; '.join(audit.left_out)}; give every benchmark once, with the same layers"
        )
    if not audit.spreads:
        lacking.append(
            f"{audit.name}: whether relevance depends on the task (claim 3) needs two benchmarks "
            "of this model above chance; add e.g. benchmark: {values: [arc_easy, piqa, hellaswag]} "
            "and run the same command again"
        )
    elif audit.spreads[DROP].clean is None:
        lacking.append(
            f"{audit.name}: how much of the drop's variance from benchmark to benchmark is "
            f"noise of the documents: {audit.spreads[DROP].reason}; raise sample: "
            "and run the same command again"
        )
    return lacking


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

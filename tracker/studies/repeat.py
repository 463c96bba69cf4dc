"""Study: test whether a model improves if it runs a span of layers a second time.

A span is a sequence of neighbouring layers. The study chooses spans on one half of the documents,
and tests these spans on the other half. The best of hundreds of spans looks good by chance alone,
so the study reports the largest gain that chance alone would produce.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from tracker.analysis.claims import run_verdicts
from tracker.schema.changes import Change
from tracker.schema.config import CellRequest
from tracker.schema.errors import RequestError
from tracker.schema.estimates import Estimate
from tracker.schema.formats import metric_format
from tracker.schema.records import CellRecord, RunRecord
from tracker.schema.tables import Table
from tracker.search.report import save_command
from tracker.stats.effects import BestByChance, best_by_chance
from tracker.studies.base import Study, StudyContext, StudyResult, Subject, cell_label, study_texts
from tracker.studies.layout import figure_table, labelled
from tracker.studies.registry import RepeatSettings

REPEAT_TEXTS = study_texts("repeat")
MAX_SPANS_TESTED = 5
"""Maximum number of chosen spans that are tested on other documents."""
_VERDICT_WORDS = {"helps": "better", "costs": "worse", "open": "open"}


@dataclass(frozen=True)
class TestedSpan:
    """Table row: repeated span of layers, with its gains on calibration and on test documents."""

    run: RunRecord
    span: str = labelled("passed")
    promised: float | None = labelled("gain on calibration documents", "change")
    gain: Estimate = labelled("gain on test documents", "change")
    gold: Estimate = labelled("gold log-prob gain", "nats")
    verdict: str = labelled("compared to the intact model")


class Repeat(Study[RepeatSettings]):
    """Study that tests whether running a span of layers twice improves a model."""

    name = "repeat"
    question = "Does repeating some layers make a model better?"
    races = True
    intact = True
    chooses = True
    texts = REPEAT_TEXTS

    def expand(self, cell: CellRequest, context: StudyContext) -> Iterator[CellRequest]:
        """Yield the request that repeats one span of layers at a time, on calibration documents."""
        if cell.until is not None and cell.until.kind != "prune":
            raise RequestError(REPEAT_TEXTS.render("wrong_question", cell, MAX_SPANS_TESTED))
        update = {"components": ("layer",), "interventions": ("repeat",)}
        changes = cell.changes.model_copy(update=update)
        if "repeat" not in cell.changes.interventions:
            changes = changes.with_exact(all_spans(changes.layers))
        yield replace(cell, changes=changes).on_part("calibration")

    def answer(self, context: StudyContext, subjects: list[Subject]) -> StudyResult:
        """Choose the best spans of layers, and measure their gains on test documents."""
        result = StudyResult()
        chosen = [choose_runs(subject.record) for subject in subjects]
        pairs = [*zip(subjects, chosen, strict=True)]
        tests = {s.request: _test_request(s.request, runs) for s, runs in pairs if runs}
        result.ran = context.run([*tests.values()])
        for subject, runs in pairs:
            if not runs:
                result.lack(subject.record.title, "no span of layers has a defined gain")
                continue
            request = tests[subject.request]
            test = context.subject(request)
            spans = tested_spans(runs, test.record) if test is not None else []
            result.rests_on += [test.record.record_key] if test is not None else []
            result.add(_write_answer(subject, spans), _spans_table(subject.record, spans))
            if better := [span.run.change for span in spans if span.verdict == "better"]:
                result.exports.append(_export_command(better[0], request, context.ledger.root))
        return result


def all_spans(layers: Sequence[int]) -> list[Change]:
    """List all spans of neighbouring layers, as changes that run the span twice."""
    spans = (tuple(range(a, a + n)) for a in layers for n in range(1, len(layers) + 1))
    layer_set = {*layers}
    return [
        Change(layers=span, intervention="repeat") for span in spans if layer_set.issuperset(span)
    ]


def choose_runs(record: CellRecord) -> list[RunRecord]:
    """Return the runs (repeated spans) with the largest gains on calibration documents."""
    runs = [run for run in record.runs if run.drop.value is not None]
    if record.answer is not None:
        chosen = {answer.change for answer in record.answer.runs if answer.chosen}
        runs = [run for run in runs if run.change in chosen]
    return sorted(runs, key=_loss_key)[:MAX_SPANS_TESTED]


def _loss_key(run: RunRecord) -> tuple[float, float]:
    return run.drop.value or 0.0, run.gold_drop.value or 0.0


def _test_request(request: CellRequest, runs: Sequence[RunRecord]) -> CellRequest:
    """Return a request that measures the given runs (repeated spans) on the test documents."""
    test = replace(request, until=None).on_part("test")
    return test.with_changes(run.change for run in runs)


def tested_spans(runs: Sequence[RunRecord], test: CellRecord) -> list[TestedSpan]:
    """Return the chosen spans in `runs` with their results on the test documents."""
    tested = {run.change: run for run in test.runs}
    runs = [run for run in runs if run.change in tested]
    verdicts = run_verdicts(test, [tested[run.change] for run in runs])
    spans = []
    for run in runs:
        result, verdict = tested[run.change], _VERDICT_WORDS[verdicts[run.change]]
        gains = (-run.drop).value, -result.drop, -result.gold_drop
        spans.append(TestedSpan(result, _span_name(run), *gains, verdict))
    return spans


def _span_name(run: RunRecord) -> str:
    return f"{run.change.layer_words} {run.change.times}"


def _write_answer(subject: Subject, spans: Sequence[TestedSpan]) -> str:
    """Write the gains of the best span on calibration and on test documents.

    The text also states the largest gain that chance alone would produce.
    """
    best = min((run for run in subject.record.runs if run.drop.value is not None), key=_loss_key)
    tested = [span for span in spans if span.run.change == best.change] or spans
    promised, chance = Estimate((-best.drop).value), _best_by_chance(subject)
    figures = (best, _span_name(best), promised, chance, tested[0] if tested else None, spans)
    return REPEAT_TEXTS.render("answer", subject, *figures)


def _best_by_chance(subject: Subject) -> BestByChance | None:
    """Estimate how large the best gain would be by chance, if no span had an effect.

    Returns None if the measurement used a stopping rule, or if no span has a finite gain.
    """
    if subject.record.answer is not None:
        return None
    outcomes = subject.outcomes()
    paired = outcomes.metric_outcomes([outcomes.ablation(run) for run in outcomes.runs])
    finite = np.isfinite(paired.drops).all(axis=0)
    return best_by_chance(-paired.drops[:, finite], paired.weights) if finite.any() else None


def _export_command(change: Change, test: CellRequest, results: Path) -> str:
    """Return the shell command that saves a copy of the model with a span of layers repeated."""
    options = ["--repeat", change.target]
    options += ["--repeats", str(change.repeats)] if change.repeats != 2 else []
    return save_command([*options, "--output", "deeper"], test, results)


def _spans_table(record: CellRecord, spans: Sequence[TestedSpan]) -> Table:
    """Build the table of chosen spans, with the gain on calibration and on test documents."""
    n_tests = spans[0].run.n if spans else 0
    title = f"{cell_label(record)}: the spans with the largest gains on calibration documents"
    notes = REPEAT_TEXTS.render_all("span_notes", record, n_tests)
    return figure_table(TestedSpan, title, spans, *notes, measure=metric_format(record))

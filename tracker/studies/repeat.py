"""Study: test whether a model improves if some layers are passed again.

One half of the documents chooses among all spans. The other, disjoint half measures the chosen
spans. The best of hundreds looks good by chance alone, so the answer includes the best by chance.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from tracker.analysis.claims import shown_runs
from tracker.core.changes import Change
from tracker.core.config import CellRequest
from tracker.core.errors import RequestError
from tracker.core.estimates import Estimate
from tracker.core.formats import measure_of
from tracker.core.records import CellRecord, RunRecord
from tracker.core.tables import Table
from tracker.search.report import saving_line
from tracker.stats.effects import BestByChance, best_by_chance
from tracker.studies.base import Study, StudyContext, StudyResult, Subject, name_of, study_texts
from tracker.studies.layout import figure_table, labelled
from tracker.studies.registry import RepeatSettings

TEXTS = study_texts("repeat")
TESTED = 5
"""Spans that are tested on documents that did not choose them."""
VERDICTS = {"helps": "better", "costs": "worse", "open": "open"}


@dataclass(frozen=True)
class TestedSpan:
    """Chosen span, and its result on the other documents."""

    run: RunRecord
    span: str = labelled("passed")
    promised: float | None = labelled("gain where it was chosen", "change")
    gain: Estimate = labelled("gain on test documents", "change")
    gold: Estimate = labelled("gold log-prob gain", "nats")
    verdict: str = labelled("beside the intact model")


class Repeat(Study[RepeatSettings]):
    """See the module."""

    name = "repeat"
    question = "Does passing some layers again make a model better?"
    races = True
    intact = True
    chooses = True
    texts = TEXTS

    def expand(self, cell: CellRequest, context: StudyContext) -> Iterator[CellRequest]:
        """Yield all spans of the cell's layers, or the requested ones, on one half."""
        if cell.until is not None and cell.until.kind != "prune":
            raise RequestError(
                f"{cell.title}: 'until: {cell.until}' asks for other runs than those that cost "
                f"least; write 'until: {{value: prune {TESTED} within 2 pp}}'"
            )
        update = {"components": ("layer",), "interventions": ("repeat",)}
        changes = cell.changes.model_copy(update=update)
        if "repeat" not in cell.changes.interventions:
            changes = changes.exactly(all_spans(changes.layers))
        yield replace(cell, changes=changes).on("calibration")

    def answer(self, context: StudyContext, subjects: list[Subject]) -> StudyResult:
        """Choose spans, test them, and compare both with a choice by chance."""
        result = StudyResult()
        chosen = {subject.request: best_runs(subject.record) for subject in subjects}
        tests = {request: _test_of(request, runs) for request, runs in chosen.items() if runs}
        result.ran = context.run([*tests.values()])
        for subject in subjects:
            if not (runs := chosen[subject.request]):
                result.lack(subject.record.title, "no stretch has a defined gain")
                continue
            test = context.subject(tests[subject.request])
            spans = tested_spans(runs, test.record) if test is not None else []
            if test is not None:
                result.rests_on.append(test.record.place)
            result.add(answer_of(subject, spans), spans_table(subject.record, spans))
            command = _export_command(spans, tests[subject.request], context.ledger.root)
            result.exports += [command] if command else []
        return result


def all_spans(layers: Sequence[int]) -> list[Change]:
    """List all spans of neighbours, each passed once more."""
    present = {*layers}
    return [
        Change(layers=tuple(range(first, first + span)), intervention="repeat")
        for first in layers
        for span in range(1, len(layers) + 1)
        if {*range(first, first + span)} <= present
    ]


def best_runs(record: CellRecord) -> list[RunRecord]:
    """Return the spans that gain most; those of a race's answer where there was one."""
    runs = [run for run in record.runs if run.drop.value is not None]
    if record.answer is not None:
        chosen = {answer.change for answer in record.answer.runs if answer.chosen}
        runs = [run for run in runs if run.change in chosen]
    return sorted(runs, key=_loss)[:TESTED]


def _loss(run: RunRecord) -> tuple[float, float]:
    return run.drop.value or 0.0, run.gold_drop.value or 0.0


def _test_of(request: CellRequest, runs: Sequence[RunRecord]) -> CellRequest:
    """Return the request for the chosen spans on the documents that did not choose."""
    test = replace(request, until=None).on("test")
    return test.with_changes(run.change for run in runs)


def tested_spans(runs: Sequence[RunRecord], test: CellRecord) -> list[TestedSpan]:
    """Return the chosen spans as the test documents show them, the best first."""
    by_change = {run.change: run for run in test.runs}
    pairs = [(run, by_change[run.change]) for run in runs if run.change in by_change]
    verdicts = shown_runs(test, [tested for _, tested in pairs])
    return [
        TestedSpan(
            tested,
            _name(run),
            (-run.drop).value,
            -tested.drop,
            -tested.gold_drop,
            VERDICTS[verdicts[tested.change]],
        )
        for run, tested in pairs
    ]


def _name(run: RunRecord) -> str:
    return f"{run.change.layer_words} {run.change.times}"


def answer_of(subject: Subject, spans: Sequence[TestedSpan]) -> str:
    """Describe the best span's promise, that of chance, and its tested effect."""
    record = subject.record
    best = min((run for run in record.runs if run.drop.value is not None), key=_loss)
    first = next((span for span in spans if span.run.change == best.change), None)
    promised, chance = Estimate((-best.drop).value), _by_chance(subject)
    figures = best, _name(best), promised, chance
    return TEXTS.one("answer", subject, *figures, first or next(iter(spans), None), spans)


def _by_chance(subject: Subject) -> BestByChance | None:
    """Return the best gain of as many spans by chance; None if their documents differ."""
    if subject.record.answer is not None:
        return None
    outcomes = subject.outcomes()
    paired = outcomes.by_metric([outcomes.ablation(run) for run in outcomes.runs])
    finite = np.isfinite(paired.drops).all(axis=0)
    return best_by_chance(-paired.drops[:, finite], paired.weights) if finite.any() else None


def _export_command(spans: Sequence[TestedSpan], test: CellRequest, results: Path) -> str:
    """Return the command that saves the best span that is shown to be better; empty without."""
    for span in spans:
        if span.verdict == "better":
            change = span.run.change
            options = ["--repeat", change.target]
            options += ["--repeats", str(change.repeats)] if change.repeats != 2 else []
            return saving_line([*options, "--output", "deeper"], test, results)
    return ""


def spans_table(record: CellRecord, spans: Sequence[TestedSpan]) -> Table:
    """Build the table of the chosen spans, with the promise and the tested effect of each."""
    tested = spans[0].run.n if spans else 0
    return figure_table(
        TestedSpan,
        f"{name_of(record)}: the stretches that promised most",
        spans,
        *TEXTS.all("span_notes", record, tested),
        measure=measure_of(record),
    )

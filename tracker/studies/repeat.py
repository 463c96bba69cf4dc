"""Does a model get better by passing some of its layers again, and is the best stretch really good?

One half of the documents chooses among all stretches; the other half, which they never met, says
what the chosen ones are worth. The best of hundreds looks good by chance alone: how good is said
beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tracker.core.changes import Change
from tracker.core.config import CellRequest
from tracker.core.errors import RequestError
from tracker.core.estimates import Estimate
from tracker.core.formats import Measure, counted, measure_of
from tracker.core.records import CellRecord, RunRecord
from tracker.core.tables import Column, Table, table
from tracker.report.leaderboard.claims import shown_in
from tracker.runner import run_cells
from tracker.search.report import saving_line
from tracker.search.request import calibration_of
from tracker.stats.selection import BestByChance, best_by_chance
from tracker.stats.support import Verdict
from tracker.studies.base import (
    Study,
    StudyContext,
    StudyResult,
    Subject,
    amount,
    measured,
    refuse_removed,
)

TESTED = 5
"""Stretches that are tested on documents that did not choose them."""
_ASSUMED = (
    "What chooses and what tests are different documents, drawn at random once.",
    "Chosen are the stretches with the largest gain in accuracy; of equal ones those that raise "
    "the gold answer's log-probability most.",
    "Best by chance: the signs of all gains of a document are turned at random together, 1,999 "
    "times, and the best mean is taken each time (Westfall and Young 1993). It is what the best "
    "would be if each stretch changed as many documents as it does and none gained or lost by it.",
    "Test: paired documents, intervals that hold for all tested stretches at once (Bonferroni).",
)


class TestedStretch(NamedTuple):
    """A stretch that was chosen, and what the other documents say of it."""

    chosen: RunRecord
    test: RunRecord
    verdict: Verdict


@dataclass(frozen=True)
class Stretches:
    """What one cell says of its stretches.

    Attributes:
        record: The calibration documents.
        chance: The best by chance of all of them; None where documents differ from run to run.
        test: The test documents; None where they could not be measured.
        tested: The chosen ones, the best first.
    """

    record: CellRecord
    chance: BestByChance | None
    test: CellRecord | None
    tested: Sequence[TestedStretch]


class Repeat(Study):
    """See the module."""

    question = "Does passing some layers again make a model better?"
    races = True

    def requests(self, asked: StudyContext) -> list[CellRequest]:
        """Ask for all stretches of the file's layers, or those that it asks for, on one half.

        RequestError where layers are removed, or documents are not drawn at random.
        """
        requests = []
        for cell in asked.experiment.cells():
            refuse_removed(cell, "layers of the intact model are passed again", asked)
            if cell.limit is not None:
                raise RequestError(
                    f"{cell.title}: documents that choose are drawn at random; write 'sample: "
                    f"{{value: {cell.limit}}}' instead of 'limit'"
                )
            question = cell.question
            if question is not None and question.kind != "prune":
                raise RequestError(
                    f"{cell.title}: 'until: {question}' asks for other runs than those that cost "
                    f"least; write 'until: {{value: prune {TESTED} within 2 pp}}'"
                )
            if "repeat" in cell.interventions:
                wanted: dict[str, Any] = {"interventions": ("repeat",)}
            else:
                wanted = all_stretches(cell.layers)
            wanted |= {"components": ("layer",)}
            requests.append(calibration_of(cell.model_copy(update=wanted)))
        return requests

    def say(self, asked: StudyContext, subjects: list[Subject]) -> StudyResult:
        """Choose, test what was chosen, and set both beside what chance would choose."""
        result = StudyResult(_ASSUMED)
        chosen = {subject.request: _chosen(subject.record) for subject in subjects}
        tests = {request: _testing(request, runs) for request, runs in chosen.items() if runs}
        result.ran = run_cells(
            [*tests.values()], asked.ledger, asked.publisher, asked.options, asked.progress
        )
        found = []
        for subject in subjects:
            runs = chosen[subject.request]
            if not runs:
                result.lacking.append(f"{subject.record.title}: no stretch has a defined gain")
                continue
            test = tests[subject.request]
            found.append(_tested(subject, runs, measured(test, asked.ledger)))
            result.exports += export_lines(found[-1].tested, test, asked.ledger.root)
        result.rests_on = [one.test.place for one in found if one.test is not None]
        result.answers = [sentence for one in found for sentence in _answers(one)]
        result.tables = [_table(one) for one in found]
        return result


def export_lines(tested: Sequence[TestedStretch], asked: CellRequest, results: Path) -> list[str]:
    """What to type to save the best stretch that is shown to be better; nothing where none is."""
    for row in tested:
        if row.verdict == "helps":
            span = row.chosen.change
            change = ["--repeat", span.target]
            change += ["--repeats", str(span.repeats)] if span.repeats != 2 else []
            return [saving_line([*change, "--output", "deeper"], asked, results)]
    return []


def all_stretches(layers: Sequence[int]) -> dict[str, Any]:
    """Ask for all stretches of neighbours among some layers, each passed once more."""
    there = {*layers}
    changes = tuple(
        Change(layers=tuple(range(first, first + span)), intervention="repeat")
        for first in layers
        for span in range(1, len(layers) + 1)
        if {*range(first, first + span)} <= there
    )
    return {"interventions": ("repeat",), "changes": changes}


def _chosen(record: CellRecord) -> list[RunRecord]:
    """Choose the stretches that gain most; those of a race's answer where there was one."""
    runs = [run for run in record.runs if run.accuracy_drop is not None]
    if record.answer is not None:
        picked = {one.change for one in record.answer.runs if one.chosen}
        runs = [run for run in runs if run.change in picked]
    return sorted(runs, key=_loss)[:TESTED]


def _loss(run: RunRecord) -> tuple[float, float]:
    """What stretches are chosen by, the least first."""
    drop, gold = run.accuracy_drop, run.gold_logprob_drop
    assert drop is not None
    return drop, 0.0 if gold is None else gold


def _testing(request: CellRequest, runs: Sequence[RunRecord]) -> CellRequest:
    """Ask for the chosen stretches on the documents that did not choose."""
    changes = tuple(run.change for run in runs)
    return request.model_copy(update={"part": "test", "changes": changes, "until": None})


def _tested(subject: Subject, runs: Sequence[RunRecord], tests: Subject | None) -> Stretches:
    record, test = subject.record, tests.record if tests is not None else None
    chance = None
    if record.answer is None:
        outcomes = subject.outcomes()
        paired = outcomes.by_metric([outcomes.ablation(run) for run in outcomes.runs])
        gains = -paired.drops
        finite = np.isfinite(gains).all(axis=0)
        if finite.any():
            chance = best_by_chance(gains[:, finite], paired.weights)
    rows: list[TestedStretch] = []
    if test is not None:
        there = {run.change: run for run in test.runs}
        pairs = [(run, there[run.change]) for run in runs if run.change in there]
        verdicts = shown_in(test, [after for _, after in pairs])
        rows = [
            TestedStretch(*pair, verdict) for pair, verdict in zip(pairs, verdicts, strict=True)
        ]
    return Stretches(record, chance, test, rows)


def _written(measure: Measure, gain: Estimate) -> str:
    """Write a gain with its unit and interval."""
    return f"{'+' if (gain.value or 0.0) > 0 else ''}{amount(gain, measure)}"


def _answers(one: Stretches) -> list[str]:
    """Say what the best stretch promises, what chance would promise, and what it is worth."""
    record, measure = one.record, measure_of(one.record)
    best = min((run for run in record.runs if run.accuracy_drop is not None), key=_loss)
    named = f"{record.model.name}, {record.benchmark.name}"
    promise = _written(measure, Estimate((-best.drop).value))
    text = (
        f"{named}: of {counted(len(record.runs), 'stretch')} the best on "
        f"{counted(best.n, 'calibration document')} is {_stretch(best)}, {promise} beside the "
        "intact model."
    )
    if one.chance is not None:
        middle, high = (measure.write(each) for each in (one.chance.middle, one.chance.high))
        text += (
            f" By chance alone the best of so many would be +{middle} {measure.unit}, in one of "
            f"twenty cases +{high} or more."
        )
    if one.test is None or not one.tested:
        return [f"{text} What it is worth on other documents is not measured yet."]
    first = next((row for row in one.tested if row.chosen.change == best.change), one.tested[0])
    gain = _written(measure, -first.test.drop)
    text += f" On {counted(first.test.n, 'test document')} it is worth {gain}."
    helps = [row for row in one.tested if row.verdict == "helps"]
    if helps:
        better = ", ".join(_stretch(row.chosen) for row in helps)
        return [f"{text} Shown to be better than the intact model: {better}."]
    worse = sum(row.verdict == "costs" for row in one.tested)
    rest = f"; {worse} of them are shown to be worse" if worse else ""
    return [
        f"{text} None of the {len(one.tested)} best is shown to be better than the intact "
        f"model{rest}."
    ]


def _stretch(run: RunRecord) -> str:
    """Name a stretch in a sentence."""
    return f"{run.change.layer_words} {run.change.times}"


_VERDICTS = {"helps": "better", "costs": "worse", "open": "open"}


def _table(one: Stretches) -> Table:
    """List the chosen stretches with what each promised and what it is worth."""
    measure = measure_of(one.record)
    columns: tuple[Column[TestedStretch], ...] = (
        Column("passed", "text", lambda row: _stretch(row.chosen)),
        Column("gain where it was chosen", measure.form, lambda row: (-row.chosen.drop).value),
        Column("gain on test documents", measure.form, lambda row: -row.test.drop),
        Column("gold log-prob gain", "nats", lambda row: -row.test.gold),
        Column("beside the intact model", "text", lambda row: _VERDICTS[row.verdict]),
    )
    tested = 0 if one.test is None else one.test.n
    return table(
        f"{one.record.model.name}, {one.record.benchmark.name}: the stretches that promised most",
        columns,
        one.tested,
        f"Chosen on {one.record.counted} documents, tested on {tested:,} others. 95 % intervals; "
        "better and worse hold for all rows at once.",
    )

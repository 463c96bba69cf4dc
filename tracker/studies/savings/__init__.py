"""How much less has to be measured where a question is enough?"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from tracker.core.ablations import removals
from tracker.core.config import CellRequest
from tracker.core.errors import ExperimentError, RequestError
from tracker.core.formats import defined, points
from tracker.core.questions import question
from tracker.ledger.early_stopping import refuse_unbounded
from tracker.studies.base import Study, StudyContext, StudyResult, StudySetting, Subject
from tracker.studies.savings.charts import passes_chart
from tracker.studies.savings.figures import (
    ORDERS,
    Hardest,
    MeasuredDocuments,
    Replayed,
    hardest,
    measured,
    most,
    orders_of,
    replayed,
)
from tracker.studies.savings.tables import (
    bounds_table,
    extent,
    named,
    savings_table,
    times,
)

QUESTIONS = (
    "drop within 2 pp",
    "drop within 5 pp",
    "top 5",
    "top 5 within 1 pp",
    "top 5 within 2 pp",
    "prune 8",
    "prune 8 within 0.5 pp",
    "prune 8 within 1 pp",
    "sign",
)
"""What is asked where nothing else is said."""

_ANY_MODEL = 10**6
"""Layers, before it is known how many a model has: spans that it is too short for count too."""

_ASSUMED = (
    f"Each question is raced for in {ORDERS} random orders of the measured documents, with a look "
    "after every block of 32, and its answer is held against that of all of them. The population "
    "is the benchmark's split: where only a sample of it is measured, a race that is still open "
    "when the sample ends took more than that, and nobody knows how much more.",
    "Layer passes are those of the baseline and of the runs that are open, with the layers shared "
    "that they share; a document counts as one, whatever its tokens. Of a group each task is "
    "measured in blocks of 32, which count from their first document on. Running lm-eval once for "
    "the baseline and each run passes all layers each time. That it also reads shared tokens again "
    "and again is not counted; 'tracker plan' says how many.",
    "A wrong answer is a set that is not that of all documents (with a tolerance: that holds a run "
    "which is more than that below the last place, or lacks one more than that above it), a sign "
    "that is another one, or an interval that does not hold the drop, of any run.",
    "The bounds are those of 'until': bets without replacement (Waudby-Smith and Ramdas 2020, "
    "2024), shared among runs, or among pairs of runs, by Bonferroni.",
    "The documents of a test that looks once rest on the normal approximation for a finite "
    "population, the same Bonferroni, 80 % power for sets and signs, and on the drops and standard "
    "deviations of all documents, which nobody knows in advance.",
)


class Savings(Study):
    """Replays how 'until' would have ended a cell, for `questions`, or those above."""

    name = "savings"
    question = "How much less has to be measured where a question is enough?"
    about = """
    'until' in an experiment file ends a benchmark when its question is answered. This study
    measures the runs in EXPERIMENT in full, draws their documents in 200 random orders, and says
    how many of them, and of the layer passes, each question would have taken, whether its answer
    is that of all documents, and what bounds it: how far the runs in question are apart, and how
    much documents differ. Leave 'until' out of the file.

    \b
    Examples:
      tracker study savings experiments/demo.yaml
      tracker study savings experiments/demo.yaml --question "top 3" --question "prune 10 at 99 %"
    """
    settings = (
        StudySetting(
            "questions",
            str,
            "A question as 'until' takes it; may be given again. Default: nine, such as 'top 5'.",
            repeated=True,
            flag="--question",
        ),
    )

    def __init__(self, questions: Sequence[str] = ()) -> None:
        try:
            self._asked = [question(text) for text in questions or QUESTIONS]
        except ValueError as error:
            raise RequestError(f"--question: {error}") from None
        self._named = bool(questions)

    def requests(self, asked: StudyContext) -> list[CellRequest]:
        """Take the file's cells; RequestError where a named question cannot be asked of one."""
        cells = asked.experiment.cells()
        for cell in cells:
            runs = len(list(removals(cell, _ANY_MODEL)))
            try:
                for one in self._asked if self._named else ():
                    one.refuse(runs)
            except ValueError as error:
                raise RequestError(f"{cell.title}: --question: {error}") from None
        return cells

    def say(self, asked: StudyContext, subjects: list[Subject]) -> StudyResult:
        """Say what each question took, and what bounds it."""
        answers, tables, charts, lacking = [], [], [], []
        races: list[Replayed] = []
        for subject in subjects:
            if reason := _unusable(subject):
                lacking.append(f"{subject.record.title}: {reason}")
                continue
            cell = measured(subject)
            orders = orders_of(len(cell.drops))
            questions = [one for one in self._asked if one.fits(len(cell.runs))]
            found = [replayed(cell, one, orders) for one in questions]
            bounds = [hardest(cell, one) for one in questions]
            answers.append(_answer(cell, found))
            answers.append(_bounded(cell, found, bounds))
            tables += [savings_table(cell, found), bounds_table(cell, found, bounds)]
            charts.append(passes_chart(cell, found))
            races += found
        if races:
            answers.append(_errors(races))
        else:
            answers = ["Nothing could be raced for."]
        return StudyResult(answers, tables, charts, lacking, _ASSUMED)


def _unusable(subject: Subject) -> str:
    """Say why a cell's outcomes cannot be raced for; empty where they can."""
    metric = subject.store.views.of(subject.request).metric
    try:
        refuse_unbounded(subject.store.identity.benchmark, metric)
    except ExperimentError:
        return (
            f"{metric} is no mean of outcomes between 0 and 1; name another 'metric', such as acc"
        )
    cell = measured(subject)
    if not len(cell.drops) or not cell.runs:
        return "no document is measured under all runs"
    if not (np.abs(cell.drops) <= cell.reach).all():
        return f"{metric} of some document is not between 0 and 1"
    return ""


def _answer(cell: MeasuredDocuments, found: Sequence[Replayed]) -> str:
    parts = [f"{one.asked}: {_share(one, 0.5)} ({_share(one, 0.9)})" for one in found]
    said = (
        f"{cell.title}, {extent(cell)}, {len(cell.runs)} runs: what each question "
        f"takes of all layer passes, in the median of {ORDERS} orders (in nine of ten at most): "
        f"{'; '.join(parts)}."
    )
    cheapest = min(found, key=lambda one: most(one.passes, 0.5))
    if not (fewer := times(cell, cheapest)):
        return said
    return (
        f"{said} '{cheapest.asked}' takes {fewer:.3g} times fewer than lm-eval once for each run, "
        f"of which a factor of {cell.plain / cell.everything:.3g} is the sharing of layers."
    )


def _share(one: Replayed, part: float) -> str:
    share = most(one.passes, part)
    return f"{points(share)} %" if defined(share) else "open"


def _bounded(cell: MeasuredDocuments, found: Sequence[Replayed], bounds: Sequence[Hardest]) -> str:
    """Say what bounds the dearest question."""
    # Of those that are open after all that are measured, the one that needs the most.
    one, bound = max(
        zip(found, bounds, strict=True),
        key=lambda both: (most(both[0].passes, 0.5), both[1].documents.value or math.inf),
    )
    said = f"{cell.title}: the dearest, '{one.asked}', is bounded by {named(bound)}"
    if bound.documents.value is None:
        return f"{said}: {bound.documents.reason}."
    took = most(one.documents, 0.5) * cell.population
    ended = f"took {took:,.0f}" if defined(took) else "was open after all that are measured"
    return (
        f"{said}, where a document has a standard deviation of {points(bound.sd)} pp: a test "
        f"that looks once, at the number of documents that is right in advance, would need "
        f"{bound.documents.value:,.0f} of the {cell.population:,}; the race {ended}."
    )


def _errors(races: Sequence[Replayed]) -> str:
    wrong = sum(int(one.wrong.sum()) for one in races)
    most = max(float(one.wrong.mean()) for one in races)
    promised = max(1 - one.asked.level for one in races)
    return (
        f"Of {len(races) * ORDERS:,} races {wrong:,} ended with a wrong answer; of one question in "
        f"one benchmark at most {points(most)} %, where {points(promised)} % are promised at most."
    )

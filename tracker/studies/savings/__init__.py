"""How much less has to be measured where a question is enough?"""

from __future__ import annotations

import math
from collections.abc import Sequence

from tracker.core.ablations import changes_of
from tracker.core.config import CellRequest
from tracker.core.errors import RequestError
from tracker.core.formats import counted, defined, points
from tracker.core.questions import question
from tracker.studies.base import Study, StudyContext, StudyResult, Subject
from tracker.studies.savings.figures import (
    ORDERS,
    MeasuredDocuments,
    Replayed,
    measured,
    most,
    orders_of,
    replayed,
)
from tracker.studies.savings.layout import (
    bounds_table,
    extent,
    hardest_of,
    passes_chart,
    savings_table,
    times,
)

QUESTIONS = (
    *("drop within 2 pp", "drop within 5 pp"),
    *("top 5", "top 5 within 1 pp", "top 5 within 2 pp"),
    *("prune 8", "prune 8 within 0.5 pp", "prune 8 within 1 pp"),
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

    question = "How much less has to be measured where a question is enough?"

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
            runs = len(list(changes_of(cell, _ANY_MODEL)))
            try:
                for asked_for in self._asked if self._named else ():
                    asked_for.refuse(runs)
            except ValueError as error:
                raise RequestError(f"{cell.title}: --question: {error}") from None
        return cells

    def say(self, asked: StudyContext, subjects: list[Subject]) -> StudyResult:
        """Say what each question took, and what bounds it."""
        result = StudyResult(_ASSUMED)
        races: list[Replayed] = []
        for subject in subjects:
            cell = measured(subject)
            if isinstance(cell, str):
                result.lacking.append(f"{subject.record.title}: {cell}")
                continue
            orders = orders_of(len(cell.drops))
            fitting = [question for question in self._asked if question.fits(len(cell.runs))]
            replays = [replayed(cell, question, orders) for question in fitting]
            result.answers += [_answer(cell, replays), _bounded(cell, replays)]
            result.tables += [savings_table(cell, replays), bounds_table(cell, replays)]
            result.charts.append(passes_chart(cell, replays))
            races += replays
        result.answers.append(_errors(races) if races else "Nothing could be raced for.")
        return result


def _answer(cell: MeasuredDocuments, replays: Sequence[Replayed]) -> str:
    head = f"{cell.title}, {extent(cell)}, {len(cell.runs)} runs"
    cheapest = min(replays, key=lambda race: most(race.passes, 0.5))
    if not defined(most(cheapest.passes, 0.5)):
        asked = counted(len(replays), "question")
        return f"{head}: of {asked} none is answered in the median of {ORDERS} orders."
    answer = (
        f"{head}: '{cheapest.asked}' takes the least, {_share(cheapest, 0.5)} of all layer passes "
        f"in the median of {ORDERS} orders (in nine of ten at most {_share(cheapest, 0.9)})"
    )
    if not (fewer := times(cell, cheapest)):
        return f"{answer}."
    return (
        f"{answer}. That is {fewer:.3g} times fewer than lm-eval once for each run, of which a "
        f"factor of {cell.plain / cell.everything:.3g} is the sharing of layers."
    )


def _share(race: Replayed, part: float) -> str:
    share = most(race.passes, part)
    return f"{points(share)} %" if defined(share) else "open"


def _bounded(cell: MeasuredDocuments, replays: Sequence[Replayed]) -> str:
    """Say what bounds the dearest question."""
    # Of those that are open after all that are measured, the one that needs the most.
    dearest = max(
        replays, key=lambda race: (most(race.passes, 0.5), race.bound.documents.value or math.inf)
    )
    bound, needed = dearest.bound, dearest.bound.documents
    answer = f"{cell.title}: the dearest, '{dearest.asked}', is bounded by {hardest_of(dearest)}"
    if needed.value is None:
        return f"{answer}: {needed.reason}."
    took = most(dearest.documents, 0.5) * cell.population
    ended = f"took {took:,.0f}" if defined(took) else "was open after all that are measured"
    return (
        f"{answer}, where a document has a standard deviation of {points(bound.sd)} pp. A test "
        f"that looks once, at the right number of documents, would need {needed.value:,.0f} of the "
        f"{cell.population:,}; the race {ended}."
    )


def _errors(races: Sequence[Replayed]) -> str:
    wrong = sum(int(race.wrong.sum()) for race in races)
    worst = max(float(race.wrong.mean()) for race in races)
    promised = max(1 - race.asked.level for race in races)
    return (
        f"Of {len(races) * ORDERS:,} races {wrong:,} ended with a wrong answer. Of one question in "
        f"one benchmark it is at most {points(worst)} %, where {points(promised)} % are promised."
    )

"""Write the answer to a cell's question as a sentence."""

from __future__ import annotations

from collections.abc import Sequence

from tracker.core.changes import WHOLE_LAYER
from tracker.core.formats import listed
from tracker.core.questions import question
from tracker.core.records import AnswerRecord, CellRecord, RunAnswer

_ORDINALS = (
    *("first", "second", "third", "fourth", "fifth"),
    *("sixth", "seventh", "eighth", "ninth", "tenth"),
)
_NAMED = 8
"""Most open runs that are named one by one; more are only counted."""


def statement(answer: AnswerRecord) -> str:
    """Write the answer, its confidence and its cost as one sentence.

    Args:
        answer: The current answer to a question.

    Returns:
        For example `top 2: the largest drops are those of layers 0 and 11 (95 % confidence; 320 of
        570 documents, 41 % of the layer passes)`.
    """
    return (
        f"{answer.question}: {_said(answer)} ({100 * answer.level:g} % confidence; {took(answer)})"
    )


def took(answer: AnswerRecord) -> str:
    """Write how many documents and layer passes an answer took.

    Args:
        answer: The current answer to a question.

    Returns:
        For example `320 of 570 documents, 41 % of the layer passes`.
    """
    share = 100 * answer.passes / answer.passes_of
    measured = (
        f"{answer.measured:,} of {answer.population:,} documents, {share:.0f} % of the layer passes"
    )
    if answer.looked == answer.measured:
        return measured
    return f"{measured}; looked at were {answer.looked:,}, each task in proportion"


def interval_name(cell: CellRecord) -> str:
    """Return the name of the interval around a cell's drops.

    Args:
        cell: The cell.

    Returns:
        `95 % interval`, or the confidence sequence where the answer decides the number of
        documents.
    """
    if cell.answer is None or not cell.is_raced:
        return "95 % interval"
    return f"confidence sequence at {100 * cell.answer.level:g} %"


def contending(answer: AnswerRecord) -> str:
    """Name the runs for which an answer is still open.

    Args:
        answer: The current answer to a question.

    Returns:
        For example `layers 7 and 19 contend for the fifth place`.
    """
    asked, runs = question(answer.question), [run for run in answer.runs if run.open]
    one = len(runs) == 1
    if asked.kind == "drop":
        within = f"{100 * (asked.within or 0):.10g} pp"
        return (
            f"the drop{'' if one else 's'} of {_named(runs)} {_are(one)} not known within {within}"
        )
    if asked.kind == "sign":
        return f"the sign{'' if one else 's'} of {_named(runs)} {_are(one)} open"
    count = asked.count or 0
    left = count - sum(run.chosen for run in answer.runs)
    place = f"the {_ordinal(count)} place" if left == 1 else f"{left} of the {count} places"
    below = " from below" if asked.kind == "prune" else ""
    return f"{_named(runs)} contend{'s' if one else ''} for {place}{below}"


def _said(answer: AnswerRecord) -> str:
    asked, chosen = question(answer.question), [run for run in answer.runs if run.chosen]
    if not answer.answered and not answer.over:
        return f"not answered yet: {contending(answer)}"
    size = "largest" if asked.kind == "top" else "smallest"
    if not answer.answered:
        tied = _named([run for run in answer.runs if run.open])
        among = f"; {_named(chosen)} {_are(len(chosen) == 1)} among them" if chosen else ""
        which = f"{size} drop is" if asked.count == 1 else f"{asked.count} {size} drops are"
        documents = answer.population
        every = "the only document" if documents == 1 else f"all {documents:,} documents"
        return f"the {which} not separated by {every}: {tied} tie{among}"
    if asked.kind == "drop":
        return f"each drop is known within {100 * (asked.within or 0):.10g} pp"
    if asked.kind == "sign":
        costs = _named([run for run in chosen if run.low > 0])
        gains = _named([run for run in chosen if run.high < 0])
        return f"the drops above 0 are those of {costs}, below 0 {gains}"
    are = " is that" if len(chosen) == 1 else "s are those"
    return f"the {size} drop{are} of {_named(chosen)}"


def _named(runs: Sequence[RunAnswer]) -> str:
    """Name runs, whole layers by their numbers alone; many open runs are only counted."""
    whole = all(run.change.kind == WHOLE_LAYER for run in runs)
    if not runs:
        return "none"
    if any(run.open for run in runs) and len(runs) > _NAMED:
        return f"{len(runs)} {'layers' if whole else 'runs'}"
    names = [str(run.change.layer) if whole else run.change.label() for run in runs]
    return f"layer{'s' if len(names) > 1 else ''} {listed(names)}" if whole else listed(names)


def _are(one: bool) -> str:
    return "is" if one else "are"


def _ordinal(number: int) -> str:
    return _ORDINALS[number - 1] if number <= len(_ORDINALS) else f"{number}th"

"""Format the result of the stopping rule (`until`) as a sentence."""

from __future__ import annotations

from collections.abc import Sequence

from tracker.schema.changes import WHOLE_LAYER
from tracker.schema.formats import join_words
from tracker.schema.questions import Question, parse_question
from tracker.schema.records import AnswerRecord, CellRecord, RunAnswer
from tracker.schema.text_templates import TextTemplate

_ORDINALS = (
    *("first", "second", "third", "fourth", "fifth"),
    *("sixth", "seventh", "eighth", "ninth", "tenth"),
)
_MAX_NAMED_RUNS = 8
"""Maximum number of undecided runs that a sentence names. More runs are only counted."""


def statement(answer: AnswerRecord) -> str:
    """Format the result, the confidence and the cost of a stopping rule as one sentence.

    Args:
        answer: Current result of the stopping rule (`until`) for one model and benchmark.

    Returns:
        The sentence, such as `top 2: the largest drops are those of layers 0 and 11 (95 %
        confidence; 320 of 570 documents, 41 % of the layer passes)`.
    """
    return _TEXTS.render("statement", answer, parse_question(answer.question))


def answer_cost(answer: AnswerRecord) -> str:
    """Format how many documents and layer passes were needed until the stopping rule ended.

    Args:
        answer: Current result of the stopping rule (`until`) for one model and benchmark.

    Returns:
        A text such as `320 of 570 documents, 41 % of the layer passes`. A layer pass is the
        computation of one layer for one document.
    """
    return _TEXTS.render("cost", answer)


def interval_name(cell: CellRecord) -> str:
    """Return the type of a record's drop intervals, such as `95 % interval`.

    Args:
        cell: Record of one model on one benchmark.

    Returns:
        `95 % interval`, or `confidence sequence at 95 %` if a stopping rule (`until`) determines
        the number of documents.
    """
    if cell.answer is None or not cell.is_raced:
        return f"95 % interval{f', clustered by {cell.cluster}' if cell.cluster else ''}"
    return f"confidence sequence at {100 * cell.answer.level:g} %"


def open_runs_text(answer: AnswerRecord) -> str:
    """Describe the runs that the stopping rule has not decided yet.

    Args:
        answer: Current result of the stopping rule (`until`) for one model and benchmark.

    Returns:
        The text, such as `layers 7 and 19 contend for the fifth place`.
    """
    return _TEXTS.render("open", answer, parse_question(answer.question))


def _run_names(runs: Sequence[RunAnswer]) -> str:
    """Return the names of runs, such as `layers 3 and 5` or `layer 3 head 0`.

    If many runs are given and some are undecided, the text is a number, such as `12 layers`.
    """
    only_layers = all(run.change.kind == WHOLE_LAYER for run in runs)
    if not runs:
        return "none"
    if any(run.open for run in runs) and len(runs) > _MAX_NAMED_RUNS:
        return f"{len(runs)} {'layers' if only_layers else 'runs'}"
    if only_layers:
        numbers = [str(run.change.layer) for run in runs]
        return f"layer{'s' if len(runs) > 1 else ''} {join_words(numbers)}"
    return join_words([run.change.label() for run in runs])


def _tolerance(parsed: Question) -> str:
    return f"{100 * (parsed.within or 0):.10g} pp"


def _ordinal(number: int) -> str:
    return _ORDINALS[number - 1] if number <= len(_ORDINALS) else f"{number}th"


_TEXTS = TextTemplate(
    "tracker.schema", "answers", run_names=_run_names, tolerance=_tolerance, ordinal=_ordinal
)

"""Format the result of the stopping rule (`until`) as a sentence."""

from __future__ import annotations

from collections.abc import Sequence

from tracker.schema.changes import WHOLE_LAYER
from tracker.schema.formats import join_words
from tracker.schema.questions import Question, parse_question
from tracker.schema.records import AnswerRecord, CellRecord, RunAnswer

_ORDINALS = (
    *("first", "second", "third", "fourth", "fifth"),
    *("sixth", "seventh", "eighth", "ninth", "tenth"),
)
_MAX_NAMED_RUNS = 8
"""Maximum number of open runs that are named one by one; more are only counted."""


def statement(answer: AnswerRecord) -> str:
    """Format the result, the confidence and the cost of a stopping rule as one sentence.

    Args:
        answer: Current result of the stopping rule (`until`) for one model and benchmark.

    Returns:
        The sentence, e.g. `top 2: the largest drops are those of layers 0 and 11 (95 % confidence;
        320 of 570 documents, 41 % of the layer passes)`.
    """
    level = f"{100 * answer.level:g} % confidence"
    return f"{answer.question}: {_answer_text(answer)} ({level}; {answer_cost(answer)})"


def answer_cost(answer: AnswerRecord) -> str:
    """Format the number of documents and the share of layer passes that were needed.

    Args:
        answer: Current result of the stopping rule (`until`) for one model and benchmark.

    Returns:
        The text, e.g. `320 of 570 documents, 41 % of the layer passes`.
    """
    share = f"{100 * answer.passes / answer.passes_of:.0f} % of the layer passes"
    cost = f"{answer.measured:,} of {answer.population:,} documents, {share}"
    if answer.looked == answer.measured:
        return cost
    used = f"the stopping rule used {answer.looked:,} of these documents"
    return f"{cost}; {used}, with each task in proportion to its size"


def interval_name(cell: CellRecord) -> str:
    """Return the name of the intervals of a benchmark's drops.

    Args:
        cell: Record of one model on one benchmark.

    Returns:
        `95 % interval`, or e.g. `confidence sequence at 95 %` if a stopping rule (`until`) decides
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
        The text, e.g. `layers 7 and 19 contend for the fifth place`.
    """
    parsed, runs = parse_question(answer.question), [run for run in answer.runs if run.open]
    names, plural = _run_names(runs), "" if len(runs) == 1 else "s"
    verb = "are" if plural else "is"
    if parsed.kind == "drop":
        return f"the drop{plural} of {names} {verb} not known within {_tolerance(parsed)}"
    if parsed.kind == "sign":
        return f"the sign{plural} of {names} {verb} open"
    count = parsed.count or 0
    n_left = count - sum(run.chosen for run in answer.runs)
    place_text = f"the {_ordinal(count)} place"
    place_text = place_text if n_left == 1 else f"{n_left} of the {count} places"
    suffix = " from below" if parsed.kind == "prune" else ""
    return f"{names} contend{'' if plural else 's'} for {place_text}{suffix}"


def _answer_text(answer: AnswerRecord) -> str:
    parsed, chosen_runs = parse_question(answer.question), [r for r in answer.runs if r.chosen]
    is_single = len(chosen_runs) == 1
    if not answer.answered and not answer.over:
        return f"not answered yet: {open_runs_text(answer)}"
    size = "largest" if parsed.kind == "top" else "smallest"
    if not answer.answered:
        ties = _run_names([run for run in answer.runs if run.open])
        if chosen_runs:
            ties += f" tie; {_run_names(chosen_runs)} {'is' if is_single else 'are'} among them"
        else:
            ties += " tie"
        drops = f"{size} drop is" if parsed.count == 1 else f"{parsed.count} {size} drops are"
        n = answer.population
        documents = "the only document" if n == 1 else f"all {n:,} documents"
        return f"the {drops} not separated by {documents}: {ties}"
    if parsed.kind == "drop":
        return f"each drop is known within {_tolerance(parsed)}"
    if parsed.kind == "sign":
        positive = _run_names([run for run in chosen_runs if run.low > 0])
        negative = _run_names([run for run in chosen_runs if run.high < 0])
        return f"the drops of {positive} are above 0, the drops of {negative} are below 0"
    verb = " is that" if is_single else "s are those"
    return f"the {size} drop{verb} of {_run_names(chosen_runs)}"


def _run_names(runs: Sequence[RunAnswer]) -> str:
    """Name runs: `layers 3 and 5`, `layer 3 head 0`, or `40 runs` if there are many."""
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

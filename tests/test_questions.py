"""The questions of `until`, as they are written."""

from __future__ import annotations

import re

import pytest

from tests.conftest import golden
from tests.helpers.answers import answer_record, run_answer
from tracker.schema.answers import answer_cost, open_runs_text, statement
from tracker.schema.questions import QUESTION_EXAMPLES, Question, parse_question


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("drop within 2 pp", Question("drop", within=0.02)),
        ("drop within 0.25pp", Question("drop", within=0.0025)),
        ("top 5", Question("top", 5)),
        ("  top  5 ", Question("top", 5)),
        ("prune 8 within 1 pp", Question("prune", 8, 0.01)),
        ("prune 8 at 90 %", Question("prune", 8, level=0.9)),
        ("top 12 within 1.5 pp at 99.9%", Question("top", 12, 0.015, 0.999)),
        ("sign", Question("sign")),
        ("sign at 95 %", Question("sign")),
    ],
)
def test_questions_are_parsed(text, expected):
    assert parse_question(text) == expected
    assert parse_question(str(expected)) == expected


def test_the_examples_are_questions():
    assert {
        kind: str(parse_question(text)) for kind, text in QUESTION_EXAMPLES.items()
    } == QUESTION_EXAMPLES


@pytest.mark.parametrize(("text", "message"), golden("questions"))
def test_invalid_questions_are_refused_with_advice(text, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        parse_question(text)


def test_questions_with_too_few_runs_are_refused():
    for text, runs in (("top 5", 6), ("sign", 1), ("drop within 2 pp", 1)):
        parse_question(text).check_runs(runs)
    for text, runs, message in (
        ("top 40", 30, "'top 40' needs at least 41 runs, not 30; write at most 'top 29'"),
        ("prune 6", 6, "'prune 6' needs at least 7 runs, not 6; write at most 'prune 5'"),
        ("top 1", 1, "'top 1' needs at least 2 runs, not 1$"),
    ):
        with pytest.raises(ValueError, match=message):
            parse_question(text).check_runs(runs)


MEASURED = "1,312 of 2,000 documents, 40 % of the layer passes"


@pytest.mark.parametrize(("question_text", "sentence"), golden("answers"))
def test_answers_about_layers(question_text, sentence):
    question, _, layers = question_text.partition(": ")
    words = layers.removesuffix(" …").split()
    runs = [run_answer(int(word.lstrip("+?")), word.rstrip("0123456789")) for word in words]
    record = answer_record(question, *runs, over=not layers.endswith("…"))
    assert statement(record) == f"{question}: {sentence} (95 % confidence; {MEASURED})"


def test_answers_about_other_runs_and_signs():
    parts = (run_answer(3, "?", component="mlp"), run_answer(5, "?", span=2))
    expected = "mlp 3 and layers 5–6 contend for the first place"
    assert open_runs_text(answer_record("top 1", *parts)) == expected
    zero_run, negative_run = (run_answer(2, low=0, high=0), run_answer(1, "+", low=-0.2, high=-0.1))
    record = answer_record("sign", run_answer(0, "+"), negative_run, zero_run)
    expected = "sign: the drops of layer 0 are above 0, the drops of layer 1 are below 0 ("
    assert statement(record).startswith(expected)
    expected = "sign: the drops of none are above 0, the drops of none are below 0 ("
    assert statement(answer_record("sign", zero_run)).startswith(expected)


def test_cost_of_an_answer_about_a_group():
    record = answer_record("sign", run_answer(0, "+"), looked=1018, measured=1312)
    usage = (
        "the stopping rule used 1,018 of these documents, with each task in proportion to its size"
    )
    assert answer_cost(record) == f"{MEASURED}; {usage}"

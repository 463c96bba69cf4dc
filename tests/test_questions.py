"""The questions of `until`, as they are written."""

from __future__ import annotations

import re

import pytest

from tests.conftest import golden
from tests.helpers.answers import answer, run
from tracker.core.answers import contending, statement, took
from tracker.core.questions import EXAMPLES, Question, question


@pytest.mark.parametrize(
    ("text", "meant"),
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
def test_what_is_written_is_meant(text, meant):
    assert question(text) == meant
    assert question(str(meant)) == meant


def test_the_examples_are_questions():
    assert {kind: str(question(text)) for kind, text in EXAMPLES.items()} == EXAMPLES


@pytest.mark.parametrize(("text", "said"), golden("questions"))
def test_what_is_no_question_says_what_would_be(text, said):
    with pytest.raises(ValueError, match=f"^{re.escape(said)}$"):
        question(text)


def test_a_question_that_so_many_runs_cannot_answer():
    for text, runs in (("top 5", 6), ("sign", 1), ("drop within 2 pp", 1)):
        question(text).refuse(runs)
    for text, runs, said in (
        ("top 40", 30, "top 40 of 30 runs chooses nothing; ask for 29 at most"),
        ("prune 6", 6, "prune 6 of 6 runs chooses nothing; ask for 5 at most"),
        ("top 1", 1, "top 1 of 1 run chooses nothing$"),
    ):
        with pytest.raises(ValueError, match=said):
            question(text).refuse(runs)


MEASURED = "1,312 of 2,000 documents, 40 % of the layer passes"


@pytest.mark.parametrize(("asked", "said"), golden("answers"))
def test_what_is_said_of_layers(asked, said):
    question, _, layers = asked.partition(": ")
    words = layers.removesuffix(" …").split()
    runs = [run(int(word.lstrip("+?")), word.rstrip("0123456789")) for word in words]
    found = answer(question, *runs, over=not layers.endswith("…"))
    assert statement(found) == f"{question}: {said} (95 % confidence; {MEASURED})"


def test_what_is_said_of_other_runs_and_of_signs():
    parts = (run(3, "?", component="mlp"), run(5, "?", span=2))
    assert contending(answer("top 1", *parts)) == "mlp 3 and layers 5–6 contend for the first place"
    none = run(2, low=0, high=0)
    found = answer("sign", run(0, "+"), run(1, "+", low=-0.2, high=-0.1), none)
    said = "sign: the drops above 0 are those of layer 0, below 0 layer 1 ("
    assert statement(found).startswith(said)
    said = "sign: the drops above 0 are those of none, below 0 none ("
    assert statement(answer("sign", none)).startswith(said)


def test_of_a_group_more_is_measured_than_looked_at():
    found = answer("sign", run(0, "+"), looked=1018, measured=1312)
    assert took(found) == f"{MEASURED}; looked at were 1,018, each task in proportion"

"""The questions of `until`, as they are written."""

from __future__ import annotations

import re

import pytest

from tests.conftest import golden
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
def test_what_is_written_is_meant(text: str, meant: Question) -> None:
    assert question(text) == meant
    assert question(str(meant)) == meant


def test_the_examples_are_questions() -> None:
    assert {kind: str(question(text)) for kind, text in EXAMPLES.items()} == EXAMPLES


@pytest.mark.parametrize(("text", "said"), golden("questions"))
def test_what_is_no_question_says_what_would_be(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(said)}$"):
        question(text)


def test_a_question_that_so_many_runs_cannot_answer() -> None:
    for text, runs in (("top 5", 6), ("sign", 1), ("drop within 2 pp", 1)):
        question(text).refuse(runs)
    for text, runs, said in (
        ("top 40", 30, "top 40 of 30 runs chooses nothing; ask for 29 at most"),
        ("prune 6", 6, "prune 6 of 6 runs chooses nothing; ask for 5 at most"),
        ("top 1", 1, "top 1 of 1 run chooses nothing$"),
    ):
        with pytest.raises(ValueError, match=said):
            question(text).refuse(runs)

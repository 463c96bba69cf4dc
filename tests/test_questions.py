"""The questions of `until`, as they are written."""

from __future__ import annotations

import doctest
import re

import pytest

from tracker.core import questions as module
from tracker.core.questions import EXAMPLES, Question, question


def test_docstring_examples() -> None:
    assert doctest.testmod(module).failed == 0


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


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("tops 5", "no question begins with 'tops'. Did you mean 'top'? Known are 'drop within 2"),
        ("prone 8", "Did you mean 'prune'"),
        ("", "no question begins with ''. Known are"),
        ("Which five layers matter?", "no question begins with 'Which'"),
        ("top", "'top': how many? Write for instance 'top 5'"),
        ("top five", "how many? Write for instance 'top 5'"),
        ("top 0", "how many?"),
        ("top 2.5", "how many?"),
        ("prune -1", "how many? Write for instance 'prune 8'"),
        ("prune within 1 pp", "how many?"),
        ("drop", "'drop': how exactly? Write for instance 'drop within 2 pp'"),
        ("drop at 99 %", "how exactly?"),
        ("drop within 2 %", "'within 2 %' is not understood. After 'drop' may come 'within 1 pp'"),
        ("drop within 2", "is not understood"),
        ("drop within 0 pp", "'within' takes more than 0 and less than 100 pp"),
        ("drop within 100 pp", "less than 100 pp"),
        ("top 5 at 99 % within 1 pp", "in this order"),
        ("top 5 at 100 %", "'at' takes 50 % or more, and less than 100 %"),
        ("top 5 at 5 %", "'at' takes 50 % or more"),
        ("sign within 1 pp", "a sign has no size. Write 'sign', or 'drop within 2 pp'"),
        ("sign please", "'please' is not understood"),
    ],
)
def test_what_is_no_question_says_what_would_be(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        question(text)


def test_a_question_that_so_many_runs_cannot_answer() -> None:
    question("top 5").refuse(6)
    question("sign").refuse(1)
    question("drop within 2 pp").refuse(1)
    with pytest.raises(ValueError, match="top 40 of 30 runs chooses nothing; ask for 29 at most"):
        question("top 40").refuse(30)
    with pytest.raises(ValueError, match="prune 6 of 6 runs chooses nothing; ask for 5 at most"):
        question("prune 6").refuse(6)
    with pytest.raises(ValueError, match=r"top 1 of 1 run chooses nothing$"):
        question("top 1").refuse(1)

"""What is said of answers, as a researcher reads it."""

from __future__ import annotations

import pytest

from tests.conftest import golden
from tests.helpers.answers import answer, run
from tracker.core.answers import contending, statement, took

MEASURED = "1,312 of 2,000 documents, 40 % of the layer passes"


@pytest.mark.parametrize(("asked", "said"), golden("answers"))
def test_what_is_said_of_layers(asked: str, said: str) -> None:
    question, _, layers = asked.partition(": ")
    words = layers.removesuffix(" …").split()
    runs = [run(int(word.lstrip("+?")), word.rstrip("0123456789")) for word in words]
    found = answer(question, *runs, over=not layers.endswith("…"))
    assert statement(found) == f"{question}: {said} (95 % confidence; {MEASURED})"


def test_what_is_said_of_other_runs_and_of_signs() -> None:
    parts = (run(3, "?", component="mlp"), run(5, "?", span=2))
    assert contending(answer("top 1", *parts)) == "mlp 3 and layers 5–6 contend for the first place"
    none = run(2, low=0, high=0)
    found = answer("sign", run(0, "+"), run(1, "+", low=-0.2, high=-0.1), none)
    said = "sign: the drops above 0 are those of layer 0, below 0 layer 1 ("
    assert statement(found).startswith(said)
    said = "sign: the drops above 0 are those of none, below 0 none ("
    assert statement(answer("sign", none)).startswith(said)


def test_of_a_group_more_is_measured_than_looked_at() -> None:
    found = answer("sign", run(0, "+"), looked=1018, measured=1312)
    assert took(found) == f"{MEASURED}; looked at were 1,018, each task in proportion"

"""What is said of answers, as a researcher reads it."""

from __future__ import annotations

from typing import Any

import pytest

from tests.conftest import golden
from tracker.core.answers import contending, statement, took
from tracker.core.records import AnswerRecord, RunAnswer

MEASURED = "1,312 of 2,000 documents, 40 % of the layer passes"


def run(layer: int, said: str = "", **changes: Any) -> RunAnswer:
    known: dict[str, Any] = {"n": 64, "low": 0.01, "high": 0.09, "layer": layer}
    return RunAnswer(**known | changes, open=said == "?", chosen=said == "+")


def answer(question: str, *runs: RunAnswer, **changes: Any) -> AnswerRecord:
    known: dict[str, Any] = {"level": 0.95, "seed": 1234, "population": 2000, "over": True}
    known |= {"looked": 1312, "measured": 1312, "passes": 40, "passes_of": 100}
    return AnswerRecord(question=question, runs=runs, **known | changes)


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

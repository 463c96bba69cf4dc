"""What is said of answers, as a researcher reads it."""

from __future__ import annotations

from typing import Any

import pytest

from tracker.core.answers import contending, statement, took
from tracker.core.records import AnswerRecord, RunAnswer


def run(layer: int, said: str = "", **changes: Any) -> RunAnswer:
    known: dict[str, Any] = {"n": 64, "low": 0.01, "high": 0.09, "layer": layer}
    return RunAnswer(**known | changes, open=said == "open", chosen=said == "chosen")


def answer(question: str, *runs: RunAnswer, **changes: Any) -> AnswerRecord:
    known: dict[str, Any] = {"level": 0.95, "seed": 1234, "population": 2000, "over": True}
    known |= {"looked": 1312, "measured": 1312, "passes": 40, "passes_of": 100}
    return AnswerRecord(question=question, runs=runs, **known | changes)


FOUR = [run(n, "chosen") for n in range(4)]


@pytest.mark.parametrize(
    ("question", "runs", "says"),
    [
        (
            "top 5",
            [*FOUR, run(7, "open"), run(19, "open"), run(20)],
            "layers 7 and 19 contend for the fifth place",
        ),
        (
            "top 5",
            [run(0, "chosen"), run(7, "open"), run(9, "open"), run(19, "open")],
            "layers 7, 9 and 19 contend for 4 of the 5 places",
        ),
        ("top 2", [run(n, "open") for n in range(9)], "9 layers contend for 2 of the 2 places"),
        (
            "prune 1",
            [run(3, "open"), run(4, "open")],
            "layers 3 and 4 contend for the first place ",
        ),
        (
            "prune 12",
            [*(run(n, "chosen") for n in range(11)), run(12, "open"), run(13, "open")],
            "layers 12 and 13 contend for the 12th place from below",
        ),
        ("drop within 0.5 pp", [run(3, "open")], "the drop of layer 3 is not known within 0.5 pp"),
        ("sign", [run(3, "open"), run(5, "open")], "the signs of layers 3 and 5 are open"),
        (
            "top 1",
            [run(3, "open", component="mlp"), run(5, "open", span=2)],
            "mlp 3 and layers 5–6 contend for the first place",
        ),
    ],
)
def test_who_contends(question: str, runs: list[RunAnswer], says: str) -> None:
    found = answer(question, *runs, over=False)
    assert contending(found).startswith(says)
    assert f"{question}: not answered yet: {says}" in statement(found)


@pytest.mark.parametrize(
    ("question", "runs", "says"),
    [
        (
            "top 2",
            [run(0, "chosen"), run(1, "chosen"), run(2)],
            "the largest drops are those of la",
        ),
        ("prune 1", [run(0), run(1, "chosen")], "the smallest drop is that of layer 1 (95 %"),
        ("drop within 2 pp at 99 %", [run(0)], "each drop is known within 2 pp (95 %"),
        (
            "sign",
            [run(0, "chosen"), run(1, "chosen", low=-0.2, high=-0.1), run(2, low=0, high=0)],
            "the drops above 0 are those of layer 0, below 0 layer 1 (",
        ),
        ("sign", [run(2, low=0, high=0)], "the drops above 0 are those of none, below 0 none ("),
        (
            "top 5",
            [*FOUR, run(7, "open"), run(9, "open")],
            "the 5 largest drops are not separated by all 2,000 documents: layers 7 and 9 tie; "
            "layers 0, 1, 2 and 3 are among them (",
        ),
        (
            "prune 1",
            [run(7, "open"), run(9, "open")],
            "the smallest drop is not separated by all 2,000 documents: layers 7 and 9 tie (",
        ),
    ],
)
def test_what_is_answered(question: str, runs: list[RunAnswer], says: str) -> None:
    found = answer(question, *runs)
    assert statement(found).startswith(f"{question}: {says}")
    assert took(found) == "1,312 of 2,000 documents, 40 % of the layer passes"
    assert statement(found).endswith(f"confidence; {took(found)})")


def test_of_a_group_more_is_measured_than_looked_at() -> None:
    found = answer("sign", run(0, "chosen"), looked=1018, measured=1312)
    measured = "1,312 of 2,000 documents, 40 % of the layer passes"
    assert took(found) == f"{measured}; looked at were 1,018, each task in proportion"

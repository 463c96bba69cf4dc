"""Records of answers and of the runs behind them."""

from __future__ import annotations

from typing import Any

from tracker.core.records import AnswerRecord, RunAnswer


def run(layer: int, said: str = "", **changes: Any) -> RunAnswer:
    known: dict[str, Any] = {"n": 64, "low": 0.01, "high": 0.09, "layer": layer}
    return RunAnswer(**known | changes, open=said == "?", chosen=said == "+")


def answer(question: str, *runs: RunAnswer, **changes: Any) -> AnswerRecord:
    known: dict[str, Any] = {"level": 0.95, "seed": 1234, "population": 2000, "over": True}
    known |= {"looked": 1312, "measured": 1312, "passes": 40, "passes_of": 100}
    return AnswerRecord(question=question, runs=runs, **known | changes)

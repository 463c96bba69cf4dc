"""Records of answers and of the runs behind them."""

from __future__ import annotations

from typing import Any

from tracker.schema.records import AnswerRecord, RunAnswer


def run_answer(layer: int, mark: str = "", **changes: Any) -> RunAnswer:
    defaults: dict[str, Any] = {"n": 64, "low": 0.01, "high": 0.09, "layer": layer}
    return RunAnswer(**defaults | changes, open=mark == "?", chosen=mark == "+")


def answer_record(question: str, *runs: RunAnswer, **changes: Any) -> AnswerRecord:
    defaults: dict[str, Any] = {"level": 0.95, "seed": 1234, "population": 2000, "over": True}
    defaults |= {"looked": 1312, "measured": 1312, "passes": 40, "passes_of": 100}
    return AnswerRecord(question=question, runs=runs, **defaults | changes)

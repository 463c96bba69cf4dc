"""Timing of tiny models: in this process, once, and on short texts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import pytest

from tracker.export import serving, serving_process
from tracker.export.llama_cpp import time_files


def _run_here(request: Mapping[str, Any], program: Sequence[str] = ()) -> Any:
    """Run a measuring program in this process."""
    if program:
        return time_files(**{n: v for n, v in request.items() if n != "function"})
    return serving_process.main(dict(request))


@contextmanager
def serving_in_process() -> Iterator[None]:
    """Run the measuring program in this process, on a few tokens."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(serving, "run_program", _run_here)
        patch.setattr(serving, "MIN_TURNS", 1)
        patch.setattr(serving, "MIN_SECONDS", 0.0)
        patch.setattr(serving, "READ_LENGTHS", (4, 8))
        patch.setattr(serving, "PROMPT_TOKENS", 4)
        patch.setattr(serving, "CACHED_TOKENS", 16)
        yield


@pytest.fixture
def fast_serving() -> Iterator[None]:
    """Measure the speed of saved models on a few tokens, for a test."""
    with serving_in_process():
        yield

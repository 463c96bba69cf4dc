"""Timing of tiny models: in this process, once, and on short texts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tracker.export import serving, serving_process


@contextmanager
def serving_in_process() -> Iterator[None]:
    """Run the measuring program in this process, on a few tokens."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(serving, "_run", serving_process.main)
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

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest


@pytest.fixture
def spy(monkeypatch) -> Callable[..., list[Any]]:
    """Notes something of every call of a function, which is called as ever."""

    def spy(owner: Any, name: str, note: Callable[..., Any]) -> list[Any]:
        noted: list[Any] = []
        honest = getattr(owner, name)

        @functools.wraps(honest)
        def noting(*args: Any, **kwargs: Any) -> Any:
            noted.append(note(*args, **kwargs))
            return honest(*args, **kwargs)

        monkeypatch.setattr(owner, name, noting)
        return noted

    return spy

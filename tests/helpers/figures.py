"""Figures that a run of W&B shows."""

from __future__ import annotations

from typing import Any


def figures(values: dict[str, Any]) -> dict[str, Any]:
    """What we logged, without what the client adds and without tables and charts."""
    return {
        name: value
        for name, value in values.items()
        if not name.startswith("_") and not isinstance(value, dict)
    }

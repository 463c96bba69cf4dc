"""Which studies there are."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any

from tracker.core.errors import RequestError, did_you_mean
from tracker.studies.base import Study

STUDIES: Mapping[str, str] = {
    "audit": "Audit",
    "calibration": "Calibration",
    "joint": "Joint",
    "prune": "Prune",
    "rescale": "Rescale",
    "savings": "Savings",
    "snowball": "Snowball",
    "theorem": "Theorem",
}
"""Name → its class, which is in the folder of this package of that name."""


def open_study(name: str, settings: Mapping[str, Any] = {}) -> Study:
    """Make a study, told what it alone can be told; RequestError if there is none of that name."""
    if name not in STUDIES:
        raise RequestError(
            f"there is no study {name!r}; use one of: {', '.join(STUDIES)}."
            + did_you_mean(name, STUDIES)
        )
    # A study loads what it needs, and the command line starts without it.
    study: Study = getattr(import_module(f"tracker.studies.{name}"), STUDIES[name])(**settings)
    return study

"""Which studies there are."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any

from tracker.core.errors import RequestError, did_you_mean

if TYPE_CHECKING:
    from tracker.studies.base import Study

STUDIES: Mapping[str, str] = {
    "audit": "Which proxy tells what a layer's removal costs?",
    "calibration": "How many documents until the ranking of layers is stable?",
    "joint": "Do the drops of two layers add up?",
    "prune": "Does pruning by accuracy beat pruning by proxies?",
    "rescale": "Is what a removal costs only missing scale?",
    "savings": "How much less has to be measured where a question is enough?",
    "snowball": "Do later layers amplify what a removal changes?",
    "theorem": "Can the lowest cosine score decide every answer?",
}
"""Name → what it asks, in a line; its class is in the folder of this package of that name."""


def study_class(name: str) -> type[Study]:
    """Load the class of a study; RequestError if there is none of that name."""
    if name not in STUDIES:
        raise RequestError(
            f"there is no study {name!r}; use one of: {', '.join(STUDIES)}."
            + did_you_mean(name, STUDIES)
        )
    # A study loads what it needs, and the command line starts without it.
    found: type[Study] = getattr(import_module(f"tracker.studies.{name}"), name.title())
    return found


def open_study(name: str, settings: Mapping[str, Any] = {}) -> Study:
    """Make a study, told what it alone can be told; RequestError if there is none of that name."""
    return study_class(name)(**settings)

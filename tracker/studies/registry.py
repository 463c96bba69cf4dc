"""Which studies there are; the command line says what each of them asks."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from tracker.core.errors import RequestError, did_you_mean

if TYPE_CHECKING:
    from tracker.studies.base import Study

STUDIES = (
    *("audit", "calibration", "joint", "prune"),
    *("rescale", "savings", "snowball", "theorem"),
)
"""By name; the class of each, named as it, is in the module or folder of this package so named."""
DRAWS = 2
"""Random directions that `snowball` takes where nothing is said."""
RELIABILITY = 0.9
"""What `calibration` wants where nothing is said."""


def open_study(name: str, **settings: Any) -> Study:
    """Load a study, told what it alone can be told; RequestError if there is none of that name."""
    if name not in STUDIES:
        raise RequestError(
            f"there is no study {name!r}; use one of: {', '.join(STUDIES)}."
            + did_you_mean(name, STUDIES)
        )
    # A study loads what it needs, and the command line starts without it.
    study: Study = getattr(import_module(f"tracker.studies.{name}"), name.title())(**settings)
    return study

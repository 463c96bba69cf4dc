"""Which studies there are: those of this package. The command line says what each asks."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from inspect import signature
from pkgutil import iter_modules
from typing import TYPE_CHECKING, Any

from tracker import studies
from tracker.core.errors import RequestError, did_you_mean

if TYPE_CHECKING:
    from tracker.studies.base import Study

STUDIES = tuple(
    each.name for each in iter_modules(studies.__path__) if each.name not in ("base", "registry")
)
"""By name: each is a module or folder of this package, and its class is named as it."""
DRAWS = 2
"""Random directions that `snowball` takes where nothing is said."""
RELIABILITY = 0.9
"""What `calibration` wants where nothing is said."""
REFINE, PAIRS = 3, 20
"""How many rounds of swaps `quantise` makes at most, and how many pairs it draws, where nothing is
said."""


def told_to(name: str) -> set[str]:
    """Name what a study alone can be told; RequestError if there is none of that name."""
    parameters = signature(_class_of(name)).parameters.values()
    return {each.name for each in parameters if each.kind is each.POSITIONAL_OR_KEYWORD}


def open_study(name: str, **settings: Any) -> Study:
    """Load a study, told what it alone can be told; RequestError if there is none of that name."""
    return _class_of(name)(**settings)


def _class_of(name: str) -> Callable[..., Study]:
    if name not in STUDIES:
        raise RequestError(
            f"there is no study {name!r}; use one of: {', '.join(STUDIES)}."
            + did_you_mean(name, STUDIES)
        )
    # A study loads what it needs, and the command line starts without it.
    found: Callable[..., Study] = getattr(import_module(f"tracker.studies.{name}"), name.title())
    return found

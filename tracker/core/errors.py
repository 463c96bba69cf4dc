"""Every error that tracker raises on purpose.

The tree, with the exit code that the command line gives each branch:

    TrackerError
    ├── RequestError            2   the request was wrong; nothing was written
    │   ├── ExperimentError         the experiment file
    │   ├── ModelError              the model cannot be found, read or understood
    │   │   └── UnreachableError        it may be on the hub, which does not answer now
    │   ├── BenchmarkError          the benchmark or its data cannot be found or read
    │   └── ResultsError            the results folder is not one that this version can use
    └── WorkError               1   the request was right, but some of the work failed
        ├── CellError               one cell could not be computed
        └── TrackingError           a tracking backend refused or could not be reached

A message holds the value, what was allowed, and what to type next.
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import ClassVar, TypeVar

T = TypeVar("T")
log = logging.getLogger(__name__)


class TrackerError(Exception):
    """The root: anything that tracker raises on purpose."""

    exit_code: ClassVar[int] = 1


class RequestError(TrackerError):
    """The request was wrong: nothing was computed and nothing was written."""

    exit_code: ClassVar[int] = 2


class ExperimentError(RequestError):
    """The experiment file is missing, malformed, or asks for what is not there."""


class ModelError(RequestError):
    """The model cannot be found, read, or understood."""


class UnreachableError(ModelError):
    """The model may be on the hub, but the hub does not answer from here, or not now."""


class BenchmarkError(RequestError):
    """The benchmark, or the data behind it, cannot be found or read."""


class ResultsError(RequestError):
    """The results folder cannot be used by this version of tracker."""


class WorkError(TrackerError):
    """The request was right, but some of the work failed."""


class CellError(WorkError):
    """One (model, benchmark) could not be computed; the others are not touched by it."""


class TrackingError(WorkError):
    """A tracking backend refused or could not be reached; the results are on disk."""


@contextmanager
def translate_errors(convert: Callable[[Exception], TrackerError | None]) -> Iterator[None]:
    """Raise an error of ours for whatever foreign code raises until exit.

    Errors of ours pass, and so does what `convert` returns None for. The original goes to the log:
    in a chain it would hide what the user is to do.
    """
    try:
        yield
    except TrackerError:
        raise
    except Exception as error:  # libraries raise anything on damaged files, models on odd input
        translated = convert(error)
        if translated is None:
            raise
        log.debug("%s", translated, exc_info=True)
        raise translated from None


def attempt(compute: Callable[[], T]) -> T | Exception:
    """Run foreign code; return its result, or the exception that it raises."""
    try:
        return compute()
    except Exception as error:  # noqa: BLE001  models and other packages raise anything
        return error


def did_you_mean(name: str, allowed: Iterable[str]) -> str:
    """Name the nearest allowed word, as a message's end: `" Did you mean 'x'?"`, or nothing."""
    near = difflib.get_close_matches(name, list(allowed), n=1, cutoff=0.6)
    return f" Did you mean {near[0]!r}?" if near else ""


def first_line(error: Exception) -> str:
    """Say in a line what was raised; what ends with a colon goes on in the next line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    some = " ".join(lines[: 2 if lines and lines[0].endswith(":") else 1])
    return some[:300] or type(error).__name__

"""Define the errors that tracker raises.

The diagram shows the error classes and their exit codes on the command line:

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

Each error message contains the invalid value, the allowed values, and the command to type next.
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
    """Base class of all errors that tracker raises."""

    exit_code: ClassVar[int] = 1


class RequestError(TrackerError):
    """The user's request is invalid; nothing was computed or written."""

    exit_code: ClassVar[int] = 2


class ExperimentError(RequestError):
    """The experiment file is missing, malformed, or requests something that does not exist."""


class ModelError(RequestError):
    """The model cannot be found, read, or understood."""


class UnreachableError(ModelError):
    """The model is not a local folder, and the Hugging Face hub does not answer."""


class BenchmarkError(RequestError):
    """The benchmark or its data cannot be found or read."""


class ResultsError(RequestError):
    """The results folder cannot be used by this version of tracker."""


class WorkError(TrackerError):
    """The user's request is valid, but some of the work failed."""


class CellError(WorkError):
    """A model could not be measured on a benchmark; other measurements are not affected."""


class TrackingError(WorkError):
    """A tracking backend refused data or could not be reached; the results are on disk."""


@contextmanager
def translate_errors(convert: Callable[[Exception], TrackerError | None]) -> Iterator[None]:
    """Convert exceptions of other packages to tracker's errors within a `with` block.

    Tracker's own errors are not converted. If `convert` returns None, the exception is raised
    unchanged. A converted exception is logged.
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
    """Call a function and return its result, or the exception that it raises."""
    try:
        return compute()
    except Exception as error:  # noqa: BLE001  models and other packages raise anything
        return error


def did_you_mean(name: str, allowed: Iterable[str]) -> str:
    """Return a question such as ` Did you mean 'top'?` with the most similar allowed word.

    The text is empty if no allowed word is similar to `name`.
    """
    matches = difflib.get_close_matches(name, list(allowed), n=1, cutoff=0.6)
    return f" Did you mean {matches[0]!r}?" if matches else ""


def first_line(error: Exception) -> str:
    """Return the first line of an error message, with at most 300 characters.

    If the first line ends with a colon, the second line is appended.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    message = " ".join(lines[: 2 if lines and lines[0].endswith(":") else 1])
    return message[:300] or type(error).__name__

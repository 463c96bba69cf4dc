"""Define the interface of an executor, and open the chosen one.

The module of an executor is imported only when it is chosen.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.metadata import EntryPoint, entry_points
from typing import Protocol

from tracker.core.config import EXECUTORS, EXECUTORS_GROUP
from tracker.core.distribution import install_extra
from tracker.core.errors import RequestError, translate_errors
from tracker.measuring.job import Job, Options, Reporting


class Executor(Protocol):
    """Measures the missing outcomes of cells; a failing cell does not affect the others."""

    def measure(self, jobs: Sequence[Job], to: Reporting) -> int:
        """Measure cells.

        Args:
            jobs: The jobs, those of equal models next to each other.
            to: The results folder and the callbacks.

        Returns:
            Number of times that a model was loaded.
        """


def last_line(error: Exception) -> str:
    """Return the last line of an error, the informative one in messages of schedulers."""
    lines = [line.strip(" -") for line in str(error).splitlines()]
    return next((line for line in reversed(lines) if line), type(error).__name__)[:300]


_PROCESSES = "tracker.executors.processes:ProcessesExecutor"
_NEEDS = {"ray": "ray", "slurm": "submitit"}
"""Executor → the package that the extra of the same name installs."""


def open_executor(options: Options) -> Executor:
    """Open the chosen executor.

    RequestError is raised if its extra is not installed, if another package's executor is broken,
    or if it does not support the options on this machine.
    """
    name = options.executor
    if name in EXECUTORS:
        kind = _PROCESSES if options.has_workers else EXECUTORS[name]
        point = EntryPoint(name, kind, EXECUTORS_GROUP)
    else:
        point, *_ = entry_points(group=EXECUTORS_GROUP, name=name)

    def problem(error: Exception) -> RequestError | None:
        package = error.name if isinstance(error, ModuleNotFoundError) else None
        if package and package.partition(".")[0] == _NEEDS.get(name):
            return RequestError(
                f"--executor {name} needs the package {_NEEDS[name]}; type: {install_extra(name)}"
            )
        if name in EXECUTORS:
            return None
        why = f"{type(error).__name__}: {last_line(error)}"
        return RequestError(
            f"--executor {name}, an entry point {point.value}, cannot be opened: {why}"
        )

    with translate_errors(problem):
        make: Callable[[Options], Executor] = point.load()
        return make(options)

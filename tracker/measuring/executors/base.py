"""Define the interface of an executor, and open the chosen executor.

An executor's module is imported only when it is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.metadata import EntryPoint, entry_points
from typing import Protocol

from tracker.measuring.job import Job, Options, Reporting
from tracker.schema.config import EXECUTORS, EXECUTORS_GROUP
from tracker.schema.distribution import extra_command
from tracker.schema.errors import RequestError, translate_errors


class Executor(Protocol):
    """Interface that measures the missing outcomes of cells (models on benchmarks)."""

    def measure(self, jobs: Sequence[Job], reporting: Reporting) -> int:
        """Measure the missing outcomes of all cells in a list of jobs.

        Args:
            jobs: The jobs, sorted so that jobs with the same model follow each other.
            reporting: The results folder, and the callbacks that report progress.

        Returns:
            Number of times that a model was loaded.
        """


def last_line(error: Exception) -> str:
    """Return the last line of an error message."""
    lines = [line.strip(" -") for line in str(error).splitlines()]
    return next((line for line in reversed(lines) if line), type(error).__name__)[:300]


_PROCESSES_TARGET = "tracker.measuring.executors.processes:ProcessesExecutor"
_REQUIRED_PACKAGES = {"ray": "ray", "slurm": "submitit"}
"""Name of an executor → package that the extra of the same name installs."""


def open_executor(options: Options) -> Executor:
    """Create the executor with the name in `options.executor`.

    RequestError is raised if the executor cannot be loaded, or does not support the options on this
    machine.
    """
    name = options.executor
    if name in EXECUTORS:
        target = _PROCESSES_TARGET if options.has_workers else EXECUTORS[name]
        entry_point = EntryPoint(name, target, EXECUTORS_GROUP)
    else:
        entry_point, *_ = entry_points(group=EXECUTORS_GROUP, name=name)

    def wrap_error(error: Exception) -> RequestError | None:
        package = error.name if isinstance(error, ModuleNotFoundError) else None
        if package and package.partition(".")[0] == _REQUIRED_PACKAGES.get(name):
            package, command = _REQUIRED_PACKAGES[name], extra_command(name)
            return RequestError(f"--executor {name} needs the package {package}; type: {command}")
        if name in EXECUTORS:
            return None
        reason = f"{type(error).__name__}: {last_line(error)}"
        return RequestError(
            f"--executor {name}: its entry point {entry_point.value} cannot be loaded: {reason}"
        )

    with translate_errors(wrap_error):
        factory: Callable[[Options], Executor] = entry_point.load()
        return factory(options)

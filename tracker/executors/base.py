"""What an executor does.

And which there are, by name; the module of each is imported only when it is asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import Protocol

from tracker.core.distribution import install_extra
from tracker.core.errors import RequestError
from tracker.measuring.job import Job, Options, Reporting


class Executor(Protocol):
    """Measures what cells lack; whatever breaks one cell, the others go on.

    Attributes:
        models_loaded: How many times a model was loaded so far.
    """

    models_loaded: int

    def measure(self, jobs: Sequence[Job], to: Reporting) -> None:
        """Measure cells.

        Args:
            jobs: The cells, equal models next to each other.
            to: Where they are kept, and who hears of them.
        """


def last_line(error: Exception) -> str:
    """Say what is worth reading in the long messages of a scheduler: how they end."""
    lines = [line.strip(" -") for line in str(error).splitlines()]
    return next((line for line in reversed(lines) if line), type(error).__name__)[:300]


_NEEDS = {"ray": "ray", "slurm": "submitit"}
"""Executor → the package that the extra of the same name installs."""


def open_executor(options: Options) -> Executor:
    """Make the executor that was asked for ready.

    RequestError if its extra is not installed, or it cannot do what was asked of it here.
    """
    name = "processes" if options.has_workers else options.executor
    try:
        module = import_module(f"tracker.executors.{name}")
        executor: Executor = getattr(module, f"{name.title()}Executor")(options)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != _NEEDS.get(name):
            raise
        raise RequestError(
            f"--executor {name} needs the package {_NEEDS[name]}; type: {install_extra(name)}"
        ) from None
    return executor

"""The executors by name; the module of each is imported only when it is asked for."""

from __future__ import annotations

from importlib import import_module

from tracker.core.distribution import install_extra
from tracker.core.errors import RequestError
from tracker.executors.base import Executor
from tracker.measuring.job import Options

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

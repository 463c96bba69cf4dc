"""The executors by name; each is imported only when it is asked for."""

from __future__ import annotations

from collections.abc import Callable

from tracker.core.distribution import install_extra
from tracker.core.errors import RequestError
from tracker.executors.base import Executor
from tracker.measuring.job import Options


def _local(options: Options) -> Executor:
    from tracker.executors.local import LocalExecutor

    return LocalExecutor(options)


def _ray(options: Options) -> Executor:
    from tracker.executors.ray import RayExecutor

    return RayExecutor(options)


def _slurm(options: Options) -> Executor:
    from tracker.executors.slurm import SlurmExecutor

    return SlurmExecutor(options)


_MAKERS: dict[str, Callable[[Options], Executor]] = {
    "local": _local,
    "ray": _ray,
    "slurm": _slurm,
}
"""Each imports what it needs only when it is called."""
_NEEDS = {"ray": "ray", "slurm": "submitit"}
"""Executor → the package that the extra of the same name installs."""


def open_executor(options: Options) -> Executor:
    """Make the executor that was asked for ready.

    RequestError if its extra is not installed, or it cannot do what was asked of it here.
    """
    name = options.executor
    try:
        return _MAKERS[name](options)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != _NEEDS.get(name):
            raise
        raise RequestError(
            f"--executor {name} needs the package {_NEEDS[name]}; type: {install_extra(name)}"
        ) from None

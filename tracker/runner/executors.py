"""The executors: where what cells lack is measured. Each is imported only when it is asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from tracker.distribution import install_extra
from tracker.errors import RequestError, did_you_mean
from tracker.ledger.cells import CellStore
from tracker.ledger.store import Ledger
from tracker.runner.prepare import Asked
from tracker.runner.progress import Progress

if TYPE_CHECKING:
    from tracker.benchmarks.benchmark import Benchmark


@dataclass(frozen=True)
class Options:
    """How to run, as opposed to what.

    Attributes:
        device: `auto`, or a torch device.
        trust_remote_code: Whether code and pickles from a download may run.
        memory: Bytes that hidden states, keys and values may take; None = half of what is free.
        executor: A key of `EXECUTORS`.
        slurm: What each SLURM job asks for, in submitit's words.

    Raises:
        RequestError: There is no such executor, or SLURM is told what it is not asked to do.
    """

    device: str = "auto"
    trust_remote_code: bool = False
    memory: int | None = None
    executor: str = "local"
    slurm: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.executor not in EXECUTORS:
            raise RequestError(
                f"there is no executor {self.executor!r}; use one of: {', '.join(EXECUTORS)}."
                + did_you_mean(self.executor, EXECUTORS)
            )
        if self.slurm and self.executor != "slurm":
            raise RequestError("--slurm says what SLURM jobs ask for; add --executor slurm")


@dataclass(frozen=True)
class Job:
    """A cell that lacks something.

    Attributes:
        asked: What was asked for.
        benchmark: Its documents.
    """

    asked: Asked
    benchmark: Benchmark


Done = Callable[[Asked, CellStore | Exception], None]
"""Told of each cell once: that nothing of it is missing any more, or what went wrong."""


class Executor(Protocol):
    """Measures what cells lack; whatever breaks one cell, the others go on.

    Attributes:
        models_loaded: How many times a model was loaded so far.
    """

    models_loaded: int

    def measure(self, jobs: Sequence[Job], ledger: Ledger, progress: Progress, done: Done) -> None:
        """Measure cells.

        Args:
            jobs: The cells, equal models next to each other.
            ledger: The results folder.
            progress: Told what happens.
            done: Told of each cell when it is finished or has failed.
        """


def _local(options: Options) -> Executor:
    from tracker.runner.local import LocalExecutor

    return LocalExecutor(options)


def _ray(options: Options) -> Executor:
    from tracker.runner.ray import RayExecutor

    return RayExecutor(options)


def _slurm(options: Options) -> Executor:
    from tracker.runner.slurm import SlurmExecutor

    return SlurmExecutor(options)


EXECUTORS: dict[str, Callable[[Options], Executor]] = {
    "local": _local,
    "ray": _ray,
    "slurm": _slurm,
}
"""What a user may ask for. Each entry imports what it needs only when it is called."""
_NEEDS = {"ray": "ray", "slurm": "submitit"}
"""Executor → the package that the extra of the same name installs."""


def open_executor(options: Options) -> Executor:
    """Make the executor that was asked for ready.

    Args:
        options: How to run.

    Returns:
        The executor.

    Raises:
        RequestError: Its extra is not installed, or it cannot do what was asked of it here.
    """
    name = options.executor
    try:
        return EXECUTORS[name](options)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != _NEEDS.get(name):
            raise
        raise RequestError(
            f"--executor {name} needs the package {_NEEDS[name]}; type: {install_extra(name)}"
        ) from None

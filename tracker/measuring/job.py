"""Define a job and its options."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any

from tracker.benchmarks.base import Benchmark
from tracker.core.config import EXECUTORS, RESTS, CellRequest, executor_names
from tracker.core.errors import RequestError, did_you_mean
from tracker.ledger.cells import CellStore
from tracker.ledger.store import Ledger
from tracker.measuring.prepare import CellLookup
from tracker.measuring.progress import Progress

_LEAST = 2**20


@dataclass(frozen=True)
class Options:
    """Options of a run that do not affect its results.

    Attributes:
        device: `auto`, a torch device, `spread` (one model over all accelerators), or `all` (a
            worker on each).
        trust_remote_code: True if code and pickles from a download may run.
        memory: Bytes for hidden states, keys and values; None = half of the free memory.
        weights: Bytes for a model's weights on the device; None = as many as fit. Other layers are
            offloaded to the host's memory or to disk.
        offload: Place of the layers that are not in use: one of `RESTS`. `device` is where the
            model runs, as far as they fit.
        workers: Number of parallel processes on this machine; None = this process only, or with
            device `all` one for each group of accelerators.
        devices_per_worker: Number of accelerators of each worker; None = as many as the weights
            need.
        executor: The executor: one of `executor_names()`.
        slurm: Parameters of each SLURM job, under submitit's names.

    Raises:
        RequestError: The executor is unknown, it does not support an option, or a size is invalid.
    """

    device: str = "auto"
    trust_remote_code: bool = False
    memory: int | None = None
    weights: int | None = None
    offload: str = "device"
    workers: int | None = None
    devices_per_worker: int | None = None
    executor: str = "local"
    slurm: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        executors = EXECUTORS if self.executor in EXECUTORS else executor_names()
        for what, said, known in (
            ("there is no executor", self.executor, executors),
            ("layers cannot be offloaded to", self.offload, RESTS),
        ):
            if said not in known:
                text = f"{what} {said!r}; use one of: {', '.join(known)}."
                raise RequestError(text + did_you_mean(said, known))
        if self.slurm and self.executor != "slurm":
            raise RequestError("--slurm says what SLURM jobs ask for; add --executor slurm")
        _refuse_no_size("memory", self.memory)
        _refuse_no_size("weights", self.weights)
        self._refuse_workers()

    @property
    def has_workers(self) -> bool:
        """True if separate processes of this machine measure the cells."""
        return self.executor == "local" and (self.device == "all" or bool(self._said_of_workers))

    @property
    def _said_of_workers(self) -> dict[str, int]:
        said = {"workers": self.workers, "devices_per_worker": self.devices_per_worker}
        return {name: number for name, number in said.items() if number is not None}

    def _refuse_workers(self) -> None:
        """Raise RequestError for options of workers that are invalid or not supported."""
        said = self._said_of_workers
        for name, number in said.items():
            if not isinstance(number, Integral) or number < 1:
                raise RequestError(f"{name} is {number!r}; write a whole number from 1 on")
        if said and self.device == "spread":
            raise RequestError(
                "--device spread is one model over all accelerators; for workers with some of them "
                "each: --device all --devices-per-worker 2"
            )
        if self.executor == "ray" and self.workers is not None:
            raise RequestError(
                "--workers is for this machine; Ray has a worker at every GPU, or at every "
                "--devices-per-worker of them, or at every node"
            )
        if self.executor == "slurm" and (said or self.device == "all"):
            raise RequestError(
                "a SLURM job measures in one process. For a model that needs several GPUs: --slurm "
                "gpus_per_node=2 --device spread. For several workers in a job, have sbatch type: "
                "tracker run FILE --device all"
            )


def _refuse_no_size(name: str, size: object) -> None:
    """Raise RequestError for an invalid number of bytes; a notebook may pass any type."""
    if size is not None and not isinstance(size, Integral):
        raise RequestError(
            f"{name} is {size!r}, which is no whole number of bytes; write 4 * 2**30 for 4GiB"
        )
    if size is not None and size < _LEAST:
        raise RequestError(
            f"{name} is {size} bytes, and no model runs in less than 1MiB; write 4GiB or 500MB "
            "(4 * 2**30 in Python)"
        )


@dataclass(frozen=True)
class Job:
    """Unfinished requests of one cell of the ledger, and their benchmark.

    The requests differ only in their runs, so they are measured and checked together. A request
    with a question has a job of its own.
    """

    cells: tuple[CellLookup, ...]
    benchmark: Benchmark

    @property
    def requests(self) -> tuple[CellRequest, ...]:
        """The requests of the job."""
        return tuple(cell.request for cell in self.cells)

    @property
    def title(self) -> str:
        """The job's name in messages."""
        others = len(self.cells) - 1
        more = f" and {others} more of its views" if others else ""
        return f"{self.cells[0].request.title}{more}"


Begun = Callable[[CellLookup, CellStore], None]
"""Function that is called with each unfinished cell before it is measured."""
Done = Callable[[CellLookup, CellStore | Exception], None]
"""Function that is called once with each cell: its finished store, or the error."""


@dataclass(frozen=True)
class Reporting:
    """The results folder and the callbacks of a measurement.

    Attributes:
        ledger: The results folder.
        progress: Receives counts and messages.
        begun: Called with each cell before it is measured.
        done: Called with each cell when it is finished or has failed.
    """

    ledger: Ledger
    progress: Progress
    begun: Begun
    done: Done

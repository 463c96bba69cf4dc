"""Define a job (unfinished requests of one cell) and the options of a run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any

from tracker.benchmarks.base import Benchmark
from tracker.ledger.cells import CellStore
from tracker.ledger.store import Ledger
from tracker.measuring.prepare import CellLookup
from tracker.measuring.progress import Progress
from tracker.schema.config import EXECUTORS, OFFLOAD_PLACES, CellRequest, executor_names
from tracker.schema.errors import RequestError, did_you_mean

_MIN_BYTES = 2**20


@dataclass(frozen=True)
class Options:
    """Options of a run, such as the device, that do not affect the run's results.

    Attributes:
        device: `auto`, a torch device, `spread` (one model over all accelerators), or `all` (one
            worker process on each accelerator).
        trust_remote_code: True to run code and pickles from downloaded models and data.
        memory: Maximum number of bytes for hidden states, keys and values; None = half of the free
            memory.
        weights: Maximum number of bytes for a model's weights on the device; None = as many as fit.
            Layers beyond this limit are offloaded to the host's memory or to disk.
        offload: Where the weights of layers are kept while other layers run: one of
            `OFFLOAD_PLACES`.
        workers: Number of parallel processes on this machine; None = only this process, or one
            process per group of accelerators if `device` is `all`.
        devices_per_worker: Number of accelerators of each worker; None = as many as the weights
            need.
        executor: Name of the executor: one of `executor_names()`.
        slurm: Parameters of each SLURM job, under submitit's names.

    Raises:
        RequestError: The executor is unknown or does not support an option, or a size is invalid.
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
        for problem, value, allowed in (
            ("there is no executor", self.executor, executors),
            ("layers cannot be offloaded to", self.offload, OFFLOAD_PLACES),
        ):
            if value not in allowed:
                text = f"{problem} {value!r}; use one of: {', '.join(allowed)}."
                raise RequestError(text + did_you_mean(value, allowed))
        if self.slurm and self.executor != "slurm":
            raise RequestError(
                "--slurm sets the resources of SLURM jobs, so it needs --executor slurm"
            )
        _refuse_invalid_size("memory", self.memory)
        _refuse_invalid_size("weights", self.weights)
        self._refuse_workers()

    @property
    def has_workers(self) -> bool:
        """True if separate processes of this machine measure the cells."""
        return self.executor == "local" and (self.device == "all" or bool(self._worker_counts))

    @property
    def _worker_counts(self) -> dict[str, int]:
        counts = {"workers": self.workers, "devices_per_worker": self.devices_per_worker}
        return {name: number for name, number in counts.items() if number is not None}

    def _refuse_workers(self) -> None:
        """Raise RequestError if an option of the workers is invalid or not supported."""
        counts = self._worker_counts
        for name, number in counts.items():
            if not isinstance(number, Integral) or number < 1:
                raise RequestError(f"{name} is {number!r}; expected a whole number above 0")
        if counts and self.device == "spread":
            raise RequestError(
                "--device spread uses all accelerators for one model in one worker; for several "
                "workers: --device all --devices-per-worker 2"
            )
        if self.executor == "ray" and self.workers is not None:
            raise RequestError(
                "--workers sets a number of local processes, so leave it out with --executor ray. "
                "Ray starts a worker for every GPU, for every --devices-per-worker GPUs, or for "
                "every node"
            )
        if self.executor == "slurm" and (counts or self.device == "all"):
            raise RequestError(
                "--executor slurm uses one process per job, without --workers, "
                "--devices-per-worker or --device all. If the model needs several GPUs, add: "
                "--slurm gpus_per_node=2 --device spread. To use several workers in one job, write "
                "a script for sbatch that runs: tracker run FILE --device all"
            )


def _refuse_invalid_size(name: str, size: object) -> None:
    """Raise RequestError unless `size` is None or a whole number of at least 1 MiB."""
    if size is not None and not isinstance(size, Integral):
        raise RequestError(
            f"invalid {name} {size!r}; expected a whole number of bytes, e.g. 4 * 2**30 for 4GiB"
        )
    if size is not None and size < _MIN_BYTES:
        raise RequestError(
            f"invalid {name} of {size} bytes; expected at least 1MiB, e.g. 4GiB or 500MB (4 * "
            "2**30 in Python)"
        )


@dataclass(frozen=True)
class Job:
    """Unfinished requests for one model and benchmark (cell).

    The requests of a job differ only in their ablations. A request with an `until` setting has a
    job of its own.
    """

    cells: tuple[CellLookup, ...]
    benchmark: Benchmark

    @property
    def requests(self) -> tuple[CellRequest, ...]:
        """The requests whose missing outcomes the job measures."""
        return tuple(cell.request for cell in self.cells)

    @property
    def title(self) -> str:
        """Name of the job in messages."""
        n_others = len(self.cells) - 1
        suffix = f" and {n_others} more requests for this cell" if n_others else ""
        return f"{self.cells[0].request.title}{suffix}"


BeginCallback = Callable[[CellLookup, CellStore], None]
"""Function that is called with each unfinished cell before it is measured."""
EndCallback = Callable[[CellLookup, CellStore | Exception], None]
"""Function that is called once for each cell, with its finished store or with the error."""


@dataclass(frozen=True)
class Reporting:
    """Results folder and callbacks of a measurement.

    Attributes:
        ledger: The results folder.
        progress: Receives counts and messages.
        on_begin: Function that is called with each cell before the cell is measured.
        on_end: Function that is called with each cell that is finished or has failed.
    """

    ledger: Ledger
    progress: Progress
    on_begin: BeginCallback
    on_end: EndCallback

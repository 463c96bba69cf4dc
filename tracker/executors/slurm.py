"""Measure cells as SLURM jobs: a job array in which each job measures one cell.

Every job works in the shared results folder as `tracker run` does, without publishing. The driver
waits for the jobs and publishes.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import submitit
from submitit.core.utils import FailedJobError, UncompletedJobError
from submitit.helpers import Checkpointable

from tracker.benchmarks.benchmark import open_benchmark
from tracker.core.config import CellRequest
from tracker.core.errors import (
    CellError,
    RequestError,
    TrackerError,
    attempt,
    did_you_mean,
    first_line,
)
from tracker.executors.base import last_line
from tracker.executors.local import measure_cell
from tracker.ledger.blocks import BLOCK
from tracker.ledger.cells import CellStore
from tracker.ledger.store import Ledger
from tracker.measuring.fill import ablation_names
from tracker.measuring.job import Job, Options, Reporting
from tracker.measuring.prepare import look_up
from tracker.measuring.progress import Silent, telling
from tracker.measuring.worker import Worker

POLL = 2.0
"""Seconds between two checks of the jobs and the ledger."""
STARTS = 4
"""Maximum number of consecutive starts of a job without a new shard."""
_COMMON = (
    *("name", "timeout_min", "mem_gb", "nodes", "cpus_per_task", "gpus_per_node"),
    *("tasks_per_node", "stderr_to_stdout"),
)
"""Parameters that submitit takes for every kind of cluster; the others are sbatch's."""
_DEFAULTS = {"name": "tracker", "timeout_min": 60}
log = logging.getLogger(__name__)


class SlurmExecutor:
    """Submits a job array over cells and waits for it.

    `options.slurm` holds the parameters of submitit's `update_parameters`, those of sbatch without
    submitit's prefix. Its key `cluster` is `slurm`, or `local` to test without a cluster.
    RequestError is raised if there is no SLURM, or a parameter is wrong.
    """

    def __init__(self, options: Options) -> None:
        self._cluster = str(options.slurm.get("cluster", "slurm"))
        self._parameters = {k: v for k, v in options.slurm.items() if k != "cluster"}
        self._options = replace(options, executor="local", slurm={})
        # submitit's debug executor makes the same checks, and creates no folder.
        checks = "debug" if self._cluster == "local" else self._cluster
        _executor(Path("slurm"), checks, self._parameters)

    def measure(self, jobs: Sequence[Job], to: Reporting) -> int:
        """Measure cells, one per job; all nodes must share the results folder's file system."""
        to.ledger.create()
        root = to.ledger.root.resolve()
        executor = _executor(root / "slurm" / "%j", self._cluster, self._parameters)
        cells = [CellJob(job.requests, root, self._options) for job in jobs]
        try:
            submitted = executor.submit_array(cells)
        except FailedJobError as error:
            raise RequestError(f"SLURM refused the jobs: {last_line(error)}") from None
        what = f"{len(jobs)} job{'s' * (len(jobs) > 1)}"
        to.progress.say(f"submitted {what}; their logs are in {to.ledger.root / 'slurm'}")
        waiting = [_Waiting(*pair, to) for pair in zip(jobs, submitted, strict=True)]
        say_once, models_loaded = cache(to.progress.say), 0
        with telling(to.progress, "SLURM", sum(job.left for job in waiting), "blocks"):
            try:
                while waiting:
                    time.sleep(POLL)
                    for job in list(waiting):
                        if job.has_ended():
                            waiting.remove(job)
                            models_loaded += job.report(say_once)
            finally:
                for job in waiting:  # the driver was stopped
                    job.submission.cancel(check=False)
        return models_loaded


class _Waiting:
    """A submitted job, and the progress of its cell in the ledger."""

    def __init__(self, job: Job, submission: submitit.Job, to: Reporting) -> None:
        self.submission = submission
        self._job, self._to = job, to
        store, request = job.cells[0].store, job.requests[0]
        self._before = {path.name for path in shards(store)}
        self._found = 0
        if store is None:
            tasks = job.benchmark.identity.tasks
            wanted = [request.extent.of(task.name, task.numbers) for task in tasks]
            self.left = sum(-(-len(documents) // BLOCK) for documents in wanted)
        else:
            names = ablation_names(job, store)
            blocks = store.blocks(request.extent)
            self.left = sum(bool(store.missing(b, request.extent, names)) for b in blocks)

    def has_ended(self) -> bool:
        """Report the new blocks since the last call; return whether the job has ended."""
        is_over = bool(self.submission.done())
        cell = self._job.cells[0]
        store = self._to.ledger.find(cell.key) if cell.key else None
        new = {path.name for path in shards(store)} - self._before
        if store is not None and new and not self._found:
            for cell in self._job.cells:
                self._to.begun(cell, store)
        blocks = len({name.rsplit(".", 2)[0] for name in new})
        fresh = min(blocks - self._found, self.left)
        self._found += fresh
        self.left -= fresh
        self._to.progress.advance(fresh)
        return is_over

    def report(self, say: Callable[[str], None]) -> int:
        """Report the outcome of the job's cells; return the number of loaded models."""
        outcomes = self._outcomes()
        for line in (line for outcome in outcomes for line in outcome.notes):
            say(line)
        errors = [outcome.error for outcome in outcomes if outcome.error is not None]
        if errors or self._job.requests[0].until is not None:
            self._to.progress.expect(-self.left)  # of a question, as many as the answer left
        else:
            self._to.progress.advance(self.left)
        for cell in self._job.cells:
            self._to.done(cell, errors[0] if errors else self._store(cell.request))
        return sum(outcome.models_loaded for outcome in outcomes)

    def _outcomes(self) -> list[JobEnd]:
        """Return the result of each task of the job."""
        try:
            found: list[JobEnd] = self.submission.results()
        except (UncompletedJobError, OSError) as error:
            log.debug("a job gave no result", exc_info=True)
            state, place = self.submission.state, self.submission.paths.stderr
            why = f"job {self.submission.job_id} ended as {state}: {last_line(error)}"
            return [JobEnd(CellError(f"{why}. Its log: {place}"))]
        return found

    def _store(self, request: CellRequest) -> CellStore | CellError:
        """Return the finished cell, or an error if the ledger does not have it."""
        cell = look_up(request, self._to.ledger)
        if cell.store is None or not cell.complete:
            return CellError(
                f"its job ended well, but {self._to.ledger.root} does not hold what it measured: "
                "the results folder must lie on a file system that all nodes share"
            )
        return cell.store


def _executor(folder: Path, cluster: str, parameters: Mapping[str, Any]) -> Any:
    """Create submitit's executor; raise RequestError for unknown parameters."""
    asked = dict(_DEFAULTS)
    for key, value in parameters.items():
        if key in ("time", "timeout_min") and not isinstance(value, int | float):
            raise RequestError(f"--slurm {key}={value}: it is in minutes, such as {key}=240")
        asked[key if key in _COMMON else f"slurm_{key}"] = value
    try:
        # Time-outs are counted by CellJob, which knows whether it came any further.
        executor = submitit.AutoExecutor(folder, cluster=cluster, slurm_max_num_timeout=10_000)
        executor.update_parameters(**asked)
    except NameError as error:
        said, _, known = str(error).splitlines()[0].partition(" Valid arguments: ")
        names = sorted({*_COMMON, *filter(None, known.split(", "))})
        wrong = next((key for key in parameters if f"'{key}'" in said), "")
        raise RequestError(
            f"--slurm: {said}{did_you_mean(wrong, names)} Known are: {', '.join(names)}."
        ) from None
    except (AssertionError, TypeError, ValueError) as error:
        raise RequestError(f"--slurm: {first_line(error)}") from None
    except RuntimeError as error:
        raise RequestError(
            f"there is no SLURM here ({error}). Log in to the cluster, or try the same jobs on "
            "this machine with --slurm cluster=local"
        ) from None
    return executor


@dataclass(frozen=True)
class JobEnd:
    """Result that a job returns to the process that submitted it.

    Attributes:
        error: The error; None if the cell is complete.
        notes: The lines of the self-check.
        models_loaded: Number of times that it loaded the model.
    """

    error: TrackerError | None = None
    notes: tuple[str, ...] = ()
    models_loaded: int = 0


@dataclass
class CellJob(Checkpointable):  # type: ignore[misc]
    """Measures one cell in the shared results folder, for requests that differ only in their runs.

    It publishes nothing. After a time-out or preemption, submitit queues it again, and it continues
    from the shards.
    """

    requests: Sequence[CellRequest]
    results: Path
    options: Options
    _shards: int = -1
    _starts: int = 0

    def __call__(self) -> JobEnd:
        """Measure the missing outcomes of the cell."""
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
        end = attempt(self._run)
        if isinstance(end, TrackerError):
            return JobEnd(end)
        if isinstance(end, Exception):
            log.info("failed", exc_info=end)
            return JobEnd(CellError(f"{type(end).__name__}: {end}"))
        return end

    def _run(self) -> JobEnd:
        ledger = Ledger(self.results)
        asked = [look_up(request, ledger) for request in self.requests]
        cells = tuple(cell for cell in asked if not cell.complete)
        if not cells:
            return JobEnd()
        found = len(shards(cells[0].store))
        self._starts = self._starts + 1 if found == self._shards else 1
        self._shards = found
        if self._starts > STARTS:
            raise CellError(
                f"its job was stopped {STARTS} times before a single block of documents was "
                "measured; give it more time: --slurm timeout_min=240"
            )
        job = Job(cells, open_benchmark(cells[0].request))
        to = Reporting(ledger, _Log(), lambda *_: None, lambda *_: None)
        _, notes = measure_cell(job, Worker(self.options), to)
        return JobEnd(notes=tuple(notes), models_loaded=1)


class _Log(Silent):
    """Receiver that writes messages to the job's log."""

    def say(self, message: str) -> None:
        log.info(message)


def shards(store: CellStore | None) -> list[Path]:
    """List the files of a cell's shards; empty for None."""
    return [] if store is None else store.shards()

"""Measure cells as SLURM jobs: a job array in which each job measures one cell.

Every job writes to the shared results folder. The submitting process waits for the jobs and
publishes the results.
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
from tracker.ledger.blocks import BLOCK_SIZE
from tracker.ledger.cells import CellStore
from tracker.ledger.store import Ledger
from tracker.measuring.executors.base import last_line
from tracker.measuring.executors.local import measure_cell
from tracker.measuring.fill import ablation_names
from tracker.measuring.job import Job, Options, Reporting
from tracker.measuring.prepare import find_cell
from tracker.measuring.progress import Silent, report_work
from tracker.measuring.worker import Worker
from tracker.schema.config import CellRequest
from tracker.schema.errors import (
    CellError,
    RequestError,
    TrackerError,
    attempt,
    did_you_mean,
    first_line,
)

POLL_SECONDS = 2.0
"""Seconds between two checks of the jobs and the ledger."""
MAX_STARTS = 4
"""Maximum number of consecutive starts of a job that write no new shard."""
_COMMON_PARAMETERS = (
    *("name", "timeout_min", "mem_gb", "nodes", "cpus_per_task", "gpus_per_node"),
    *("tasks_per_node", "stderr_to_stdout"),
)
"""Parameters that submitit accepts for every kind of cluster; others are options of sbatch."""
_DEFAULT_PARAMETERS = {"name": "tracker", "timeout_min": 60}
log = logging.getLogger(__name__)


class SlurmExecutor:
    """Executor that submits an array of SLURM jobs, one per cell, and waits for the jobs.

    `options.slurm` contains sbatch options and other parameters of submitit. The parameter
    `cluster` is `slurm`, or `local` to test without a cluster. RequestError is raised if SLURM is
    missing, or a parameter is wrong.
    """

    def __init__(self, options: Options) -> None:
        self._cluster = str(options.slurm.get("cluster", "slurm"))
        self._parameters = {k: v for k, v in options.slurm.items() if k != "cluster"}
        self._options = replace(options, executor="local", slurm={})
        # submitit's debug executor makes the same checks, but creates no folder.
        check_cluster = "debug" if self._cluster == "local" else self._cluster
        _make_executor(Path("slurm"), check_cluster, self._parameters)

    def measure(self, jobs: Sequence[Job], reporting: Reporting) -> int:
        """Measure one cell per SLURM job; all nodes must share the results folder.

        Returns the number of times that a model was loaded.
        """
        reporting.ledger.create()
        root = reporting.ledger.root.resolve()
        executor = _make_executor(root / "slurm" / "%j", self._cluster, self._parameters)
        cells = [CellJob(job.requests, root, self._options) for job in jobs]
        try:
            submitted = executor.submit_array(cells)
        except FailedJobError as error:
            raise RequestError(f"SLURM refused the jobs: {last_line(error)}") from None
        jobs_text = f"{len(jobs)} job{'s' * (len(jobs) > 1)}"
        log_folder, progress = reporting.ledger.root / "slurm", reporting.progress
        progress.say(f"submitted {jobs_text}; their logs are in {log_folder}")
        waiting = [_SubmittedJob(*pair, reporting) for pair in zip(jobs, submitted, strict=True)]
        say_once, models_loaded = cache(progress.say), 0
        with report_work(progress, "SLURM", sum(job.n_left for job in waiting), "blocks"):
            try:
                while waiting:
                    time.sleep(POLL_SECONDS)
                    for job in list(waiting):
                        if job.has_ended():
                            waiting.remove(job)
                            models_loaded += job.report(say_once)
            finally:
                for job in waiting:  # this process was stopped before these jobs ended
                    job.submission.cancel(check=False)
        return models_loaded


class _SubmittedJob:
    """A submitted SLURM job, with the number of blocks that are not measured yet."""

    def __init__(self, job: Job, submission: submitit.Job, reporting: Reporting) -> None:
        self.submission = submission
        self._job, self._reporting = job, reporting
        store, request = job.cells[0].store, job.requests[0]
        self._old_shards = {path.name for path in list_shards(store)}
        self._n_found = 0
        extent = request.extent
        if store is None:
            tasks = job.benchmark.identity.tasks
            counts = [len(extent.select(task.name, task.numbers)) for task in tasks]
            self.n_left = sum(-(-count // BLOCK_SIZE) for count in counts)
        else:
            names = ablation_names(job, store)
            missing = [store.missing_outcomes(b, extent, names) for b in store.blocks(extent)]
            self.n_left = sum(map(bool, missing))

    def has_ended(self) -> bool:
        """Return whether the job has ended; also report the blocks measured since the last call."""
        is_over = bool(self.submission.done())
        cell = self._job.cells[0]
        store = self._reporting.ledger.find(cell.key) if cell.key else None
        new_shards = {path.name for path in list_shards(store)} - self._old_shards
        if store is not None and new_shards and not self._n_found:
            for cell in self._job.cells:
                self._reporting.on_begin(cell, store)
        blocks = len({name.rsplit(".", 2)[0] for name in new_shards})
        n_new = min(blocks - self._n_found, self.n_left)
        self._n_found += n_new
        self.n_left -= n_new
        self._reporting.progress.advance(n_new)
        return is_over

    def report(self, say: Callable[[str], None]) -> int:
        """Report the messages, progress and results of the ended job.

        `say` receives the messages. Returns the number of times that the job loaded a model.
        """
        outcomes = self._read_results()
        for line in (line for outcome in outcomes for line in outcome.notes):
            say(line)
        errors = [outcome.error for outcome in outcomes if outcome.error is not None]
        if errors or self._job.requests[0].until is not None:
            # A cell with a question leaves out the blocks that the answer does not need.
            self._reporting.progress.expect(-self.n_left)
        else:
            self._reporting.progress.advance(self.n_left)
        for cell in self._job.cells:
            self._reporting.on_end(cell, errors[0] if errors else self._find_store(cell.request))
        return sum(outcome.models_loaded for outcome in outcomes)

    def _read_results(self) -> list[JobEnd]:
        """Return the results of the SLURM tasks of the job.

        If the results cannot be read, the list contains one item with an error.
        """
        try:
            ends: list[JobEnd] = self.submission.results()
        except (UncompletedJobError, OSError) as error:
            log.debug("a job gave no result", exc_info=True)
            job = self.submission
            reason = f"job {job.job_id} ended as {job.state}: {last_line(error)}"
            return [JobEnd(CellError(f"{reason}. Its log: {job.paths.stderr}"))]
        return ends

    def _find_store(self, request: CellRequest) -> CellStore | CellError:
        """Return the measured cell's store, or an error if outcomes are missing."""
        cell = find_cell(request, self._reporting.ledger)
        if cell.store is None or not cell.complete:
            return CellError(
                f"the SLURM job succeeded, but {self._reporting.ledger.root} does not contain its "
                "outcomes; the results folder must be on a file system that all nodes share"
            )
        return cell.store


def _make_executor(folder: Path, cluster: str, parameters: Mapping[str, Any]) -> Any:
    """Create submitit's executor; raise RequestError for unknown parameters."""
    settings = dict(_DEFAULT_PARAMETERS)
    for key, value in parameters.items():
        if key in ("time", "timeout_min") and not isinstance(value, int | float):
            raise RequestError(f"--slurm {key}={value}: expected minutes, such as {key}=240")
        settings[key if key in _COMMON_PARAMETERS else f"slurm_{key}"] = value
    try:
        # CellJob counts time-outs itself, because it knows whether it has written new shards.
        executor = submitit.AutoExecutor(folder, cluster=cluster, slurm_max_num_timeout=10_000)
        executor.update_parameters(**settings)
    except NameError as error:
        message, _, valid_names = str(error).splitlines()[0].partition(" Valid arguments: ")
        names = sorted({*_COMMON_PARAMETERS, *filter(None, valid_names.split(", "))})
        wrong_key = next((key for key in parameters if f"'{key}'" in message), "")
        raise RequestError(
            f"--slurm: {message}{did_you_mean(wrong_key, names)} Known are: {', '.join(names)}."
        ) from None
    except (AssertionError, TypeError, ValueError) as error:
        raise RequestError(f"--slurm: {first_line(error)}") from None
    except RuntimeError as error:
        raise RequestError(
            f"SLURM is not available here ({error}). Log in to the cluster, or try the same jobs "
            "on this machine with --slurm cluster=local"
        ) from None
    return executor


@dataclass(frozen=True)
class JobEnd:
    """Result that a job returns to the process that submitted the job.

    Attributes:
        error: The error that stopped the job; None if the cell is complete.
        notes: Messages of the self-check.
        models_loaded: Number of times that the job loaded the model.
    """

    error: TrackerError | None = None
    notes: tuple[str, ...] = ()
    models_loaded: int = 0


@dataclass
class CellJob(Checkpointable):  # type: ignore[misc]
    """SLURM job that measures one cell.

    After a time-out or preemption, submitit queues the job again, and the job measures the
    remaining documents.
    """

    requests: Sequence[CellRequest]
    results: Path
    options: Options
    _shards: int = -1
    _starts: int = 0

    def __call__(self) -> JobEnd:
        """Measure the cell's missing outcomes; errors are returned in the result, not raised."""
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
        lookups = [find_cell(request, ledger) for request in self.requests]
        cells = tuple(cell for cell in lookups if not cell.complete)
        if not cells:
            return JobEnd()
        n_shards = len(list_shards(cells[0].store))
        self._starts = self._starts + 1 if n_shards == self._shards else 1
        self._shards = n_shards
        if self._starts > MAX_STARTS:
            raise CellError(
                f"the SLURM job was stopped {MAX_STARTS} times before it measured a single block "
                "of documents; give the job more time: --slurm timeout_min=240"
            )
        job = Job(cells, open_benchmark(cells[0].request))
        reporting = Reporting(ledger, _Log(), lambda *_: None, lambda *_: None)
        _, notes = measure_cell(job, Worker(self.options), reporting)
        return JobEnd(notes=tuple(notes), models_loaded=1)


class _Log(Silent):
    """Progress listener that writes messages to the log of the SLURM job."""

    def say(self, message: str) -> None:
        log.info(message)


def list_shards(store: CellStore | None) -> list[Path]:
    """List the files with a cell's outcomes (shards); return an empty list if `store` is None."""
    return [] if store is None else store.shards()

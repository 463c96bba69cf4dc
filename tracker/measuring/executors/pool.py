"""Measure cells with several workers, each of which has one thread of this process.

Each thread calls one worker and writes the worker's outcomes. A block of documents is locked while
a worker measures the block. This module also divides the devices among the workers.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from threading import Condition

from tracker.ledger.blocks import Block
from tracker.ledger.cache import Checks
from tracker.ledger.cells import CellStore
from tracker.ledger.views import cell_key
from tracker.measuring.fill import RETRY_SECONDS, CellWork, open_work, refuse_changed_tokens
from tracker.measuring.job import Job, Options, Reporting
from tracker.measuring.progress import report_work
from tracker.measuring.worker import DeviceLostError
from tracker.models.load import bytes_to_load
from tracker.models.offloaded import devices_needed
from tracker.models.sources import find_model
from tracker.schema.config import CellRequest
from tracker.schema.errors import CellError, RequestError, TrackerError, attempt
from tracker.schema.remote import ProcessEndedError, Remote

MAX_DEATHS = 3
"""Number of workers that must die over the same documents before the cell fails."""
log = logging.getLogger(__name__)


@dataclass(eq=False)
class _PoolCell:
    """Cell that the workers of a pool measure together.

    Attributes:
        work: Blocks of documents that are still to be measured; None until a worker has opened the
            cell.
        deaths: Block → number of workers that died while they measured the block. The value of the
            key None is the number of workers that died while they opened the cell.
        has_ended: True if the cell is finished or has failed.
    """

    job: Job
    work: CellWork | None = None
    deaths: Counter[Block | None] = field(default_factory=Counter)
    has_ended: bool = False

    @property
    def request(self) -> CellRequest:
        """First request of the cell; all requests of a cell have the same model and benchmark."""
        return self.job.requests[0]


class WorkerPool:
    """Pool of workers that measure cells together; workers that die are started again.

    Args:
        workers: The workers, each a `RemoteWorker` in another process.
        jobs: The jobs to measure, one for each cell.
        report: The results folder and the callbacks, which are never called by two threads at once.
        checks: Storage of self-check results; None if the workers cannot read the results folder.
    """

    def __init__(
        self,
        workers: Sequence[Remote],
        jobs: Sequence[Job],
        report: Reporting,
        checks: Checks | None,
    ) -> None:
        self._workers, self._report, self._checks = list(workers), report, checks
        self._cells = [_PoolCell(job) for job in jobs]
        self._open_cells: dict[Remote, _PoolCell] = {}
        self._condition = Condition()
        self._say_once = cache(report.progress.say)
        self._is_over = not self._cells
        self._models_loaded = 0

    def run(self, title: str) -> int:
        """Measure all cells with all workers; close the workers at the end.

        Returns the number of times that a model was loaded.
        """
        executor = ThreadPoolExecutor(len(self._workers))
        with report_work(self._report.progress, title, 0), executor:
            try:
                workers = [*self._workers]  # a worker that cannot start leaves the list meanwhile
                futures = [executor.submit(self._run_worker, worker) for worker in workers]
                for future in as_completed(futures):
                    future.result()
            finally:
                self._is_over = True
                for worker in self._workers:
                    worker.close()
        return self._models_loaded

    def _run_worker(self, worker: Remote) -> None:
        """Measure cells with one worker until no cell is left; restart the worker if it dies."""
        try:
            while not self._is_over:
                refusal = attempt(worker.ready)
                if isinstance(refusal, Exception):
                    self._drop_worker(worker, refusal)
                    return
                while (cell := self._next_cell(worker)) is not None:
                    if not self._measure(worker, cell):
                        break
        finally:
            worker.close()

    def _drop_worker(self, worker: Remote, error: Exception) -> None:
        """Remove a worker that cannot start; if no worker is left, end all cells with an error."""
        with self._condition:
            if not self._is_over:
                self._workers.remove(worker)
                self._report.progress.say(f"{worker.name} cannot start: {error}")
                for cell in [] if self._workers else self._cells:
                    self._end_cell(cell, CellError(f"no worker is left: {error}"))

    def _next_cell(self, worker: Remote) -> _PoolCell | None:
        """Wait for a cell that a worker can measure, and return this cell.

        The worker continues its current cell if possible. Otherwise, cells of the model that the
        worker has loaded are preferred. Returns None if all cells are done.
        """
        open_cell = self._open_cells.get(worker)
        loaded_model = open_cell and open_cell.request.model

        def preference(cell: _PoolCell) -> tuple[bool, bool, int]:
            n_workers = sum(cell is other for other in self._open_cells.values())
            is_open = cell is open_cell
            return not is_open, loaded_model != cell.request.model, n_workers - is_open

        with self._condition:
            while not self._is_over:
                cells = [cell for cell in self._cells if not cell.has_ended]
                free = [cell for cell in cells if cell.work is None or cell.work.has_free_block]
                if free:
                    return min(free, key=preference)
                self._condition.wait(RETRY_SECONDS)
        return None

    def _measure(self, worker: Remote, cell: _PoolCell) -> bool:
        """Measure blocks of a cell with a worker until no block is available.

        Returns False if the worker died.
        """
        block: Block | None = None
        try:
            work = cell.work or self._open(worker, cell)
            while not (cell.has_ended or self._is_over):
                with work.take_block() as block_work:
                    if block_work is None:
                        break
                    if is_open := self._open_cells.get(worker) is cell:
                        block = block_work.block
                        # A remote worker reports no progress within a block.
                        work.measure(block_work, lambda *args: worker.measure(*args[:4]))
                block = None
                if not is_open:
                    self._open(worker, cell)
        except (ProcessEndedError, DeviceLostError) as error:
            self._handle_death(worker, cell, block, str(error))
            return False
        except Exception as error:  # the error fails this cell, not the others
            log.debug("%s failed", cell.job.title, exc_info=True)
            self._end_cell(cell, error)
        with self._condition:
            if cell.work is not None and cell.work.is_complete:
                self._end_cell(cell, cell.work.store)
        return True

    def _open(self, worker: Remote, cell: _PoolCell) -> CellWork:
        """Load a cell's model on a worker, and return the work that is left in the cell."""
        progress = self._report.progress
        with self._condition:
            self._open_cells[worker] = cell
            self._say_once(f"loading {cell.job.cells[0].source.name}")
        facts = worker.open(cell.job.requests)
        with self._condition:
            self._models_loaded += facts.is_fresh
            if facts.offloaded:
                self._say_once(f"{facts.model.name}: {facts.offloaded}")
            if cell.work is None:
                cell.work = open_work(cell.job, facts, self._report, self._condition)
                progress.expect(cell.work.total)
                for lookup in cell.job.cells if cell.work.missing_responses else ():
                    self._report.on_begin(lookup, cell.work.store)
            elif cell_key(facts.model, facts.benchmark) != cell.work.store.identity.key:
                raise CellError("the workers read different versions of the model or of the data")
            else:
                refuse_changed_tokens(cell.work.store, facts, progress)
        for line in worker.check(self._checks) if cell.work.missing_responses else ():
            self._say_once(line)
        return cell.work

    def _handle_death(
        self, worker: Remote, cell: _PoolCell, block: Block | None, reason: str
    ) -> None:
        """Count the death of a worker; end the cell with an error after too many deaths."""
        worker.close()
        with self._condition:
            self._open_cells.pop(worker, None)
            if self._is_over:
                return
            cell.deaths[block] += 1
            # A machine on which no worker can open the cell must not fail the cell for the others.
            limit = MAX_DEATHS * (len(self._workers) if block is None else 1)
            if cell.deaths[block] < limit:
                text = f"{worker.name} died; its unfinished work is done again ({reason})"
                self._report.progress.say(text)
                return
            activity = "opening the cell"
            if block is not None:
                activity = f"measuring one block of documents of {block.task}"
            error = CellError(
                f"{limit} workers died while {activity}; reason of the last death: {reason}"
            )
            self._end_cell(cell, error)

    def _end_cell(self, cell: _PoolCell, outcome: CellStore | Exception) -> None:
        """Report the end of a cell, and notify the waiting threads.

        `outcome` is the measured cell, or the exception if the measurement failed. If the cell has
        already ended, nothing is done.
        """
        with self._condition:
            if cell.has_ended:
                return
            cell.has_ended = True
            self._is_over = all(cell.has_ended for cell in self._cells)
            if cell.work is not None:
                self._report.progress.expect(-cell.work.total)
            for lookup in cell.job.cells:
                self._report.on_end(lookup, outcome)
            self._condition.notify_all()


def group_devices(
    devices: Sequence[str], size: int, n_groups: int | None = None, can_grow: bool = False
) -> list[range]:
    """Divide devices into groups of consecutive devices, one group for each worker.

    Args:
        devices: Names of the devices.
        size: Number of devices in each group.
        n_groups: Number of groups; None = as many as possible.
        can_grow: Whether groups of two or more devices may be enlarged, so that fewer devices stay
            unused.

    Returns:
        The groups, as ranges of device numbers.

    Raises:
        RequestError: There are too few devices.
    """
    n_groups = n_groups or len(devices) // size
    if not n_groups or n_groups * size > len(devices):
        raise RequestError(
            f"{max(n_groups, 1)} workers with {size} accelerators each are requested, but this "
            f"machine has {len(devices)}; lower --workers or --devices-per-worker"
        )
    if can_grow and size > 1:
        size = len(devices) // n_groups
    return [range(number * size, (number + 1) * size) for number in range(n_groups)]


def count_devices(
    jobs: Sequence[Job], options: Options, max_devices: int, least_free: Callable[[], int]
) -> int:
    """Return how many accelerators each worker needs to hold the largest model.

    Args:
        jobs: The jobs, which name the models.
        options: The options of the run.
        max_devices: Maximum number of devices of a worker.
        least_free: Function that returns the lowest free memory of any device, in bytes.

    Returns:
        The number of devices per worker; 1 if layers are offloaded.
    """
    if max_devices == 1 or options.weights is not None or options.offload != "device":
        return 1
    return devices_needed(largest_weights(jobs, options), least_free(), max_devices)


def largest_weights(jobs: Sequence[Job], options: Options) -> int:
    """Return the number of bytes of the largest model's weights; an unknown size counts as 0."""
    sizes = [0]
    for spec in dict.fromkeys(job.requests[0].model for job in jobs):
        with suppress(TrackerError):  # the worker that loads the model reports the error
            source = find_model(spec, options.trust_remote_code)
            sizes.append(bytes_to_load(source, spec.dtype) or 0)
    return max(sizes)

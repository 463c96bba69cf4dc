"""Call workers in threads, which share blocks by their locks, and divide devices among them.

Each worker is called in a thread of its own, which writes its outcomes. The locks of blocks alone
distribute the work, as between commands.
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

from tracker.core.config import CellRequest
from tracker.core.errors import CellError, RequestError, TrackerError, attempt
from tracker.core.remote import ProcessEndedError, Remote
from tracker.ledger.blocks import Block
from tracker.ledger.cache import Checks
from tracker.ledger.cells import CellStore
from tracker.ledger.views import cell_key
from tracker.measuring.fill import WAIT, CellWork, open_work, refuse_other_tokens
from tracker.measuring.job import Job, Options, Reporting
from tracker.measuring.progress import telling
from tracker.measuring.worker import DeviceLostError
from tracker.models.load import bytes_to_load
from tracker.models.offloaded import devices_for
from tracker.models.sources import find_model

ATTEMPTS = 3
"""Number of workers that die over the same documents before their cell fails."""
log = logging.getLogger(__name__)


@dataclass(eq=False)
class _Cell:
    """A cell that workers share.

    Attributes:
        work: Its missing blocks; None until a worker has opened it.
        deaths: Block → number of workers that died over it; None → while opening the cell.
        has_ended: True if it is finished or has failed.
    """

    job: Job
    work: CellWork | None = None
    deaths: Counter[Block | None] = field(default_factory=Counter)
    has_ended: bool = False

    @property
    def request(self) -> CellRequest:
        """The first request; all have the same model, benchmark and documents."""
        return self.job.requests[0]


class WorkerPool:
    """Workers that measure cells together; those that die are replaced.

    Args:
        workers: The workers, each a `RemoteWorker` in another process.
        jobs: The jobs.
        to: The results folder and the callbacks, which are called by one thread at a time.
        checks: Storage of verdicts on architectures; None if workers cannot reach it.
    """

    def __init__(
        self, workers: Sequence[Remote], jobs: Sequence[Job], to: Reporting, checks: Checks | None
    ) -> None:
        self._workers, self._to, self._checks = list(workers), to, checks
        self._cells = [_Cell(job) for job in jobs]
        self._opened: dict[Remote, _Cell] = {}
        self._changed = Condition()
        self._say_once = cache(to.progress.say)
        self._is_over = not self._cells
        self._models_loaded = 0

    def run(self, title: str) -> int:
        """Measure until every cell has finished or failed; return the number of loaded models.

        All workers are closed at the end.
        """
        threads = ThreadPoolExecutor(len(self._workers))
        with telling(self._to.progress, title, 0), threads:
            try:
                for thread in as_completed(threads.submit(self._use, w) for w in self._workers):
                    thread.result()
            finally:
                self._is_over = True
                for worker in self._workers:
                    worker.close()
        return self._models_loaded

    def _use(self, worker: Remote) -> None:
        """Measure with a worker until nothing is left; one that dies is started again."""
        try:
            while not self._is_over:
                refusal = attempt(worker.ready)
                if isinstance(refusal, Exception):
                    self._give_up(worker, refusal)
                    return
                while (cell := self._next_cell(worker)) is not None:
                    if not self._measure(worker, cell):
                        break
        finally:
            worker.close()

    def _give_up(self, worker: Remote, error: Exception) -> None:
        """Continue without a worker that cannot start."""
        with self._changed:
            if not self._is_over:
                self._workers.remove(worker)
                self._to.progress.say(f"{worker.name} cannot start: {error}")
                for cell in [] if self._workers else self._cells:
                    self._end(cell, CellError(f"no worker is left: {error}"))

    def _next_cell(self, worker: Remote) -> _Cell | None:
        """Choose a cell for a worker, waiting if necessary; None once all work is done.

        The order of preference is the open cell, cells of the loaded model, and cells with few
        other workers.
        """
        opened = self._opened.get(worker)
        loaded = opened and opened.request.model

        def preference(cell: _Cell) -> tuple[bool, bool, int]:
            others = sum(cell is at for other, at in self._opened.items() if other is not worker)
            return cell is not opened, loaded != cell.request.model, others

        with self._changed:
            while not self._is_over:
                cells = [cell for cell in self._cells if not cell.has_ended]
                if free := [cell for cell in cells if cell.work is None or cell.work.is_free]:
                    return min(free, key=preference)
                self._changed.wait(WAIT)
        return None

    def _measure(self, worker: Remote, cell: _Cell) -> bool:
        """Measure a cell's available blocks with a worker; return whether it is still alive."""
        block: Block | None = None
        try:
            work = cell.work or self._open(worker, cell)
            while not (cell.has_ended or self._is_over):
                with work.take() as taken:
                    if taken is None:
                        break
                    if is_open := self._opened.get(worker) is cell:
                        block = taken.block
                        work.measure(
                            taken,
                            lambda task, names, documents, _: worker.measure(
                                task, names, documents
                            ),
                        )
                block = None
                if not is_open:
                    self._open(worker, cell)
        except (ProcessEndedError, DeviceLostError) as error:
            self._died(worker, cell, block, str(error))
            return False
        except Exception as error:  # it fails its cell, not the others
            log.debug("%s failed", cell.job.title, exc_info=True)
            self._end(cell, error)
        with self._changed:
            if cell.work is not None and cell.work.is_complete:
                self._end(cell, cell.work.store)
        return True

    def _open(self, worker: Remote, cell: _Cell) -> CellWork:
        """Open a cell on a worker."""
        progress = self._to.progress
        with self._changed:
            self._opened[worker] = cell
            self._say_once(f"loading {cell.job.cells[0].source.name}")
        facts = worker.open(cell.job.requests)
        with self._changed:
            self._models_loaded += facts.is_fresh
            if facts.offloaded:
                self._say_once(f"{facts.model.name}: {facts.offloaded}")
            if cell.work is None:
                cell.work = open_work(cell.job, facts, self._to.ledger, progress, self._changed)
                progress.expect(cell.work.total)
                for lookup in cell.job.cells if cell.work.left else ():
                    self._to.begun(lookup, cell.work.store)
            elif cell_key(facts.model, facts.benchmark) != cell.work.store.identity.key:
                raise CellError("the workers do not all see the same model and data")
            else:
                refuse_other_tokens(cell.work.store, facts, progress)
        for line in worker.check(self._checks) if cell.work.left else ():
            self._say_once(line)
        return cell.work

    def _died(self, worker: Remote, cell: _Cell, block: Block | None, why: str) -> None:
        """Schedule a dead worker's block again, up to `ATTEMPTS` times."""
        worker.close()
        with self._changed:
            self._opened.pop(worker, None)
            if self._is_over:
                return
            cell.deaths[block] += 1
            # One machine on which no worker can open the cell must not fail it for the others.
            bound = ATTEMPTS * (len(self._workers) if block is None else 1)
            if cell.deaths[block] < bound:
                self._to.progress.say(f"{worker.name} died; what it did is done again ({why})")
                return
            work = "opening it" if block is None else f"the same documents of {block.task}"
            self._end(cell, CellError(f"{bound} workers died over {work}; the last: {why}"))

    def _end(self, cell: _Cell, outcome: CellStore | Exception) -> None:
        """Report a cell that has finished or failed."""
        with self._changed:
            if cell.has_ended:
                return
            cell.has_ended = True
            self._is_over = all(cell.has_ended for cell in self._cells)
            if cell.work is not None:
                self._to.progress.expect(-cell.work.total)
            for lookup in cell.job.cells:
                self._to.done(lookup, outcome)
            self._changed.notify_all()


def group_devices(
    devices: Sequence[str], size: int, most: int | None = None, more: bool = False
) -> list[range]:
    """Divide devices into groups of neighbours.

    Args:
        devices: The devices.
        size: Number of devices of a group.
        most: Number of groups; None = as many as possible.
        more: True if groups of several devices may be larger to use all devices.

    Returns:
        The groups, as ranges of device numbers.

    Raises:
        RequestError: There are too few devices.
    """
    groups = most or len(devices) // size
    if not groups or groups * size > len(devices):
        raise RequestError(
            f"{max(groups, 1)} workers of {size} accelerators each: this machine has "
            f"{len(devices)}; give less to --workers or --devices-per-worker"
        )
    if more and size > 1:
        size = len(devices) // groups
    return [range(group * size, (group + 1) * size) for group in range(groups)]


def count_devices(
    jobs: Sequence[Job], options: Options, devices: int, least_free: Callable[[], int]
) -> int:
    """Count the devices that a worker needs.

    Args:
        jobs: The cells.
        options: The options of the run.
        devices: Maximum number of devices of a worker.
        least_free: Function that returns the free bytes of the fullest device; may take seconds.

    Returns:
        The number of devices for the weights of the largest model; 1 if layers are offloaded.
    """
    if devices == 1 or options.weights is not None or options.offload != "device":
        return 1
    return devices_for(largest_weights(jobs, options), least_free(), devices)


def largest_weights(jobs: Sequence[Job], options: Options) -> int:
    """Return the bytes of the largest model's weights; models of unknown size count as 0."""
    largest = 0
    for spec in dict.fromkeys(job.requests[0].model for job in jobs):
        with suppress(TrackerError):  # the worker that loads it will say so
            source = find_model(spec, options.trust_remote_code)
            size = bytes_to_load(source, spec.dtype)
            largest = max(largest, size or 0)
    return largest

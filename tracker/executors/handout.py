"""Handing cells out to workers elsewhere, block by block, and taking what comes back.

Only this process writes the ledger, and it holds the lock of every block that is out.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache

from filelock import FileLock, Timeout

from tracker.core.config import CellRequest
from tracker.core.errors import CellError
from tracker.ledger.blocks import Block
from tracker.ledger.cells import CellStore
from tracker.ledger.early_stopping import CellRace
from tracker.ledger.views import cell_key
from tracker.measuring.fill import lacking_of, look, names_of, open_cell, refuse_other_tokens
from tracker.measuring.job import Job, Reporting
from tracker.measuring.meter import Facts, Measured, Place

AHEAD = 4
"""Of so many blocks that a race has looked at, one may be measured before its turn."""
ATTEMPTS = 3
"""How many workers may die over the same documents before their cell fails."""
log = logging.getLogger(__name__)


@dataclass(eq=False)
class Cell:
    """A cell that is handed out.

    Attributes:
        store: The cell on disk; None until a worker has opened it.
        pending: The blocks that nobody is at, and how many responses they lack at most.
        race: Decides what is measured of it, where it has a question.
        responses: Document → how many responses it asks for under one ablation.
        losses: How many workers died over a block, or over opening the cell (None).
        ended: Whether it is finished or has failed.
    """

    job: Job
    store: CellStore | None = None
    pending: dict[Block, int] = field(default_factory=dict)
    race: CellRace | None = None
    responses: dict[Place, int] = field(default_factory=dict)
    losses: Counter[Block | None] = field(default_factory=Counter)
    ended: bool = False

    @property
    def request(self) -> CellRequest:
        """Whose model, benchmark and documents are those of all."""
        return self.job.requests[0]


@dataclass(eq=False)
class Task:
    """What one worker does.

    Attributes:
        block: Which of the cell's blocks is measured; None where the cell is opened.
        missing: Names of ablations → the documents of the block that lack just these.
        responses: How many responses that is.
        whole: Whether all of it is measured at once; else a portion, and the block comes again.
        lock: Keeps other processes from the block.
    """

    cell: Cell
    block: Block | None = None
    missing: dict[tuple[str, ...], list[int]] = field(default_factory=dict)
    responses: int = 0
    whole: bool = True
    lock: FileLock | None = None


class Handout:
    """Knows what is to be done, what is out, and when a cell is finished.

    `begun` is told of each cell that is about to be measured, `done` when it is finished or has
    failed, and `models_loaded` counts how many times the workers loaded a model.
    """

    def __init__(self, jobs: Sequence[Job], to: Reporting) -> None:
        self.models_loaded = 0
        self._cells = [Cell(job) for job in jobs]
        self._out: set[Task] = set()
        self._to, self._progress = to, to.progress
        self._say_once = cache(to.progress.say)

    @property
    def ended(self) -> bool:
        """Whether every cell is finished or has failed."""
        return all(cell.ended for cell in self._cells)

    def next(self, opened: Cell | None, elsewhere: Collection[Cell | None]) -> Task | None:
        """Find something to do for a worker, best with the cell that it has opened already.

        `elsewhere` is what each of the other workers has opened, or is opening. None while there is
        nothing to do.
        """

        def preference(cell: Cell) -> tuple[bool, bool, int]:
            loaded = opened is not None and (
                opened.request.model_settings == cell.request.model_settings
            )
            return cell is not opened, not loaded, sum(cell is other for other in elsewhere)

        for cell in sorted(self._cells, key=preference):
            if cell.ended or not (cell.store is None or cell.pending):
                continue
            task = None
            if cell is not opened:
                task = Task(cell)
            else:
                with self._failing(cell):
                    task = self._next_block(cell, cell.store)
            if task is not None:
                if cell.store is None:
                    self._say_once(f"loading {cell.job.cells[0].source.name}")
                self._out.add(task)
                return task
            self._end_if_complete(cell)
        return None

    def _next_block(self, cell: Cell, store: CellStore | None) -> Task | None:
        assert store is not None
        names, blocks = names_of(cell.job, store), list(cell.pending)
        if (race := cell.race) is not None:
            self._look(cell, store)
            # Beyond the next one a quarter of those that were looked at: so much at most is
            # measured for nothing.
            ahead = race.done // AHEAD
            blocks = [block for block in race.left[: 1 + ahead] if block in cell.pending]
            names = list(race.needed)
        held = False
        for block in blocks:
            lock = store.lock(block)
            try:
                lock.acquire(timeout=0)
            except Timeout:
                held = True
                continue
            missing = store.missing(block, cell.request.extent, names)
            if missing:
                whole = cell.race is not None  # which looks at whole blocks
                return Task(cell, block, missing, cell.pending.pop(block), whole, lock)
            lock.release()
            if cell.race is None:
                self._progress.advance(cell.pending.pop(block))
        if held:
            self._say_once(f"{cell.job.title}: another process is measuring the rest")
        return None

    def _look(self, cell: Cell, store: CellStore) -> None:
        """Let a cell's race look at what came, from whomever."""
        assert cell.race is not None
        left = look(cell.race, store, cell.responses, self._progress)
        out = {task.block for task in self._out if task.cell is cell}
        pending = {block: count for block, count in left.items() if block not in out}
        self._progress.expect(sum(pending.values()) - sum(cell.pending.values()))
        cell.pending = pending

    def opened(self, task: Task, facts: Facts, fresh: bool, said: Sequence[str] = ()) -> None:
        """Take what a worker knows of a cell it has opened, and pass on what it `said`.

        `fresh` if it had to load the model.
        """
        for line in said:
            self._say_once(line)
        self.models_loaded += fresh
        cell = task.cell
        self._out.discard(task)
        with self._failing(cell):
            if cell.store is None and not cell.ended:
                opened = open_cell(cell.job, facts, self._to.ledger, self._progress)
                cell.store, cell.pending, cell.race = opened
                cell.responses = facts.responses
                self._progress.expect(sum(cell.pending.values()))
                if cell.pending:
                    for asked in cell.job.cells:
                        self._to.begun(asked, cell.store)
            elif cell.store and cell_key(facts.model, facts.benchmark) != cell.store.identity.key:
                raise CellError("the workers do not all see the same model and data")
            elif cell.store:
                refuse_other_tokens(cell.store, facts, self._progress)
        self._end_if_complete(cell)

    def measured(self, task: Task, shards: Sequence[Measured], said: Sequence[str]) -> None:
        """Write what a worker has measured, and pass on what it `said`."""
        cell, block = task.cell, task.block
        assert cell.store is not None
        assert block is not None
        for line in said:
            self._say_once(line)
        left = 0
        with self._failing(cell):
            for shard in shards:
                cell.store.write(block, shard.rows, shard.metadata)
                cell.store.texts.add(block.name, shard.texts)
            if not task.whole:
                names = names_of(cell.job, cell.store)
                left = lacking_of(cell.store, block, cell.responses, cell.request.extent, names)
        self._progress.advance(task.responses - left)
        self._return(task)
        if left:
            cell.pending[block] = left
        if cell.race is not None and not cell.ended:
            with self._failing(cell):
                self._look(cell, cell.store)
        self._end_if_complete(cell)

    def failed(self, task: Task, error: Exception) -> None:
        """Let the cell of a task fail."""
        log.debug("%s failed", task.cell.job.title, exc_info=error)
        self._return(task, undone=True)
        self._fail(task.cell, error)

    def lost(self, task: Task, who: str, why: str, workers: int) -> None:
        """Have a task done again because the worker `who` died, `ATTEMPTS` times at most.

        Opening a cell that some worker has opened already may fail so often on each of the
        `workers`.
        """
        self._return(task, undone=True)
        cell, block = task.cell, task.block
        cell.losses[block] += 1
        # Where one machine could open the cell, another one that cannot does not decide.
        bound = ATTEMPTS * (workers if block is None and cell.store is not None else 1)
        if cell.losses[block] < bound:
            self._progress.say(f"{who} died; what it did is done again ({why})")
            return
        what = "opening it" if block is None else f"the same documents of {block.task}"
        self._fail(cell, CellError(f"{bound} workers died over {what}; the last: {why}"))

    def give_up(self, why: str) -> None:
        """Let everything that is not finished fail with a reason."""
        for cell in self._cells:
            self._fail(cell, CellError(why))

    def close(self) -> None:
        """Leave what is still out to other processes."""
        for task in list(self._out):
            self._return(task, undone=True)

    def _return(self, task: Task, undone: bool = False) -> None:
        self._out.discard(task)
        if task.block is not None and undone:
            task.cell.pending[task.block] = task.responses
        if task.lock is not None:
            task.lock.release()

    @contextmanager
    def _failing(self, cell: Cell) -> Iterator[None]:
        """Let a cell fail, and only it, where the context fails."""
        try:
            yield
        except Exception as error:
            log.debug("%s failed", cell.job.title, exc_info=True)
            self._fail(cell, error)

    def _fail(self, cell: Cell, error: Exception) -> None:
        if not cell.ended:
            cell.ended = True
            self._progress.expect(-sum(cell.pending.values()))
            for asked in cell.job.cells:
                self._to.done(asked, error)

    def _end_if_complete(self, cell: Cell) -> None:
        busy = any(task.cell is cell and task.block is not None for task in self._out)
        if cell.store is not None and not (cell.ended or cell.pending or busy):
            cell.ended = True
            for asked in cell.job.cells:
                self._to.done(asked, cell.store)

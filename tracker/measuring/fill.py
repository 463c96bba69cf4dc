"""Compute the missing blocks of a cell, also together with other processes.

Work is distributed by the locks of blocks alone. The holder of a lock measures and writes the
block: the only worker of a command, one of several, or another command on the same folder.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from threading import Condition
from typing import NamedTuple

from filelock import Timeout

from tracker.analysis.stopping import BlockRace, CellRace
from tracker.core.config import all_ablations
from tracker.core.errors import CellError
from tracker.core.extent import ALL, Extent
from tracker.core.provenance import SAME_VERSIONS, readers, reads_otherwise
from tracker.ledger.blocks import Block, portions
from tracker.ledger.cells import CellStore
from tracker.ledger.outcomes import PROVENANCE, TOKENS_DIGEST
from tracker.ledger.store import Ledger
from tracker.measuring.job import Job
from tracker.measuring.meter import Advance, Facts, Measured
from tracker.measuring.prepare import look_up
from tracker.measuring.progress import Progress, telling

WAIT = 0.5
"""Seconds between two attempts to take a block that another process is measuring."""
AHEAD = 4
"""One block may be measured ahead of the race for every this many blocks that it has used."""


Measure = Callable[[str, Sequence[str], Sequence[int], Advance], Measured]
"""Function that measures documents of a task under named ablations and reports its progress."""


def refuse_other_tokens(store: CellStore, facts: Facts, progress: Progress) -> None:
    """Raise CellError if a cell's measured documents have other tokens than now.

    If former versions did not store the tokens and package versions differ, a warning goes to
    `progress`. `facts` describes the documents and the current versions.
    """
    provenance = facts.provenance
    frame = store.read(columns=["task", "doc", TOKENS_DIGEST, PROVENANCE]).drop_duplicates()
    for task, doc, digest, stack in frame.itertuples(index=False):
        if isinstance(digest, str) and facts.digests.get((task, doc), digest) != digest:
            what = f"document {doc} of {task} is read as other tokens"
            raise _not_mixed(what, json.loads(stack), provenance)
    if reads_otherwise(store.identity.provenance, provenance):
        raise _not_mixed("texts are read otherwise", store.identity.provenance, provenance)
    before = map(json.loads, frame[PROVENANCE][frame[TOKENS_DIGEST].isna()].unique())
    if versions := sorted({readers(each, provenance) for each in before} - {SAME_VERSIONS}):
        progress.say(
            f"{store.identity.benchmark.title}: what is measured ({'; '.join(versions)}) does not "
            f"state its tokens. If {readers(provenance, {})} read texts otherwise, figures are "
            "mixed; choose another --results to be sure"
        )


def _not_mixed(what: str, then: Mapping[str, str], now: Mapping[str, str]) -> CellError:
    """Return the error about a cell whose new outcomes would have other tokens."""
    before, after = readers(then, now), readers(now, then)
    alike = (
        ". A chat template may state the date, which chat_template_args can fix; and the model's "
        "own code runs only with --trust-remote-code"
    )
    return CellError(
        f"{what} now ({after}) than when this was measured ({before}); the two are not mixed, and "
        "nothing is added. Measure with what was used then, or choose another --results"
        f"{alike * (before == SAME_VERSIONS)}"
    )


class BlockWork(NamedTuple):
    """A block with missing outcomes.

    Attributes:
        block: The block.
        missing: Names of ablations → the documents that lack exactly these.
    """

    block: Block
    missing: Mapping[tuple[str, ...], Sequence[int]]


class CellWork:
    """The missing blocks of a cell, shared by the workers of one command, each in its thread.

    Attributes:
        store: The cell on disk.
        left: Block with missing outcomes → maximum number of missing responses.
    """

    def __init__(
        self,
        store: CellStore,
        facts: Facts,
        progress: Progress,
        *,
        extent: Extent = ALL,
        names: Sequence[str] = (),
        race: BlockRace | None = None,
        changed: Condition | None = None,
    ) -> None:
        """Find the missing blocks of a cell.

        Args:
            store: The cell on disk.
            facts: Its documents and the current versions.
            progress: Receives counts and messages.
            extent: The requested documents; not used with a race.
            names: The requested ablations; not used with a race.
            race: The stopping rule that decides block by block what is measured; None for none.
            changed: Lock of the workers' shared state, which is notified of each finished block.
        """
        self.store = store
        self._facts, self._progress, self._race = facts, progress, race
        self._extent = extent if race is None else race.extent
        self._names = names
        self._changed = changed or Condition()
        self._taken: set[Block] = set()
        self._complete: set[Block] = set()
        self._retry = 0.0
        self.left = self._find_lacking()

    @property
    def total(self) -> int:
        """The maximum number of missing responses."""
        return sum(self.left.values())

    @property
    def is_complete(self) -> bool:
        """True if nothing is missing, and no worker measures a block."""
        return not (self.left or self._taken)

    @property
    def is_free(self) -> bool:
        """True if there may be a missing block that no one measures."""
        return time.monotonic() >= self._retry and bool(self._candidates())

    @contextmanager
    def take(self) -> Iterator[BlockWork | None]:
        """Yield a missing block while holding its lock; None if none is available now."""
        with ExitStack() as held:
            with self._changed:
                self._update_race()
                work = self._lock_block(held)
            yield work

    def measure(self, work: BlockWork, measure: Measure) -> None:
        """Measure and write the missing outcomes of a block, whose lock must be held."""
        block, missing = work
        due = self._count(block, missing)
        # Offloaded weights are read once for everything that is computed together.
        for names, documents in missing.items() if self._facts.offloaded else portions(missing):
            due -= self._count(block, {names: documents})
            shard = measure(block.task, names, documents, partial(self._advance, block, due))
            for line in shard.notes:
                self._progress.say(line)
            self.store.write(block, shard.rows, shard.metadata)
            self.store.texts.add(block.name, shard.texts)
            self._settle(block, due)
        with self._changed:
            self._update_race()

    def _lock_block(self, held: ExitStack) -> BlockWork | None:
        """Lock the first missing block that no one measures; None if there is none."""
        elsewhere: list[Block] = []
        while blocks := [block for block in self._candidates() if block not in elsewhere]:
            block = blocks[0]
            with suppress(Timeout), ExitStack() as lock:
                lock.callback(self._give_back, block)
                lock.enter_context(self.store.lock(block).acquire(timeout=0))
                names = self._names if self._race is None else self._race.needed
                missing = self.store.missing(block, self._extent, names)
                self._settle(block, self._count(block, missing))
                if missing:
                    self._taken.add(block)
                    held.enter_context(lock.pop_all())
                    return BlockWork(block, missing)
                self._update_race()
                continue
            elsewhere.append(block)
        if elsewhere:
            if not self._retry:
                count = f"{len(elsewhere)} block{'s are' if len(elsewhere) > 1 else ' is'}"
                self._progress.say(f"{count} being measured by another process")
            self._retry = time.monotonic() + WAIT
        return None

    def _give_back(self, block: Block) -> None:
        """Make a block, whose lock is released, available to the other workers."""
        with self._changed:
            self._taken.discard(block)
            self._changed.notify_all()

    def _candidates(self) -> list[Block]:
        """List the blocks that may be measured now and that no worker of this command measures."""
        blocks = list(self.left)
        if self._race is not None:
            blocks = self._race.left
            # Blocks depend on the results before them. Beyond the next block, at most a quarter of
            # the number of used blocks is measured ahead, while another worker measures the next.
            ahead = self._race.done // AHEAD if self._taken.intersection(blocks[:1]) else 0
            blocks = [block for block in blocks[: 1 + ahead] if block in self.left]
        return [block for block in blocks if block not in self._taken]

    def _update_race(self) -> None:
        """Re-evaluate the stopping rule on all results so far."""
        if self._race is None:
            return
        open_before = self._race.open.sum()
        self._race.advance()
        if 0 < self._race.open.sum() < open_before:
            self._progress.say(f"{self._race.contenders}; {self._race.looked:,} documents")
        before = self.total
        self.left = self._find_lacking()
        self._progress.expect(self.total - before)

    def _find_lacking(self) -> dict[Block, int]:
        """Return missing blocks → maximum number of missing responses."""
        extent, race = self._extent, self._race
        if race is None and not self.store.is_complete(extent, self._names):
            blocks = self.store.blocks(extent)
            missing = {block: self.store.missing(block, extent, self._names) for block in blocks}
        elif race is not None and race.lacking is not None:
            next_block, names = race.lacking
            blocks = [b for b in race.left if b == next_block or b not in self._complete]
            missing = {b: {names: list(self.store.documents(b, extent))} for b in blocks}
        else:
            return {}
        responses = {block: self._count(block, work) for block, work in missing.items()}
        return {block: count for block, count in responses.items() if count}

    def _count(self, block: Block, missing: Mapping[tuple[str, ...], Sequence[int]]) -> int:
        """Count the missing responses of a block."""
        responses = self._facts.responses
        return sum(
            len(names) * sum(responses[block.task, document] for document in documents)
            for names, documents in missing.items()
        )

    def _advance(self, block: Block, due: int, responses: int) -> None:
        """Report responses of a block that is being measured; `due` responses come later."""
        # The baseline is computed along with missing ablations, and is not counted again.
        self._settle(block, max(due, self.left.get(block, 0) - responses))

    def _settle(self, block: Block, left: int) -> None:
        """Report a block's responses as done, except for those that are left."""
        with self._changed:
            if (responses := self.left.get(block, 0) - left) > 0:
                self._progress.advance(responses)
                self.left[block] = left
            if not left:
                self.left.pop(block, None)
                self._complete.add(block)


def open_work(
    job: Job, facts: Facts, ledger: Ledger, progress: Progress, changed: Condition | None = None
) -> CellWork:
    """Open or create the cell of a job, and find its missing blocks.

    Args:
        job: The job.
        facts: Its model and documents.
        ledger: The results folder.
        progress: Receives counts and messages.
        changed: The lock of the workers that share it.

    Returns:
        The missing blocks.

    Raises:
        CellError: Its documents have other tokens than earlier outcomes of the cell.
    """
    store, request = open_store(job, facts, ledger), job.cells[0].request
    race = None if request.until is None else CellRace(store, store.views.of(request))
    work = CellWork(
        *(store, facts, progress),
        extent=request.extent,
        names=ablation_names(job, store),
        race=race,
        changed=changed,
    )
    if work.left:
        refuse_other_tokens(store, facts, progress)
    return work


def open_store(job: Job, facts: Facts, ledger: Ledger) -> CellStore:
    """Open or create the cell of a job, and record it as the result of its request."""
    store = ledger.cell(facts.model, facts.benchmark, facts.provenance)
    # A hub model's commit is known only now that it is in the cache. Changes are not part of the
    # key, so all requests of a job have the same one.
    cell = job.cells[0]
    if key := cell.key or look_up(cell.request, ledger).key:
        ledger.remember(key, store)
    return store


def ablation_names(job: Job, store: CellStore) -> list[str]:
    """List the names of the ablations of a job's requests."""
    return [a.name for a in all_ablations(job.requests, store.identity.model.layers)]


def fill(work: CellWork, measure: Measure, progress: Progress) -> None:
    """Measure everything that a cell lacks, and wait for blocks of other processes.

    If such a process dies, its lock is released, and the block is measured here.
    """
    with telling(progress, work.store.identity.benchmark.title, work.total):
        while True:
            with work.take() as taken:
                if taken is not None:
                    work.measure(taken, measure)
            if work.is_complete:
                return
            if taken is None:
                time.sleep(WAIT)

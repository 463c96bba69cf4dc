"""Measure the missing outcomes of a cell, block by block; several processes can share a cell.

A process locks a block of documents while it measures the block. The processes can belong to
different commands.
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
from tracker.ledger.blocks import Block, split_missing
from tracker.ledger.cells import CellStore
from tracker.ledger.outcomes import DIGEST_COLUMN, PROVENANCE_COLUMN, stored_texts
from tracker.ledger.store import Ledger
from tracker.measuring.job import Job, Reporting
from tracker.measuring.meter import Advance, CellFacts, Measurement
from tracker.measuring.prepare import find_cell
from tracker.measuring.progress import Progress, report_work
from tracker.schema.changes import INTACT
from tracker.schema.config import all_ablations, names_traces
from tracker.schema.errors import CellError
from tracker.schema.extent import ALL_DOCUMENTS, Extent
from tracker.schema.provenance import SAME_VERSIONS, has_other_tokens, tokeniser_differences

RETRY_SECONDS = 0.5
"""Seconds between two attempts to take a block that another process is measuring."""
AHEAD_RATIO = 4
"""Number of blocks that the race must have used for each block that is measured ahead of it."""


MeasureDocuments = Callable[
    [str, Sequence[str], Sequence[int], Mapping[int, Sequence[str]], Advance], Measurement
]
"""Function that measures documents of a task under named ablations and reports progress.

The mapping contains the texts that the intact model wrote before for documents of `traces:TASK`.
"""


def refuse_changed_tokens(store: CellStore, facts: CellFacts, progress: Progress) -> None:
    """Raise CellError if a document is tokenised differently than in the stored results.

    `facts` contains the current tokens and package versions. `progress` receives a warning if the
    stored tokens are unknown and the package versions have changed.
    """
    provenance = facts.provenance
    frame = store.read(columns=["task", "doc", DIGEST_COLUMN, PROVENANCE_COLUMN]).drop_duplicates()
    for task, doc, digest, provenance_text in frame.itertuples(index=False):
        if isinstance(digest, str) and facts.digests.get((task, doc), digest) != digest:
            subject = f"document {doc} of {task}"
            raise _tokens_error(subject, json.loads(provenance_text), provenance)
    if has_other_tokens(store.identity.provenance, provenance):
        raise _tokens_error("the benchmark", store.identity.provenance, provenance)
    undigested = map(json.loads, frame[PROVENANCE_COLUMN][frame[DIGEST_COLUMN].isna()].unique())
    versions = {tokeniser_differences(stored, provenance) for stored in undigested}
    if versions := versions - {SAME_VERSIONS}:
        old, new = "; ".join(sorted(versions)), tokeniser_differences(provenance, {})
        progress.say(
            f"{store.identity.benchmark.title}: the stored results (from {old}) do not record how "
            f"texts were tokenised. The new results (from {new}) may come from other tokens than "
            "the stored results. To be safe, choose another folder with --results"
        )


def _tokens_error(subject: str, stored: Mapping[str, str], current: Mapping[str, str]) -> CellError:
    """Build the error about a document or benchmark whose tokens have changed.

    `subject` names the document or benchmark. `stored` and `current` are the software versions of
    the stored and of the new results.
    """
    old, new = tokeniser_differences(stored, current), tokeniser_differences(current, stored)
    advice = (
        "Tokens can change with a chat template that inserts the current date; to keep the tokens, "
        "set the date in chat_template_args. Tokens can also change with model code that was not "
        "run; to run the code, add --trust-remote-code. "
    )
    return CellError(
        f"{subject} is now tokenised differently ({new}) than in the stored results ({old}), so no "
        f"results were added. {advice * (old == SAME_VERSIONS)}"
        "Restore the former versions and settings, or choose another results folder with --results"
    )


MissingOutcomes = Mapping[tuple[str, ...], Sequence[int]]
"""Names of ablations → numbers of the documents that lack exactly these ablations."""


class BlockWork(NamedTuple):
    """A block of documents, and the missing outcomes of these documents.

    Attributes:
        block: The block, which contains documents of one task.
        missing: Names of ablations → numbers of the documents without outcomes under these
            ablations.
    """

    block: Block
    missing: MissingOutcomes


class CellWork:
    """Blocks of a cell that are still to be measured, shared by the threads of all workers.

    Attributes:
        store: The cell on disk.
        missing_responses: Block with missing outcomes → maximum number of responses (requests ×
            ablations) that are still to be computed.
    """

    def __init__(
        self,
        store: CellStore,
        facts: CellFacts,
        progress: Progress,
        *,
        extent: Extent = ALL_DOCUMENTS,
        names: Sequence[str] = (),
        race: BlockRace | None = None,
        condition: Condition | None = None,
    ) -> None:
        """Find the blocks of a cell that have missing outcomes.

        Args:
            store: The cell on disk.
            facts: Facts about the cell's documents, and the current package versions.
            progress: Receives counts and messages.
            extent: The requested documents; ignored if a race is given.
            names: Names of the requested ablations; ignored if a race is given.
            race: Stopping rule that chooses the next block and its ablations; None = measure
                everything.
            condition: Condition variable that protects the state shared by workers.
        """
        self.store = store
        self._facts, self._progress, self._race = facts, progress, race
        self._extent = extent if race is None else race.extent
        self._names = names
        self._condition = condition or Condition()
        self._busy_blocks: set[Block] = set()
        self._complete_blocks: set[Block] = set()
        self._retry_time = 0.0
        self.missing_responses = self._count_missing()

    @property
    def total(self) -> int:
        """Maximum number of responses (requests × ablations) still to be computed."""
        return sum(self.missing_responses.values())

    @property
    def is_complete(self) -> bool:
        """True if no outcome is missing, and no worker is measuring a block."""
        return not (self.missing_responses or self._busy_blocks)

    @property
    def has_free_block(self) -> bool:
        """True if a worker may try to lock a block with missing outcomes."""
        return time.monotonic() >= self._retry_time and bool(self._free_blocks())

    @contextmanager
    def take_block(self) -> Iterator[BlockWork | None]:
        """Lock and yield a block with missing outcomes; yield None if no block is free."""
        with ExitStack() as locks:
            with self._condition:
                self._apply_stopping_rule()
                work = self._lock_block(locks)
            yield work

    def measure(self, work: BlockWork, measure: MeasureDocuments) -> None:
        """Measure the missing outcomes of a block, and write them to the cell.

        Args:
            work: The block and its missing outcomes. The caller must hold the lock of the block.
            measure: Function that measures documents of one task under some ablations.
        """
        block, missing = work
        n_pending, traces = self._count_responses(block, missing), self._read_traces(block)
        # Offloaded weights are read once for all documents that are computed together.
        portions = missing.items() if self._facts.offloaded else split_missing(missing)
        for names, documents in portions:
            n_pending -= self._count_responses(block, {names: documents})
            advance = partial(self._report_responses, block, n_pending)
            shard = measure(block.task, names, documents, traces, advance)
            for line in shard.notes:
                self._progress.say(line)
            # Texts first: a block with outcomes is not measured again, so a kill would lose them.
            self.store.texts.add(block.name, shard.texts)
            self.store.write(block, shard.rows, shard.metadata)
            self._set_missing(block, n_pending)
        with self._condition:
            self._apply_stopping_rule()

    def _read_traces(self, block: Block) -> dict[int, list[str]]:
        """Return the intact model's stored texts for the documents of a block.

        The dict is empty unless the benchmark is `traces:TASK`, which scores such texts.
        """
        if not names_traces(self.store.identity.benchmark.name):
            return {}
        frame = self.store.read_block(block, self._extent)
        rows = frame[frame["ablation"] == INTACT.name].to_dict("records")
        return {int(row["doc"]): texts for row in rows if (texts := stored_texts(row))}

    def _lock_block(self, locks: ExitStack) -> BlockWork | None:
        """Lock the first free block with missing outcomes; return the work on the block.

        Returns None if there is no free block. The lock is held until the caller closes `locks`.
        """
        skipped: list[Block] = []
        while blocks := [block for block in self._free_blocks() if block not in skipped]:
            block = blocks[0]
            with suppress(Timeout), ExitStack() as lock:
                lock.callback(self._release_block, block)
                lock.enter_context(self.store.lock(block).acquire(timeout=0))
                names = self._names if self._race is None else self._race.needed_ablations
                missing = self.store.missing_outcomes(block, self._extent, names)
                self._set_missing(block, self._count_responses(block, missing))
                if missing:
                    self._busy_blocks.add(block)
                    locks.enter_context(lock.pop_all())
                    return BlockWork(block, missing)
                self._apply_stopping_rule()
                continue
            skipped.append(block)
        if skipped:
            if not self._retry_time:
                noun = "blocks" if len(skipped) > 1 else "block"
                self._progress.say(
                    f"another process is measuring {len(skipped)} {noun} of documents"
                )
            self._retry_time = time.monotonic() + RETRY_SECONDS
        return None

    def _release_block(self, block: Block) -> None:
        """Mark a block as not being measured, and notify the threads that wait for blocks."""
        with self._condition:
            self._busy_blocks.discard(block)
            self._condition.notify_all()

    def _free_blocks(self) -> list[Block]:
        """List blocks with missing outcomes that no worker of this run is measuring."""
        blocks = list(self.missing_responses)
        if self._race is not None:
            blocks = self._race.remaining_blocks
            # The work of a block depends on earlier results. While another worker measures the next
            # block, further blocks are measured ahead: at most a quarter of the used ones.
            is_next_busy = bool(self._busy_blocks.intersection(blocks[:1]))
            blocks = blocks[: 1 + is_next_busy * (self._race.n_blocks // AHEAD_RATIO)]
        return [b for b in blocks if b in self.missing_responses and b not in self._busy_blocks]

    def _apply_stopping_rule(self) -> None:
        """Apply the stopping rule, if the cell has one, and count the missing responses again."""
        if self._race is None:
            return
        n_open = self._race.open.sum()
        self._race.advance()
        if 0 < self._race.open.sum() < n_open:
            self._progress.say(f"{self._race.contenders}; {self._race.looked:,} documents")
        n_missing = self.total
        self.missing_responses = self._count_missing()
        self._progress.expect(self.total - n_missing)

    def _count_missing(self) -> dict[Block, int]:
        """Count the missing responses of each incomplete block of documents.

        With a stopping rule, the counts are upper limits.
        """
        extent, race = self._extent, self._race
        if race is None and not self.store.is_complete(extent, self._names):
            blocks = self.store.blocks(extent)
            missing = {b: self.store.missing_outcomes(b, extent, self._names) for b in blocks}
        elif race is not None and race.next_block is not None:
            next_block, names = race.next_block
            complete = self._complete_blocks - {next_block}
            blocks = [block for block in race.remaining_blocks if block not in complete]
            missing = {b: {names: list(self.store.documents(b, extent))} for b in blocks}
        else:
            return {}
        responses = {block: self._count_responses(block, work) for block, work in missing.items()}
        return {block: count for block, count in responses.items() if count}

    def _count_responses(self, block: Block, missing: MissingOutcomes) -> int:
        """Count the responses (requests × ablations) for the missing outcomes of a block."""
        responses = self._facts.responses
        return sum(
            len(names) * sum(responses[block.task, document] for document in documents)
            for names, documents in missing.items()
        )

    def _report_responses(self, block: Block, n_pending: int, n_responses: int) -> None:
        """Report `n_responses` new responses of a block to the progress receiver.

        At least `n_pending` responses of the block remain to be computed.
        """
        # The baseline is always computed with missing ablations; it is not counted again.
        self._set_missing(block, max(n_pending, self.missing_responses.get(block, 0) - n_responses))

    def _set_missing(self, block: Block, n_left: int) -> None:
        """Set the number of missing responses of a block, and report the progress."""
        with self._condition:
            if (n_done := self.missing_responses.get(block, 0) - n_left) > 0:
                self._progress.advance(n_done)
                self.missing_responses[block] = n_left
            if not n_left:
                self.missing_responses.pop(block, None)
                self._complete_blocks.add(block)


def open_work(
    job: Job, facts: CellFacts, report: Reporting, condition: Condition | None = None
) -> CellWork:
    """Open the stored outcomes of a job, and find the documents that are still to be measured.

    Args:
        job: The job.
        facts: Facts about the model and documents of the job.
        report: The results folder, and the receiver of counts and messages.
        condition: The lock of the workers that share the job; None if there is one worker.

    Returns:
        The documents that are still to be measured, in blocks.

    Raises:
        CellError: A stored outcome belongs to a document that was tokenised differently.
    """
    store, request = open_store(job, facts, report.ledger), job.cells[0].request
    race = None if request.until is None else CellRace(store, store.views.view_of(request))
    work = CellWork(
        *(store, facts, report.progress),
        extent=request.extent,
        names=ablation_names(job, store),
        race=race,
        condition=condition,
    )
    if work.missing_responses:
        refuse_changed_tokens(store, facts, report.progress)
    return work


def open_store(job: Job, facts: CellFacts, ledger: Ledger) -> CellStore:
    """Open or create the cell of a job, and store the key by which requests find the cell."""
    store = ledger.open_cell(facts.model, facts.benchmark, facts.provenance)
    # The commit of a hub model is known only now that the model is in the cache. All requests of a
    # job have the same key, because the key does not contain the changes.
    cell = job.cells[0]
    if key := cell.key or find_cell(cell.request, ledger).key:
        ledger.index_cell(key, store)
    return store


def ablation_names(job: Job, store: CellStore) -> list[str]:
    """List the names of all ablations that a job's requests need."""
    return [a.name for a in all_ablations(job.requests, store.identity.model.layers)]


def fill_cell(work: CellWork, measure: MeasureDocuments, progress: Progress) -> None:
    """Measure a cell's missing outcomes, and wait for outcomes that other processes measure.

    If another process dies, this process measures the block of the dead process.
    """
    with report_work(progress, work.store.identity.benchmark.title, work.total):
        while True:
            with work.take_block() as block_work:
                if block_work is not None:
                    work.measure(block_work, measure)
            if work.is_complete:
                return
            if block_work is None:
                time.sleep(RETRY_SECONDS)

"""Filling a cell's missing outcomes, block by block, together with whoever else is at it."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress

from filelock import Timeout

from tracker.core.ablations import all_ablations
from tracker.core.errors import CellError
from tracker.core.extent import Extent
from tracker.core.provenance import SAME_VERSIONS, readers, reads_otherwise
from tracker.ledger.blocks import Block
from tracker.ledger.cells import CellStore
from tracker.ledger.early_stopping import BlockRace, CellRace
from tracker.ledger.outcomes import PROVENANCE, TOKENS_DIGEST
from tracker.ledger.store import Ledger
from tracker.measuring.job import Job
from tracker.measuring.meter import Facts, Meter, Place
from tracker.measuring.prepare import look_up
from tracker.measuring.progress import Progress, telling

WAIT = 0.5
"""Seconds between two looks at blocks that another process is computing."""


def refuse_other_tokens(store: CellStore, facts: Facts, progress: Progress) -> None:
    """Raise CellError where documents of a cell were measured as other tokens than they are now.

    Where that was not kept and versions differ, `progress` is told a warning. `facts` are those of
    the documents and of what reads them now.
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
    """Make the error of a cell to which nothing is added."""
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


def open_cell(
    job: Job, facts: Facts, ledger: Ledger, progress: Progress
) -> tuple[CellStore, dict[Block, int], CellRace | None]:
    """Open a cell whose model is known, or make it, and see what it lacks.

    The ledger finds the cell by its requests from now on. With the cell come the blocks that lack
    something, how many responses each lacks, and the race that decides, where there is a question.
    CellError where its documents are other tokens now than they were.
    """
    store = ledger.cell(facts.model, facts.benchmark, facts.provenance)
    # A hub model's commit is known only now that it is in the cache. What is removed is no part of
    # the key, so that all cells of a job have the same.
    asked = job.cells[0]
    key = asked.key or look_up(asked.request, ledger).key
    if key:
        ledger.remember(key, store)
    race = None
    if asked.request.until is not None:
        race = CellRace(store, store.views.of(asked.request))
        left = at_most(race, store, facts.responses)
    else:
        left = lacking(store, facts, asked.request.extent, names_of(job, store))
    if left:
        refuse_other_tokens(store, facts, progress)
    return store, left, race


def lacking(
    store: CellStore, facts: Facts, extent: Extent, names: Sequence[str]
) -> dict[Block, int]:
    """Say which blocks lack something of what is named, and how many responses each lacks."""
    if store.is_complete(extent, names):
        return {}
    found = {
        block: lacking_of(store, block, facts.responses, extent, names)
        for block in store.blocks(extent)
    }
    return {block: count for block, count in found.items() if count}


def lacking_of(
    store: CellStore,
    block: Block,
    responses: Mapping[Place, int],
    extent: Extent,
    names: Sequence[str],
) -> int:
    """Count the responses that one block lacks of what is named."""
    return sum(
        responses[block.task, i] * len(absent)
        for absent, indices in store.missing(block, extent, names).items()
        for i in indices
    )


def names_of(job: Job, store: CellStore) -> list[str]:
    """Name the ablations that a cell is measured under."""
    return [a.name for a in all_ablations(job.requests, store.identity.model.layers)]


def at_most(race: BlockRace, store: CellStore, responses: Mapping[Place, int]) -> dict[Block, int]:
    """Say how many responses each block takes until a race is over, if nobody leaves it."""
    if race.lacking is None:
        return {}
    return {
        block: len(race.needed)
        * sum(responses[block.task, d] for d in store.documents(block, race.extent))
        for block in race.left
    }


def look(
    race: BlockRace, store: CellStore, responses: Mapping[Place, int], progress: Progress
) -> dict[Block, int]:
    """Look at what was measured, say who is left, and how many responses are to come at most."""
    were = race.open.sum()
    race.advance()
    if 0 < race.open.sum() < were:
        progress.say(f"{race.contenders}; {race.looked:,} documents")
    return at_most(race, store, responses)


def fill_until(race: BlockRace, store: CellStore, meter: Meter, progress: Progress) -> None:
    """Measure block after block, each under the ablations that are open, until a race is over.

    A block that another process holds is waited for: what comes after it depends on it.
    """
    expected = sum(at_most(race, store, meter.facts.responses).values())
    with telling(progress, store.identity.benchmark.title, expected):
        while race.lacking is not None:
            done = _fill_block(store, meter, race.extent, progress, *race.lacking)
            if done is None:
                time.sleep(WAIT)
            left = sum(look(race, store, meter.facts.responses, progress).values())
            progress.expect(left - expected + (done or 0))
            expected = left


def fill(
    store: CellStore, left: Mapping[Block, int], meter: Meter, extent: Extent, progress: Progress
) -> None:
    """Measure what a cell lacks: the blocks, and how many responses each of them lacks.

    A block that another process holds is left to it and looked at again at the end: if that
    process dies, its lock goes with it and the block is computed here.
    """
    names = [ablation.name for ablation in meter.ablations]
    pending, told = list(left), False
    with telling(progress, store.identity.benchmark.title, sum(left.values())):
        while pending:
            held = []
            for block in pending:
                done = _fill_block(store, meter, extent, progress, block, names)
                if done is None:
                    held.append(block)
                else:
                    progress.advance(left[block] - done)
            if held == pending:
                if not told:
                    what = "1 block is" if len(held) == 1 else f"{len(held)} blocks are"
                    progress.say(f"{what} being measured by another process")
                    told = True
                time.sleep(WAIT)
            pending = held


def _fill_block(
    store: CellStore,
    meter: Meter,
    extent: Extent,
    progress: Progress,
    block: Block,
    names: Sequence[str],
) -> int | None:
    """Measure what one block lacks, and count the responses; None if another process does."""
    done = 0

    def advance(responses: int) -> None:
        nonlocal done
        # The baseline is computed along with what is missing, and is not counted again.
        responses = min(responses, due - done)
        done += responses
        progress.advance(responses)

    with suppress(Timeout), store.lock(block).acquire(timeout=0):
        due = lacking_of(store, block, meter.facts.responses, extent, names)
        missing = store.missing(block, extent, names)
        for absent, indices in meter.portions(missing):
            shard = meter.measure(block.task, absent, indices, advance)
            for line in meter.notes():
                progress.say(line)
            store.write(block, shard.rows, shard.metadata)
            store.texts.add(block.name, shard.texts)
        return done
    return None

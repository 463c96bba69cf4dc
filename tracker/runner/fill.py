"""Filling a cell's missing outcomes, block by block, together with whoever else is at it."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime

from filelock import Timeout

from tracker.ablations import INTACT, Ablation
from tracker.benchmarks.tasks import Benchmark
from tracker.documents import Document
from tracker.engine.sweep import DocumentScores, Engine
from tracker.ledger.outcomes import outcome_row
from tracker.ledger.store import Block, CellStore
from tracker.runner.progress import Progress

WAIT = 0.5
"""Seconds between two looks at blocks that another process is computing."""


def fill(
    store: CellStore,
    benchmark: Benchmark,
    documents: Sequence[Document],
    engine: Engine,
    ablations: Sequence[Ablation],
    limit: int | None,
    progress: Progress,
) -> None:
    """Measure what a cell lacks.

    A block that another process holds is left to it and looked at again at the end: if that
    process dies, its lock goes with it and the block is computed here.

    Args:
        store: The cell on disk.
        benchmark: Judges the responses.
        documents: All documents up to the limit.
        engine: Scores them.
        ablations: What to remove.
        limit: Documents per task.
        progress: Told of every scored row.
    """
    by_place = {(document.task, document.index): document for document in documents}
    sizes = {
        block: sum(
            row.tokens
            for row in engine.rows([by_place[block.task, i] for i in block.documents(count)])
        )
        for block in store.blocks(limit)
        if (count := store.counts(limit)[block.task])
    }
    progress.start(store.identity.benchmark.name, sum(sizes.values()))
    pending = list(sizes)
    told = False
    while pending:
        left = []
        for block in pending:
            try:
                with store.lock(block).acquire(timeout=0):
                    done = _fill_block(
                        store, block, benchmark, by_place, engine, ablations, limit, progress
                    )
                    progress.advance(sizes[block] - done)
            except Timeout:
                left.append(block)
        if len(left) == len(pending):
            if not told:
                progress.say(f"{len(left)} blocks are being measured by another process")
                told = True
            time.sleep(WAIT)
        pending = left
    progress.finish()


def _fill_block(
    store: CellStore,
    block: Block,
    benchmark: Benchmark,
    by_place: Mapping[tuple[str, int], Document],
    engine: Engine,
    ablations: Sequence[Ablation],
    limit: int | None,
    progress: Progress,
) -> int:
    """Measure what one block lacks; returns the tokens that were reported as scored."""
    named = {ablation.name: ablation for ablation in ablations}
    done = 0

    def advance(tokens: int) -> None:
        nonlocal done
        done += tokens
        progress.advance(tokens)

    for names, indices in store.missing(block, limit, list(named)).items():
        # The baseline rides along for free: every other stream forks from it.
        scored = [INTACT, *(named[name] for name in names if name != INTACT.name)]
        start = time.perf_counter()
        results = engine.score([by_place[block.task, i] for i in indices], scored, advance)
        rows = [
            row
            for result in results
            for row in _rows(result, scored, benchmark, keep_baseline=INTACT.name in names)
        ]
        store.write(
            block,
            rows,
            {
                "measured": datetime.now(UTC).isoformat(timespec="seconds"),
                "seconds": f"{time.perf_counter() - start:.3f}",
                "device": str(engine.loaded.device),
                "sharing": str(engine.sharing),
            },
        )
    return done


def _rows(
    result: DocumentScores, scored: Sequence[Ablation], benchmark: Benchmark, keep_baseline: bool
) -> list[dict[str, object]]:
    rows = []
    for ablation, responses in zip(scored, result.responses, strict=True):
        if ablation == INTACT and not keep_baseline:
            continue
        proxies = (result.proxy_tokens, result.proxy_sums.tolist()) if ablation == INTACT else None
        metrics = benchmark.outcomes(result.document, responses)
        rows.append(outcome_row(result.document, ablation.name, responses, metrics, proxies))
    return rows

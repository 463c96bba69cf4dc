"""Filling a cell's missing outcomes, block by block, together with whoever else is at it."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime

from filelock import Timeout

from tracker.ablations import INTACT, Ablation
from tracker.benchmarks.benchmark import Benchmark
from tracker.documents import Document
from tracker.engine.sweep import DocumentScores
from tracker.ledger.outcomes import outcome_row
from tracker.ledger.store import Block, CellStore
from tracker.runner.progress import Progress
from tracker.runner.scorer import Scorer

WAIT = 0.5
"""Seconds between two looks at blocks that another process is computing."""


def fill(
    store: CellStore,
    benchmark: Benchmark,
    documents: Sequence[Document],
    scorer: Scorer,
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
        scorer: Scores them.
        ablations: What to remove.
        limit: Documents per task.
        progress: Told of every scored row.
    """
    by_place = {(document.task, document.index): document for document in documents}
    names = [ablation.name for ablation in ablations]
    sizes = {
        block: sum(
            scorer.responses(by_place[block.task, i]) * len(lacking)
            for lacking, indices in store.missing(block, limit, names).items()
            for i in indices
        )
        for block in store.blocks(limit)
    }
    progress.start(store.identity.benchmark.name, sum(sizes.values()))
    pending = [block for block, size in sizes.items() if size]
    told = False
    while pending:
        left = []
        for block in pending:
            try:
                with store.lock(block).acquire(timeout=0):
                    done = _fill_block(
                        store, block, benchmark, by_place, scorer, ablations, limit, progress
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
    scorer: Scorer,
    ablations: Sequence[Ablation],
    limit: int | None,
    progress: Progress,
) -> int:
    """Measure what one block lacks; returns the responses that were reported as scored."""
    named = {ablation.name: ablation for ablation in ablations}
    done = 0

    def advance(responses: int) -> None:
        nonlocal done
        done += responses
        progress.advance(responses)

    for names, indices in store.missing(block, limit, list(named)).items():
        # The baseline rides along for free: every other stream forks from it.
        scored = [INTACT, *(named[name] for name in names if name != INTACT.name)]
        start = time.perf_counter()
        results = scorer.score([by_place[block.task, i] for i in indices], scored, advance)
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
                "device": str(scorer.engine.loaded.device),
                "sharing": str(scorer.engine.sharing),
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

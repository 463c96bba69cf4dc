"""Observe more of a model than outcomes, block by block, and store it in the cell's folder."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tracker.benchmarks.benchmark import open_benchmark
from tracker.core.config import CellRequest
from tracker.core.documents import Document
from tracker.engine.scoring.sweep import Engine
from tracker.ledger.blocks import Block
from tracker.ledger.cache import Checks
from tracker.ledger.cells import CellStore
from tracker.ledger.shards import Arrays, read_observations, write_observations
from tracker.ledger.store import Ledger
from tracker.measuring.fill import refuse_other_tokens
from tracker.measuring.job import Options
from tracker.measuring.meter import Meter, open_model
from tracker.measuring.progress import Progress, telling

OFTEN = 60.0
"""Maximum number of seconds of observing that a killed process loses."""
Documents = Mapping[tuple[str, int], Document]
"""Mapping of (task, number in its split) → document."""
Observe = Callable[[Document], Arrays]
"""Function that observes one document; its arrays have equal names and shapes for all documents."""


@dataclass(frozen=True)
class Observed:
    """Observations of documents, in the order in which they are measured.

    Attributes:
        documents: The (task, number in its split) of each document.
        arrays: Name → array whose first axis is the documents.
    """

    documents: list[tuple[str, int]]
    arrays: Mapping[str, NDArray[np.float64]]

    def of(self, documents: Iterable[tuple[str, int]]) -> dict[str, NDArray[np.float64]]:
        """Return the arrays of some of the documents, in their order."""
        rows = {document: row for row, document in enumerate(self.documents)}
        chosen = [rows[document] for document in documents]
        return {name: figures[chosen] for name, figures in self.arrays.items()}


def observe(
    request: CellRequest,
    store: CellStore,
    kind: str,
    begin: Callable[[Engine], Observe],
    opened: Callable[[], tuple[Engine, Documents]],
    progress: Progress,
    among: Collection[tuple[str, int]] | None = None,
) -> Observed:
    """Observe documents of a cell, and compute only those not observed before.

    Args:
        request: The request of the cell.
        store: The cell in the ledger.
        kind: Name of the observed quantity and its method; it must change whenever figures do.
        begin: Function that returns the observer of an engine.
        opened: Function that opens the engine and the documents, as `open_observed` does. It is
            called only if something is missing.
        progress: Receives counts and messages.
        among: The documents, as (task, number in its split); None for all.

    Returns:
        The observations.
    """
    folder, extent = store.folder, request.extent
    wanted = {
        block: [
            n for n in store.documents(block, extent) if among is None or (block.task, n) in among
        ]
        for block in store.blocks(extent)
    }
    held = {block: read_observations(folder, kind, block) for block in wanted}
    lacking = sum(doc not in held[block] for block, docs in wanted.items() for doc in docs)
    if lacking:
        engine, documents = opened()
        watch = begin(engine)
        with telling(progress, f"{request.title}: observing", lacking, "documents"):
            for block, docs in wanted.items():
                with store.lock(Block(f"{kind}/{block.task}", block.number, block.seed)):
                    found = read_observations(folder, kind, block)
                    absent = [doc for doc in docs if doc not in found]
                    written = time.monotonic()
                    for doc in absent:
                        found[doc] = watch(documents[block.task, doc])
                        progress.advance(1)
                        if doc == absent[-1] or time.monotonic() > written + OFTEN:
                            write_observations(folder, kind, block, found)
                            written = time.monotonic()
                    held[block] = found
    places = [(block.task, doc) for block, docs in wanted.items() for doc in docs]
    rows = [held[block][doc] for block, docs in wanted.items() for doc in docs]
    return Observed(places, {name: np.stack([row[name] for row in rows]) for name in rows[0]})


def open_observed(
    request: CellRequest, store: CellStore, ledger: Ledger, options: Options, progress: Progress
) -> tuple[Engine, Documents]:
    """Load the model of a cell, check its sharing, and read its documents."""
    model = open_model(request.model, options)
    meter = Meter([request], open_benchmark(request), model, options)
    refuse_other_tokens(store, meter.facts, progress)
    progress.say(f"{request.benchmark}: checking that sharing is exact for this model")
    meter.check(Checks(ledger.root))
    return meter.engine, meter.documents

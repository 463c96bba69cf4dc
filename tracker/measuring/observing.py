"""Compute and store statistics of documents for studies and for the setting `observe`."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import compress
from operator import itemgetter

import numpy as np
from numpy.typing import NDArray

from tracker.analysis.aligned import AlignedOutcomes
from tracker.benchmarks.benchmark import open_benchmark
from tracker.engine.forward.streams import Ablations
from tracker.engine.observers.layer_proxies import answer_divergences
from tracker.engine.scoring.sweep import Engine
from tracker.ledger.blocks import Block
from tracker.ledger.cache import Checks
from tracker.ledger.cells import CellStore
from tracker.ledger.shards import DocumentArrays, read_observations, write_observations
from tracker.ledger.store import Ledger
from tracker.measuring.fill import refuse_changed_tokens
from tracker.measuring.job import Options
from tracker.measuring.meter import Meter, open_model
from tracker.measuring.progress import Progress, report_work
from tracker.schema.config import CellRequest
from tracker.schema.documents import Document
from tracker.schema.grouping import group_by
from tracker.schema.provenance import content_hash
from tracker.schema.proxies import ANSWER_TOKENS, KL_COLUMN, KL_KIND

SAVE_SECONDS = 60.0
"""Seconds between two saves, so that a killed process loses at most this much work."""
DocumentMap = Mapping[tuple[str, int], Document]
"""Mapping of (task, number in the task's split) → document."""
ObserveDocument = Callable[[Document], DocumentArrays]
"""Function that observes a document; names and shapes of its arrays are equal for all."""


@dataclass(frozen=True)
class Observations:
    """Statistics that a study measured on documents, as arrays with one row per document.

    Attributes:
        documents: Key (task, number in the task's split) of each row's document.
        arrays: Name of a statistic → array, with rows in the order of `documents`.
    """

    documents: list[tuple[str, int]]
    arrays: Mapping[str, NDArray[np.float64]]

    def select(self, documents: Iterable[tuple[str, int]]) -> dict[str, NDArray[np.float64]]:
        """Select the rows of the given documents from each array.

        The result maps the name of each statistic to an array with rows in the order of
        `documents`.
        """
        rows = {document: row for row, document in enumerate(self.documents)}
        row_numbers = [rows[document] for document in documents]
        return {name: figures[row_numbers] for name, figures in self.arrays.items()}


def observe_cell(
    request: CellRequest,
    store: CellStore,
    kind: str,
    make_observer: Callable[[Engine], ObserveDocument],
    open_engine: Callable[[], tuple[Engine, DocumentMap]],
    progress: Progress,
    selection: Collection[tuple[str, int]] | None = None,
) -> Observations:
    """Return statistics of documents; first compute and store the missing statistics.

    Args:
        request: The request of the cell.
        store: Stored results of the cell in the ledger.
        kind: Name under which the values are stored. If the computation of the values changes, this
            name must change too.
        make_observer: Function that takes an engine and returns a function for one document.
        open_engine: Function that returns an engine and the documents. Not called if all values are
            stored.
        progress: Receives counts and messages.
        selection: Documents to observe, as (task, number in the task's split); None for all.

    Returns:
        The statistics of all selected documents.
    """
    folder, extent = store.folder, request.extent
    keys = [(block, n) for block in store.blocks(extent) for n in store.documents(block, extent)]
    if selection is not None:
        keys = [(block, n) for block, n in keys if (block.task, n) in selection]
    numbers = {
        block: [n for _, n in group] for block, group in group_by(keys, itemgetter(0)).items()
    }
    stored = {block: read_observations(folder, kind, block) for block in numbers}
    if n_missing := sum(n not in stored[block] for block, n in keys):
        engine, documents = open_engine()
        observe_document = make_observer(engine)
        with report_work(progress, f"{request.title}: observing", n_missing, "documents"):
            for block in numbers:
                with store.lock(Block(f"{kind}/{block.task}", block.number, block.seed)):
                    stored[block] = arrays = read_observations(folder, kind, block)
                    missing = [n for n in numbers[block] if n not in arrays]
                    save_time = time.monotonic()
                    for n in missing:
                        arrays[n] = observe_document(documents[block.task, n])
                        progress.advance(1)
                        if n == missing[-1] or time.monotonic() > save_time + SAVE_SECONDS:
                            write_observations(folder, kind, block, arrays)
                            save_time = time.monotonic()
    rows = [stored[block][n] for block, n in keys]
    figures = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    return Observations([(block.task, n) for block, n in keys], figures)


def open_observed_cell(
    request: CellRequest, store: CellStore, ledger: Ledger, options: Options, progress: Progress
) -> tuple[Engine, DocumentMap]:
    """Load a model, check results against pruned models; return the engine and the documents."""
    model = open_model(request.model, options)
    meter = Meter([request], open_benchmark(request), model, options)
    refuse_changed_tokens(store, meter.facts, progress)
    progress.say(f"{request.benchmark}: checking results against pruned models")
    meter.check(Checks(ledger.root))
    return meter.engine, meter.documents


def observe_divergences(
    request: CellRequest, store: CellStore, ledger: Ledger, options: Options, progress: Progress
) -> CellStore:
    """Compute and store a measured request's missing KL divergences; return its stored results."""
    outcomes = AlignedOutcomes(store, store.views.view_of(request))
    is_missing = np.isnan(outcomes.part_sums(KL_COLUMN, outcomes.runs).sum(axis=0))
    ablations = [outcomes.ablation(run) for run in compress(outcomes.runs, is_missing)]
    if ablations:
        kind = f"{KL_KIND}-{content_hash([ablation.name for ablation in ablations])[:8]}"
        open_cell = partial(open_observed_cell, request, store, ledger, options, progress)
        begin = partial(partial, _observe_answer, ablations)
        observe_cell(request, store, kind, begin, open_cell, progress)
    return store


def _observe_answer(ablations: Ablations, engine: Engine, document: Document) -> DocumentArrays:
    """Measure the KL divergences of ablations at the tokens of a document's right answer."""
    sums = answer_divergences(engine, document, ablations)
    values = zip(ablations, sums["kl"].numpy(), strict=True)
    return {ANSWER_TOKENS: sums["tokens"].numpy()} | {a.name: kl for a, kl in values}

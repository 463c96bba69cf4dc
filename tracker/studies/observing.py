"""Observing more of a model than outcomes, block by block, kept beside the cell."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tracker.ablations import ablations_of
from tracker.benchmarks.benchmark import open_benchmark
from tracker.benchmarks.encoder import RequestEncoder
from tracker.documents import Document
from tracker.engine.check import check
from tracker.engine.sweep import Engine
from tracker.ledger.blocks import Block
from tracker.ledger.checks import Checks
from tracker.ledger.observations import Arrays, read_observations, write_observations
from tracker.measuring.meter import open_model
from tracker.studies.base import Asked, Subject

Observe = Callable[[Document], Arrays]
"""Observes one document: arrays of the same names and shapes for every document."""


@dataclass(frozen=True)
class Observed:
    """What was observed of documents, in the order in which they are measured.

    Attributes:
        documents: (task, number in its split) of each.
        arrays: Name → figures, the first axis the documents.
    """

    documents: list[tuple[str, int]]
    arrays: Mapping[str, NDArray[np.float64]]


def observe(
    subject: Subject, kind: str, asked: Asked, begin: Callable[[Engine], Observe]
) -> Observed:
    """Observe all documents of a cell, just those that were not observed before.

    Args:
        subject: The cell.
        kind: What is observed and how; whatever changes a figure is in it.
        asked: The study.
        begin: Makes the observer of a model, which is loaded only where something is missing. The
            engine that it is given shares as much as the self-check finds exact.

    Returns:
        What was observed.
    """
    store, folder = subject.store, subject.store.folder
    extent = subject.request.extent
    wanted = {block: list(store.documents(block, extent)) for block in store.blocks(extent)}
    held = {block: read_observations(folder, kind, block) for block in wanted}
    lacking = sum(doc not in held[block] for block, docs in wanted.items() for doc in docs)
    if lacking:
        engine, documents = _opened(subject, asked)
        watch = begin(engine)
        asked.progress.start(f"{subject.request.title}: {kind}", lacking, "documents")
        try:
            for block, docs in wanted.items():
                with store.lock(Block(f"{kind}/{block.task}", block.number, block.seed)):
                    found = dict(read_observations(folder, kind, block))
                    absent = [doc for doc in docs if doc not in found]
                    for doc in absent:
                        found[doc] = watch(documents[block.task, doc])
                        asked.progress.advance(1)
                    if absent:
                        write_observations(folder, kind, block, found)
                    held[block] = found
        finally:
            asked.progress.finish()
    rows = [held[block][doc] for block, docs in wanted.items() for doc in docs]
    places = [(block.task, doc) for block, docs in wanted.items() for doc in docs]
    return Observed(places, {name: np.stack([row[name] for row in rows]) for name in rows[0]})


def _opened(subject: Subject, asked: Asked) -> tuple[Engine, dict[tuple[str, int], Document]]:
    """Load the model of a cell, share as much as is exact, and read its documents."""
    request = subject.request
    model = open_model(request, asked.options).loaded
    encoder = RequestEncoder(model.model, model.tokenizer, request)
    documents = open_benchmark(request).documents(encoder, request.extent)
    engine = Engine(model, encoder.max_length, memory=asked.options.memory)
    asked.progress.say(f"{request.benchmark}: checking that sharing is exact for this model")
    ablations = ablations_of(request, model.identity.layers)
    engine = check(engine, documents, ablations, Checks(asked.ledger.root)).engine
    return engine, {(document.task, document.index): document for document in documents}

"""Observes the errors of linear maps in formats, document by document."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tracker.core.changes import Ablation, Change
from tracker.core.documents import Document
from tracker.engine.observers.divergence import divergences
from tracker.engine.observers.rounding_error import rounding_errors, weight_errors
from tracker.engine.scoring.sweep import Engine
from tracker.ledger.shards import Arrays
from tracker.measuring.observing import Observe


def errors_of(engine: Engine, maps: Sequence[Change], kl: bool = False) -> Observe:
    """Make what observes a document's `rounding_errors`, with `weight_error` the same for all.

    With `kl` also the divergence of what the model says, which takes a pass for each map.
    """
    weights = weight_errors(engine, maps)
    ablations = [Ablation.of(each) for each in maps]

    def watch(document: Document) -> Arrays:
        found = {**rounding_errors(engine, document, maps), "weight_error": weights}
        if kl:
            found["kl"] = divergences(engine, document, ablations)["kl"]
        return {name: np.asarray(value) for name, value in found.items()}

    return watch

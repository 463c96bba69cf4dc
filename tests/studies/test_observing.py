"""What a study observes is observed once, also when the sample grows or a file is damaged."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tracker.engine.scoring.sweep import Engine
from tracker.ledger.shards import Arrays
from tracker.measuring.derive import record_of
from tracker.measuring.observing import Observed
from tracker.runner import run_cells
from tracker.studies.base import StudyContext, Subject, observe

from .conftest import asked_for, stores


def _subject(path: Path, results: Path) -> tuple[StudyContext, Subject]:
    asked = asked_for(path, results)
    (request,) = asked.experiment.cells()
    run_cells([request], asked.ledger, asked.publisher, asked.options, asked.progress)
    (store,) = stores(path, results)
    return asked, Subject(request, store, record_of(store, store.views.of(request)))


def test_what_was_observed_before_a_process_ends_is_kept(
    tiny_llama, experiment, tmp_path, monkeypatch
):
    """Was: 32 documents of a long observation were lost together."""
    monkeypatch.setattr("tracker.measuring.observing.OFTEN", 0.0)
    path = experiment(tiny_llama(), limit=None, sample=5, layer=[1])
    asked, subject = _subject(path, tmp_path / "results")
    seen: list[int] = []

    def begin(engine: Engine):
        def watch(document) -> Arrays:
            seen.append(document.index)
            if len(seen) == 3:
                raise KeyboardInterrupt
            return {"index": np.array(document.index)}

        return watch

    with pytest.raises(KeyboardInterrupt):
        observe(subject, "test", asked, begin)
    found = observe(subject, "test", asked, begin)
    assert [doc for _, doc in found.documents] == [*seen[:2], *seen[3:]]
    assert found.arrays["index"].tolist() == [*seen[:2], *seen[3:]]


def test_only_what_is_missing_is_observed(tiny_llama, experiment, tmp_path):
    model, seen = tiny_llama(), []

    def begin(engine: Engine):
        def watch(document) -> Arrays:
            seen.append(document.index)
            tokens = len(document.requests[0].context)
            return {"tokens": np.array(tokens), "map": np.full((2, 3), document.index)}

        return watch

    def observed(sample: int) -> Observed:
        path = experiment(model, limit=None, sample=sample, layer=[1])
        asked, subject = _subject(path, tmp_path / "results")
        return observe(subject, "test", asked, begin)

    few = observed(3)
    assert few.arrays["map"].shape == (3, 2, 3)
    assert few.arrays["tokens"].shape == (3,)
    more = observed(40)
    assert len(seen) == len(set(seen)) == 40
    assert [doc for _, doc in more.documents] == seen
    assert (more.arrays["map"][:, 1, 2] == seen).all()
    assert more.documents[:3] == few.documents
    _first, second = sorted((tmp_path / "results").glob("cells/*/observed/test/*"))
    content = second.read_bytes()
    second.write_bytes(content[:40] + bytes([content[40] ^ 1]) + content[41:])
    again = observed(40)
    assert len(seen) == 48
    assert (again.arrays["map"] == more.arrays["map"]).all()

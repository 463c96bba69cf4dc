"""Count what a row costs beside computing: copies between host and device, waits, launches."""

from __future__ import annotations

from collections import Counter
from itertools import accumulate

import pytest
import torch

from tests.device.simulated import counters
from tests.helpers.engines import make_documents
from tracker.bench.doctor import FEATURE_SWEEPS
from tracker.engine.forward.layer import FittedReplacement
from tracker.engine.observers.layer_proxies import divergences
from tracker.engine.scoring import sweep
from tracker.engine.scoring.score import launch_row
from tracker.models.layers import find_layers
from tracker.schema.changes import INTACT

FAMILIES = {"shared experts": "qwen2_moe", "experts": "mixtral"}


def totals() -> Counter[str]:
    """Count copies between host and device, and what waits for the device: blocking copies too."""
    counts = counters.counts()
    waits = sum(counts.get(name, 0) for name in ("sync", "synchronize", "h2d", "d2h"))
    return Counter(copies=sum(n for name, n in counts.items() if "2" in name), waits=waits)


@pytest.mark.parametrize("shared", [6, 60])
@pytest.mark.parametrize("name", FEATURE_SWEEPS)
def test_copies_and_waits_of_a_row(engines, spy, name, shared):
    documents, ablations = make_documents(8, shared=shared), [INTACT, *FEATURE_SWEEPS[name]]
    fitted = FittedReplacement(torch.ones(32), 0.7, (torch.eye(32), torch.ones(32)))
    _, engine = engines(FAMILIES.get(name, "llama"), replacements={1: fitted, 2: fitted})
    model = engine.loaded.model
    if name in FAMILIES:
        model.set_experts_implementation("batched_mm")
    engine.score(documents, ablations)  # what is found once
    rows = spy(sweep, "launch_row", lambda *_: None)
    layer_counts: Counter[str] = Counter()
    for layer in find_layers(model):
        layer.register_forward_pre_hook(lambda *_: layer_counts.subtract(totals()))
        layer.register_forward_hook(lambda *_: layer_counts.update(totals()))
    counters.reset()
    engine.score(documents, ablations)
    all_counts = totals()
    # One more pass finds which experts a row reads, which decides what is computed.
    n_decisions = 2 if name == "experts" and shared == 6 else 0
    assert len(rows) > 1
    assert max(layer_counts.values()) <= n_decisions * len(rows)
    assert all_counts["copies"] <= (2 + n_decisions + bool(n_decisions)) * len(rows)
    assert all_counts["waits"] <= (1 + n_decisions) * len(rows)


def test_a_row_is_launched_before_the_last_one_is_read(engines, monkeypatch):
    """On the CPU there is nothing to wait for."""
    log = []

    def logged(*args):
        read = launch_row(*args)
        log.append(1)
        return lambda: log.append(-1) or read()

    monkeypatch.setattr(sweep, "launch_row", logged)
    for engine, late in zip(engines("llama"), (False, True), strict=True):
        log.clear()
        engine.score(make_documents(12), [INTACT, *FEATURE_SWEEPS["layers"]])
        rows = log.count(1)
        assert [*accumulate(log)] == ([1, *[2, 1] * (rows - 1), 0] if late else [1, 0] * rows)
        assert rows > 2


def test_divergences_wait_as_often_for_more_ablations(engines):
    _, engine = engines("llama")
    waits = []
    for number in (2, 4, 2):
        counters.reset()
        divergences(engine, make_documents(1)[0], FEATURE_SWEEPS["layers"][:number])
        waits.append(totals()["waits"])
    assert waits[1] == waits[2]

"""What is shown of a cell that a question has stopped, and what is asked of it next."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tracker.answers import interval_name
from tracker.config import CellRequest
from tracker.extent import random_order
from tracker.ledger.cells import CellStore
from tracker.ledger.races import CellRace
from tracker.ledger.so_far import so_far
from tracker.measuring.derive import record_of
from tracker.records import CellRecord
from tracker.views import View

from .test_races import LOST, RUNS, SEED, outcomes

SIZES = {"arc_easy": 320}
ORDER = random_order(SEED, "arc_easy", range(320))


def asks(*layers: int, **changes: Any) -> CellRequest:
    """A request for some layers; all where none is named."""
    settings = {"layers": layers or tuple(range(RUNS)), "seed": SEED, **changes}
    return CellRequest(model="m", benchmark="b", **settings)


@pytest.fixture
def answered(measure):
    """Ask a question, and measure until it is answered."""

    def answered(store: CellStore, request: CellRequest, every: Any) -> tuple[View, CellRecord]:
        view = store.views.ask(request, "project")
        measure(store, CellRace(store, view), every)
        return view, record_of(store, view)

    return answered


# -- without the question, or with another ---------------------------------------------------------


def test_what_a_question_chose_is_not_shown_as_if_it_were_drawn(
    cell_of, answered, measure_all
) -> None:
    store, every = cell_of(SIZES), outcomes(SIZES)
    measure_all(store, ["baseline", "layer:1"], every)
    store.views.ask(asks(1), "project")
    _, stopped = answered(store, asks(until="top 1"), every)
    assert stopped.is_stopped
    assert [run.layer for run in stopped.runs] == [0, 1, 2, 3]

    # Layer 1 had all documents before; 0 and 3 have those that the question took.
    view = store.views.ask(asks(2), "project")
    assert [run.layer for run in view.runs] == [1, 2]
    measure_all(store, ["layer:2"], every)
    found = record_of(store, view)
    assert found.is_complete
    assert [(run.layer, run.n) for run in found.runs] == [(1, 320), (2, 320)]
    assert None not in [run.mcnemar_p for run in found.runs]

    # What was asked for stays, as ever, once nobody asks a question.
    assert [run.layer for run in store.views.ask(asks(3), "project").runs] == [1, 2, 3]


def test_a_question_that_all_documents_answer_leaves_ordinary_figures(
    cell_of, answered, measure_all
) -> None:
    store, every = cell_of(SIZES), outcomes(SIZES)
    answered(store, asks(until="top 1"), every)
    _, found = answered(store, asks(2, until="drop within 0.01 pp"), every)
    assert (found.n, found.documents) == (320, "320 documents")
    assert (found.is_raced, found.is_stopped) == (False, False)
    assert found.answer is not None
    assert found.answer.over
    assert [run.layer for run in found.missing] == [0, 1, 3]
    assert not found.is_complete, "the older runs lack documents"
    assert interval_name(found) == "95 % interval"

    # As a run of which all documents were asked at once.
    other = cell_of(SIZES, name="other")
    measure_all(other, ["baseline", "layer:2"], every)
    plain = record_of(other, other.views.ask(asks(2), "project"))
    assert found.runs == plain.runs
    assert plain.runs[0].mcnemar_p is not None
    assert found.baseline_low == plain.baseline_low is not None
    assert found.correlations == plain.correlations


# -- what it rests on ------------------------------------------------------------------------------


@pytest.mark.parametrize("there", [False, True])
def test_the_layers_beneath_are_measured_alone_too(
    there: bool, cell_of, answered, measure_all
) -> None:
    store, every = cell_of(SIZES), outcomes(SIZES)
    request = asks(0, 1, 2, removed=(3,), until="top 1")
    if there:
        measure_all(store, ["baseline", "layer:3"], every)
    race = CellRace(store, store.views.of(request))
    assert race.lacking is not None
    runs = ("layers:0,3", "layers:1,3", "layers:2,3")
    assert race.needed == race.lacking[1] == ("baseline", "layer:3", *runs)
    _, found = answered(store, request, every)
    assert found.is_stopped
    # Without layer 3, on the documents that all runs share.
    alone = np.mean([every["arc_easy", doc][4] for doc in ORDER[: found.n]])
    assert found.removed_accuracy == pytest.approx(alone)
    assert "removed_accuracy" not in found.reasons
    assert found.answer is not None
    # The intact model passes 4 layers, and 0 above layer 3; the others 2, 1 and 0 besides it.
    passes = 4 * found.answer.measured + sum(run.n * (2 - run.layer) for run in found.runs)
    assert found.answer.passes == passes
    assert found.answer.passes_of == 320 * (4 + 2 + 1 + 0)


@pytest.mark.parametrize("by_size", [True, False])
def test_what_is_known_so_far_of_a_group_is_weighted_as_the_benchmark(
    by_size: bool, cell_of, measure
) -> None:
    sizes = {"art": 40, "law": 280}
    every = outcomes(sizes, [0.9, 0.1, 0.1, 0.1], LOST)
    store = cell_of(sizes, weight_by_size=by_size)
    view = store.views.of(asks(until="drop within 1 pp"))
    measure(store, CellRace(store, view), every, at_most=5)
    frame = store.read(columns=["task", "doc", "ablation", "metric/acc"])
    right = frame.pivot(index=["task", "doc"], columns="ablation", values="metric/acc")
    drops = (right["baseline"] - right["layer:0"]).groupby("task")
    assert drops.size().min() >= 32
    exact = drops.mean().mean() if not by_size else drops.sum().sum() / drops.size().sum()
    found = so_far(store, view)
    assert found.drops[view.runs[0]].value == pytest.approx(exact)

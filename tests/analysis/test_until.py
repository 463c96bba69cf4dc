"""Test the record of a cell that a question stopped, and the next requests for it."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest

from tests.helpers import stored_cells
from tests.helpers.races import LOST, RUNS, SEED, begun, outcomes, raced
from tests.helpers.stored_cells import measure, measure_all
from tracker.analysis import stopping
from tracker.analysis.stopping import CellRace, interim_estimates
from tracker.core.answers import interval_name
from tracker.core.config import CellRequest
from tracker.core.extent import Extent, random_order, shuffled
from tracker.core.records import CellRecord
from tracker.ledger.cells import CellStore
from tracker.measuring.derive import record_of
from tracker.stats.stopping import Forecast

SIZES = {"arc_easy": 320}
ORDER = random_order(SEED, "arc_easy", range(320))


asks = partial(stored_cells.asks, seed=SEED)


def answered(store: CellStore, request: CellRequest, every: Any) -> CellRecord:
    """Ask a question, and measure until it is answered."""
    view = store.views.ask(request, "project")
    measure(store, CellRace(store, view), every)
    return record_of(store, view)


# -- without the question, or with another ---------------------------------------------------------


def test_what_a_question_chose_is_not_shown_as_if_it_were_drawn(cell_of):
    store, every = cell_of(SIZES), outcomes(SIZES)
    measure_all(store, ["baseline", "layer:1"], every)
    store.views.ask(asks(1), "project")
    stopped = answered(store, asks(until="top 1"), every)
    assert stopped.is_stopped
    assert [run.change.layer for run in stopped.runs] == [0, 1, 2, 3]

    # Layer 1 had all documents before; 0 and 3 have those that the question took.
    view = store.views.ask(asks(2), "project")
    assert [run.layer for run in view.runs] == [1, 2]
    measure_all(store, ["layer:2"], every)
    found = record_of(store, view)
    assert found.is_complete
    assert [(run.change.layer, run.n) for run in found.runs] == [(1, 320), (2, 320)]
    assert None not in [run.drop.p_value for run in found.runs]

    # What was asked for without a question stays, measured or not.
    store.views.ask(asks(3), "project")
    assert [run.layer for run in store.views.ask(asks(0), "project").runs] == [0, 1, 2, 3]


def test_a_question_that_all_documents_answer_leaves_ordinary_figures(cell_of):
    store, every = cell_of(SIZES), outcomes(SIZES)
    answered(store, asks(until="top 1"), every)
    found = answered(store, asks(2, until="drop within 0.01 pp"), every)
    assert (found.n, found.documents) == (320, "320 documents")
    assert (found.is_raced, found.is_stopped) == (False, False)
    assert found.answer is not None
    assert found.answer.over
    assert ([run.change.layer for run in found.runs], found.missing) == ([2], ())
    labels = {stored.view.beside: len(stored.view.runs) for stored in store.views.asked()}
    assert labels == {"until top 1, 4 runs": 4, "until drop within 0.01 pp, 1 run": 1}
    assert interval_name(found) == "95 % interval"

    # As a run of which all documents were asked at once.
    other = cell_of(SIZES, name="other")
    measure_all(other, ["baseline", "layer:2"], every)
    plain = record_of(other, other.views.ask(asks(2), "project"))
    assert found.runs == plain.runs
    assert plain.runs[0].drop.p_value is not None
    assert found.baseline.low == plain.baseline.low is not None
    assert found.correlations == plain.correlations


# -- what it rests on ------------------------------------------------------------------------------


@pytest.mark.parametrize("there", [False, True])
def test_the_layers_beneath_are_measured_alone_too(there, cell_of):
    store, every = cell_of(SIZES), outcomes(SIZES)
    request = asks(0, 1, 2, removed=(3,), until="top 1")
    if there:
        measure_all(store, ["baseline", "layer:3"], every)
    race = CellRace(store, store.views.of(request))
    assert race.lacking is not None
    runs = ("layers:0,3", "layers:1,3", "layers:2,3")
    assert race.needed == race.lacking[1] == ("baseline", "layer:3", *runs)
    found = answered(store, request, every)
    assert found.is_stopped
    # Without layer 3, on the documents that all runs share.
    alone = np.mean([every["arc_easy", doc][4] for doc in ORDER[: found.n]])
    assert found.remaining.value == pytest.approx(alone)
    assert "removed_accuracy" not in found.reasons
    assert found.answer is not None
    # The intact model passes 4 layers, and 0 above layer 3; the others 2, 1 and 0 besides it.
    passes = 4 * found.answer.measured + sum(run.n * (2 - run.change.layer) for run in found.runs)
    assert found.answer.passes == passes
    assert found.answer.passes_of == 320 * (4 + 2 + 1 + 0)


@pytest.mark.parametrize("by_size", [True, False])
def test_what_is_known_so_far_of_a_group_is_weighted_as_the_benchmark(by_size, cell_of):
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
    found = interim_estimates(store, view)
    assert found.drops[view.runs[0]].value == pytest.approx(exact)


# -- what it will take -----------------------------------------------------------------------------

GROUP = {"art": 60, "law": 540}
UNLIKE = [0.1, 0.8, 0.1, 0.0], [0.5, 0.1, 0.1, 0.05]
"""What each layer costs the one task, and the other."""
PILOT = Extent(sample=64, seed=1234)
EVERYTHING = ["baseline", *(f"layer:{number}" for number in range(RUNS))]


def taken(every: Any, by_size: bool, seed: int) -> int:
    """Count the documents that "top 1" of a group takes in an order, with a look after every 32."""
    order = shuffled(seed, {task: range(size) for task, size in GROUP.items()})
    return begun(order[: raced(every, order, by_size).bounds.seen.max()], GROUP)


@pytest.mark.parametrize("by_size", [True, False])
def test_a_pilot_of_as_many_of_each_task_foretells_what_the_group_takes(by_size, cell_of):
    store, every = cell_of(GROUP, weight_by_size=by_size), outcomes(GROUP, *UNLIKE)
    measure_all(store, EVERYTHING, every, PILOT)
    expected = stopping.forecast_answer(store, store.views.of(asks(until="top 1")))
    assert expected is not None
    assert expected.measured == 60 + 64
    usual = np.median([taken(every, by_size, seed) for seed in range(16)])
    # A tenth of the larger task is known. As many of each task alike: 50 % too many, or 80 too few.
    assert expected.documents[0] == pytest.approx(usual, rel=0.35)
    assert expected.documents[0] <= expected.documents[1]


def test_what_it_will_take_is_whole_blocks(cell_of, monkeypatch):
    sizes = {f"task{number}": 40 + number for number in range(6)}
    store, total = cell_of(sizes), sum(sizes.values())
    measure_all(store, EVERYTHING, outcomes(sizes), Extent(sample=8, seed=SEED))
    looks = np.array([[64, 32, 64, 32, 9]] * 24)
    found = Forecast(looks[:, 0], looks[:, 1:], np.ones(24, dtype=bool))
    monkeypatch.setattr(stopping, "forecast", lambda *_, **settings: found)
    expected = stopping.forecast_answer(store, store.views.of(asks(until="top 1")))
    order = shuffled(SEED, {task: range(size) for task, size in sizes.items()})
    most, *each = (begun(order[:looked], sizes) for looked in looks[0])
    assert most > 64
    passes = 4 * most + sum(n * (3 - layer) for layer, n in enumerate(each))
    assert expected is not None
    assert expected.documents == (most, most)
    assert expected.share == pytest.approx([passes / (10 * total)] * 2)

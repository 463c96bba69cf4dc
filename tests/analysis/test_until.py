"""Test the record of a cell that a question stopped, and the next requests for it."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest

from tests.helpers import stored_cells
from tests.helpers.races import LAYER_LOSSES, N_RUNS, SEED, count_started, draw_outcomes, run_race
from tests.helpers.stored_cells import measure_all, measure_race
from tracker.analysis import stopping
from tracker.analysis.stopping import CellRace, interim_estimates
from tracker.ledger.cells import CellStore
from tracker.measuring.derive import derive_record
from tracker.schema.answers import interval_name
from tracker.schema.config import CellRequest
from tracker.schema.extent import Extent, random_order, shuffle_documents
from tracker.schema.records import CellRecord
from tracker.stats.stopping import RaceForecast

SIZES = {"arc_easy": 320}
ORDER = random_order(SEED, "arc_easy", range(320))


asks = partial(stored_cells.layer_request, seed=SEED)


def measure_answer(store: CellStore, request: CellRequest, answers: Any) -> CellRecord:
    """Ask a question, and measure until it is answered."""
    view = store.views.add_request(request, "project")
    measure_race(store, CellRace(store, view), answers)
    return derive_record(store, view)


# -- without the question, or with another ---------------------------------------------------------


def test_what_a_question_chose_is_not_shown_as_if_it_were_drawn(cell_of):
    store, answers = cell_of(SIZES), draw_outcomes(SIZES)
    measure_all(store, ["baseline", "layer:1"], answers)
    store.views.add_request(asks(1), "project")
    stopped = measure_answer(store, asks(until="top 1"), answers)
    assert stopped.is_stopped
    assert [run.change.layer for run in stopped.runs] == [0, 1, 2, 3]

    # Layer 1 had all documents before; 0 and 3 have those that the question took.
    view = store.views.add_request(asks(2), "project")
    assert [run.layer for run in view.runs] == [1, 2]
    measure_all(store, ["layer:2"], answers)
    record = derive_record(store, view)
    assert record.is_complete
    assert [(run.change.layer, run.n) for run in record.runs] == [(1, 320), (2, 320)]
    assert None not in [run.drop.p_value for run in record.runs]

    # What was asked for without a question stays, measured or not.
    store.views.add_request(asks(3), "project")
    assert [run.layer for run in store.views.add_request(asks(0), "project").runs] == [0, 1, 2, 3]


def test_a_question_that_all_documents_answer_leaves_ordinary_figures(cell_of):
    store, answers = cell_of(SIZES), draw_outcomes(SIZES)
    measure_answer(store, asks(until="top 1"), answers)
    record = measure_answer(store, asks(2, until="drop within 0.01 pp"), answers)
    assert (record.n, record.documents_text) == (320, "320 documents")
    assert (record.is_raced, record.is_stopped) == (False, False)
    assert record.answer is not None
    assert record.answer.over
    assert ([run.change.layer for run in record.runs], record.missing) == ([2], ())
    labels = {stored.view.beside: len(stored.view.runs) for stored in store.views.read_requested()}
    assert labels == {"until top 1, 4 runs": 4, "until drop within 0.01 pp, 1 run": 1}
    assert interval_name(record) == "95 % interval"

    # As a run of which all documents were asked at once.
    other_store = cell_of(SIZES, name="other")
    measure_all(other_store, ["baseline", "layer:2"], answers)
    expected = derive_record(other_store, other_store.views.add_request(asks(2), "project"))
    assert record.runs == expected.runs
    assert expected.runs[0].drop.p_value is not None
    assert record.baseline.low == expected.baseline.low is not None
    assert record.correlations == expected.correlations


# -- what it rests on ------------------------------------------------------------------------------


@pytest.mark.parametrize("is_measured", [False, True])
def test_the_layers_beneath_are_measured_alone_too(is_measured, cell_of):
    store, answers = cell_of(SIZES), draw_outcomes(SIZES)
    request = asks(0, 1, 2, removed=(3,), until="top 1")
    if is_measured:
        measure_all(store, ["baseline", "layer:3"], answers)
    race = CellRace(store, store.views.view_of(request))
    assert race.next_block is not None
    runs = ("layers:0,3", "layers:1,3", "layers:2,3")
    assert race.needed_ablations == race.next_block[1] == ("baseline", "layer:3", *runs)
    record = measure_answer(store, request, answers)
    assert record.is_stopped
    # Without layer 3, on the documents that all runs share.
    remaining = np.mean([answers["arc_easy", doc][4] for doc in ORDER[: record.n]])
    assert record.remaining.value == pytest.approx(remaining)
    assert "removed_accuracy" not in record.reasons
    assert record.answer is not None
    # The intact model passes 4 layers, and 0 above layer 3; the others 2, 1 and 0 besides it.
    passes = 4 * record.answer.measured + sum(run.n * (2 - run.change.layer) for run in record.runs)
    assert record.answer.passes == passes
    assert record.answer.passes_of == 320 * (4 + 2 + 1 + 0)


@pytest.mark.parametrize("by_size", [True, False])
def test_what_is_known_so_far_of_a_group_is_weighted_as_the_benchmark(by_size, cell_of):
    sizes = {"art": 40, "law": 280}
    answers = draw_outcomes(sizes, [0.9, 0.1, 0.1, 0.1], LAYER_LOSSES)
    store = cell_of(sizes, weight_by_size=by_size)
    view = store.views.view_of(asks(until="drop within 1 pp"))
    measure_race(store, CellRace(store, view), answers, max_blocks=5)
    frame = store.read(columns=["task", "doc", "ablation", "metric/acc"])
    accuracies = frame.pivot(index=["task", "doc"], columns="ablation", values="metric/acc")
    drops = (accuracies["baseline"] - accuracies["layer:0"]).groupby("task")
    assert drops.size().min() >= 32
    exact = drops.mean().mean() if not by_size else drops.sum().sum() / drops.size().sum()
    interim = interim_estimates(store, view)
    assert interim.drops[view.runs[0]].value == pytest.approx(exact)


# -- what it will take -----------------------------------------------------------------------------

GROUP = {"art": 60, "law": 540}
UNLIKE = [0.1, 0.8, 0.1, 0.0], [0.5, 0.1, 0.1, 0.05]
"""What each layer costs the one task, and the other."""
PILOT = Extent(sample=64, seed=1234)
EVERYTHING = ["baseline", *(f"layer:{number}" for number in range(N_RUNS))]


def count_taken(answers: Any, by_size: bool, seed: int) -> int:
    """Count the documents that "top 1" of a group takes in an order, with a look after every 32."""
    order = shuffle_documents(seed, {task: range(size) for task, size in GROUP.items()})
    return count_started(order[: run_race(answers, order, by_size).bounds.seen.max()], GROUP)


@pytest.mark.parametrize("by_size", [True, False])
def test_a_pilot_of_as_many_of_each_task_foretells_what_the_group_takes(by_size, cell_of):
    store, answers = cell_of(GROUP, weight_by_size=by_size), draw_outcomes(GROUP, *UNLIKE)
    measure_all(store, EVERYTHING, answers, PILOT)
    expected = stopping.forecast_answer(store, store.views.view_of(asks(until="top 1")))
    assert expected is not None
    assert expected.measured == 60 + 64
    usual = np.median([count_taken(answers, by_size, seed) for seed in range(16)])
    # A tenth of the larger task is known. As many of each task alike: 50 % too many, or 80 too few.
    assert expected.documents[0] == pytest.approx(usual, rel=0.35)
    assert expected.documents[0] <= expected.documents[1]


def test_what_it_will_take_is_whole_blocks(cell_of, monkeypatch):
    sizes = {f"task{number}": 40 + number for number in range(6)}
    store, total = cell_of(sizes), sum(sizes.values())
    measure_all(store, EVERYTHING, draw_outcomes(sizes), Extent(sample=8, seed=SEED))
    counts = np.array([[64, 32, 64, 32, 9]] * 24)
    forecasts = RaceForecast(counts[:, 0], counts[:, 1:], np.ones(24, dtype=bool))
    monkeypatch.setattr(stopping, "forecast_race", lambda *_, **settings: forecasts)
    expected = stopping.forecast_answer(store, store.views.view_of(asks(until="top 1")))
    order = shuffle_documents(SEED, {task: range(size) for task, size in sizes.items()})
    n_documents, *run_documents = (count_started(order[:looked], sizes) for looked in counts[0])
    assert n_documents > 64
    passes = 4 * n_documents + sum(n * (3 - layer) for layer, n in enumerate(run_documents))
    assert expected is not None
    assert expected.documents == (n_documents, n_documents)
    assert expected.share == pytest.approx([passes / (10 * total)] * 2)

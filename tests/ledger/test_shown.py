"""Requests of several files extend the view of a cell, and never remove anything from it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.conftest import golden
from tests.helpers.stored_cells import (
    benchmark_identity,
    layer_request,
    measure_all,
    measure_race,
    model_identity,
)
from tracker.analysis.stopping import CellRace
from tracker.ledger.cells import CellStore
from tracker.ledger.store import Ledger
from tracker.measuring.derive import derive_record
from tracker.schema.config import CellRequest
from tracker.schema.grouping import group_by
from tracker.schema.views import View
from tracker.team.collect import _join_views, _view_key, remove_contained

SEED = 5
COSTS = (0.7, 0.35, 0.15, 0.15, 0.15, 0.0, 0.3)
"""How much each layer costs."""
ABOUT: dict[str, Any] = {"metrics": ("acc", "acc_norm"), "proxies": (5, [[1.0] * len(COSTS)] * 3)}
SIX = (0, 1, 2, 3, 4, 5)
Asked = tuple[dict[str, Any], Sequence[int]]


def request(options: dict[str, Any], layers: Sequence[int]) -> CellRequest:
    settings = {name: value for name, value in options.items() if name != "named"}
    return layer_request(*layers, **{"seed": SEED, **settings})


OUTCOMES = {
    ("arc_easy", doc): [1.0, *(np.random.default_rng(doc).random(len(COSTS)) >= COSTS)]
    for doc in range(192)
}


def open_store(ledger: Ledger, size: int) -> CellStore:
    model = model_identity(layers=len(COSTS))
    return ledger.open_cell(model, benchmark_identity({"arc_easy": size}, ("acc", "acc_norm")), {})


def run(store: CellStore, options: dict[str, Any], layers: Sequence[int] = SIX) -> View:
    """Measure a request and record it in the cell, as `tracker run` does."""
    cell_request, is_named = request(options, layers), options.get("named", False)
    announced = None
    if cell_request.until is not None:
        measure_race(store, CellRace(store, store.views.view_of(cell_request)), OUTCOMES, **ABOUT)
    else:
        announced = store.views.display_view(cell_request, is_named)
        names = ["baseline", *(f"layer:{number}" for number in layers)]
        measure_all(store, names, OUTCOMES, cell_request.extent, **ABOUT)
    view = store.views.add_request(cell_request, "project", is_named)
    assert announced in (None, view)
    return view


def stored_views(store: CellStore) -> list[View]:
    return [stored.view for stored in store.views.read_requested()]


def view_texts(store: CellStore) -> set[str]:
    """Return the views of a cell: their names, and the layers that they show."""
    views = stored_views(store)
    # The hash of a question ends its name.
    names = [store.views.view_name(view)[: -9 if view.until else None] for view in views]
    layers = ["".join(str(run.layer) for run in view.runs) for view in views]
    return {" of ".join(pair) for pair in zip(names, layers, strict=True)}


@pytest.mark.parametrize(("requests", "names"), golden("views"))
def test_requests_extend_views(requests, names, ledger):
    steps: list[Asked] = []
    for options, layers in (step.split(" of ") for step in requests.split("; ")):
        steps.append((yaml.safe_load(options), [*map(int, layers)]))
    store = open_store(ledger, 192)
    for options, layers in steps:
        view = run(store, options, layers)
        if not options.get("until"):
            assert {*layers} <= {run.layer for run in view.runs}, "where it is shown"
        assert view in stored_views(store)
    assert view_texts(store) == {*names.split("; ")}
    # All of it is there, and the same from a folder as from a report's sources.
    records = [derive_record(store, view) for view in stored_views(store)]
    assert not [record.missing for record in records if record.missing]
    assert len({record.view for record in records}) == len(records)
    assert all(record.is_raced or record.is_complete for record in records)
    groups = group_by([(store, view) for view in stored_views(store)], _view_key).values()
    merged = remove_contained(derive_record(*_join_views(group)) for group in groups)
    assert sorted(record.view for record in merged) == sorted(record.view for record in records)
    # Asked again, nothing changes.
    before = view_texts(store)
    for options, layers in steps[::-1]:
        run(store, options, layers)
    assert view_texts(store) == before


def draw_steps(sizes: Sequence[int]) -> st.SearchStrategy[Asked]:
    """Draw the documents or the question of a request, and its layers."""
    count = st.sampled_from(sizes)
    strategies = st.one_of(
        st.builds(lambda n, seed: {"sample": n, "seed": seed}, count, st.sampled_from([SEED, 7])),
        st.builds(lambda n: {"limit": n}, st.one_of(st.none(), count)),
        st.builds(lambda n: {"sample": n, "seed": SEED, "named": True}, count),
        st.sampled_from([{"until": "top 1"}, {"until": "drop within 30 pp"}]),
    )
    layers = st.lists(st.sampled_from(range(4)), min_size=2, max_size=4, unique=True)
    return st.tuples(strategies, layers.map(sorted))


@settings(max_examples=5, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=st.lists(draw_steps([8, 40, 64, 96]), min_size=2, max_size=6))
def test_requests_never_remove_runs_from_views(steps):
    with TemporaryDirectory() as folder:
        store = open_store(Ledger(Path(folder) / "results"), 96)
        former: dict[tuple[int | None, int], float] = {}
        for options, layers in steps:
            view = run(store, options, layers)
            views = stored_views(store)
            assert view in views
            records = [derive_record(store, stored) for stored in views]
            assert all(record.is_raced or record.is_complete for record in records)
            assert len({record.record_key for record in records}) == len(records)
            until, shown_record = options.get("until"), derive_record(store, view)
            if until is None:
                assert {*layers} <= {run.change.layer for run in shown_record.runs}
                assert view.size >= store.views.view_of(request(options, layers)).size
            else:
                assert shown_record.answer is not None
                assert shown_record.answer.question.startswith(until)
            sizes: dict[tuple[int | None, int], float] = {}
            for stored, record in zip(views, records, strict=True):
                for key in ((stored.seed, run.change.layer) for run in record.runs):
                    if not record.is_raced:
                        sizes[key] = max(sizes.get(key, 0), stored.size)
            assert all(sizes.get(key, 0) >= size for key, size in former.items())
            former = sizes
            assert run(store, options, layers) == view, "asked again"
            assert stored_views(store) == views

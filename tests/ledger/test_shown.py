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
    asks,
    benchmark_identity,
    measure,
    measure_all,
    model_identity,
)
from tracker.analysis.stopping import CellRace
from tracker.core.config import CellRequest
from tracker.core.distribution import FORMAT
from tracker.core.grouping import grouped
from tracker.core.views import View
from tracker.ledger.cells import CellStore
from tracker.ledger.files import write_note
from tracker.ledger.store import Ledger
from tracker.measuring.derive import record_of
from tracker.team.collect import _joined, _shown, merged

SEED = 5
COSTS = (0.7, 0.35, 0.15, 0.15, 0.15, 0.0, 0.3)
"""How much each layer costs."""
ABOUT: dict[str, Any] = {"metrics": ("acc", "acc_norm"), "proxies": (5, [[1.0] * len(COSTS)] * 3)}
SIX = (0, 1, 2, 3, 4, 5)
TWO = (0, 3)
Asked = tuple[dict[str, Any], Sequence[int]]


def request(how: dict[str, Any], layers: Sequence[int]) -> CellRequest:
    settings = {name: value for name, value in how.items() if name != "named"}
    return asks(*layers, **{"seed": SEED, **settings})


OUTCOMES = {
    ("arc_easy", doc): [1.0, *(np.random.default_rng(doc).random(len(COSTS)) >= COSTS)]
    for doc in range(192)
}


def store_in(ledger: Ledger, size: int) -> CellStore:
    model = model_identity(layers=len(COSTS))
    return ledger.cell(model, benchmark_identity({"arc_easy": size}, ("acc", "acc_norm")), {})


def run(store: CellStore, how: dict[str, Any], layers: Sequence[int] = SIX) -> View:
    """Measure what a file asks for, and ask it of the cell, as `tracker run` does."""
    asked, named = request(how, layers), how.get("named", False)
    before = store.views.shown_in(asked, named) if asked.until is None else None
    if asked.until is not None:
        measure(store, CellRace(store, store.views.of(asked)), OUTCOMES, **ABOUT)
    else:
        names = ["baseline", *(f"layer:{number}" for number in layers)]
        measure_all(store, names, OUTCOMES, asked.extent, **ABOUT)
    view = store.views.ask(asked, "project", named)
    assert before in (None, view), "what was said before it was measured"
    return view


def shown(store: CellStore) -> set[str]:
    """Return the views of a cell: their names, and the layers that they show."""
    views = [stored.view for stored in store.views.asked()]
    # The hash of a question ends its name.
    names = [store.views.name_of(view)[: -9 if view.until else None] for view in views]
    layers = ["".join(str(run.layer) for run in view.runs) for view in views]
    return {" of ".join(pair) for pair in zip(names, layers, strict=True)}


@pytest.mark.parametrize(("requests", "names"), golden("views"))
def test_what_is_known_of_a_run_is_shown(requests, names, ledger):
    steps: list[Asked] = []
    for how, layers in (step.split(" of ") for step in requests.split("; ")):
        steps.append((yaml.safe_load(how), [*map(int, layers)]))
    store = store_in(ledger, 192)
    for how, layers in steps:
        view = run(store, how, layers)
        if not how.get("until"):
            assert {*layers} <= {run.layer for run in view.runs}, "where it is shown"
        assert view in [asked.view for asked in store.views.asked()]
    assert shown(store) == {*names.split("; ")}
    # All of it is there, and the same from a folder as from a report's sources.
    records = [record_of(store, asked.view) for asked in store.views.asked()]
    assert not [record.missing for record in records if record.missing]
    assert len({record.view for record in records}) == len(records)
    assert all(record.is_raced or record.is_complete for record in records)
    pairs = [(store, asked.view) for asked in store.views.asked()]
    gathered = merged(record_of(*_joined(same)) for same in grouped(pairs, _shown).values())
    assert sorted(each.view for each in gathered) == sorted(each.view for each in records)
    # Asked again, nothing changes.
    before = shown(store)
    for how, layers in steps[::-1]:
        run(store, how, layers)
    assert shown(store) == before


@pytest.mark.parametrize("beside", ["", "16 documents"])
def test_a_view_of_a_former_version_is_renamed_and_superseded(beside, ledger):
    store = store_in(ledger, 192)
    sixteen, name = {"sample": 16}, f"intact-sample-16-seed-{SEED}"
    former = f"intact-sample-{SEED}" + "-16-documents" * bool(beside)
    view = store.views.of(request(sixteen, TWO)).model_dump(mode="json") | {"beside": beside}
    path = store.folder / "requests" / f"{former}.json"
    write_note(path, {"format": FORMAT, "project": "project", "view": view})
    (stored,) = store.views.asked()
    assert (store.views.name_of(stored.view), stored.view.supersedes) == (name, (former,))
    assert store.views.path(name) == path
    joined = run(store, sixteen, SIX)
    assert joined.supersedes == (former,)
    assert [file.stem for file in store.views.files()] == [name]
    assert {*run(store, {"sample": 64}, SIX).supersedes} == {former, name}
    assert [{*stored.view.supersedes} for stored in store.views.asked()] == [{former, name}]


def asks_of(sizes: Sequence[int]) -> st.SearchStrategy[Asked]:
    """Draw what a file may ask: of which documents, or until what, and of which layers."""
    count = st.sampled_from(sizes)
    how = st.one_of(
        st.builds(lambda n, seed: {"sample": n, "seed": seed}, count, st.sampled_from([SEED, 7])),
        st.builds(lambda n: {"limit": n}, st.one_of(st.none(), count)),
        st.builds(lambda n: {"sample": n, "seed": SEED, "named": True}, count),
        st.sampled_from([{"until": "top 1"}, {"until": "drop within 30 pp"}]),
    )
    layers = st.lists(st.sampled_from(range(4)), min_size=2, max_size=4, unique=True)
    return st.tuples(how, layers.map(sorted))


@settings(max_examples=5, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=st.lists(asks_of([8, 40, 64, 96]), min_size=2, max_size=6))
def test_whatever_is_asked_nothing_is_taken_away(steps):
    with TemporaryDirectory() as folder:
        store = store_in(Ledger(Path(folder) / "results"), 96)
        best: dict[tuple[int | None, int], float] = {}
        for how, layers in steps:
            view = run(store, how, layers)
            views = [asked.view for asked in store.views.asked()]
            assert view in views
            records = [record_of(store, each) for each in views]
            assert all(each.is_raced or each.is_complete for each in records)
            assert len({each.place for each in records}) == len(records)
            asked, until = store.views.of(request(how, layers)), how.get("until")
            shown_in = record_of(store, view)
            if until is None:
                assert {*layers} <= {one.change.layer for one in shown_in.runs}
                assert view.size >= asked.size
            else:
                assert shown_in.answer is not None
                assert shown_in.answer.question.startswith(until)
            now: dict[tuple[int | None, int], float] = {}
            for each, record in zip(views, records, strict=True):
                for one in record.runs:
                    key = (each.seed, one.change.layer)
                    if not record.is_raced:
                        now[key] = max(now.get(key, 0), each.size)
            assert all(now.get(key, 0) >= size for key, size in best.items())
            best = now
            assert run(store, how, layers) == view, "asked again"
            assert [asked.view for asked in store.views.asked()] == views

"""What is shown of a cell as one file after another asks something of it: nothing is taken away."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

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
ABOUT: dict[str, Any] = {
    "metrics": ("acc", "acc_norm"),
    "proxies": (5, [[1.0] * len(COSTS)] * 3),
}
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


def shown(store: CellStore) -> dict[str, tuple[int | None, tuple[int, ...]]]:
    """Return the views of a cell by name: how many documents, and which layers."""
    views = [stored.view for stored in store.views.asked()]
    return {
        # The hash of a question ends its name.
        store.views.name_of(view)[: -9 if view.until else None]
        + (f" of {len(view.until.runs)}, first {view.until.runs[0].layer}" if view.until else ""): (
            view.limit or view.sample,
            tuple(run.layer for run in view.runs),
        )
        for view in views
    }


def drawn(count: int | None, seed: int = SEED) -> dict[str, Any]:
    return {"sample": count, "seed": seed}


def first(count: int | None) -> dict[str, Any]:
    return {"limit": count}


DRAWN = f"intact-sample-{SEED}"
UNTIL = {"until": "top 1"}
S16, S64, S128 = (drawn(count) for count in (16, 64, 128))
N16, N64 = S16 | {"named": True}, S64 | {"named": True}
F16, F64, EVERY = (first(count) for count in (16, 64, None))
V = "intact"
V16, V64 = (f"{V}-limit-{count}" for count in (16, 64))
D16, D64, D128 = (f"{V}-sample-{count}-seed-{SEED}" for count in (16, 64, 128))
U6, U2, U2B = (f"{V}-until-top-1 of {many}" for many in ("6, first 0", "2, first 0", "2, first 1"))
# Requests, one after the other → views, each with its documents and layers.
TABLE: dict[str, tuple[list[Asked], dict[str, tuple[int | None, Sequence[int]]]]] = {
    "fewer documents add nothing": ([(S64, SIX), (S16, TWO)], {D64: (64, SIX)}),
    "fewer of all add nothing": ([(S64, SIX), (S16, SIX)], {D64: (64, SIX)}),
    "more documents take the place": ([(S16, SIX), (S64, SIX)], {D64: (64, SIX)}),
    "more documents and layers": ([(S16, TWO), (S64, SIX)], {D64: (64, SIX)}),
    "other layers add up": ([(S64, TWO), (S64, (1, 2))], {D64: (64, (0, 1, 2, 3))}),
    "more documents of two stand beside all": (
        [(S16, SIX), (S64, TWO)],
        {D16: (16, SIX), D64: (64, TWO)},
    ),
    "until the others have them too": (
        [(S16, SIX), (S64, TWO), (S64, (1, 2, 4, 5))],
        {D64: (64, SIX)},
    ),
    "another metric is another view": (
        [({**S64, "metric": "acc_norm"}, SIX), (S16, SIX)],
        {D16: (16, SIX), f"{D64}--acc_norm": (64, SIX)},
    ),
    "a third number": ([(S16, SIX), (S64, TWO), (S128, TWO)], {D16: (16, SIX), D128: (128, TWO)}),
    "a number between": ([(S16, SIX), (S128, TWO), (S64, TWO)], {D16: (16, SIX), D128: (128, TWO)}),
    "three steps": (
        [(S16, SIX), (S64, (0, 1, 3)), (S128, TWO)],
        {D16: (16, SIX), D64: (64, (0, 1, 3)), D128: (128, TWO)},
    ),
    "fewer documents of a new layer stand beside": (
        [(S64, SIX), (S16, (6,))],
        {D64: (64, SIX), D16: (16, (6,))},
    ),
    "and join when it has as many": (
        [(S64, SIX), (S16, (6,)), (S64, (6,))],
        {D64: (64, (*SIX, 6))},
    ),
    "another seed is another sample": (
        [(S64, SIX), (drawn(16, 7), TWO)],
        {D64: (64, SIX), "intact-sample-16-seed-7": (16, TWO)},
    ),
    "limit after limit": ([(F64, SIX), (F16, TWO)], {V64: (64, SIX)}),
    "a larger limit": ([(F16, SIX), (F64, SIX)], {V64: (64, SIX)}),
    "a larger limit of two": ([(F16, SIX), (F64, TWO)], {V16: (16, SIX), V64: (64, TWO)}),
    "a limit after all": ([(EVERY, SIX), (F16, TWO)], {V: (None, SIX)}),
    "all after a limit": ([(F16, SIX), (EVERY, SIX)], {V: (None, SIX)}),
    "all of two after a limit": ([(F16, SIX), (EVERY, TWO)], {V16: (16, SIX), V: (None, TWO)}),
    "a limit that leaves nothing out": ([(first(192), SIX), (EVERY, TWO)], {V: (None, SIX)}),
    "sample after limit": ([(F64, SIX), (S16, TWO)], {V64: (64, SIX), D16: (16, TWO)}),
    "limit after sample": ([(S64, SIX), (F16, TWO)], {V16: (16, TWO), D64: (64, SIX)}),
    "all after sample and back": (
        [(S64, SIX), (EVERY, SIX), (S16, TWO)],
        {V: (None, SIX), D64: (64, SIX)},
    ),
    "a sample that leaves nothing out": (
        [(S64, SIX), (drawn(192), SIX), (drawn(1000), TWO)],
        {V: (None, SIX), D64: (64, SIX)},
    ),
    # A question keeps its answer, whatever else is measured.
    "until after a limit": ([(F64, SIX), (UNTIL, SIX)], {V64: (64, SIX), U6: (None, SIX)}),
    "a limit after until": ([(UNTIL, SIX), (F16, TWO)], {V16: (16, TWO), U6: (None, SIX)}),
    "another question stands beside": (
        [(UNTIL, SIX), ({"until": "prune 1"}, SIX)],
        {U6: (None, SIX), "intact-until-prune-1 of 6, first 0": (None, SIX)},
    ),
    "the same of other runs too": (
        [(UNTIL, SIX), (UNTIL, TWO), (UNTIL, (1, 2)), (UNTIL, TWO)],
        {U6: (None, SIX), U2: (None, TWO), U2B: (None, (1, 2))},
    ),
    "all after until": ([(UNTIL, SIX), (EVERY, SIX)], {V: (None, SIX), U6: (None, SIX)}),
    "until after all": ([(EVERY, SIX), (UNTIL, TWO)], {V: (None, SIX), U2: (None, TWO)}),
    "a smaller one by name": (
        [(S64, SIX), (N16, TWO), (S64, TWO)],
        {D64: (64, SIX), D16: (16, TWO)},
    ),
    "first by name, and it stays": (
        [(N16, TWO), (S64, SIX), (S128, SIX), (S16, (1,))],
        {D128: (128, SIX), D16: (16, TWO)},
    ),
    "a name for what stood beside": (
        [(S16, SIX), (S64, TWO), (N64, TWO), (S128, SIX)],
        {D128: (128, SIX), D64: (64, TWO)},
    ),
    "a name for what was superseded": (
        [(S16, SIX), (S64, SIX), (N16, SIX)],
        {D64: (64, SIX), D16: (16, SIX)},
    ),
}


@pytest.mark.parametrize("case", TABLE)
def test_what_is_known_of_a_run_is_shown(case: str, ledger: Ledger) -> None:
    steps, wanted = TABLE[case]
    store = store_in(ledger, 192)
    for how, layers in steps:
        view = run(store, how, layers)
        if not how.get("until"):
            assert {*layers} <= {run.layer for run in view.runs}, "where it is shown"
        assert view in [asked.view for asked in store.views.asked()]
    assert shown(store) == wanted
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
def test_a_view_of_a_former_version_is_renamed_and_superseded(beside: str, ledger: Ledger) -> None:
    store = store_in(ledger, 192)
    former = DRAWN + "-16-documents" * bool(beside)
    view = store.views.of(request(S16, TWO)).model_dump(mode="json") | {"beside": beside}
    path = store.folder / "requests" / f"{former}.json"
    write_note(path, {"format": FORMAT, "project": "project", "view": view})
    (stored,) = store.views.asked()
    assert (store.views.name_of(stored.view), stored.view.supersedes) == (D16, (former,))
    assert store.views.path(D16) == path
    joined = run(store, S16, SIX)
    assert joined.supersedes == (former,)
    assert [file.stem for file in store.views.files()] == [D16]
    assert {*run(store, S64, SIX).supersedes} == {former, D16}
    assert [{*stored.view.supersedes} for stored in store.views.asked()] == [{former, D16}]


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


@settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=st.lists(asks_of([8, 40, 64, 96]), min_size=2, max_size=6))
def test_whatever_is_asked_nothing_is_taken_away(steps: list[Asked]) -> None:
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

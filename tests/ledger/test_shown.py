"""What is shown of a cell as one file after another asks something of it: nothing is taken away."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tracker.core.config import CellRequest
from tracker.core.documents import Document, Response
from tracker.core.extent import Extent
from tracker.core.views import View
from tracker.ledger.blocks import Block
from tracker.ledger.cells import CellStore
from tracker.ledger.early_stopping import CellRace
from tracker.ledger.outcomes import outcome_row
from tracker.ledger.store import Ledger
from tracker.measuring.derive import record_of
from tracker.team.collect import _joined, _same, merged

SEED = 5
SIZES = {"arc_easy": 320}
GROUP = {"art": 20, "law": 300}
COSTS = (0.7, 0.35, 0.15, 0.15, 0.15, 0.0, 0.3)
"""How much each layer costs."""
SIX = (0, 1, 2, 3, 4, 5)
TWO = (0, 3)
Asked = tuple[dict[str, Any], Sequence[int]]


def asks(how: dict[str, Any], layers: Sequence[int]) -> CellRequest:
    settings = {name: value for name, value in how.items() if name != "named"}
    return CellRequest(model="m", benchmark="b", layers=tuple(layers), **{"seed": SEED, **settings})


@pytest.fixture
def make(ledger: Ledger, model_identity, benchmark_identity) -> Callable[..., CellStore]:
    def make(sizes: dict[str, int] = SIZES) -> CellStore:
        benchmark = benchmark_identity(sizes, {"acc": "mean", "acc_norm": "mean"})
        return ledger.cell(model_identity(layers=len(COSTS)), benchmark, {})

    return make


def enter(store: CellStore, block: Block, extent: Extent, names: Sequence[str]) -> None:
    """Measure what a block lacks."""
    sums = [[1.0] * len(COSTS)] * 3
    for absent, documents in store.missing(block, extent, names).items():
        rows = []
        for doc in documents:
            for name in absent:
                document = Document(block.task, doc, requests=(), gold=1, choices=2)
                draw = np.random.default_rng([doc, *name.encode()]).random()
                intact = name == "baseline"
                acc = float(intact or draw >= COSTS[int(name[-1])])
                said = [Response(-1.5, False, 0), Response(-0.25, True, 0)]
                more = (5, sums) if intact else None
                rows.append(outcome_row(document, name, said, {"acc": acc, "acc_norm": acc}, more))
        store.write(block, rows, {"device": "cpu"})


def run(store: CellStore, how: dict[str, Any], layers: Sequence[int] = SIX) -> View:
    """Measure what a file asks for, and ask it of the cell, as `tracker run` does."""
    request, named = asks(how, layers), how.get("named", False)
    before = store.views.shown_in(request, named) if request.until is None else None
    if request.until is not None:
        race = CellRace(store, store.views.of(request))
        while race.lacking:
            enter(store, race.lacking[0], race.extent, race.lacking[1])
            race.advance()
    else:
        names = ["baseline", *(f"layer:{number}" for number in layers)]
        for block in store.blocks(request.extent):
            enter(store, block, request.extent, names)
    view = store.views.ask(request, "project", named)
    assert before in (None, view), "what was said before it was measured"
    return view


def shown(store: CellStore) -> list[tuple[str, tuple[int, ...]]]:
    """What is shown of a cell: where, and which layers."""
    return [
        (store.views.name_of(asked.view), tuple(run.layer for run in asked.view.runs))
        for asked in store.views.asked()
    ]


def drawn(count: int | None, seed: int = SEED) -> dict[str, Any]:
    return {"sample": count, "seed": seed}


def first(count: int | None) -> dict[str, Any]:
    return {"limit": count}


UNTIL = {"until": "top 1"}
DRAWN = f"intact-sample-{SEED}"
TABLE: dict[str, tuple[list[Asked], dict[str, tuple[int | None, Sequence[int]]]]] = {
    # What is asked, one file after the other → views, each with its documents and layers.
    "fewer documents add nothing": (
        [(drawn(64), SIX), (drawn(16), TWO)],
        {DRAWN: (64, SIX)},
    ),
    "fewer of all add nothing": ([(drawn(64), SIX), (drawn(16), SIX)], {DRAWN: (64, SIX)}),
    "more documents make it grow": ([(drawn(16), SIX), (drawn(64), SIX)], {DRAWN: (64, SIX)}),
    "more documents and layers": ([(drawn(16), TWO), (drawn(64), SIX)], {DRAWN: (64, SIX)}),
    "other layers add up": ([(drawn(64), TWO), (drawn(64), (1, 2))], {DRAWN: (64, (0, 1, 2, 3))}),
    "more documents of two stand beside all": (
        [(drawn(16), SIX), (drawn(64), TWO)],
        {DRAWN: (16, SIX), f"{DRAWN}-64-documents": (64, TWO)},
    ),
    "until the others have them too": (
        [(drawn(16), SIX), (drawn(64), TWO), (drawn(64), (1, 2, 4, 5))],
        {DRAWN: (64, SIX)},
    ),
    "also where they had them for another metric": (
        [({**drawn(64), "metric": "acc_norm"}, SIX), (drawn(16), SIX), (drawn(64), TWO)],
        {DRAWN: (64, SIX), f"{DRAWN}--acc_norm": (64, SIX)},
    ),
    "a third number": (
        [(drawn(16), SIX), (drawn(64), TWO), (drawn(128), TWO)],
        {DRAWN: (16, SIX), f"{DRAWN}-128-documents": (128, TWO)},
    ),
    "a number between": (
        [(drawn(16), SIX), (drawn(128), TWO), (drawn(64), TWO)],
        {DRAWN: (16, SIX), f"{DRAWN}-128-documents": (128, TWO)},
    ),
    "three steps": (
        [(drawn(16), SIX), (drawn(64), (0, 1, 3)), (drawn(128), TWO)],
        {
            DRAWN: (16, SIX),
            f"{DRAWN}-64-documents": (64, (0, 1, 3)),
            f"{DRAWN}-128-documents": (128, TWO),
        },
    ),
    "fewer documents of a new layer stand beside": (
        [(drawn(64), SIX), (drawn(16), (6,))],
        {DRAWN: (64, SIX), f"{DRAWN}-16-documents": (16, (6,))},
    ),
    "and join when it has as many": (
        [(drawn(64), SIX), (drawn(16), (6,)), (drawn(64), (6,))],
        {DRAWN: (64, (*SIX, 6))},
    ),
    "another seed is another sample": (
        [(drawn(64), SIX), (drawn(16, 7), TWO)],
        {DRAWN: (64, SIX), "intact-sample-7": (16, TWO)},
    ),
    "limit after limit": ([(first(64), SIX), (first(16), TWO)], {"intact": (64, SIX)}),
    "a larger limit": ([(first(16), SIX), (first(64), SIX)], {"intact": (64, SIX)}),
    "a larger limit of two": (
        [(first(16), SIX), (first(64), TWO)],
        {"intact": (16, SIX), "intact-64-documents": (64, TWO)},
    ),
    "a limit after all": ([(first(None), SIX), (first(16), TWO)], {"intact": (None, SIX)}),
    "all after a limit": ([(first(16), SIX), (first(None), SIX)], {"intact": (None, SIX)}),
    "all of two after a limit": (
        [(first(16), SIX), (first(None), TWO)],
        {"intact": (16, SIX), "intact-all-documents": (None, TWO)},
    ),
    "a limit that leaves nothing out": (
        [(first(320), SIX), (first(None), TWO)],
        {"intact": (None, SIX)},
    ),
    "sample after limit": (
        [(first(64), SIX), (drawn(16), TWO)],
        {"intact": (64, SIX), DRAWN: (16, TWO)},
    ),
    "limit after sample": (
        [(drawn(64), SIX), (first(16), TWO)],
        {"intact": (16, TWO), DRAWN: (64, SIX)},
    ),
    "all after sample and back": (
        [(drawn(64), SIX), (first(None), SIX), (drawn(16), TWO)],
        {"intact": (None, SIX), DRAWN: (64, SIX)},
    ),
    "a sample that leaves nothing out": (
        [(drawn(64), SIX), (drawn(320), SIX), (drawn(1000), TWO)],
        {"intact": (None, SIX), DRAWN: (64, SIX)},
    ),
    "until after a limit stands beside": (
        [(first(64), SIX), (UNTIL, SIX)],
        {"intact": (64, SIX), "intact-until-top-1,-6-runs": (None, SIX)},
    ),
    "a limit after until stands beside": (
        [(UNTIL, SIX), (first(16), TWO)],
        {"intact": (None, SIX), "intact-16-documents": (16, TWO)},
    ),
    "until after sample": (
        [(drawn(64), SIX), (UNTIL, TWO)],
        {"intact": (None, TWO), DRAWN: (64, SIX)},
    ),
    "sample after until": (
        [(UNTIL, SIX), (drawn(16), TWO)],
        {"intact": (None, SIX), DRAWN: (16, TWO)},
    ),
    "another question stands beside": (
        [(UNTIL, SIX), ({"until": "prune 1"}, SIX)],
        {"intact": (None, SIX), "intact-until-prune-1,-6-runs": (None, SIX)},
    ),
    "the same of other runs too": (
        [(UNTIL, SIX), (UNTIL, TWO), (UNTIL, (1, 2)), (UNTIL, TWO)],
        {
            "intact": (None, SIX),
            "intact-until-top-1,-2-runs": (None, TWO),
            "intact-until-top-1,-2-runs-(2)": (None, (1, 2)),
        },
    ),
    "all of some after until": (
        [(UNTIL, SIX), (first(None), TWO)],
        {"intact": (None, SIX), "intact-all-documents": (None, TWO)},
    ),
    "all after until": ([(UNTIL, SIX), (first(None), SIX)], {"intact": (None, SIX)}),
    "all after a limit and until": (
        [(first(64), SIX), (UNTIL, SIX), (first(None), SIX)],
        {"intact": (None, SIX)},
    ),
    "until after all": ([(first(None), SIX), (UNTIL, TWO)], {"intact": (None, SIX)}),
    "a smaller one by name": (
        [(drawn(64), SIX), ({**drawn(16), "named": True}, TWO), (drawn(64), TWO)],
        {DRAWN: (64, SIX), f"{DRAWN}-16-documents": (16, TWO)},
    ),
    "first by name, and it stays": (
        [
            ({**drawn(16), "named": True}, TWO),
            (drawn(64), SIX),
            (drawn(128), SIX),
            (drawn(16), (1,)),
        ],
        {DRAWN: (128, SIX), f"{DRAWN}-16-documents": (16, TWO)},
    ),
    "a name for what stood beside": (
        [
            (drawn(16), SIX),
            (drawn(64), TWO),
            ({**drawn(64), "named": True}, TWO),
            (drawn(128), SIX),
        ],
        {DRAWN: (128, SIX), f"{DRAWN}-64-documents": (64, TWO)},
    ),
}


@pytest.mark.parametrize("case", TABLE)
def test_what_is_known_of_a_run_is_shown(case: str, make) -> None:
    steps, wanted = TABLE[case]
    store, best = make(), {}
    for how, layers in steps:
        view = run(store, how, layers)
        if not how.get("until"):
            assert {*layers} <= {run.layer for run in view.runs}, "where it is shown"
        there = [asked.view for asked in store.views.asked()]
        assert view in there
        # Nobody's figures rest on fewer documents than before.
        for key, known in best.items():
            now = known_now(store, there, *key)
            assert now >= known, key
        for each in there:
            for one in each.runs:
                key = (each.metric, each.seed, record_of(store, each).is_raced, one.layer)
                best[key] = max(best.get(key, 0), each.size)
    assert dict(shown(store)) == {name: layers for name, (_, layers) in wanted.items()}
    sizes = {
        store.views.name_of(a.view): a.view.limit or a.view.sample for a in store.views.asked()
    }
    assert sizes == {name: count for name, (count, _) in wanted.items()}
    # All of it is there, and the same from a folder as from a report's sources.
    records = [record_of(store, asked.view) for asked in store.views.asked()]
    assert not [record.missing for record in records if record.missing]
    assert len({record.view for record in records}) == len(records)
    assert all(record.is_raced or record.is_complete for record in records)
    pairs = [(store, asked.view) for asked in store.views.asked()]
    gathered = merged(record_of(*_joined(same)) for same in _same(pairs))
    assert sorted(each.view for each in gathered) == sorted(each.view for each in records)
    # Asked again, nothing changes.
    before = shown(store)
    for how, layers in steps[::-1]:
        run(store, how, layers)
    assert shown(store) == before


def known_now(
    store: CellStore, views: list[View], metric: str, seed: int | None, raced: bool, layer: int
) -> float:
    return max(
        each.size
        for each in views
        if (each.metric, each.seed) == (metric, seed)
        and (raced or not record_of(store, each).is_raced)
        and layer in {run.layer for run in each.runs}
    )


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


@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=st.lists(asks_of([8, 40, 64, 96]), min_size=2, max_size=6))
def test_whatever_is_asked_nothing_is_taken_away(
    steps: list[Asked], model_identity, benchmark_identity
) -> None:
    with TemporaryDirectory() as folder:
        ledger = Ledger(Path(folder) / "results")
        benchmark = benchmark_identity({"arc_easy": 96}, {"acc": "mean", "acc_norm": "mean"})
        store = ledger.cell(model_identity(layers=len(COSTS)), benchmark, {})
        best: dict[tuple[int | None, int], float] = {}
        for how, layers in steps:
            view = run(store, how, layers)
            views = [asked.view for asked in store.views.asked()]
            assert view in views
            records = [record_of(store, each) for each in views]
            assert all(each.is_raced or each.is_complete for each in records)
            assert len({each.place for each in records}) == len(records)
            asked, until = store.views.of(asks(how, layers)), how.get("until")
            shown_in = record_of(store, view)
            if until is None:
                assert {*layers} <= {one.layer for one in shown_in.runs}
                assert view.size >= asked.size
            else:
                assert shown_in.answer is not None
                assert shown_in.answer.question.startswith(until)
            now: dict[tuple[int | None, int], float] = {}
            for each, record in zip(views, records, strict=True):
                for one in record.runs:
                    key = (each.seed, one.layer)
                    if not record.is_raced:
                        now[key] = max(now.get(key, 0), each.size)
            assert all(now.get(key, 0) >= size for key, size in best.items())
            best = now
            assert run(store, how, layers) == view, "asked again"
            assert [asked.view for asked in store.views.asked()] == views

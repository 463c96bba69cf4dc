"""Constraints hold, and within them every strategy chooses like a naive one."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.conftest import golden, printed
from tests.helpers.searches import cosine, grown, naive_proxy, turned
from tracker.cli.options import Setting
from tracker.core.errors import ExperimentError
from tracker.core.prune_records import PruneCost, PruneRecord, PruneStep
from tracker.core.search_parts import SearchParts
from tracker.ledger.store import listed
from tracker.search.cells import OpenCell
from tracker.search.planning import DrawnScores, ends_of
from tracker.search.request import SearchRequest, load_searches, search_request
from tracker.search.scores import Scores, Set
from tracker.search.search import Found
from tracker.search.settings import Budget, amount, budget, constraints_of
from tracker.search.strategies import STRATEGIES, Search

from .conftest import GO, LAYERS, WHOLE, Truth

KINDS = ["full", "mamba", "mamba", "full", "mamba"]
CONFIG = SimpleNamespace(num_hidden_layers=LAYERS, layer_types=KINDS)
CASES: dict[str, tuple[dict[str, Any], Callable[[set[int]], bool]]] = {
    "nothing": ({}, lambda s: True),
    "protect": ({"protect": "0"}, lambda s: 0 not in s),
    "both ends": ({"protect": [1, "last"]}, lambda s: not {1, 4} & s),
    "range": ({"among": {"min": 1, "max": 3}}, lambda s: s <= {1, 2, 3}),
    "kind": ({"among": {"kind": "mamba"}}, lambda s: s <= {1, 2, 4}),
    "both": ({"among": "even,odd", "protect": [2]}, lambda s: 2 not in s),
    "so many": ({"at_least": {"mamba": 2}}, lambda s: len({1, 2, 4} & s) <= 1),
    "of 3": ({"at_least": {"mamba": "1 of 3"}}, lambda s: not ({1, 2} <= s or {2, 4} <= s)),
    "of 4": ({"at_least": "odd=1 of 4"}, lambda s: not {1, 3} <= s),
}
"""What is written → which sets that leaves, by hand."""


def asked(**said: Any) -> SearchRequest:
    return search_request({"model": "m", "benchmark": "copa", "remove": GO, **said})


def within(case: str) -> Budget:
    """Return the budget of a search of layers of `KINDS`."""
    one = asked(strategy="last", **CASES[case][0])
    found = constraints_of(one.protect, one.among, one.at_least, LAYERS, lambda: CONFIG)
    return budget("remove", amount(GO), [1.0] * LAYERS, LAYERS, "t", found)


def ends(case: str) -> list[Set]:
    return [s for s in combinations(range(LAYERS), GO) if CASES[case][1](set(s))]


def leads(case: str, sets: list[Set]) -> list[Set]:
    """Those sets that are a part of one that is large enough."""
    return [s for s in sets if any(set(s) <= set(end) for end in ends(case))]


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def steps(cell: OpenCell, case: str, strategy: str, **more: Any) -> list[PruneStep]:
    return list(STRATEGIES[strategy](Search(Scores([cell], WHOLE), within(case), **more)))


def run(cell: OpenCell, case: str, strategy: str, **more: Any) -> list[Set]:
    return [step.removed for step in steps(cell, case, strategy, **more)]


@pytest.mark.parametrize("by", ["accuracy", "gold_logprob"])
def test_greedy_takes_the_best_that_leads_to_enough(cell, truth: Truth, case: str, by: str) -> None:
    removed: Set = ()
    for step in steps(cell, case, by):
        order = sorted(leads(case, grown(removed)), key=lambda each: truth.key(by, each))
        assert step.removed == order[0]
        assert step.score == pytest.approx(truth.lost(by, order[0]), abs=1e-4)
        assert step.runner_up == (order[1] if order[1:] else ())
        if order[1:]:
            between = truth.lost(by, order[1]) - truth.lost(by, order[0])
            assert step.margin.value == pytest.approx(between, abs=1e-4)
        assert (step.layer,) == tuple(set(step.removed) - set(removed))
        removed = step.removed
    assert len(removed) == GO


@pytest.mark.parametrize("by", ["accuracy", "gold_logprob", "cosine"])
def test_one_shot_takes_the_next_that_leads_to_enough(cell, truth: Truth, case: str, by) -> None:
    once = naive_proxy("cosine", truth, ()) if by == "cosine" else {}
    order = sorted(range(LAYERS), key=lambda n: once.get(n) or truth.key(by, (n,)))  # type: ignore[arg-type, return-value]
    removed, expected = (), []
    while len(removed) < GO:
        candidates = leads(case, [tuple(sorted((*removed, n))) for n in order if n not in removed])
        removed = candidates[0]
        expected.append(removed)
    assert run(cell, case, f"{by}_oneshot") == expected


def test_the_best_stretch_of_those_that_may_go_goes(cell, truth: Truth, case: str) -> None:
    angles = turned(truth.model, truth, lambda b, a: cosine(b, a).clamp(-1, 1).arccos())
    allowed = CASES[case][1]

    def stretches(length: int) -> Iterator[Set]:
        for first in range(LAYERS - length + 1):
            if allowed(set(stretch := tuple(range(first, first + length)))):
                yield stretch

    if not list(stretches(GO)):
        with pytest.raises(ExperimentError, match="each of which may go, and that is not enough"):
            run(cell, case, "angular")
        return
    for length, step in enumerate(steps(cell, case, "angular"), 1):
        assert step.removed == min(stretches(length), key=lambda s: angles[s[0]][s[-1]])
        angle = angles[step.removed[0]][step.removed[-1]] / np.pi
        assert step.score == pytest.approx(angle, rel=1e-3)
    assert length == GO


def test_the_last_that_may_go_go_but_for_the_very_last(cell, case: str) -> None:
    possible = [s for s in ends(case) if LAYERS - 1 not in s]
    if not possible:
        with pytest.raises(ExperimentError, match="last leaves the very last layer"):
            run(cell, case, "last")
        return
    # The latest, and of these the latest: as a number is read.
    assert run(cell, case, "last")[-1] == max(possible, key=lambda s: s[::-1])


def test_random_draws_are_all_that_may_go_and_nothing_else(cell, case: str) -> None:
    drawn = {run(cell, case, "random", seed=seed)[-1] for seed in range(60)}
    assert drawn == set(ends(case))


def naive(each: tuple[float, ...], needed: float, within: Budget) -> list[set[int]]:
    """All sets that are enough, leave what must stay, and leave a part."""
    parts = range(len(each))
    return [
        set(s)
        for n in range(1, len(each))
        for s in combinations(parts, n)
        if sum(each[p] for p in s) >= needed
        and not within.fixed & set(s)
        and all(len(set(group) - set(s)) >= stay for group, stay in within.least)
    ]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_whatever_must_stay_the_budget_is_met_or_it_is_said(strategy: str) -> None:
    """Layers of any sizes, any of them fixed, any sets of which some stay."""
    lots = random.Random(7)
    for _ in range(60):
        total = lots.randint(3, 7)
        each = tuple(float(lots.choice((1, 1, 2, 5))) for _ in range(total))
        parts = range(total)
        fixed = frozenset(p for p in parts if lots.random() < 0.2)
        groups = [tuple(sorted(lots.sample(parts, lots.randint(1, total)))) for _ in range(2)]
        least = tuple((group, lots.randint(1, len(group))) for group in groups)
        one = Budget(each, float(lots.randint(1, int(sum(each)))), fixed, least)
        possible = naive(each, one.needed, one)
        assert one.reachable(()) == bool(possible)
        for s in (set(lots.sample(parts, n)) for n in range(total)):
            assert one.reachable(s) == any(s <= end for end in possible), (one, s)
            if one.reachable(s):
                assert one.left(s) == [
                    p for p in parts if p not in s and any({*s, p} <= end for end in possible)
                ]
        if not possible:
            continue
        try:
            steps = list(
                STRATEGIES[strategy](Search(DrawnScores(SearchParts("layer", total)), one))
            )
        except ExperimentError:
            assert strategy in ("last", "angular")
            continue
        assert set(steps[-1].removed) in possible
        assert not any(one.enough(step.removed) for step in steps[:-1])


@pytest.mark.parametrize(("written", "meant"), golden("layers_said"))
def test_layers_are_understood_however_they_are_written(written: str, meant: str) -> None:
    protect = asked(strategy="last", protect=written).protect
    assert ", ".join(map(str, protect)) == meant
    assert asked(strategy="last", protect=list(protect)).protect == protect


def test_other_constraints_are_another_search_and_none_is_the_same_as_ever() -> None:
    """The name of a search without any is what it was before there were constraints."""
    cost = PruneCost(evaluations=0, passes=0, seconds=0)

    def name(**said: Any) -> str:
        one = asked(strategy="random", sample=32, remove=8, **said)
        return Found(one, WHOLE, 2, (), (), cost).name("tests")

    assert name() == "m-copa-random-2-remove-8-72dd68c6"
    said = [{}, {"protect": [0, "last"]}, {"among": "3-9"}, {"at_least": {"odd": 3}}]
    assert len({name(**each) for each in said}) == 4
    assert name(protect="last,0") == name(protect=["last", "0"]) == name(protect=[0, "last"])
    assert name(at_least="odd=3") == name(at_least={"odd": "3"}) == name(at_least={"odd": 3})


@pytest.mark.usefixtures("one_thread")
def test_a_file_says_what_must_stay_and_the_page_repeats_it(write, prune, tmp_path: Path) -> None:
    path = write(
        strategy=["cosine_oneshot", "accuracy", "last", "random"],
        protect={"values": [[0, "last"], [0, 1]]},
        at_least={"value": {"odd": "1 of 4"}},
        test_sample=4,
    )
    plan = printed("plan", path, "--gflops=1", f"--results={tmp_path}/new")
    assert "copa: last, remove 2, protect 0, last, at_least odd: 1 of 4" in plan
    done = prune(path)
    assert done.exit_code == 0, done.output
    records = listed(tmp_path / "results" / "searches", PruneRecord, {})
    assert len(records) == 2 * (3 + 3)
    for one in records:
        assert not {1, 3} <= set(one.removed)
        assert not set(one.protected) & set(one.removed)
        assert (one.protected, one.among, one.at_least) in (
            ((0, 4), None, {"odd": "1 of 4"}),
            ((0, 1), None, {"odd": "1 of 4"}),
        )
        assert PruneRecord.model_validate_json(one.model_dump_json()) == one
    text = " ".join(done.output.split())
    assert "Layers 0 and 4 were protected." in text
    assert "Of any 4 layers in a row at least 1 of kind odd had to stay." in text
    # What could be told apart by its amount alone is, by what was to stay.
    assert "last, without 0 and 1" in done.output

    # As W&B passes it on, for the same search.
    trial = prune(
        *(f"--{key}={value}" for key, value in _parameters(path).items()),
        "--strategy=last",
        "--protect=[0, 'last']",
        "--at_least={'odd': '1 of 4'}",
    )
    assert trial.exit_code == 0, trial.output
    assert {one.name for one in listed(tmp_path / "results" / "searches", PruneRecord, {})} == {
        r.name for r in records
    }


def _parameters(path: Path) -> dict[str, Any]:
    import yaml

    said = yaml.safe_load(path.read_text())["parameters"]
    return {key: one["value"] for key, one in said.items() if "value" in one and key != "at_least"}


def test_a_search_without_documents_says_beforehand_how_it_ends() -> None:
    one = asked(strategy="random", draws=2)
    assert all(len(end) == GO for end in ends_of(one, within("of 3")))
    given = [Search(DrawnScores(WHOLE), within("of 3"), 1234, draw) for draw in (1, 2)]
    drawn = [list(STRATEGIES["random"](each))[-1].removed for each in given]
    assert ends_of(one, within("of 3")) == list(dict.fromkeys(drawn))


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        ({"protect": [0, "last"]}, [{"protect": (0, "last")}]),
        ({"protect": range(2)}, [{"protect": (0, 1)}]),
        ({"protect": [[0], [0, 1]]}, [{"protect": (0,)}, {"protect": (0, 1)}]),
        ({"among": {"min": 1, "max": 3}}, [{"among": (1, 2, 3)}]),
        ({"among": {"kind": "odd"}}, [{"among": ("odd",)}]),
        ({"among": {"values": ["odd", "even"]}}, [{"among": ("odd",)}, {"among": ("even",)}]),
        ({"calibrate": {"values": ["a", "b"]}}, [{"calibrate": ("a",)}, {"calibrate": ("b",)}]),
        ({"at_least": {"odd": 1}}, [{"at_least": '{"odd": "1"}'}]),
    ],
)
def test_python_and_set_take_the_values_of_a_file(said: dict[str, Any], meant: list[Any]) -> None:
    """Also as the command that goes on with a search is typed."""
    given = {"model": "m", "benchmark": "copa", "remove": 1, "strategy": "last"}
    asked = load_searches(None, given | said)
    found = [each.model_dump(include=set(said)) for each in asked.file.searches()]
    assert found == meant
    sets = [Setting(yaml=True).convert(each, None, None) for each in asked.typed[1::2]]
    assert load_searches(None, dict(sets)).file == asked.file

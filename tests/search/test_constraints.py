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
from tests.helpers.searches import cosine_similarity, naive_proxy, one_larger_sets, span_figures
from tracker.cli.options import SettingType
from tracker.schema.errors import ExperimentError
from tracker.schema.prune_records import PruneCost, PruneRecord, PruneStep
from tracker.schema.search_parts import SearchParts
from tracker.search.cells import OpenCell
from tracker.search.planning import RandomScores, possible_results
from tracker.search.request import SearchRequest, load_searches, search_request
from tracker.search.scores import PartSet, Scores
from tracker.search.search import SearchDraw
from tracker.search.settings import Budget, build_budget, parse_amount, resolve_constraints
from tracker.search.strategies import STRATEGIES, Search

from .conftest import LAYER_PARTS, LAYERS, N_REMOVED, Truth, stored_searches

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


def make_request(**settings: Any) -> SearchRequest:
    return search_request({"model": "m", "benchmark": "copa", "remove": N_REMOVED, **settings})


def budget_of(case: str) -> Budget:
    """Return the budget of a search of layers of `KINDS`."""
    request = make_request(strategy="last", **CASES[case][0])
    texts = (request.protect, request.among, request.at_least)
    constraints = resolve_constraints(*texts, LAYERS, lambda: CONFIG)
    return build_budget("remove", parse_amount(N_REMOVED), [1.0] * LAYERS, LAYERS, "t", constraints)


def final_sets(case: str) -> list[PartSet]:
    return [s for s in combinations(range(LAYERS), N_REMOVED) if CASES[case][1](set(s))]


def leading_sets(case: str, sets: list[PartSet]) -> list[PartSet]:
    """Those sets that are a part of one that is large enough."""
    return [s for s in sets if any(set(s) <= set(final_set) for final_set in final_sets(case))]


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def run_steps(cell: OpenCell, case: str, strategy: str, **kwargs: Any) -> list[PruneStep]:
    search = Search(Scores([cell], LAYER_PARTS), budget_of(case), **kwargs)
    return list(STRATEGIES[strategy](search))


def removed_sets(cell: OpenCell, case: str, strategy: str, **options: Any) -> list[PartSet]:
    return [step.removed for step in run_steps(cell, case, strategy, **options)]


@pytest.mark.parametrize("by", ["accuracy", "gold_logprob"])
def test_greedy_takes_the_best_that_leads_to_enough(cell, truth: Truth, case: str, by: str) -> None:
    removed: PartSet = ()
    for step in run_steps(cell, case, by):
        sets = leading_sets(case, one_larger_sets(removed))
        order = sorted(sets, key=lambda parts: truth.key(by, parts))
        assert step.removed == order[0]
        assert step.score == pytest.approx(truth.lost(by, order[0]), abs=1e-4)
        assert step.runner_up == (order[1] if order[1:] else ())
        if order[1:]:
            margin = truth.lost(by, order[1]) - truth.lost(by, order[0])
            assert step.margin.value == pytest.approx(margin, abs=1e-4)
        assert (step.layer,) == tuple(set(step.removed) - set(removed))
        removed = step.removed
    assert len(removed) == N_REMOVED


@pytest.mark.parametrize("by", ["accuracy", "gold_logprob", "cosine"])
def test_one_shot_matches_naive_choice(cell, truth: Truth, case: str, by) -> None:
    proxy_scores = naive_proxy("cosine", truth, ()) if by == "cosine" else {}
    order = sorted(range(LAYERS), key=lambda n: proxy_scores.get(n) or truth.key(by, (n,)))  # type: ignore[arg-type, return-value]
    removed, expected = (), []
    while len(removed) < N_REMOVED:
        sets = leading_sets(case, [tuple(sorted((*removed, n))) for n in order if n not in removed])
        removed = sets[0]
        expected.append(removed)
    assert removed_sets(cell, case, f"{by}_oneshot") == expected


def test_the_best_stretch_of_those_that_may_go_goes(cell, truth: Truth, case: str) -> None:
    cosine = cosine_similarity
    angles = span_figures(truth.model, truth, lambda b, a: cosine(b, a).clamp(-1, 1).arccos())
    is_allowed = CASES[case][1]

    def allowed_spans(length: int) -> Iterator[PartSet]:
        for start in range(LAYERS - length + 1):
            if is_allowed(set(span := tuple(range(start, start + length)))):
                yield span

    if not list(allowed_spans(N_REMOVED)):
        with pytest.raises(
            ExperimentError, match="cannot remove enough, because the strategy 'angular'"
        ):
            removed_sets(cell, case, "angular")
        return
    for length, step in enumerate(run_steps(cell, case, "angular"), 1):
        assert step.removed == min(allowed_spans(length), key=lambda s: angles[s[0]][s[-1]])
        angle = angles[step.removed[0]][step.removed[-1]] / np.pi
        assert step.score == pytest.approx(angle, rel=1e-3)
    assert length == N_REMOVED


def test_last_keeps_the_very_last_layer(cell, case: str) -> None:
    possible_sets = [s for s in final_sets(case) if LAYERS - 1 not in s]
    if not possible_sets:
        with pytest.raises(ExperimentError, match="the strategy 'last' keeps the final layer"):
            removed_sets(cell, case, "last")
        return
    # The latest, and of these the latest: as a number is read.
    assert removed_sets(cell, case, "last")[-1] == max(possible_sets, key=lambda s: s[::-1])


def test_random_draws_all_allowed_sets(cell, case: str) -> None:
    drawn_sets = {removed_sets(cell, case, "random", seed=seed)[-1] for seed in range(60)}
    assert drawn_sets == set(final_sets(case))


def naive_sets(sizes: tuple[float, ...], min_removed: float, budget: Budget) -> list[set[int]]:
    """All sets that are enough, leave what must stay, and leave a part."""
    parts = range(len(sizes))
    return [
        set(s)
        for n in range(1, len(sizes))
        for s in combinations(parts, n)
        if sum(sizes[p] for p in s) >= min_removed
        and not budget.fixed & set(s)
        and all(len(set(group) - set(s)) >= minimum for group, minimum in budget.minimums)
    ]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_budget_is_met_or_refused(strategy: str) -> None:
    """Layers of any sizes, any of them fixed, any sets of which some stay."""
    rng = random.Random(7)
    for _ in range(60):
        total = rng.randint(3, 7)
        sizes = tuple(float(rng.choice((1, 1, 2, 5))) for _ in range(total))
        parts = range(total)
        fixed = frozenset(p for p in parts if rng.random() < 0.2)
        groups = [tuple(sorted(rng.sample(parts, rng.randint(1, total)))) for _ in range(2)]
        minimums = tuple((group, rng.randint(1, len(group))) for group in groups)
        budget = Budget(
            sizes,
            float(rng.randint(1, int(sum(sizes)))),
            fixed,
            minimums,
            parts=SearchParts("layer", total),
        )
        ends = naive_sets(sizes, budget.min_removed, budget)
        assert budget.can_reach(()) == bool(ends)
        for s in (set(rng.sample(parts, n)) for n in range(total)):
            assert budget.can_reach(s) == any(s <= end for end in ends), (budget, s)
            if budget.can_reach(s):
                next_parts = set().union(*(end for end in ends if s <= end)) - s
                assert budget.next_parts(s) == sorted(next_parts)
        if not ends:
            continue
        try:
            scores = RandomScores(SearchParts("layer", total))
            steps = list(STRATEGIES[strategy](Search(scores, budget)))
        except ExperimentError:
            assert strategy in ("last", "angular")
            continue
        assert set(steps[-1].removed) in ends
        assert not any(budget.is_met(step.removed) for step in steps[:-1])


@pytest.mark.parametrize(("written", "expected"), golden("layers_said"))
def test_layers_are_parsed(written: str, expected: str) -> None:
    protect = make_request(strategy="last", protect=written).protect
    assert ", ".join(map(str, protect)) == expected
    assert make_request(strategy="last", protect=list(protect)).protect == protect


def test_constraints_are_part_of_the_name() -> None:
    """The name of a search without any is what it was before there were constraints."""
    cost = PruneCost(evaluations=0, passes=0, seconds=0)

    def name(**settings: Any) -> str:
        request = make_request(strategy="random", sample=32, remove=8, **settings)
        return SearchDraw(request, LAYER_PARTS, 2, (), (), cost).name("tests")

    assert name() == "m-copa-random-2-remove-8-72dd68c6"
    constraints = [{}, {"protect": [0, "last"]}, {"among": "3-9"}, {"at_least": {"odd": 3}}]
    assert len({name(**constraint) for constraint in constraints}) == 4
    assert name(protect="last,0") == name(protect=["last", "0"]) == name(protect=[0, "last"])
    assert name(at_least="odd=3") == name(at_least={"odd": "3"}) == name(at_least={"odd": 3})


@pytest.mark.usefixtures("one_thread")
def test_constraints_of_a_file_are_shown(write, prune, tmp_path: Path) -> None:
    path = write(
        strategy=["cosine_oneshot", "accuracy", "last", "random"],
        protect={"values": [[0, "last"], [0, 1]]},
        at_least={"value": {"odd": "1 of 4"}},
        test_sample=4,
    )
    plan_text = printed("plan", path, "--gflops=1", f"--results={tmp_path}/new")
    assert "copa: last, remove 2, protect 0, last, at_least odd: 1 of 4" in plan_text
    result = prune(path)
    assert result.exit_code == 0, result.output
    records = stored_searches(tmp_path)
    assert len(records) == 2 * (3 + 3)
    for record in records:
        assert not {1, 3} <= set(record.removed)
        assert not set(record.protected) & set(record.removed)
        assert record.protected in ((0, 4), (0, 1))
        assert (record.among, record.at_least) == (None, {"odd": "1 of 4"})
        assert PruneRecord.model_validate_json(record.model_dump_json()) == record
    text = " ".join(result.output.split())
    assert "Layers 0 and 4 were protected." in text
    assert "Among any 4 layers in a row, at least 1 of kind odd had to stay." in text
    # What could be told apart by its amount alone is, by what was to stay.
    assert "last, without 0 and 1" in result.output

    # As W&B passes it on, for the same search.
    trial = prune(
        *(f"--{key}={value}" for key, value in _parameters(path).items()),
        "--strategy=last",
        "--protect=[0, 'last']",
        "--at_least={'odd': '1 of 4'}",
    )
    assert trial.exit_code == 0, trial.output
    assert {record.name for record in stored_searches(tmp_path)} == {r.name for r in records}


def _parameters(path: Path) -> dict[str, Any]:
    import yaml

    parameters = yaml.safe_load(path.read_text())["parameters"]
    parameters.pop("at_least", None)
    return {key: entry["value"] for key, entry in parameters.items() if "value" in entry}


def test_results_without_documents_are_predicted() -> None:
    request = make_request(strategy="random", draws=2)
    assert all(len(end) == N_REMOVED for end in possible_results(request, budget_of("of 3")))
    searches = [Search(RandomScores(LAYER_PARTS), budget_of("of 3"), 1234, draw) for draw in (1, 2)]
    drawn_sets = [list(STRATEGIES["random"](search))[-1].removed for search in searches]
    assert possible_results(request, budget_of("of 3")) == list(dict.fromkeys(drawn_sets))


@pytest.mark.parametrize(
    ("changes", "expected"),
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
def test_python_and_set_take_the_values_of_a_file(changes: dict, expected: list[Any]) -> None:
    """Also as the command that goes on with a search is typed."""
    settings = {"model": "m", "benchmark": "copa", "remove": 1, "strategy": "last"}
    loaded = load_searches(None, settings | changes)
    found_values = [item.model_dump(include=set(changes)) for item in loaded.file.searches()]
    assert found_values == expected
    setting = SettingType(is_yaml=True)
    typed = dict(setting.convert(text, None, None) for text in loaded.command_arguments[1::2])
    assert load_searches(None, typed).file == loaded.file

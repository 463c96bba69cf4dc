"""Test the predicted costs of searches against the real ones."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from pathlib import Path

import pytest

from tests.conftest import printed
from tracker.ledger.store import Ledger
from tracker.measuring.planning import plan_cells
from tracker.schema.config import CellRequest
from tracker.search.cells import ModelCache
from tracker.search.planning import plan_searches
from tracker.search.search import find_budget, run_search
from tracker.search.strategies import STRATEGIES

from .conftest import DOCUMENTS, LAYERS, N_REMOVED

PROXIES = ["cosine", "relative_update", "perplexity", "taylor"]
PROXIES += [*(f"{name}_oneshot" for name in PROXIES), "angular"]


@pytest.fixture(scope="module")
def cache(make_cache: Callable[..., ModelCache]) -> ModelCache:
    """Open the model and the cells of all searches here once."""
    return make_cache()


@pytest.mark.parametrize(
    ("strategy", "stays"),
    [
        *((strategy, {}) for strategy in STRATEGIES),
        *product(
            ("accuracy", "cosine_oneshot", "random"), ({"protect": "0"}, {"at_least": "odd=1"})
        ),
    ],
    ids=str,
)
def test_a_search_costs_what_was_planned(ask, cache, one_thread, tmp_path, strategy, stays) -> None:
    request = ask(strategy=strategy, **stays)
    ((planned,), (planned_test,)) = plan_searches([request], Ledger(tmp_path / "new"))
    draws = list(run_search(request, find_budget(request, cache), cache))
    costs = [search_draw.cost for search_draw in draws]
    # What went says what of a kind may go.
    rel = 0.15 if "at_least" in stays else 0.0
    assert planned.evaluations == pytest.approx(sum(cost.evaluations for cost in costs), rel=rel)
    # Which layers go decides how much the sets share.
    assert planned.passes == pytest.approx(sum(cost.passes for cost in costs), rel=0.15)
    assert planned.documents == (0 if not request.calibration() else DOCUMENTS)
    assert (planned.steps, planned.at_most) == (N_REMOVED, False)
    assert (planned.naive_flops is None) == (strategy in PROXIES)
    assert planned_test.documents == DOCUMENTS
    sets = {step.removed for search_draw in draws for step in search_draw.steps}
    assert abs(planned_test.evaluations - 1 - len(sets)) <= len(draws) - 1


def test_shared_measurements_are_planned_once(ask, tmp_path) -> None:
    ledger = Ledger(tmp_path / "new")
    short_search, long_search = ask(strategy="accuracy", remove=1), ask(strategy="accuracy")
    (request,) = short_search.calibration()
    (cell,) = plan_cells([request.with_changes(layers=tuple(range(LAYERS)))], ledger)
    ((first_plan, second_plan), _) = plan_searches([short_search, long_search], ledger)
    ((single_plan,), _) = plan_searches([long_search], ledger)
    assert first_plan.flops == pytest.approx(cell.cost.flops)
    assert first_plan.naive_flops == pytest.approx(cell.cost.naive_flops)
    assert first_plan.flops + second_plan.flops == pytest.approx(single_plan.flops)
    assert second_plan.evaluations == single_plan.evaluations == 1 + 5 + 4 + 3
    ((lazy_plan,), _) = plan_searches([ask(strategy="accuracy", rescoring="lazy")], ledger)
    assert (lazy_plan.evaluations, lazy_plan.at_most) == (single_plan.evaluations, True)


def test_deciding_documents_are_planned(ask, make_cache) -> None:
    requests = [ask(strategy=name, remove=2) for name in ("cosine_oneshot", "last", "random")]
    _, (decider, test_plan) = plan_searches(requests, make_cache().ledger)
    assert isinstance(decider.request, CellRequest)
    assert (decider.request.documents.part, decider.documents) == ("calibration", DOCUMENTS)
    assert decider.evaluations == 3, "the intact model and two sets, and no random one"
    _, (test_plan,) = plan_searches(requests[1:], make_cache().ledger)
    assert isinstance(test_plan.request, CellRequest)
    assert test_plan.request.documents.part == "test"


def test_the_command_plans_a_file_of_searches(write: Callable[..., Path], tmp_path: Path) -> None:
    path = write(sample=4, test_sample=6, strategy=["accuracy", "random"])
    output = printed("plan", path, "--gflops=1", f"--results={tmp_path}/new")
    lines = output[output.index("search ") :].splitlines()
    table = [line.split() for line in lines]
    # 5 + 4 candidates and the intact model; two steps of it, and of three random draws.
    assert table[1][:8] == ["copa:", "accuracy,", "remove", "2", "copa", "4", "2", "10"]
    assert table[2][:9] == ["copa:", "random,", "remove", "2", "–", "0", "2", "0", "0.0"]
    assert table[3][:2] == ["copa:", "test"]
    assert output.index("2 searches, at least") < output.index("search "), "the time comes first"
    assert not (tmp_path / "new").exists()

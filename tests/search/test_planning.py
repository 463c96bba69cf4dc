"""Test the predicted costs of searches against the real ones."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from pathlib import Path

import pytest

from tests.conftest import printed
from tracker.core.config import CellRequest
from tracker.ledger.store import Ledger
from tracker.measuring.planning import plan
from tracker.search.cells import OpenCell
from tracker.search.planning import plan_searches
from tracker.search.search import budget_of, search
from tracker.search.strategies import STRATEGIES

from .conftest import DOCUMENTS, GO, LAYERS

PROXIES = ["cosine", "relative_update", "perplexity", "taylor"]
PROXIES += [*(f"{name}_oneshot" for name in PROXIES), "angular"]
CELLS: dict[CellRequest, OpenCell] = {}
"""Those that are open: of all searches here the same."""


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
def test_a_search_takes_what_was_said(ask, lend, one_thread, tmp_path, strategy, stays) -> None:
    request, lender = ask(strategy=strategy, **stays), lend()
    ((said,), (test,)) = plan_searches([request], Ledger(tmp_path / "new"))
    found = list(search(request, budget_of(request, lender), lender, CELLS))
    costs = [each.cost for each in found]
    # What went says what of a kind may go.
    off = 0.15 if "at_least" in stays else 0.0
    assert said.evaluations == pytest.approx(sum(cost.evaluations for cost in costs), rel=off)
    # Which layers go decides how much the sets share.
    assert said.passes == pytest.approx(sum(cost.passes for cost in costs), rel=0.15)
    assert said.documents == (0 if not request.calibration() else DOCUMENTS)
    assert (said.steps, said.at_most) == (GO, False)
    assert (said.naive_flops is None) == (strategy in PROXIES)
    assert test.documents == DOCUMENTS
    sets = {step.removed for each in found for step in each.steps}
    assert abs(test.evaluations - 1 - len(sets)) <= len(found) - 1


def test_the_first_step_is_a_sweep_and_nothing_is_paid_for_twice(ask, tmp_path) -> None:
    ledger = Ledger(tmp_path / "new")
    short, long = ask(strategy="accuracy", remove=1), ask(strategy="accuracy")
    (request,) = short.calibration()
    (cell,) = plan([request.with_changes(layers=tuple(range(LAYERS)))], ledger)
    ((first, whole), _) = plan_searches([short, long], ledger)
    ((alone,), _) = plan_searches([long], ledger)
    assert first.flops == pytest.approx(cell.cost.flops)
    assert first.naive_flops == pytest.approx(cell.cost.naive_flops)
    assert first.flops + whole.flops == pytest.approx(alone.flops)
    assert whole.evaluations == alone.evaluations == 1 + 5 + 4 + 3
    ((lazy,), _) = plan_searches([ask(strategy="accuracy", rescoring="lazy")], ledger)
    assert (lazy.evaluations, lazy.at_most) == (alone.evaluations, True)


def test_what_decides_between_sets_is_planned_where_no_search_asks_for_it(ask, lend) -> None:
    asked = [ask(strategy=name, remove=2) for name in ("cosine_oneshot", "last", "random")]
    _, (decides, test) = plan_searches(asked, lend().ledger)
    assert isinstance(decides.request, CellRequest)
    assert (decides.request.documents.part, decides.documents) == ("calibration", DOCUMENTS)
    assert decides.evaluations == 3, "the intact model and two sets, and no random one"
    _, (test,) = plan_searches(asked[1:], lend().ledger)
    assert isinstance(test.request, CellRequest)
    assert test.request.documents.part == "test"


def test_the_command_plans_a_file_of_searches(write: Callable[..., Path], tmp_path: Path) -> None:
    path = write(sample=4, test_sample=6, strategy=["accuracy", "random"])
    said = printed("plan", path, "--gflops=1", f"--results={tmp_path}/new")
    lines = said[said.index("search ") :].splitlines()
    table = [line.split() for line in lines]
    # 5 + 4 candidates and the intact model; two steps of it, and of three random draws.
    assert table[1][:8] == ["copa:", "accuracy,", "remove", "2", "copa", "4", "2", "10"]
    assert table[2][:9] == ["copa:", "random,", "remove", "2", "–", "0", "2", "0", "0.0"]
    assert table[3][:2] == ["copa:", "test"]
    assert said.index("2 searches, at least") < said.index("search "), "the time comes first"
    assert not (tmp_path / "new").exists()

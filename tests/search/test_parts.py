"""Searches for heads and experts, held against models from which they were really taken."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import printed, save_llama
from tests.helpers.mixtures import save_mixture, smaller
from tests.helpers.truth import layers_of, without_heads
from tracker.core.changes import Ablation, Change
from tracker.core.errors import ExperimentError
from tracker.core.prune_records import PruneRecord, PruneStep
from tracker.core.search_parts import SearchParts
from tracker.ledger.store import listed
from tracker.measuring.job import Options
from tracker.measuring.progress import Silent
from tracker.search.cells import Lender, OpenCell
from tracker.search.planning import DrawnScores
from tracker.search.request import SearchRequest, search_request
from tracker.search.scores import Scores, Set
from tracker.search.search import budget_of
from tracker.search.settings import BudgetOfParts
from tracker.search.strategies import OF_LAYERS, STRATEGIES, Search

from .conftest import SETTINGS, Truth

pytestmark = pytest.mark.usefixtures("one_thread")
GO, DOCUMENTS = 3, 4
UNITS = {"head": (4, 1), "kv_head": (2, 1), "expert": (4, 2)}
"""What goes → how many a layer has, and how many of them must stay."""


class PartsTruth(Truth):
    """The same of heads, or of experts."""

    def __init__(self, unit: str, request: Any) -> None:
        self.per_layer, self.stay = UNITS[unit]

        def changed(model: Any, removed: Set) -> Any:
            parts = [divmod(part, self.per_layer) for part in removed]
            gone = Ablation.of(*(Change(unit, (layer,), part=n) for layer, n in parts))
            return (
                smaller(model, "mixtral", gone) if unit == "expert" else without_heads(model, gone)
            )

        super().__init__(request, changed)
        self.all = range(self.per_layer * len(layers_of(self.model)))

    def fits(self, removed: Set) -> bool:
        """Return whether enough parts of each layer remain."""
        layers = [part // self.per_layer for part in removed]
        return all(self.per_layer - layers.count(n) >= self.stay for n in set(layers))

    def candidates(self, removed: Set) -> Iterator[Set]:
        """Return each set with one more part of those that may be removed."""
        for part in self.all:
            more = tuple(sorted((*removed, part)))
            if part not in removed and self.fits(more):
                yield more


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("parts")
    llama = save_llama(folder / "llama", seed=3, layers=2, vocab_size=352)
    save_mixture(mixtral := folder / "mixtral", "mixtral")
    return {"head": llama, "kv_head": llama, "expert": mixtral}


Ask = Callable[..., SearchRequest]


@pytest.fixture(scope="module")
def ask_for(models: dict[str, Path]) -> Ask:
    """Make a request for a search of a unit."""

    def make(unit: str, **more: Any) -> SearchRequest:
        said = {**SETTINGS, "sample": DOCUMENTS, "test_sample": DOCUMENTS, "remove": GO}
        said |= {"model": str(models[unit]), "unit": unit, "strategy": "accuracy"}
        return search_request(said | more)

    return make


@pytest.fixture(scope="module", params=UNITS)
def unit(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def truth(unit: str, ask_for: Ask, one_thread: None) -> PartsTruth:
    return PartsTruth(unit, ask_for(unit).calibration()[0])


@pytest.fixture(scope="module")
def lender(results: Path) -> Lender:
    from tracker.ledger.store import Ledger

    return Lender(Ledger(results), Options("cpu"), Silent())


def run(lender: Lender, asked: SearchRequest) -> list[PruneStep]:
    within = budget_of(asked, lender)
    cell = OpenCell(asked.calibration()[0], lender)
    scores = Scores([cell], within.parts_of(asked.unit))
    given = Search(scores, within, asked.cell.documents.seed, rescoring=asked.rescored)
    return list(STRATEGIES[asked.strategy](given))


@pytest.mark.parametrize("by", ["accuracy", "gold_logprob"])
def test_greedy_is_that_of_really_changed_models(unit, truth, ask_for, lender, by) -> None:
    removed: Set = ()
    count = 2 if unit == "kv_head" else GO
    for step in run(lender, ask_for(unit, strategy=by, remove=count)):
        order = sorted(truth.candidates(removed), key=lambda each: truth.key(by, each))
        assert step.removed == order[0]
        assert step.score is not None
        assert step.score == pytest.approx(truth.lost(by, order[0]), abs=1e-4)
        assert step.runner_up == (order[1] if len(order) > 1 else ())
        assert (step.layer,) == tuple(set(step.removed) - set(removed))
        removed = step.removed
    assert len(removed) == count


@pytest.mark.parametrize("by", ["accuracy", "gold_logprob"])
def test_one_shot_is_a_sort_that_leaves_each_layer_enough(unit, truth, ask_for, lender, by) -> None:
    """As many as may go: the smallest of all would take too many of some layer."""
    order = sorted(truth.candidates(()), key=lambda each: truth.key(by, each))
    most = 2 * (truth.per_layer - truth.stay)
    expected: list[int] = []
    for (part,) in order:
        if truth.fits((*expected, part)):
            expected.append(part)
    steps = run(lender, ask_for(unit, strategy=f"{by}_oneshot", remove=most))
    assert [step.layer for step in steps] == expected[:most]


PARTS = SearchParts("expert", 4, per_layer=3, there=(0, 2, 3), stay=2)
"""Of which one a layer may go; layer 1 has none."""


def naive(parts: SearchParts, fixed: frozenset[int], needed: int) -> list[set[int]]:
    """All sets that are enough, of parts that are there and may go, and leave each layer enough."""
    found = []
    for size in range(needed, len(parts.numbers) + 1):
        for some in combinations(parts.numbers, size):
            counts = [sum(part // parts.per_layer == n for part in some) for n in parts.there or ()]
            if not fixed & set(some) and max(counts) <= parts.per_layer - parts.stay:
                found.append(set(some))
    return found


@pytest.mark.parametrize("strategy", sorted(set(STRATEGIES) - set(OF_LAYERS)))
def test_no_layer_is_left_with_too_few_whatever_chooses(strategy: str) -> None:
    lots = random.Random(5)
    for needed in (1, 2, 3):
        fixed = frozenset(lots.sample(PARTS.numbers, 2)) | set(PARTS.of_layers([1]))
        within = BudgetOfParts((1.0,) * PARTS.total, needed, fixed, parts=PARTS)
        possible = naive(PARTS, fixed, needed)
        assert within.reachable(()) == bool(possible)
        for size in range(needed):
            some = set(lots.sample(PARTS.numbers, size))
            leads = any(some <= end for end in possible)
            assert within.reachable(some) == leads
            if leads:
                rest = (part for part in PARTS.numbers if part not in some)
                expected = [p for p in rest if any({*some, p} <= end for end in possible)]
                assert within.left(some) == expected
        try:
            steps = list(STRATEGIES[strategy](Search(DrawnScores(PARTS), within)))
        except ExperimentError:
            assert strategy == "last"
            continue
        assert set(steps[-1].removed) in possible
        assert len(steps[-1].removed) == needed


def test_a_file_of_heads_is_planned_searched_kept_and_shown(write, prune, tmp_path) -> None:
    said = {"unit": "head", "protect": {"value": [0, "last"]}, "remove": 2, "sample": 4}
    said |= {"model": str(save_llama(tmp_path / "tiny", layers=3))}
    path = write(strategy=["gold_logprob_oneshot", "random"], draws=1, test_sample=4, **said)
    plan = printed("plan", path, "--gflops=1", f"--results={tmp_path}/new")
    assert "copa: gold_logprob_oneshot, remove 2 heads" in " ".join(plan.split())
    done = prune(path)
    assert done.exit_code == 0, done.output
    records = {r.strategy: r for r in listed(tmp_path / "results" / "searches", PruneRecord, {})}
    assert len(records) == 2
    for one in records.values():
        assert (one.per_layer, one.there, one.protected) == (4, 12, (0, 2))
        assert PruneRecord.model_validate_json(one.model_dump_json()) == one
        assert {one.parts.layer_of(part) for part in one.removed} == {1}
        assert set(one.kept) >= {0, 2}
    best = records["gold_logprob_oneshot"]
    names = ", ".join(f"{part // 4}.{part % 4}" for part in best.removed)
    assert best.names == names
    # The first head alone is a run, as any that is asked for.
    assert len(best.rests_on) == 1
    text = " ".join(done.output.split())
    assert f"it goes without heads {names} (2 of 12)" in text
    assert "no command saves it: tracker export takes whole layers out, and no heads" in text

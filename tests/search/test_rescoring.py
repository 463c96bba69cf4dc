"""Lazy searches and races, against what they leave out."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest

from tracker.analysis.stopping import QUESTION
from tracker.core.changes import INTACT
from tracker.core.extent import random_order
from tracker.core.questions import question
from tracker.search.cells import Lender, OpenCell
from tracker.search.request import SearchRequest
from tracker.search.scores import Scores, Set
from tracker.search.settings import Budget
from tracker.search.strategies import BATCH, STRATEGIES, Search
from tracker.stats.stopping import Race

from .conftest import LAYERS, WHOLE, Known


def chosen(known: Known, rescoring: str, count: int = 6) -> list[int | None]:
    search = known.search(count, rescoring=rescoring)
    return [step.layer for step in STRATEGIES["accuracy"](search)]


def redundant(each: Set) -> float:
    """Parts cost 1 to 20, and more beside a neighbour: costs only grow."""
    return sum((7 * n) % 20 + 1 for n in each) + 30.0 * sum(n + 1 in each for n in each)


def test_a_lazy_search_is_the_full_one_where_costs_only_grow() -> None:
    full, lazy = Known(redundant), Known(redundant)
    assert chosen(lazy, "lazy") == chosen(full, "full")
    asked = {each for call in lazy.calls for each in call}
    known = [set(itertools.chain(*lazy.calls[:n])) for n in range(len(lazy.calls))]
    new = [len(set(call) - before) for call, before in zip(lazy.calls, known, strict=True)]
    assert (new[0], max(new[1:])) == (20, BATCH)
    assert [len(call) for call in full.calls] == [20 - n for n in range(6)]
    assert len(asked) < sum(map(len, full.calls)) / 2


def test_a_lazy_search_overlooks_what_became_cheaper() -> None:
    """Its documented assumption is violated: part 19 costs nothing once part 0 is gone."""

    def cost(each: Set) -> float:
        return sum(n for n in each if not (n == 19 and 0 in each))

    assert chosen(Known(cost), "full", 2) == [0, 19]
    assert chosen(Known(cost), "lazy", 2) == [0, 1]


@pytest.fixture(scope="module")
def racing(
    ask: Callable[..., SearchRequest], lend: Callable[..., Lender], one_thread: None
) -> OpenCell:
    asked = ask(strategy="accuracy", remove=2, rescoring="race", sample=None)
    (request,) = asked.calibration()
    return OpenCell(request, lend())


def test_a_race_leaves_the_best_of_what_all_documents_say(racing: OpenCell) -> None:
    scores = Scores([racing], WHOLE)
    search = Search(scores, Budget((1.0,) * LAYERS, 2), rescoring="race")
    steps = list(STRATEGIES["accuracy"](search))
    removed: Set = ()
    full = Scores([racing], WHOLE)
    passes, evaluations, most = 0.0, 0.0, 0
    for step in steps:
        left = [n for n in range(LAYERS) if n not in removed]
        sets = [tuple(sorted((*removed, n))) for n in left]
        found = full.losses("accuracy", sets)
        # The same race over what all documents say of all candidates.
        numbers = racing.documents["copa"]
        places = [numbers.index(n) for n in _order(racing)]
        drops = found.values[places]
        race = Race(question(QUESTION), len(drops), len(sets))
        while not race.standing.answered and race.bounds.seen.max() < len(drops):
            at = int(race.bounds.seen.max())
            race.look(drops[at : at + 32])
        assert found.means[sets.index(step.removed)] <= found.means.min() + 0.01 + 1e-9
        evaluations += race.bounds.seen.sum() / len(drops)
        ends = sorted(set(race.bounds.seen.tolist()))
        for before, end in zip([0, *ends], ends, strict=False):
            still = [s for s, n in zip(sets, race.bounds.seen, strict=True) if n >= end]
            beneath = [scores.ablation(removed)] if removed else []
            some = [INTACT, *beneath, *map(scores.ablation, still)]
            passes += racing.passes(some) * (end - before) / len(drops)
        removed = step.removed
        most = max(most, int(race.bounds.seen.max()))
    cost = scores.cost()
    # What nobody looked at chose nothing.
    assert scores.looked_at(racing) == {"copa": tuple(sorted(_order(racing)[:most]))}
    assert cost.evaluations == pytest.approx(evaluations + 1)
    assert cost.passes == pytest.approx(passes)
    assert cost.seconds


def _order(cell: OpenCell) -> list[int]:
    """Return the random order of the race's documents."""
    return random_order(cell.request.documents.seed, "copa", cell.documents["copa"])


def test_several_benchmarks_count_alike(ask, lend, one_thread, tmp_path) -> None:
    """Their mean, and not that of all documents together."""
    lender = lend(tmp_path)
    sizes = {"copa": 8, "winogrande": 4}
    cells = []
    for benchmark, sample in sizes.items():
        asked = ask(strategy="accuracy", remove=2, benchmark=benchmark, sample=sample)
        cells.append(OpenCell(asked.calibration()[0], lender))
    both = Scores(cells, WHOLE)
    sets = [(n,) for n in range(LAYERS)]
    alone = [Scores([cell], WHOLE) for cell in cells]
    for by in ("accuracy", "gold_logprob"):
        found = both.losses(by, sets)
        assert found.values.shape == (12, LAYERS)
        means = [one.losses(by, sets).means for one in alone]
        assert found.means == pytest.approx(np.mean(means, axis=0))
    assert both.cost().evaluations == alone[0].cost().evaluations == 1 + LAYERS
    assert both.cost().passes == pytest.approx(alone[0].cost().passes)
    proxies = [one.proxy("cosine_score", (2,)).means for one in (both, *alone)]
    assert proxies[0] == pytest.approx((proxies[1] + proxies[2]) / 2)

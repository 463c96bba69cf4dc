"""Lazy searches and races, against what they leave out."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from tracker import api
from tracker.analysis.stopping import CANDIDATE_QUESTION
from tracker.schema.changes import INTACT
from tracker.schema.extent import random_order
from tracker.schema.questions import parse_question
from tracker.search.cells import OpenCell, engine_passes
from tracker.search.scores import PartSet, Scores
from tracker.search.settings import Budget
from tracker.search.strategies import LAZY_BATCH, STRATEGIES, Search
from tracker.stats.stopping import Race

from .conftest import LAYER_PARTS, LAYERS, KnownScores, stored_searches


def removed_layers(scores: KnownScores, rescoring: str, count: int = 6) -> list[int | None]:
    search = scores.search(count, rescoring=rescoring)
    return [step.layer for step in STRATEGIES["accuracy"](search)]


def redundant_cost(part_set: PartSet) -> float:
    """Parts cost 1 to 20, and more beside a neighbour: costs only grow."""
    return sum((7 * n) % 20 + 1 for n in part_set) + 30.0 * sum(n + 1 in part_set for n in part_set)


def test_lazy_equals_full_if_costs_only_grow() -> None:
    full_run, lazy = KnownScores(redundant_cost), KnownScores(redundant_cost)
    assert removed_layers(lazy, "lazy") == removed_layers(full_run, "full")
    scored_sets = {part_set for call in lazy.calls for part_set in call}
    old_sets = [set(itertools.chain(*lazy.calls[:n])) for n in range(len(lazy.calls))]
    n_new = [len(set(call) - old) for call, old in zip(lazy.calls, old_sets, strict=True)]
    assert (n_new[0], max(n_new[1:])) == (20, LAZY_BATCH)
    assert [len(call) for call in full_run.calls] == [20 - n for n in range(6)]
    assert len(scored_sets) < sum(map(len, full_run.calls)) / 2


def test_lazy_search_misses_layers_that_become_cheaper() -> None:
    """Its documented assumption is violated: part 19 costs nothing once part 0 is gone."""

    def cost(part_set: PartSet) -> float:
        return sum(n for n in part_set if not (n == 19 and 0 in part_set))

    assert removed_layers(KnownScores(cost), "full", 2) == [0, 19]
    assert removed_layers(KnownScores(cost), "lazy", 2) == [0, 1]


@pytest.fixture(scope="module")
def race_cell(ask, make_cache, one_thread) -> OpenCell:
    search_request = ask(strategy="accuracy", remove=2, rescoring="race", sample=None)
    (request,) = search_request.calibration()
    return OpenCell(request, make_cache())


def test_race_agrees_with_all_documents(race_cell: OpenCell) -> None:
    scores = Scores([race_cell], LAYER_PARTS)
    search = Search(scores, Budget((1.0,) * LAYERS, 2, parts=LAYER_PARTS), rescoring="race")
    steps = list(STRATEGIES["accuracy"](search))
    removed: PartSet = ()
    full_scores = Scores([race_cell], LAYER_PARTS)
    passes, evaluations, max_seen = 0.0, 0.0, 0
    for step in steps:
        candidates = [n for n in range(LAYERS) if n not in removed]
        sets = [tuple(sorted((*removed, n))) for n in candidates]
        all_losses = full_scores.losses("accuracy", sets)
        # The same race over what all documents say of all candidates.
        numbers = race_cell.documents["copa"]
        positions = [numbers.index(n) for n in _order(race_cell)]
        drops = all_losses.values[positions]
        race = Race(parse_question(CANDIDATE_QUESTION), len(drops), len(sets))
        while not race.is_answered and race.bounds.seen.max() < len(drops):
            start = int(race.bounds.seen.max())
            race.update(drops[start : start + 32])
        assert all_losses.means[sets.index(step.removed)] <= all_losses.means.min() + 0.01 + 1e-9
        evaluations += race.bounds.seen.sum() / len(drops)
        ends = sorted(set(race.bounds.seen.tolist()))
        for begin, end in zip([0, *ends], ends, strict=False):
            open_sets = [s for s, n in zip(sets, race.bounds.seen, strict=True) if n >= end]
            removed_before = [scores.ablation(removed)] if removed else []
            computed = [INTACT, *removed_before, *map(scores.ablation, open_sets)]
            passes += engine_passes(computed, LAYERS) * (end - begin) / len(drops)
        removed = step.removed
        max_seen = max(max_seen, int(race.bounds.seen.max()))
    cost = scores.cost()
    # What nobody looked at chose nothing.
    seen = tuple(sorted(_order(race_cell)[:max_seen]))
    assert scores.choosing_documents(race_cell) == {"copa": seen}
    assert cost.evaluations == pytest.approx(evaluations + 1)
    assert cost.passes == pytest.approx(passes)
    assert cost.seconds


def _order(cell: OpenCell) -> list[int]:
    """Return the random order of the race's documents."""
    return random_order(cell.request.documents.seed, "copa", cell.documents["copa"])


def test_benchmarks_have_equal_weights(ask, make_cache, one_thread, tmp_path) -> None:
    """Their mean, and not that of all documents together."""
    cache = make_cache(tmp_path)
    sizes = {"copa": 8, "winogrande": 4}
    cells = []
    for benchmark, sample in sizes.items():
        request = ask(strategy="accuracy", remove=2, benchmark=benchmark, sample=sample)
        cells.append(OpenCell(request.calibration()[0], cache))
    joint = Scores(cells, LAYER_PARTS)
    sets = [(n,) for n in range(LAYERS)]
    singles = [Scores([cell], LAYER_PARTS) for cell in cells]
    for by in ("accuracy", "gold_logprob"):
        joint_losses = joint.losses(by, sets)
        assert joint_losses.values.shape == (12, LAYERS)
        means = [scores.losses(by, sets).means for scores in singles]
        assert joint_losses.means == pytest.approx(np.mean(means, axis=0))
    assert joint.cost().evaluations == singles[0].cost().evaluations == 1 + LAYERS
    assert joint.cost().passes == pytest.approx(singles[0].cost().passes)
    proxies = [scores.proxy("cosine_score", (2,)).means for scores in (joint, *singles)]
    assert proxies[0] == pytest.approx((proxies[1] + proxies[2]) / 2)


@pytest.mark.parametrize("rescoring", ["full", "race"])
def test_a_search_by_choice_probability(write, prune, tmp_path, rescoring):
    sample = {"sample": None} if rescoring == "race" else {}
    path = write(strategy="accuracy", metric="choice_probability", rescoring=rescoring, **sample)
    result = prune(path)
    assert result.exit_code == 0, result.output
    (record,) = stored_searches(tmp_path)
    assert record.metric == "choice_probability"
    assert "test choice probability" in result.output
    assert "test accuracy" not in result.output
    (step, *_) = record.steps
    (cell,) = (c for c in api.ls(tmp_path / "results") if step.layer in c.runs_of_kind())
    assert step.test.level.value == cell.runs_of_kind()[step.layer].metrics["choice_probability"]

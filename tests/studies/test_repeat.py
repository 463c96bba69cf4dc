"""Test findings on repeated spans against the ledger, and against chance."""

from __future__ import annotations

import itertools
import shlex
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from tracker import api
from tracker.cli.pruning import export as exporting
from tracker.core.changes import Change
from tracker.core.extent import Extent
from tracker.export.changes import count_choosing, tried_repetition
from tracker.ledger.outcomes import METRIC
from tracker.ledger.store import Ledger
from tracker.stats.effects import best_by_chance
from tracker.studies import repeat
from tracker.studies.repeat import TESTED, all_spans

from .conftest import Small, column, plain, small


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> Small:
    return small("repeat", tmp_path_factory.mktemp("repeat"), ["copa"], 24)


def _frames(results: Path) -> dict[str, pd.DataFrame]:
    return {
        store.identity.benchmark.settings["part"]: store.read() for store in Ledger(results).cells()
    }


def test_the_best_is_chosen_on_one_half_and_tested_on_the_other(found):
    frames = _frames(found.results)
    gains = {}
    for part, frame in frames.items():
        pairs = zip(frame["loglikelihoods"], frame["gold"], strict=True)
        frame["gold_logprob"] = [answers[int(gold)] for answers, gold in pairs]
        means = frame.groupby("ablation")[[f"{METRIC}acc", "gold_logprob"]].mean()
        gains[part] = means - means.loc["baseline"]
    # All ten stretches of four layers chose; those that gained most were tested, and no other.
    chose = gains["calibration"].drop("baseline")
    assert len(chose) == 10
    order = chose.sort_values([f"{METRIC}acc", "gold_logprob"], ascending=False).index
    assert set(frames["test"]["ablation"]) == {"baseline", *order[:TESTED]}
    documents = [set(zip(frame["task"], frame["doc"], strict=True)) for frame in frames.values()]
    assert not documents[0] & documents[1]
    (table,) = found.finding.tables
    named = [
        f"layer {s[0]} twice" if len(s) == 1 else f"layers {s[0]} to {s[1]} twice"
        for s in (name.partition(":")[2].split("-") for name in order[:TESTED])
    ]
    assert plain(column(table, "passed")) == named
    for label, part in (
        ("gain where it was chosen", "calibration"),
        ("gain on test documents", "test"),
    ):
        expected = gains[part].loc[order[:TESTED], f"{METRIC}acc"]
        assert plain(column(table, label)) == pytest.approx([*expected])
    (answer,) = found.finding.answers
    assert f"of 10 stretches the best on 24 calibration documents is {named[0]}" in answer
    assert "By chance alone the best of so many would be" in answer
    assert "On 24 test documents it is worth" in answer


def test_the_best_that_is_shown_to_be_better_is_saved_by_what_it_says_to_type(
    found, tmp_path, monkeypatch
):
    """The suggested command tests the span on the test documents; here spans of the file."""
    assert found.done.exports == (), "of a random model none is shown to be better"
    verdicts = ("costs", "helps", "helps")
    monkeypatch.setattr(
        repeat,
        "shown_runs",
        lambda cell, runs: {run.change: word for run, word in zip(runs, verdicts, strict=True)},
    )
    settings = {"span": 2, "intervention": "repeat", "repeats": 3, "layer": [0, 1, 2]}
    results = tmp_path / "results"
    asked = api.study("repeat", found.path, results=results, track=[], **settings)
    assert "of 3 stretches" in asked.finding.answers[0]
    assert "3 times" in asked.finding.answers[0]
    (line,) = asked.exports
    (table,) = asked.finding.tables
    best = plain(column(table, "passed"))[1]
    first, last = (int(word) for word in best.split() if word.isdigit() and word != "3")
    words = shlex.split(line)
    assert words[:2] == ["tracker", "export"]
    given = exporting.make_context("export", words[2:]).params
    assert (given["repeat"], given["repeats"]) == (tuple(range(first, last + 1)), 3)
    assert (given["part"], given["sample"], given["results"]) == ("test", 24, results)
    assert str(given["output"]) == "deeper"
    # Another question stands beside it, and each says on what it rests.
    monkeypatch.undo()
    settings |= {"seed": 14, "sample": 12}
    beside = api.study("repeat", found.path, results=results, track=[], **settings)
    measured = {record.place for record in api.ls(results)}
    assert {*asked.finding.rests_on, *beside.finding.rests_on} == measured


def test_documents_that_may_have_chosen_a_stretch_are_known_when_it_is_saved(found):
    ledger = Ledger(found.results)
    stores = {store.identity.benchmark.settings["part"]: store for store in ledger.cells()}
    model = stores["test"].identity.model
    known = tried_repetition(ledger, model, Change.parse("repeat:1-2"))
    assert known.calibration == "24 documents of copa (calibration)"
    asked = Extent(sample=24)
    chose = {part: count_choosing(ledger, known, store, asked) for part, store in stores.items()}
    assert chose == {"calibration": 24, "test": 0}
    assert tried_repetition(ledger, model, Change.parse("repeat3:1-2")).documents == (), "nobody"


def test_stretches_are_all_neighbours_among_some_layers():
    asked = all_spans([0, 1, 2, 5])
    spans = ("0", "0-1", "0-2", "1", "1-2", "2", "5")
    assert [*map(str, asked)] == [f"repeat:{span}" for span in spans]
    assert len(all_spans(range(30))) == 465


def test_the_best_by_chance_is_that_of_all_signs():
    draw = np.random.default_rng(3)
    gains = draw.integers(-1, 2, (10, 6)).astype(float)
    weights = draw.random(10)
    weights /= weights.sum()
    every = [
        (np.array(signs) @ (gains * weights[:, None])).max()
        for signs in itertools.product((-1.0, 1.0), repeat=10)
    ]
    found = best_by_chance(gains, weights)
    assert found.middle == pytest.approx(np.median(every), abs=0.02)
    assert found.high == pytest.approx(np.quantile(every, 0.95), abs=0.02)
    best = (gains * weights[:, None]).sum(0).max()
    assert found.p_value == pytest.approx(np.mean(np.array(every) >= best - 1e-12), abs=0.04)


def test_where_nothing_is_gained_the_best_is_seldom_called_more_than_chance():
    draw = np.random.default_rng(0)
    called = 0
    for seed in range(200):
        gains = draw.integers(-1, 2, (60, 40)).astype(float)
        called += best_by_chance(gains, seed=seed).p_value <= 0.05
    assert called <= 20  # 5 % of 200, and three standard deviations

"""Rescale over a tiny model: what it says follows from the ledger, and what lacks is said."""

from __future__ import annotations

import re
from itertools import chain
from types import SimpleNamespace

import numpy as np
import pytest
from click.testing import CliRunner

from tracker import api
from tracker.cli import main
from tracker.ledger.outcomes import METRIC_PREFIX
from tracker.schema.config import cell_request
from tracker.schema.formats import ACCURACY_FORMAT, MetricFormat
from tracker.studies import rescale as module
from tracker.studies.base import open_study
from tracker.studies.rescale import (
    REPLACEMENTS,
    STAND_INS,
    CellCosts,
    LayerDrops,
    significance_table,
)

from .conftest import cell_stores, conduct_study, plain_values

RESCALE_SETTINGS = {"benchmark": ["copa"], "limit": None, "sample": 24, "layer": [1, 2]}


def test_what_is_won_back_follows_from_the_ledger(tiny_llama, experiment, tmp_path):
    path = experiment(tiny_llama(), **RESCALE_SETTINGS)
    results = tmp_path / "results"
    study = api.study("rescale", path, results=results, track=[])
    assert study.outcome.exit_code == 0
    summary, significant, per_layer = study.finding.tables
    (store,) = cell_stores(path, results)
    frame = store.read()
    names = {"remove": "layer"} | {name: name for name in REPLACEMENTS}
    ablations = {kind: [f"{name}:{layer}" for layer in (1, 2)] for kind, name in names.items()}
    assert set(frame["ablation"]) == {"baseline", *chain(*ablations.values())}
    means = frame.groupby("ablation")[f"{METRIC_PREFIX}acc"].mean()
    drops = {kind: means["baseline"] - means[runs].to_numpy() for kind, runs in ablations.items()}
    for index, row in enumerate(per_layer.rows):
        expected = [drops[kind][index] for kind in STAND_INS]
        assert [entry.value for entry in row[1:]] == pytest.approx(expected)
    ((name, n, mean, *shares, fitted_on),) = summary.rows
    assert "copa" in name
    assert n.value == 24
    assert mean.value == pytest.approx(drops["remove"].mean())
    for kind, entry in zip(REPLACEMENTS, shares, strict=False):
        if entry.value is None:
            assert entry.reason == "the sum of the drops is not significantly above 0"
        else:
            assert entry.value == pytest.approx(1 - drops[kind].sum() / drops["remove"].sum())
    assert [row[1].value for row in significant.rows] == [2, 2, 2]
    assert "documents in the random order; none of these documents are also" in fitted_on
    assert fitted_on in {record.fitted_on for record in api.ls(results)}
    assert study.finding.question in (results / "report.html").read_text()
    # Another week: nothing is measured twice, and the answer is the same.
    repeated = api.study("rescale", path, results=results, track=[])
    assert repeated.outcome.models_loaded == 0
    assert repeated.finding == study.finding


def test_a_linear_map_that_cannot_be_fitted(tiny_llama, experiment, tmp_path, monkeypatch):
    """The rest is measured all the same."""
    monkeypatch.setattr("tracker.measuring.calibrate.MIN_TOKENS_PER_DIM", 10**6)
    path = experiment(tiny_llama(), **RESCALE_SETTINGS)
    results = tmp_path / "results"
    arguments = [str(path), "--results", str(results), "--track", "none"]
    result = CliRunner().invoke(main, ["study", "rescale", *arguments])
    assert result.exit_code == 1
    assert "a linear map of 32 dimensions needs 32,000,000" in result.output
    assert "leave 'linear' out of 'intervention'" in result.output
    assert module.Rescale.question in result.stdout
    assert "not measured; for the reason, see the list" in (results / "report.html").read_text()


def test_a_corpus_has_no_outcomes_to_test(tiny_llama, experiment, tmp_path):
    text = tmp_path / "text.txt"
    sentence = 3 * "The heart is a muscle, Paris is a capital, and water is wet. "
    text.write_text(f"{sentence}It flows on.\n")
    corpus = {"benchmark": [f"corpus:{text}"], "data": None, "limit": None, "metric": "loss"}
    path = experiment(tiny_llama(), layer=[1, 2], **corpus)
    finding = conduct_study("rescale", path, tmp_path / "results")
    sentence = r"A layer costs \S+ nats a token \(\S+ to \S+\) when it is removed, "
    assert re.match(sentence, finding.answers[0])
    row = finding.tables[1].rows[0]
    assert plain_values(row) == ["a factor", 0, None, None]
    (fitted_on,) = (row[-1] for row in finding.tables[0].rows)
    assert re.search(
        "of the last 1 documents in the random order; 1 of these documents are also measured",
        fitted_on,
    )


BITS = MetricFormat("loss", "loss increase", "bits per byte", "bits per byte", "score", "score")


def cell_costs(
    measure: MetricFormat = ACCURACY_FORMAT, scale: float = 0.1, p: float | None = 0.001
) -> CellCosts:
    """Build a cell of three layers whose removal costs 2 × `scale` on average, a factor 1.6, …."""
    means = scale * np.outer((1, 0.8, 0.6, 0.3), (1, 2, 3))
    drops = {n: LayerDrops(m, np.tile(m, (100, 1))) for n, m in zip(STAND_INS, means, strict=True)}
    p_values = {name: [p] * 3 for name in REPLACEMENTS}
    return CellCosts("a cell", 50, (0, 1, 2), measure, "some text", drops, drops, p_values)


def test_bits_and_fractions_have_no_sum(monkeypatch):
    cells = [cell_costs(), cell_costs(BITS, 1.15, None), cell_costs(scale=0.3)]
    requests = [cell_request(model=f"m{n}", benchmark="b", layers=(0,)) for n in range(3)]
    subjects = [SimpleNamespace(request=request) for request in requests]
    monkeypatch.setattr(module, "measure_costs", lambda group: cells[subjects.index(group[0])])
    result = open_study("rescale").answer(None, subjects)
    sentence = "By accuracy in pp: A layer costs 40.0 pp (40.0 to 40.0) when"
    assert result.answers[0].startswith(sentence)
    sentence = "By loss in bits per byte: A layer costs 2.300 bits per byte (2.300 to 2.300) when"
    assert sentence in result.answers[5]
    assert [len(table.rows) for table in result.tables[:2]] == [2, 1]


def test_a_test_that_was_not_made_shows_nothing_and_costs_nothing():
    """Each p of 0.012 is significant among three tests, and would not be among six."""
    row = significance_table([cell_costs(p=0.012), cell_costs(BITS, p=None)]).rows[0]
    assert [entry.value for entry in row[1:]] == [3, 3, 0]
    row = significance_table([cell_costs(BITS, p=None)]).rows[0]
    assert [entry.value for entry in row[1:]] == [0, None, None]
    assert "needs outcomes that are right or wrong" in row[2].reason

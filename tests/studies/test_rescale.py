"""Rescale over a tiny model: what it says follows from the ledger, and what lacks is said."""

from __future__ import annotations

import re
from types import SimpleNamespace

import numpy as np
import pytest
from click.testing import CliRunner

from tracker import api
from tracker.cli import main
from tracker.core.config import cell_request
from tracker.core.formats import ACCURACY, Measure
from tracker.ledger.outcomes import METRIC
from tracker.studies import rescale as module
from tracker.studies.base import open_study
from tracker.studies.rescale import NAMES, REPLACEMENTS, Costs, Drops, significance_table

from .conftest import conducted, plain, stores

ASKED = {"benchmark": ["copa"], "limit": None, "sample": 24, "layer": [1, 2]}


def test_what_is_won_back_follows_from_the_ledger(tiny_llama, experiment, tmp_path):
    path = experiment(tiny_llama(), **ASKED)
    results = tmp_path / "results"
    done = api.study("rescale", path, results=results, track=[])
    assert done.outcome.exit_code == 0
    summary, significant, per_layer = done.finding.tables
    (store,) = stores(path, results)
    frame = store.read()
    names = {"remove": "layer"} | {way: way for way in REPLACEMENTS}
    ablations = {way: [f"{name}:{layer}" for layer in (1, 2)] for way, name in names.items()}
    assert set(frame["ablation"]) == {"baseline", *(n for some in ablations.values() for n in some)}
    means = frame.groupby("ablation")[f"{METRIC}acc"].mean()
    drops = {way: means["baseline"] - means[some].to_numpy() for way, some in ablations.items()}
    for place, row in enumerate(per_layer.rows):
        found = [entry.value for entry in row[1:]]
        assert found == pytest.approx([drops[way][place] for way in NAMES])
    ((name, n, mean, *shares, fitted_on),) = summary.rows
    assert "copa" in name
    assert n.value == 24
    assert mean.value == pytest.approx(drops["remove"].mean())
    for way, entry in zip(REPLACEMENTS, shares, strict=False):
        if entry.value is None:
            assert entry.reason == "removals cost nothing here that these documents could show"
        else:
            assert entry.value == pytest.approx(1 - drops[way].sum() / drops["remove"].sum())
    assert [row[1].value for row in significant.rows] == [2, 2, 2]
    assert "documents from the end of the random order, none of them measured" in fitted_on
    assert fitted_on in {record.fitted_on for record in api.ls(results)}
    assert done.finding.question in (results / "report.html").read_text()
    # Another week: nothing is measured twice, and the answer is the same.
    again = api.study("rescale", path, results=results, track=[])
    assert again.outcome.models_loaded == 0
    assert again.finding == done.finding


def test_a_linear_map_that_cannot_be_fitted_leaves_the_rest_alone(
    tiny_llama, experiment, tmp_path, monkeypatch
):
    monkeypatch.setattr("tracker.measuring.calibrate.LEAST", 10**6)
    path = experiment(tiny_llama(), **ASKED)
    results = tmp_path / "results"
    arguments = [str(path), "--results", str(results), "--track", "none"]
    done = CliRunner().invoke(main, ["study", "rescale", *arguments])
    assert done.exit_code == 1
    assert "a linear map of 32 dimensions needs 32,000,000" in done.output
    assert "leave 'linear' out of 'intervention'" in done.output
    assert "Is what a removal costs only missing scale?" in done.stdout
    assert "not measured; what is lacking says why" in (results / "report.html").read_text()


def test_a_corpus_has_no_outcomes_to_test(tiny_llama, experiment, tmp_path):
    text = tmp_path / "text.txt"
    said = 3 * "The heart is a muscle, Paris is a capital, and water is wet. "
    text.write_text(f"{said}It flows on.\n")
    corpus = {"benchmark": [f"corpus:{text}"], "data": None, "limit": None, "metric": "loss"}
    path = experiment(tiny_llama(), layer=[1, 2], **corpus)
    found = conducted("rescale", path, tmp_path / "results")
    said = r"A layer costs \S+ nats a token \(\S+ to \S+\) when it is removed, "
    assert re.match(said, found.answers[0])
    row = found.tables[1].rows[0]
    assert plain(row) == ["a factor", 0, None, None]
    (fitted_on,) = (row[-1] for row in found.tables[0].rows)
    assert re.search("of 1 documents from .*, 1 of them among those measured", fitted_on)


BITS = Measure("loss", "loss increase", "bits per byte", "bits per byte", "score", "score")


def costs(measure: Measure = ACCURACY, scale: float = 0.1, p: float | None = 0.001) -> Costs:
    """Build a cell of three layers whose removal costs 2 × `scale` on average, a factor 1.6, …."""
    drops = {}
    for way, share in zip(NAMES, (1, 0.8, 0.6, 0.3), strict=True):
        mean = scale * np.array([1.0, 2, 3]) * share
        drops[way] = Drops(mean, np.tile(mean, (100, 1)))
    better = {way: [p] * 3 for way in REPLACEMENTS}
    return Costs("a cell", 50, (0, 1, 2), measure, "some text", drops, drops, better)


def test_bits_and_fractions_have_no_sum(monkeypatch):
    cells = [costs(), costs(BITS, 1.15, None), costs(scale=0.3)]
    requests = [cell_request(model=f"m{n}", benchmark="b", layers=(0,)) for n in range(3)]
    subjects = [SimpleNamespace(request=request) for request in requests]
    monkeypatch.setattr(module, "costs", lambda mine: cells[subjects.index(mine[0])])
    said = open_study("rescale").answer(None, subjects)
    assert said.answers[0].startswith(
        "By accuracy in pp: A layer costs 40.0 pp (40.0 to 40.0) when"
    )
    assert (
        "By loss in bits per byte: A layer costs 2.300 bits per byte (2.300 to 2.300) when"
        in said.answers[5]
    )
    assert [len(table.rows) for table in said.tables[:2]] == [2, 1]


def test_a_test_that_was_not_made_shows_nothing_and_costs_nothing():
    """Each p of 0.012 is significant among three tests, and would not be among six."""
    row = significance_table([costs(p=0.012), costs(BITS, p=None)]).rows[0]
    assert [entry.value for entry in row[1:]] == [3, 3, 0]
    row = significance_table([costs(BITS, p=None)]).rows[0]
    assert [entry.value for entry in row[1:]] == [0, None, None]
    assert "outcomes that are right or wrong" in row[2].reason

"""Rescale over a tiny model: what it says follows from the ledger, and what lacks is said."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from tracker import api
from tracker.cli import main
from tracker.ledger.outcomes import METRIC
from tracker.studies.rescale.figures import WAYS

from .conftest import stores


def test_what_is_won_back_follows_from_the_ledger(tiny_llama, experiment, tmp_path: Path):
    path = experiment(tiny_llama(), limit=None, sample=24, layer=[1, 2])
    done = api.study("rescale", path, results=tmp_path / "results", track=[])
    assert done.outcome.exit_code == 0
    summary, significant, per_layer = done.finding.tables
    (store,) = stores(path, tmp_path / "results")
    frame = store.read()
    wanted = {f"{way}:{layer}" for way in (*WAYS, "layer") for layer in (1, 2)} | {"baseline"}
    assert set(frame["ablation"]) == wanted
    means = frame.groupby("ablation")[f"{METRIC}acc"].mean()
    drops = {
        way: means["baseline"] - np.array([means[f"{way}:{layer}"] for layer in (1, 2)])
        for way in (*WAYS, "layer")
    }
    for place, row in enumerate(per_layer.rows):
        found = [entry.value for entry in row[1:]]
        assert found == pytest.approx([drops[way][place] for way in ("layer", *WAYS)])
    ((name, n, mean, *shares),) = summary.rows
    assert "arc_easy" in name.value
    assert n.value == 24
    assert mean.value == pytest.approx(drops["layer"].mean())
    for way, entry in zip(WAYS, shares, strict=False):
        if entry.value is None:
            assert entry.reason == "removals cost nothing here that these documents could show"
        else:
            assert entry.value == pytest.approx(1 - drops[way].sum() / drops["layer"].sum())
    assert [row[1].value for row in significant.rows] == [2, 2, 2]
    fitted = [r.fitted_on for r in api.ls(tmp_path / "results") if r.fitted_on]
    assert fitted
    assert "documents from the end of the random order, none of them measured" in fitted[0]
    page = (tmp_path / "results" / "report.html").read_text()
    assert "Is what a removal costs only missing scale?" in page
    # Another week: nothing is measured twice, and the answer is the same.
    again = api.study("rescale", path, results=tmp_path / "results", track=[])
    assert again.outcome.models_loaded == 0
    assert again.finding == done.finding


def test_a_linear_map_that_cannot_be_fitted_leaves_the_rest_alone(
    tiny_llama, experiment, tmp_path: Path, monkeypatch
):
    monkeypatch.setattr("tracker.measuring.calibrate.LEAST", 10**6)
    path = experiment(tiny_llama(), limit=6, layer=[1])
    arguments = [str(path), "--results", str(tmp_path / "results"), "--track", "none"]
    done = CliRunner().invoke(main, ["study", "rescale", *arguments])
    assert done.exit_code == 1
    assert "a linear map of 32 dimensions needs 32,000,000" in done.output
    assert "leave 'linear' out of 'intervention'" in done.output
    assert "Is what a removal costs only missing scale?" in done.stdout

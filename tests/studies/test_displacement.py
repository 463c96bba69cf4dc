"""Displacement over a tiny model: its figures follow from the ledger."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import spearmanr

from tracker import api
from tracker.ledger.outcomes import METRIC_PREFIX

from .conftest import cell_stores

SETTINGS = {"benchmark": ["openbookqa"], "limit": None, "sample": 24, "layer": [0, 1, 2, 3]}
COMPONENTS = ["layer", "attention", "mlp"]


def test_agreements_follow_from_the_ledger(tiny_llama, experiment, tmp_path):
    path = experiment(tiny_llama(), component=COMPONENTS, **SETTINGS)
    results = tmp_path / "results"
    study = api.study("displacement", path, results=results, track=[])
    assert study.outcome.exit_code == 0
    (table,), (answer,) = study.finding.tables, study.finding.answers
    (store,) = cell_stores(path, results)
    frame = store.read()
    means = frame.groupby("ablation")[f"{METRIC_PREFIX}acc_norm"].mean()
    (record,) = api.ls(results)
    kl = np.array([run.kl_divergence for run in record.runs])
    drops = np.array([means["baseline"] - means[run.ablation] for run in record.runs])
    choices = np.array([run.choice_drop.value for run in record.runs])
    assert len(kl) == 12
    is_small = kl < np.sort(kl)[6]
    for row, mask in zip(table.rows, (is_small | True, is_small, ~is_small), strict=True):
        name, count, mean_kl, drop, choice, _ = row
        assert count.value == mask.sum(), name
        assert mean_kl.value == pytest.approx(kl[mask].mean())
        for entry, costs in ((drop, drops), (choice, choices)):
            expected = spearmanr(kl[mask], costs[mask]).statistic
            assert entry.value == pytest.approx(expected)
            assert entry.low <= entry.value <= entry.high
    assert answer.count("The difference of the two is ") == 2
    # Another week: nothing is measured or observed twice, and the answer is the same.
    repeated = api.study("displacement", path, results=results, track=[])
    assert repeated.outcome.models_loaded == 0
    assert repeated.finding == study.finding

"""Test rankings by samples against plain sampling of the ledger, and refused requests."""

from __future__ import annotations

import warnings
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from tracker.schema.findings import FindingRecord
from tracker.schema.tables import Entry
from tracker.stats.reliability import spearman_brown, stratified_orders
from tracker.stats.resampling import SEED
from tracker.studies.calibration import (
    HALVES_DISAGREE,
    SAMPLE_PAIRS,
    AgreementCurve,
    LayerRanking,
    adjust_curves,
    agreement_curve,
    agreement_table,
    needed_table,
)

from .conftest import SmallStudy, cell_stores, conduct_small, conduct_study, plain_values

N = 30
TITLE = "tiny · arc_easy · 0-shot"


def _read_outcomes(study: SmallStudy) -> list[pd.DataFrame]:
    """Return the ledger's rows of each cell of a file."""
    return [store.read() for store in cell_stores(study.path, study.results)]


def _read_drops(rows: pd.DataFrame) -> np.ndarray:
    acc = rows.pivot_table(index="doc", columns="ablation", values="metric/acc").sort_index()
    layers = [f"layer:{n}" for n in range(4)]
    return acc["baseline"].to_numpy()[:, None] - acc[layers].to_numpy()


def _read_cosines(rows: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    base = rows[rows["ablation"] == "baseline"].sort_values("doc")
    return -np.stack(base["cosine_similarity_sum"].to_list()), base["proxy_tokens"].to_numpy()


def _spearman(means: np.ndarray, other_means: np.ndarray) -> float:
    """Spearman's coefficient, NaN where one order is all ties."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", stats.ConstantInputWarning)
        return stats.spearmanr(np.round(means, 12), np.round(other_means, 12)).statistic


def _find_row(finding: FindingRecord, title: str, label: object) -> tuple[Entry, ...]:
    (table,) = (candidate for candidate in finding.tables if title in candidate.title)
    (row,) = (candidate for candidate in table.rows if plain_values(candidate[:1]) == [label])
    return row


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> SmallStudy:
    """Build a study of a tiny model on two benchmarks."""
    return conduct_small("calibration", tmp_path_factory.mktemp("study"), ["arc_easy", "copa"], N)


def test_agreement_is_that_of_plain_samples(measured):
    finding, drops = measured.finding, _read_drops(_read_outcomes(measured)[0])
    assert drops.shape == (N, 4)
    for n in (5, 10, 15):
        disjoint, part_whole, kendall, top = [], [], [], []
        for order in stratified_orders(np.zeros(N), SAMPLE_PAIRS, SEED):
            means, other_means = drops[order[:n]].mean(axis=0), drops[order[n : 2 * n]].mean(axis=0)
            disjoint.append(_spearman(means, other_means))
            part_whole.append(_spearman(means, drops.mean(axis=0)))
            pair = means, other_means
            kendall.append(stats.kendalltau(*(np.round(m, 12) for m in pair)).statistic)
            tops = [np.isclose(m, m.max()) for m in pair]
            top.append(np.prod([is_top / is_top.sum() for is_top in tops], axis=0).sum())
        row = _find_row(finding, TITLE, n)
        for entry, draws in ((row[1], disjoint), (row[3], part_whole), (row[4], kendall)):
            if np.isnan(draws).mean() > 0.5:
                assert entry.reason == "in most samples of this size, all layers have the same mean"
                continue
            assert entry.value == pytest.approx(np.nanmean(draws))
            assert entry.low == pytest.approx(np.nanquantile(draws, 0.025))
            assert entry.high == pytest.approx(np.nanquantile(draws, 0.975))
        assert row[5].value == pytest.approx(np.mean(top))
    assert row[3].value > row[1].value
    half, predicted = row[1], _find_row(finding, TITLE, 5)[2]
    if half.low > 0:
        assert predicted.value == pytest.approx(spearman_brown(half.value, 1 / 3))
    else:
        assert predicted.reason == HALVES_DISAGREE
    beyond = _find_row(finding, TITLE, 20)
    assert (beyond[1].value is None, beyond[3].value is None) == (True, False)


def test_a_proxy_counts_every_token_once(measured):
    finding = measured.finding
    sums, tokens = _read_cosines(_read_outcomes(measured)[0])
    draws = []
    for order in stratified_orders(np.zeros(N), SAMPLE_PAIRS, SEED):
        halves = [sums[docs].sum(axis=0) / tokens[docs].sum() for docs in (order[:15], order[15:])]
        draws.append(_spearman(*halves))
    rows = finding.tables[0].rows
    (row,) = (row for row in rows if "arc_easy" in row[0] and row[1] == "cosine score")
    assert row[3].value == pytest.approx(np.mean(draws))
    # A rank correlation of a proxy is high with few documents already.
    assert row[5].value <= 15
    assert row[6] == "measured"


def test_benchmarks_together_count_alike(measured):
    finding, drops = measured.finding, [_read_drops(rows) for rows in _read_outcomes(measured)]
    all_drops, strata = np.concatenate(drops), np.repeat(["0/arc_easy", "1/copa"], N)
    draws = []
    for order in stratified_orders(strata, SAMPLE_PAIRS, SEED):
        halves = order[:N], order[N:]
        assert all((docs < N).sum() == N // 2 for docs in halves)
        draws.append(_spearman(*(all_drops[docs].mean(axis=0) for docs in halves)))
    row = finding.tables[0].rows[0]
    assert row[0] == "tiny · mean of 2 benchmarks"
    assert row[2].value == 2 * N
    assert row[3].value == pytest.approx(np.nanmean(draws))
    assert finding.answers[0].startswith("With n = 20 documents of 2 benchmarks together")
    assert len(finding.answers) == 3


def _drawn_curve(loss_shares: np.ndarray, seed: int) -> AgreementCurve:
    """Layers that lose and win answers, each by its own share."""
    uniform = np.random.default_rng(seed).random((128, 30))
    values = np.where(uniform < loss_shares, 1.0, np.where(uniform < loss_shares + 0.06, -1.0, 0.0))
    ranking = LayerRanking("accuracy drop", values, np.full(128, 1 / 128), np.zeros(128))
    return agreement_curve(ranking, 0.9)


def test_of_pure_noise_no_number_of_documents_is_named(monkeypatch):
    """All layers are alike; in each of these sets two halves agree by 0.1 and more by luck."""
    monkeypatch.setattr("tracker.studies.calibration.SAMPLE_SIZES", (10, 20, 50))
    for seed in (0, 7, 10, 11, 17):
        curve = _drawn_curve(np.full(30, 0.06), seed)
        assert curve.agreement(64).value > 0.1
        assert curve.needed.value is None
        undefined = needed_table([("noise", curve)], 0.9).rows[0][4:]
        undefined += agreement_table("noise", curve).rows[0][2:3]
        assert {entry.reason for entry in undefined} == {HALVES_DISAGREE}


def test_of_layers_that_differ_a_number_is_named(monkeypatch):
    monkeypatch.setattr("tracker.studies.calibration.SAMPLE_SIZES", (10, 20, 50))
    curve = _drawn_curve(np.linspace(0.02, 0.3, 30), 0)
    assert curve.needed.low < curve.needed.value < curve.needed.high
    assert curve.predicted(128) == pytest.approx(spearman_brown(curve.agreement(64).value, 2))


def test_of_many_rankings_a_number_is_named_where_all_tests_together_allow_it(monkeypatch):
    """Was: each by itself, so that of several one was named by luck."""
    monkeypatch.setattr("tracker.studies.calibration.SAMPLE_SIZES", (10, 20, 50))
    curve = _drawn_curve(np.linspace(0.02, 0.3, 30), 0)
    lucky = replace(curve, p_value=0.03)
    assert adjust_curves([lucky])[0].needed == curve.needed
    reason = adjust_curves([lucky, lucky])[0].needed.reason
    assert reason == HALVES_DISAGREE


def test_a_drop_that_is_the_same_everywhere_ranks_nothing(tiny_llama, experiment, tmp_path):
    """Layers of weights near 0 do nothing, so no removal costs anything."""
    model = tiny_llama(initializer_range=1e-12, num_hidden_layers=3)
    path = experiment(model, layer=[0, 1, 2], limit=6)
    finding = conduct_study("calibration", path, tmp_path / "results")
    assert any(
        "drop: all 3 layers have the same mean value, so they have no ranking" in note
        for note in finding.lacking
    )
    assert finding.answers == ("Nothing could be ranked.",)

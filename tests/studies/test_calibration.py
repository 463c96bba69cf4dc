"""Test rankings by samples against plain sampling of the ledger, and refused requests."""

from __future__ import annotations

import warnings
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from tracker.core.findings import FindingRecord
from tracker.core.tables import Entry
from tracker.stats.reliability import spearman_brown, stratified_orders
from tracker.stats.resampling import SEED
from tracker.studies.calibration import (
    SAMPLE_PAIRS,
    Curve,
    Ranking,
    agreement_table,
    curve_of,
    judged,
    needed_table,
)

from .conftest import Small, conducted, plain, small, stores

N = 30


def _outcomes(measured: Small) -> list[pd.DataFrame]:
    """Return the ledger's rows of each cell of a file."""
    return [store.read() for store in stores(measured.path, measured.results)]


def _drops(rows: pd.DataFrame) -> np.ndarray:
    acc = rows.pivot_table(index="doc", columns="ablation", values="metric/acc").sort_index()
    layers = [f"layer:{n}" for n in range(4)]
    return acc["baseline"].to_numpy()[:, None] - acc[layers].to_numpy()


def _cosines(rows: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    base = rows[rows["ablation"] == "baseline"].sort_values("doc")
    return -np.stack(base["cosine_similarity_sum"].to_list()), base["proxy_tokens"].to_numpy()


def _plain(first: np.ndarray, second: np.ndarray) -> float:
    """Spearman's coefficient, NaN where one order is all ties."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", stats.ConstantInputWarning)
        return stats.spearmanr(np.round(first, 12), np.round(second, 12)).statistic


def _row(finding: FindingRecord, title: str, first: object) -> tuple[Entry, ...]:
    (table,) = (each for each in finding.tables if title in each.title)
    (row,) = (each for each in table.rows if plain(each[:1]) == [first])
    return row


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> Small:
    """Build a study of a tiny model on two benchmarks."""
    return small("calibration", tmp_path_factory.mktemp("study"), ["arc_easy", "copa"], N)


def test_agreement_is_that_of_plain_samples(measured):
    finding, drops = measured.finding, _drops(_outcomes(measured)[0])
    assert drops.shape == (N, 4)
    for n in (5, 10, 15):
        apart, within, kendall, top = [], [], [], []
        for order in stratified_orders(np.zeros(N), SAMPLE_PAIRS, SEED):
            one, other = drops[order[:n]].mean(axis=0), drops[order[n : 2 * n]].mean(axis=0)
            apart.append(_plain(one, other))
            within.append(_plain(one, drops.mean(axis=0)))
            kendall.append(stats.kendalltau(np.round(one, 12), np.round(other, 12)).statistic)
            mine, theirs = (np.isclose(each, each.max()) for each in (one, other))
            top.append((mine / mine.sum() * (theirs / theirs.sum())).sum())
        row = _row(finding, "tiny · arc_easy · 0-shot", n)
        for entry, drawn in zip((row[1], row[3], row[4]), (apart, within, kendall), strict=True):
            if np.isnan(drawn).mean() > 0.5:
                assert entry.reason == "in most samples of this size all layers are tied"
                continue
            assert entry.value == pytest.approx(np.nanmean(drawn))
            assert entry.low == pytest.approx(np.nanquantile(drawn, 0.025))
            assert entry.high == pytest.approx(np.nanquantile(drawn, 0.975))
        assert row[5].value == pytest.approx(np.mean(top))
    assert row[3].value > row[1].value
    half, predicted = row[1], _row(finding, "tiny · arc_easy · 0-shot", 5)[2]
    if half.low > 0:
        assert predicted.value == pytest.approx(spearman_brown(half.value, 1 / 3))
    else:
        assert predicted.reason == "two halves agree no surer than chance"
    beyond = _row(finding, "tiny · arc_easy · 0-shot", 20)
    assert (beyond[1].value is None, beyond[3].value is None) == (True, False)


def test_a_proxy_counts_every_token_once(measured):
    finding = measured.finding
    sums, tokens = _cosines(_outcomes(measured)[0])
    drawn = []
    for order in stratified_orders(np.zeros(N), SAMPLE_PAIRS, SEED):
        pair = [sums[docs].sum(axis=0) / tokens[docs].sum() for docs in (order[:15], order[15:])]
        drawn.append(_plain(*pair))
    (row,) = (
        row for row in finding.tables[0].rows if "arc_easy" in row[0] and row[1] == "cosine score"
    )
    assert row[3].value == pytest.approx(np.mean(drawn))
    # A rank correlation of a proxy is high with few documents already.
    assert row[5].value <= 15
    assert row[6] == "measured"


def test_benchmarks_together_count_alike(measured):
    finding, drops = measured.finding, [_drops(rows) for rows in _outcomes(measured)]
    both, strata = np.concatenate(drops), np.repeat(["0/arc_easy", "1/copa"], N)
    drawn = []
    for order in stratified_orders(strata, SAMPLE_PAIRS, SEED):
        halves = order[:N], order[N:]
        assert all((docs < N).sum() == N // 2 for docs in halves)
        drawn.append(_plain(*(both[docs].mean(axis=0) for docs in halves)))
    row = finding.tables[0].rows[0]
    assert row[0] == "tiny · mean of 2 benchmarks"
    assert row[2].value == 2 * N
    assert row[3].value == pytest.approx(np.nanmean(drawn))
    assert finding.answers[0].startswith("With n = 20 documents of 2 benchmarks together")
    assert len(finding.answers) == 3


def _curve(lost: np.ndarray, seed: int) -> Curve:
    """Layers that lose and win answers, each by its own share."""
    luck = np.random.default_rng(seed).random((128, 30))
    values = np.where(luck < lost, 1.0, np.where(luck < lost + 0.06, -1.0, 0.0))
    return curve_of(Ranking("accuracy drop", values, np.full(128, 1 / 128), np.zeros(128)), 0.9)


def test_of_pure_noise_no_number_of_documents_is_named(monkeypatch):
    """All layers are alike; in each of these sets two halves agree by 0.1 and more by luck."""
    monkeypatch.setattr("tracker.studies.calibration.SIZES", (10, 20, 50))
    for seed in (0, 7, 10, 11, 17):
        curve = _curve(np.full(30, 0.06), seed)
        assert curve.agreement(64).value > 0.1
        assert curve.needed.value is None
        undefined = needed_table([("noise", curve)], 0.9).rows[0][4:]
        undefined += agreement_table("noise", curve).rows[0][2:3]
        assert {entry.reason for entry in undefined} == {"two halves agree no surer than chance"}


def test_of_layers_that_differ_a_number_is_named(monkeypatch):
    monkeypatch.setattr("tracker.studies.calibration.SIZES", (10, 20, 50))
    curve = _curve(np.linspace(0.02, 0.3, 30), 0)
    assert curve.needed.low < curve.needed.value < curve.needed.high
    assert curve.predicted(128) == pytest.approx(spearman_brown(curve.agreement(64).value, 2))


def test_of_many_rankings_a_number_is_named_where_all_tests_together_allow_it(monkeypatch):
    """Was: each by itself, so that of several one was named by luck."""
    monkeypatch.setattr("tracker.studies.calibration.SIZES", (10, 20, 50))
    curve = _curve(np.linspace(0.02, 0.3, 30), 0)
    lucky = replace(curve, p_value=0.03)
    first, alone = judged([lucky, lucky])[0], judged([lucky])[0]
    assert alone.needed == curve.needed
    assert first.needed.reason == "two halves agree no surer than chance"


def test_a_drop_that_is_the_same_everywhere_ranks_nothing(tiny_llama, experiment, tmp_path):
    """Layers of weights near 0 do nothing, so no removal costs anything."""
    model = tiny_llama(initializer_range=1e-12, num_hidden_layers=3)
    path = experiment(model, layer=[0, 1, 2], limit=6)
    found = conducted("calibration", path, tmp_path / "results")
    assert any("accuracy drop: it is the same in all 3 layers" in each for each in found.lacking)
    assert found.answers == ("Nothing could be ranked.",)

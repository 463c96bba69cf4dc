from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from tracker.stats import resampling as module
from tracker.stats.resampling import (
    bias_corrected_interval,
    document_counts,
    jackknife_error,
    resampled_means,
)


def test_counts_draw_each_document_as_often_as_chance_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_CHUNK", 700)
    chunks = list(document_counts(7, 4050, seed=1))
    counts = np.concatenate(chunks)
    assert len(chunks) == 41
    assert counts.shape == (4050, 7)
    assert (counts.sum(axis=1) == 7).all()
    assert counts.mean(axis=0) == pytest.approx(np.ones(7), abs=0.06)
    # Each count is binomial(7, 1/7).
    observed = np.bincount(counts[:, 0].astype(int), minlength=8)[:5]
    expected = 4050 * stats.binom.pmf(np.arange(5), 7, 1 / 7)
    assert observed == pytest.approx(expected, abs=4 * np.sqrt(expected).max())


@pytest.mark.parametrize(
    ("strata", "together"),
    [
        ("babcbac", [[0, 2, 4], [1, 5], [3, 6]]),
        ("abcd", [[0, 1, 2, 3]]),  # an mmlu with one document of each task
        ("aabbcd", [[0, 1], [2, 3], [4, 5]]),
        ("aaabbc", [[0, 1, 2], [3, 4, 5]]),
        ("a", [[0]]),
    ],
)
def test_strata_keep_their_sizes(strata: str, together: list[list[int]]) -> None:
    """Those of one document vary together."""
    counts = np.concatenate(list(document_counts(len(strata), 200, 0, list(strata))))
    for members in together:
        assert (counts[:, members].sum(axis=1) == len(members)).all()
        assert len(members) == 1 or (counts[:, members].std(axis=0) > 0).all()


def test_means_are_the_means_of_the_drawn_documents() -> None:
    rng = np.random.default_rng(0)
    values, weights, strata = (
        rng.normal(size=(9, 2)),
        rng.uniform(size=9),
        np.arange(9) % 2,
    )
    for row, means, weighted in zip(
        np.concatenate(list(document_counts(9, 20, 5, strata))),
        resampled_means(values, 20, 5, strata),
        resampled_means(values, 20, 5, strata, weights),
        strict=True,
    ):
        indexes = np.repeat(np.arange(9), row.astype(int))
        assert means == pytest.approx(values[indexes].mean(axis=0))
        assert weighted == pytest.approx(
            np.average(values[indexes], axis=0, weights=weights[indexes])
        )


def test_chunks_do_not_change_the_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(0).normal(size=(30, 1)).repeat(2, axis=1)
    means = resampled_means(values, 100, seed=9)
    assert (means[:, 0] == means[:, 1]).all(), "equal means stay exactly equal"
    monkeypatch.setattr(module, "_CHUNK", 77)
    assert resampled_means(values, 100, seed=9) == pytest.approx(means)
    assert not np.allclose(resampled_means(values, 100, seed=10), means)


# -- interval --------------------------------------------------------------------------------------


def test_the_interval_holds_the_value_however_large_the_bias() -> None:
    resampled = np.random.default_rng(0).beta(30, 5, size=999)
    for value in (-1.0, 0.0, 0.99, 1.0):
        low, high = bias_corrected_interval(value, resampled)
        assert low < value < high
        assert high - low == pytest.approx(np.ptp(np.quantile(resampled, [0.025, 0.975])))


def test_undefined_resamples_are_dropped_up_to_a_half() -> None:
    defined = np.linspace(0, 1, 50)
    resamples = np.concatenate([defined, np.full(50, np.nan)])
    assert bias_corrected_interval(0.5, resamples) == bias_corrected_interval(0.5, defined)
    for value, undefined in (
        (0.5, np.append(resamples, np.nan)),
        (0.5, np.array([])),
        (np.nan, np.linspace(0, 1, 9)),
    ):
        assert bias_corrected_interval(value, undefined) == (None, None)


def test_each_document_is_left_out_once_with_its_share_of_every_task() -> None:
    tasks, samples = np.repeat(["a", "b", "c"], [20, 15, 5]), []
    figures = np.random.default_rng(0).normal(size=5)

    def figure(documents: np.ndarray) -> float:
        samples.append(documents.tolist())
        return float(figures[len(samples) - 1])

    error = jackknife_error(figure, tasks, 5)
    groups = [sorted(set(range(40)) - set(documents)) for documents in samples]
    assert sorted(document for group in groups for document in group) == list(range(40))
    for group in groups:
        assert [int((tasks[group] == task).sum()) for task in "abc"] == [4, 3, 1]
    assert error == pytest.approx((0.8 * sum((figures - figures.mean()) ** 2)) ** 0.5)
    assert np.isnan(jackknife_error(lambda documents: np.nan, tasks, 5))

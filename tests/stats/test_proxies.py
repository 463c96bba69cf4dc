from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from tracker.stats.proxies import cosine_score, proxy_means


def test_cosine_score() -> None:
    assert cosine_score(1.0) == 0
    assert cosine_score(-1.0) == 2
    assert cosine_score(None) is None


def test_every_token_counts_once() -> None:
    tokens = [np.array([[0.1, 0.4], [0.3, 0.2]]), np.array([[0.8, 0.6]])]
    sums = np.array([document.sum(axis=0) for document in tokens])
    expected = np.concatenate(tokens).mean(axis=0)
    assert proxy_means(sums, np.array([2, 1])) == pytest.approx(expected)


def test_no_documents_and_no_tokens_are_nan() -> None:
    assert np.isnan(proxy_means(np.empty((0, 3)), np.array([]))).tolist() == [True] * 3
    assert np.isnan(proxy_means(np.zeros((2, 3)), np.array([0, 0]))).tolist() == [True] * 3


def test_nan_stays_in_its_layer() -> None:
    means = proxy_means(np.array([[np.nan, 1.0], [1.0, 1.0]]), np.array([2, 2]))
    assert np.isnan(means).tolist() == [True, False]


@pytest.mark.parametrize(("sums", "tokens"), [((3,), (3,)), ((3, 2), (2,))])
def test_shapes_that_do_not_match_are_refused(
    sums: tuple[int, ...], tokens: tuple[int, ...]
) -> None:
    with pytest.raises(ValueError, match="sums of the shape"):
        proxy_means(np.ones(sums), np.ones(tokens))


def test_only_influence_needs_torch() -> None:
    modules = "accuracy, correlation, proxies, resampling"
    code = f"import sys; from tracker.stats import {modules}; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)

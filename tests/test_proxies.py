from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import replace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tracker.schema import proxies
from tracker.schema.proxies import (
    OBSERVED,
    angle,
    angular_distance,
    cosine_similarity,
    observed,
    relative_update,
)
from tracker.stats.arrays import proxy_means


def test_against_torch_in_double_precision():
    generator = torch.Generator().manual_seed(0)
    before = torch.randn(2, 3, 5, 64, generator=generator)
    after = before + 0.3 * torch.randn(2, 3, 5, 64, generator=generator)
    cosine = cosine_similarity(before, after)
    update = relative_update(before, after)
    wide_before, wide_after = before.double(), after.double()
    assert cosine.shape == update.shape == (2, 3, 5)
    expected = torch.nn.functional.cosine_similarity(wide_before, wide_after, dim=-1)
    torch.testing.assert_close(cosine, expected, rtol=0, atol=1e-14)
    expected = (wide_after - wide_before).norm(dim=-1) / wide_before.norm(dim=-1)
    torch.testing.assert_close(update.double(), expected, rtol=1e-6, atol=0)
    expected_angle = math.acos(cosine[0, 0, 0].item()) / math.pi
    assert angle(cosine)[0, 0, 0].item() == pytest.approx(expected_angle, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_every_dtype_is_computed_in_wide_numbers(dtype):
    before = torch.full((1, 4096), 16.0, dtype=dtype)  # float16 would overflow in the square
    after = before.clone()
    after[:, ::2] = -16
    assert cosine_similarity(before, after).dtype == torch.float64
    assert relative_update(before, after).dtype == torch.float32
    assert cosine_similarity(before, after).item() == pytest.approx(0, abs=1e-6)
    assert relative_update(before, after).item() == pytest.approx(math.sqrt(2))
    assert angular_distance(before, after).dtype == torch.float64


@pytest.mark.parametrize("score", [0.5, 1e-4, 1e-8, 1e-10])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_layer_that_hardly_turns_its_input(score, dtype):
    """An update at a right angle to the input turns it by an angle that is known exactly."""
    before = torch.randn(6, 512, generator=torch.Generator().manual_seed(0), dtype=dtype)
    before[:, 7] = 0
    after = before.clone()
    after[:, 7] = before.double().norm(dim=1) * math.sqrt(score * (2 - score)) / (1 - score)
    scores = 1 - cosine_similarity(before, after)
    assert scores.tolist() == pytest.approx([score] * 6, rel=2e-6 if score < 1e-9 else 3e-7)
    angles = angular_distance(before, after) * math.pi
    assert angles.tolist() == pytest.approx([2 * math.asin(math.sqrt(score / 2))] * 6, rel=2e-6)


@given(st.floats(1e-15, 1e15))
def test_cosine_does_not_see_magnitude_and_the_update_does(scale):
    before = torch.tensor([[1.0, 2.0, -2.0]])
    assert cosine_similarity(before, before * scale).item() == pytest.approx(1, abs=1e-6)
    assert relative_update(before, before * scale).item() == pytest.approx(
        abs(scale - 1), rel=1e-5, abs=1e-6
    )


def test_known_directions():
    before = torch.tensor([[1.0, 0.0]] * 3)
    after = torch.tensor([[2.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    cosine = cosine_similarity(before, after)
    assert cosine.tolist() == [1, 0, -1]
    assert angle(cosine).tolist() == pytest.approx([0, 0.5, 1])
    assert angle(torch.tensor([1 + 2e-7, -1 - 2e-7])).tolist() == [0, 1], "rounding past one"
    assert cosine_similarity(before[:0], after[:0]).shape == (0,)
    assert relative_update(before, after).tolist() == pytest.approx([1, math.sqrt(2), 2])


def test_a_zero_vector_is_undefined_and_leaves_the_others_alone():
    before = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 0.0], [1.0, 0.0]])
    after = torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, 0.0], [1.0, 0.0]])
    cosine, update = cosine_similarity(before, after), relative_update(before, after)
    assert cosine.isnan().tolist() == [True, True, True, False]
    assert update.isnan().tolist() == [True, False, True, False]
    assert update[1].item() == 1
    assert angle(cosine).isnan().tolist() == [True, True, True, False]


def test_a_vector_too_small_for_float32_to_square_has_a_direction():
    tiny = torch.full((1, 4), 1e-30)
    assert cosine_similarity(tiny, torch.ones(1, 4)).item() == pytest.approx(1)
    assert relative_update(tiny, torch.ones(1, 4)).isnan().item()


def test_every_token_counts_once():
    tokens = [np.array([[0.1, 0.4], [0.3, 0.2]]), np.array([[0.8, 0.6]])]
    sums = np.array([document.sum(axis=0) for document in tokens])
    expected = np.concatenate(tokens).mean(axis=0)
    assert proxy_means(sums, np.array([2, 1])) == pytest.approx(expected)
    # Without documents or tokens there is no mean, and a NaN stays in its layer.
    for sums, tokens, undefined in (
        (np.empty((0, 2)), [], [True, True]),
        (np.zeros((2, 2)), [0, 0], [True, True]),
        (np.array([[np.nan, 1.0], [1.0, 1.0]]), [2, 2], [True, False]),
    ):
        assert np.isnan(proxy_means(sums, np.array(tokens))).tolist() == undefined


def test_proxies_are_listed_without_torch():
    imports = (
        "import tracker.schema.proxies; from tracker.stats import accuracy, arrays, correlation"
    )
    code = f"import sys; {imports}; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_shared_figures_are_computed_once(monkeypatch):
    """Was: the cosine, in float64, once for each."""
    before, after = torch.randn(2, 5, 8)
    single_figures = [proxy.token_figure(proxy.observe(before, after)) for proxy in OBSERVED]
    counters = {proxy.observe: Mock(wraps=proxy.observe) for proxy in OBSERVED}
    counted_proxies = tuple(replace(proxy, observe=counters[proxy.observe]) for proxy in OBSERVED)
    monkeypatch.setattr(proxies, "OBSERVED", counted_proxies)
    figures = observed(before, after)
    assert sum(call.call_count for call in counters.values()) == len(counters) < len(OBSERVED)
    for figure, expected in zip(figures, single_figures, strict=True):
        assert torch.equal(figure, expected)
    index = [proxy.name for proxy in OBSERVED].index("angular_distance")
    assert torch.equal(figures[index], angular_distance(before, after))

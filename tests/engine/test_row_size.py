"""The size of a row is what is fastest here, found once; no answer depends on it."""

from __future__ import annotations

import pytest
import torch

from tests.helpers.engines import engine_of
from tests.helpers.families import tiny_model
from tracker.engine.scoring.row_size import CPU_ROW_SIZES, choose_row_size, find_row_size
from tracker.engine.scoring.sweep import ROW_TOKENS
from tracker.measuring import scorer


@pytest.fixture
def engine():
    return engine_of(tiny_model("llama").bfloat16())


@pytest.mark.parametrize(
    ("seconds", "best"), [((1, 0.97, 0.96), 192), ((1, 0.9, 0.8), 768), ((1, 2, 3), 192)]
)
def test_another_size_must_be_clearly_faster(seconds, best):
    assert choose_row_size(dict(zip(CPU_ROW_SIZES, seconds, strict=True))) == best


def test_trying_leaves_the_model_as_it_is(engine):
    old_weights = {name: w.clone() for name, w in engine.loaded.model.state_dict().items()}
    assert find_row_size(engine) in CPU_ROW_SIZES
    torch.testing.assert_close(engine.loaded.model.state_dict(), old_weights, rtol=0, atol=0)


def test_it_is_tried_once_and_for_half_precision_alone(engine, monkeypatch, tmp_path):
    monkeypatch.setenv("TRACKER_CACHE", str(tmp_path))
    monkeypatch.setattr(scorer, "find_row_size", lambda engine: 768)
    assert scorer.set_row_size(engine).max_row_tokens == 768
    monkeypatch.delattr(scorer, "find_row_size")
    assert scorer.set_row_size(engine).max_row_tokens == 768
    plain = engine_of(tiny_model("llama"))
    assert scorer.set_row_size(plain).max_row_tokens == ROW_TOKENS

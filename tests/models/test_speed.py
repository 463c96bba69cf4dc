from __future__ import annotations

import pytest
import torch

from tracker.models import checkpoint
from tracker.models.load import load_model
from tracker.models.sources import find_model


def test_other_work_in_whole_turns_does_not_matter():
    quiet_turns = [(0.10, 0.13)] * 4
    busy_turns = [(0.40, 0.52)] * 4
    for turns in (quiet_turns, busy_turns, quiet_turns + busy_turns):
        assert checkpoint.median_speedup(turns) == pytest.approx((1.3, 1.3, 1.3))


def test_unequal_disturbances_give_no_speedup():
    turns = [(0.10, 0.13), (0.40, 0.13), (0.10, 0.52), (0.10, 0.13), (0.40, 0.13), (0.11, 0.5)]
    assert checkpoint.median_speedup(turns) is None
    turns = [(0.10, 0.13)] * 9 + [(0.1, 0.9)]
    assert checkpoint.median_speedup(turns) == pytest.approx((1.3, 1.3, 1.3))


def test_both_models_read_the_same_texts_in_turns(tiny_llama, monkeypatch):
    monkeypatch.setattr(checkpoint, "MIN_TIMING_SECONDS", 0.0)
    calls = []
    models = [load_model(find_model(str(tiny_llama(name)))).model for name in ("one", "other")]
    for name, model in zip(("one", "other"), models, strict=True):
        model.register_forward_pre_hook(
            lambda _, args, kwargs, name=name: calls.append((name, kwargs["input_ids"])),
            with_kwargs=True,
        )
    checkpoint.measure_speedup(*models, batch=2, length=5)
    assert [name for name, _ in calls] == ["one", "other"] * (checkpoint.MIN_TIMING_TURNS + 1)
    assert all(ids.shape == (2, 5) and torch.equal(ids, calls[0][1]) for _, ids in calls)

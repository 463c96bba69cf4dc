from __future__ import annotations

import pytest
import torch

from tracker.models import checkpoint
from tracker.models.load import load_model
from tracker.models.sources import find_model


def test_what_slows_both_hides_nothing():
    quiet = [(0.10, 0.13)] * 4
    busy = [(0.40, 0.52)] * 4
    for turns in (quiet, busy, quiet + busy):
        assert checkpoint.ratio(turns) == pytest.approx((1.3, 1.3, 1.3))


def test_what_slows_now_the_one_and_now_the_other_is_not_called_speed():
    turns = [(0.10, 0.13), (0.40, 0.13), (0.10, 0.52), (0.10, 0.13), (0.40, 0.13), (0.11, 0.5)]
    assert checkpoint.ratio(turns) is None
    assert checkpoint.ratio([(0.10, 0.13)] * 9 + [(0.1, 0.9)]) == pytest.approx((1.3, 1.3, 1.3))


def test_two_models_read_the_same_by_turns(tiny_llama, monkeypatch):
    monkeypatch.setattr(checkpoint, "SECONDS", 0.0)
    read = []
    models = [load_model(find_model(str(tiny_llama(name)))).model for name in ("one", "other")]
    for name, model in zip(("one", "other"), models, strict=True):
        model.register_forward_pre_hook(
            lambda _, args, given, name=name: read.append((name, given["input_ids"])),
            with_kwargs=True,
        )
    checkpoint.times_as_fast(*models, batch=2, length=5)
    assert [name for name, _ in read] == ["one", "other"] * (checkpoint.TURNS + 1)
    assert all(ids.shape == (2, 5) and torch.equal(ids, read[0][1]) for _, ids in read)

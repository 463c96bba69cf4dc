"""Test models with the shape of a real one and random weights."""

from __future__ import annotations

from collections import namedtuple

import pytest
import torch

from tracker.models import load
from tracker.models.load import build_hollow, load_model
from tracker.models.sources import find_model
from tracker.schema.errors import ModelError


def test_a_shape_is_a_model_with_random_weights(tiny_llama):
    folder = tiny_llama()
    loaded = load_model(find_model(f"shape:{folder}@3"))
    real_model = load_model(find_model(str(folder)))
    assert len(loaded.layers) == 3
    shapes, expected = (
        {name: p.shape for name, p in m.model.named_parameters() if ".3." not in name}
        for m in (loaded, real_model)
    )
    assert shapes == expected
    assert loaded.tokenizer("a word").input_ids == real_model.tokenizer("a word").input_ids
    second = load_model(find_model(f"shape:{folder}@3"))
    weights = (m.layers[2].mlp.up_proj.weight for m in (loaded, second))
    assert torch.equal(*weights)


@pytest.mark.parametrize(
    ("name", "layers", "billions"),
    [("llama-3-8b", 32, 8.0), ("llama-2-13b", 40, 13.0), ("qwen3-30b-a3b", 48, 30.5),
     ("llama-3-70b", 80, 70.6), ("llama-3-70b@8", 8, 8.9)],
)  # fmt: skip
def test_shipped_shapes_have_the_size_in_their_name(name, layers, billions):
    model = build_hollow(find_model(f"shape:{name}"), "auto")
    assert model.config.num_hidden_layers == layers
    assert model.num_parameters() / 1e9 == pytest.approx(billions, abs=0.06)
    assert model.dtype == torch.bfloat16


def test_full_disk_is_reported_before_writing(tiny_llama, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(load.shutil, "disk_usage", lambda folder: usage(1, 1, 1000))
    with pytest.raises(ModelError, match=r"takes .* GB in .* use fewer layers"):
        load_model(find_model(f"shape:{tiny_llama()}"))


@pytest.mark.parametrize(
    ("source", "message"),
    [("shape:llama-3-8", "Did you mean 'llama-3-8b'"), ("shape:llama-3-8b@33", "from 1 to 32"),
     ("shape:", "there is no model shape"), ("shape:llama-3-8b@x", "from 1 to 32")],
)  # fmt: skip
def test_unknown_shapes_are_refused(source, message):
    with pytest.raises(ModelError, match=message):
        find_model(source)

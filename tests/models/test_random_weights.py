"""A model of somebody's shape: loaded with as many layers as asked, and written once."""

from __future__ import annotations

from collections import namedtuple

import pytest
import torch

from tracker.core.errors import ModelError
from tracker.models import load
from tracker.models.load import hollow, load_model
from tracker.models.sources import find_model


def test_a_shape_is_a_model_with_random_weights(tiny_llama):
    folder = tiny_llama()
    loaded = load_model(find_model(f"shape:{folder}@3"))
    real = load_model(find_model(str(folder)))
    assert len(loaded.layers) == 3
    ours, theirs = (dict(each.model.named_parameters()) for each in (loaded, real))
    assert {n: p.shape for n, p in theirs.items() if ".3." not in n} == {
        n: p.shape for n, p in ours.items()
    }
    assert loaded.tokenizer("a word").input_ids == real.tokenizer("a word").input_ids
    again = load_model(find_model(f"shape:{folder}@3"))
    weights = (each.model.model.layers[2].mlp.up_proj.weight for each in (loaded, again))
    assert torch.equal(*weights)


@pytest.mark.parametrize(
    ("name", "layers", "billions"),
    [("llama-3-8b", 32, 8.0), ("llama-2-13b", 40, 13.0), ("qwen3-30b-a3b", 48, 30.5),
     ("llama-3-70b", 80, 70.6), ("llama-3-70b@8", 8, 8.9)],
)  # fmt: skip
def test_what_ships_has_the_size_that_its_name_says(name, layers, billions):
    model = hollow(find_model(f"shape:{name}"), "auto")
    assert model.config.num_hidden_layers == layers
    assert model.num_parameters() / 1e9 == pytest.approx(billions, abs=0.06)
    assert model.dtype == torch.bfloat16


def test_a_disk_without_room_is_said_before_anything_is_written(tiny_llama, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(load.shutil, "disk_usage", lambda place: usage(1, 1, 1000))
    with pytest.raises(ModelError, match=r"takes .* GB in .* take fewer layers"):
        load_model(find_model(f"shape:{tiny_llama()}"))


@pytest.mark.parametrize(
    ("source", "said"),
    [("shape:llama-3-8", "Did you mean 'llama-3-8b'"), ("shape:llama-3-8b@33", "from 1 to 32"),
     ("shape:", "there is no shape"), ("shape:llama-3-8b@x", "from 1 to 32")],
)  # fmt: skip
def test_what_is_no_shape(source, said):
    with pytest.raises(ModelError, match=said):
        find_model(source)

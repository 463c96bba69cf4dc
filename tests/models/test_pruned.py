"""Test that the data of removed layers are removed, and that changes by a call are undone."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
import transformers
from torch import nn

from tests.helpers.families import SMALL_CONFIG, tiny_model
from tests.helpers.truth import model_logits
from tracker.models.layers import find_layers
from tracker.models.parts.anatomy import LayerAnatomy
from tracker.models.parts.sublayers import Sublayers
from tracker.models.pruned import changed_keys, cut_config, prune_model, record_state, restore_state
from tracker.schema.changes import Change


def test_modules_around_the_layers_are_adapted() -> None:
    model = tiny_model("llama")
    model.model.n_layers = 4
    model.model.layer_width = 7
    model.model.width = 4
    model.model.kinds = ["a", "b", "c", "d"]
    model.model.names = {0: "a", 2: "c"}
    find_layers(model)[2].tables = {1: "b", 2: "c"}
    find_layers(model)[2].factors = [1, 2, 3, 4]
    base = prune_model(model, [1]).model
    assert (base.n_layers, base.layer_width, base.width) == (3, 7, 4)
    assert base.kinds == ["a", "c", "d"]
    assert base.names == {0: "a", 1: "c"}
    assert base.layers[1].tables == {1: "c"}
    assert base.layers[1].factors == [1, 2, 3, 4], "a layer's own list is not one of layers"


def test_numbers_equal_to_layer_indices_are_renumbered() -> None:
    model = tiny_model("llama")
    layers = find_layers(model)
    layers[2].layer_number = layers[2].block_idx = layers[2].width = 2
    layers[1].place, layers[3].place = 1, 3
    layers[1].size, layers[3].size = 1, 2
    remaining = find_layers(prune_model(model, [0]))
    assert (remaining[1].layer_number, remaining[1].block_idx, remaining[1].width) == (1, 1, 2)
    assert (remaining[0].place, remaining[2].place) == (0, 2)
    assert (remaining[0].size, remaining[2].size) == (1, 2)
    assert layers[2].layer_number == 2


@pytest.mark.parametrize(
    ("value", "left"),
    [
        ([0], []), ([2], [1]), ([0, 3], [2]), ([], []),
        ([1, 4], [1, 4]), ([5, 9], [5, 9]), ([1.0, 2.0], [1.0, 2.0]), ([3, 1], [3, 1]),
    ],
)  # fmt: skip
def test_lists_of_layer_indices_are_renumbered(value: list[float], left: list[float]) -> None:
    config = transformers.LlamaConfig(**SMALL_CONFIG)
    config.dense_layers, config.widths = list(value), list(value)
    cut_config(config, [1, 2, 3])
    assert config.dense_layers == left
    assert config.widths == value


def test_lists_with_an_entry_per_layer_are_cut_except_rope_factors() -> None:
    """As many factors as layers: a list is a layer's by its length, unless it is rope's."""
    config = transformers.LlamaConfig(**SMALL_CONFIG)
    rope = {"rope_type": "longrope", "short_factor": [1.0, 2.0, 3.0, 4.0]}
    config.widths, config.by_layer = [1, 2, 3, 4], {0: "a", 1: "b", 2: "c", 3: "d"}
    config.moe_layers, config.hybrid_layers = [1, 3], [0, 1, 2, 3]
    config.parts = {"widths": [1, 2, 3, 4], "rope": rope, "deeper": {"kinds": ["a", "b", "c", "d"]}}
    config.rope_parameters = rope
    cut_config(config, [0, 2, 3])
    assert config.num_hidden_layers == 3
    assert (config.widths, config.by_layer) == ([1, 3, 4], {0: "a", 1: "c", 2: "d"})
    # Places of all layers are no entry for each.
    assert (config.moe_layers, config.hybrid_layers) == ([2], [0, 1, 2])
    assert config.rope_parameters["short_factor"] == [1.0, 2.0, 3.0, 4.0]
    assert config.parts == {"widths": [1, 3, 4], "rope": rope, "deeper": {"kinds": ["a", "c", "d"]}}


@pytest.mark.parametrize(("part", "last"), [("self_attn", "o_proj"), ("mlp", "down_proj")])
def test_silenced_sublayer_adds_nothing(part: str, last: str) -> None:
    model = tiny_model("llama")
    zeroed_model = copy.deepcopy(model)
    getattr(getattr(find_layers(zeroed_model)[1], part), last).weight.zero_()
    sublayers = LayerAnatomy.of(model).get_part(Sublayers, 1)
    change = Change.parse("mlp:1" if part == "mlp" else "attention:1")
    silence = partial(sublayers.remove, parts=[change], name="layer 1")
    silenced, removed = prune_model(model, changes=[(1, silence)]), prune_model(model, [1])
    both_removed = prune_model(model, [1], changes=[(1, silence)])
    for clone, expected in ((silenced, zeroed_model), (both_removed, removed)):
        assert torch.equal(model_logits(clone, (3, 1, 4)), model_logits(expected, (3, 1, 4)))


class ModuleWithState(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.register_buffer("frequencies", torch.arange(3.0))
        self.cache = torch.zeros(2)
        self.length, self.scale, self.kind, self.first, self.absent = 4, 0.5, "default", True, None
        self.items = [1]


@pytest.fixture
def model() -> nn.Module:
    outer = nn.Module()
    outer.inner = ModuleWithState()
    return outer


def change_attributes(model: nn.Module) -> None:
    inner = model.inner
    inner.weight.data *= 2
    inner.frequencies += 1
    inner.cache[0] = 7
    inner.length, inner.scale, inner.kind, inner.absent = 5, 0.25, "long", 1


CHANGED_NAMES = {"weight", "frequencies", "cache", "length", "scale", "kind", "absent"}


def test_changes_by_a_call_are_found_and_restored(model: nn.Module) -> None:
    old_state = record_state(model)
    assert ("inner", "items") not in old_state
    assert changed_keys(old_state, record_state(model)) == set()
    for _ in range(2):  # the restored values are copies, which the next call cannot change
        change_attributes(model)
        expected = {("inner", name) for name in CHANGED_NAMES}
        assert changed_keys(old_state, record_state(model)) == expected
        restore_state(model, old_state)
        assert changed_keys(old_state, record_state(model)) == {("inner", "weight")}
        model.inner.weight.data /= 2
    assert "frequencies" in model.inner._buffers


def test_attributes_added_by_a_call_are_removed():
    """Rotary embeddings of several kinds store their longest text in a new attribute."""
    module = torch.nn.Linear(2, 2)
    old_state = record_state(module, {"sliding_longest", "full_frequencies"})
    module.sliding_longest = 40
    module.register_buffer("full_frequencies", torch.ones(2), persistent=False)
    for _ in range(2):
        restore_state(module, old_state)
        assert not hasattr(module, "sliding_longest")
        assert not hasattr(module, "full_frequencies")

"""Everything that belongs to a layer is removed with it, and changes of a call are undone."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
import transformers
from torch import nn

from tests.helpers.families import SMALL, tiny_model
from tests.helpers.truth import logits
from tracker.core.changes import Change
from tracker.models.layers import find_layers
from tracker.models.parts.anatomy import LayerAnatomy
from tracker.models.parts.sublayers import Sublayers
from tracker.models.pruned import changed, cut_config, pruned, put_back, remember


def test_what_holds_the_layers_counts_them_anew() -> None:
    model = tiny_model("llama")
    model.model.n_layers = 4
    model.model.layer_width = 7
    model.model.width = 4
    model.model.kinds = ["a", "b", "c", "d"]
    model.model.names = {0: "a", 2: "c"}
    find_layers(model)[2].tables = {1: "b", 2: "c"}
    find_layers(model)[2].factors = [1, 2, 3, 4]
    base = pruned(model, [1]).model
    assert (base.n_layers, base.layer_width, base.width) == (3, 7, 4)
    assert base.kinds == ["a", "c", "d"]
    assert base.names == {0: "a", 1: "c"}
    assert base.layers[1].tables == {1: "c"}
    assert base.layers[1].factors == [1, 2, 3, 4], "a layer's own list is not one of layers"


def test_a_number_is_a_layers_place_where_its_name_or_another_layer_says_so() -> None:
    model = tiny_model("llama")
    layers = find_layers(model)
    layers[2].layer_number = layers[2].block_idx = layers[2].width = 2
    layers[1].place, layers[3].place = 1, 3
    layers[1].size, layers[3].size = 1, 2
    left = find_layers(pruned(model, [0]))
    assert (left[1].layer_number, left[1].block_idx, left[1].width) == (1, 1, 2)
    assert (left[0].place, left[2].place) == (0, 2)
    assert (left[0].size, left[2].size) == (1, 2)
    assert layers[2].layer_number == 2


@pytest.mark.parametrize(
    ("value", "left"),
    [
        ([0], []), ([2], [1]), ([0, 3], [2]), ([], []),
        ([1, 4], [1, 4]), ([5, 9], [5, 9]), ([1.0, 2.0], [1.0, 2.0]), ([3, 1], [3, 1]),
    ],
)  # fmt: skip
def test_a_list_of_some_layers_holds_places(value: list[float], left: list[float]) -> None:
    config = transformers.LlamaConfig(**SMALL)
    config.dense_layers, config.widths = list(value), list(value)
    cut_config(config, [1, 2, 3])
    assert config.dense_layers == left
    assert config.widths == value


def test_what_has_one_entry_a_layer_is_cut_and_rope_factors_are_not() -> None:
    """As many factors as layers: a list is a layer's by its length, unless it is rope's."""
    config = transformers.LlamaConfig(**SMALL)
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
def test_a_silent_sublayer_adds_nothing(part: str, last: str) -> None:
    model = tiny_model("llama")
    truth = copy.deepcopy(model)
    getattr(getattr(find_layers(truth)[1], part), last).weight.zero_()
    sublayers = LayerAnatomy.of(model).at(Sublayers, 1)
    component = "mlp" if part == "mlp" else "attention"
    silence = partial(sublayers.remove, parts=[Change.parse(f"{component}:1")], name="layer 1")
    assert torch.equal(
        logits(pruned(model, changes=[(1, silence)]), (3, 1, 4)), logits(truth, (3, 1, 4))
    )
    # It goes with its layer.
    both = pruned(model, [1], changes=[(1, silence)])
    assert torch.equal(logits(both, (3, 1, 4)), logits(pruned(model, [1]), (3, 1, 4)))


class Remembering(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.register_buffer("frequencies", torch.arange(3.0))
        self.cache = torch.zeros(2)
        self.length, self.scale, self.kind, self.first, self.absent = 4, 0.5, "default", True, None
        self.items = [1]


@pytest.fixture
def model() -> nn.Module:
    made = nn.Module()
    made.inner = Remembering()
    return made


def call(model: nn.Module) -> None:
    inner = model.inner
    inner.weight.data *= 2
    inner.frequencies += 1
    inner.cache[0] = 7
    inner.length, inner.scale, inner.kind, inner.absent = 5, 0.25, "long", 1


CHANGED = {"weight", "frequencies", "cache", "length", "scale", "kind", "absent"}


def test_what_a_call_changes_is_found_and_put_back(model: nn.Module) -> None:
    before = remember(model)
    assert ("inner", "items") not in before
    assert changed(before, remember(model)) == set()
    for _ in range(2):  # what was put back is the model's own, so that the next call spoils nothing
        call(model)
        assert changed(before, remember(model)) == {("inner", name) for name in CHANGED}
        put_back(model, before)
        assert changed(before, remember(model)) == {("inner", "weight")}
        model.inner.weight.data /= 2
    assert "frequencies" in model.inner._buffers


def test_what_a_call_adds_to_a_module_is_taken_away_again():
    """Rotary embeddings of several kinds note their longest text under a name made then."""
    module = torch.nn.Linear(2, 2)
    before = remember(module, {"sliding_longest", "full_frequencies"})
    module.sliding_longest = 40
    module.register_buffer("full_frequencies", torch.ones(2), persistent=False)
    for _ in range(2):
        put_back(module, before)
        assert not hasattr(module, "sliding_longest")
        assert not hasattr(module, "full_frequencies")

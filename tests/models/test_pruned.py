"""What belongs to a layer goes with it, and what a call changes can be put back."""

from __future__ import annotations

import copy
from functools import partial
from operator import itemgetter
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from torch import nn

from tests.helpers.small_models import SMALL, logits, make
from tracker.core.changes import Change
from tracker.models.hooks import add_nothing, first_of, returning
from tracker.models.layers import find_layers
from tracker.models.parts.anatomy import LayerAnatomy
from tracker.models.parts.sublayers import Sublayers
from tracker.models.pruned import SMALL as SMALL_BUFFER
from tracker.models.pruned import changed, cut_config, pruned, put_back, remember

HIDDEN = torch.tensor([[1.0, 2.0]])


def test_what_holds_the_layers_counts_them_anew() -> None:
    model = make("llama")
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
    model = make("llama")
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


def test_what_a_configuration_computes_is_cut_and_what_it_cannot_compute_left_alone() -> None:
    class Config(transformers.LlamaConfig):
        names = ("one", "two", "three", "four")

        @property
        def missing(self):
            raise AttributeError("only with pictures")

        @property
        def every_other(self):
            return [layer % 2 for layer in range(self.num_hidden_layers)]

    config = Config(**SMALL)
    cut_config(config, [0, 2, 3])
    assert config.every_other == [0, 0, 1]
    assert config.names == Config.names, "the class's own, of which four are no layers'"


def test_a_copy_has_what_is_fresh_for_its_own_and_shares_the_rest() -> None:
    model = make("llama")
    for name, size in (("small", SMALL_BUFFER), ("large", SMALL_BUFFER + 1)):
        model.model.register_buffer(name, torch.zeros(size), persistent=False)
    hook = SimpleNamespace(weights_map={"weight": HIDDEN}, tied_params_map={1: HIDDEN})
    find_layers(model)[1]._hf_hook = hook  # as accelerate's, where weights lie elsewhere
    norm = torch.full((32,), 2.0)
    fresh = {("model.norm", "weight"): norm, ("model", "length"): 7}
    twin = pruned(model, [0], fresh=fresh)
    assert torch.equal(twin.model.norm.weight, norm)
    assert not twin.model.norm.weight.requires_grad
    assert torch.equal(model.model.norm.weight, torch.ones(32))
    twin.model.norm.weight.zero_()
    assert norm.sum() == 64
    assert twin.model.length == 7
    assert not hasattr(model.model, "length")
    assert twin.lm_head.weight is model.lm_head.weight
    assert twin.model.large is model.model.large
    assert twin.model.small is not model.model.small
    moved = find_layers(twin)[0]._hf_hook
    assert moved is not hook
    assert moved.weights_map is hook.weights_map
    assert moved.tied_params_map is hook.tied_params_map


class Named(NamedTuple):
    """What Reformer's layers return, in short."""

    state: Any
    weights: str
    number: int


class Writing(nn.Module):
    """Writes into its input, as layers may."""

    def __init__(self, kind) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, hidden_states, number):
        return self.kind((hidden_states.exp_(), "kept", number))


@pytest.mark.parametrize("kind", [tuple, list, Named._make, None])
def test_a_layer_that_stays_returns_its_input_and_all_else_that_it_made(kind) -> None:
    layer = Writing(kind or itemgetter(0))  # one thing alone
    handles = returning(layer, lambda state: state)
    for found in (layer(HIDDEN.clone(), 3), layer(number=3, hidden_states=HIDDEN.clone())):
        assert torch.equal(first_of(found), HIDDEN)
        if kind is not None:
            assert type(found) is type(kind((HIDDEN, "kept", 3)))
            assert tuple(found[1:]) == ("kept", 3)
    for handle in handles:
        handle.remove()
    assert torch.equal(first_of(layer(HIDDEN.clone(), 3)), HIDDEN.exp())


@pytest.mark.parametrize(("part", "last"), [("self_attn", "o_proj"), ("mlp", "down_proj")])
def test_a_silent_sublayer_adds_nothing(part: str, last: str) -> None:
    model = make("llama")
    truth = copy.deepcopy(model)
    getattr(getattr(find_layers(truth)[1], part), last).weight.zero_()
    sublayers = LayerAnatomy.of(model).at(Sublayers, 1)
    component = "mlp" if part == "mlp" else "attention"
    silence = partial(sublayers.remove, parts=[Change.parse(f"{component}:1")], name="layer 1")
    assert torch.equal(logits(pruned(model, changes=[(1, silence)])), logits(truth))
    # It goes with its layer.
    both = pruned(model, [1], changes=[(1, silence)])
    assert torch.equal(logits(both), logits(pruned(model, [1])))


class AddsItself(nn.Module):
    """As Bloom's sublayers do."""

    def forward(self, hidden, residual):
        return residual + hidden


@pytest.mark.parametrize("by_name", [True, False])
def test_a_sublayer_that_adds_to_the_stream_itself_hands_it_on(by_name: bool) -> None:
    sublayer = AddsItself()
    sublayer.register_forward_hook(add_nothing, with_kwargs=True)
    stream = torch.tensor([[5.0, 6.0]])
    found = sublayer(HIDDEN, residual=stream) if by_name else sublayer(HIDDEN, stream)
    assert torch.equal(found, stream)


@pytest.mark.parametrize("kind", [tuple, list, Named._make])
def test_a_silent_sublayer_keeps_what_else_it_returns(kind) -> None:
    made = torch.ones(3, 4, 5)
    output = kind((made, "weights", 3))
    found = add_nothing(nn.Module(), (made,), {}, output)
    assert type(found) is type(output)
    assert torch.equal(found[0], torch.zeros(3, 4, 5))
    assert found[1:] == output[1:]
    assert torch.equal(add_nothing(nn.Module(), (made,), {}, made), torch.zeros(3, 4, 5))


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


def test_values_of_other_kinds_differ() -> None:
    one = {("", str(n)): value for n, value in enumerate((1, 1, 0, torch.ones(1), 1.0, "1"))}
    other = {
        ("", str(n)): value for n, value in enumerate((True, 1.0, None, 1.0, torch.ones(1), 1))
    }
    assert changed(one, other) == set(one)
    assert changed(one, {}) == changed({}, one) == set(one)
    assert changed(one, dict(one)) == set()
    shape = {("", "x"): torch.ones(2)}
    assert changed(shape, {("", "x"): torch.ones(1)}) == {("", "x")}


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

"""Heads that are taken out and stretches that are passed again, against models changed by hand."""

from __future__ import annotations

import json
from functools import partial

import pytest
import torch

from tests.conftest import golden
from tests.helpers.ablations import parse_ablations
from tests.helpers.engines import assert_changed_scores, engine_of, make_documents, score_sharings
from tests.helpers.families import tiny_model
from tests.helpers.mixtures import MIXTURES, tiny_mixture
from tests.helpers.mixtures import UNDIVIDED_MIXTURES as EXPERTS_BESIDE
from tests.helpers.registry import Variant, make_registered, tiny_settings
from tests.helpers.truth import NEURON_MAPS, deeper_copy, without_heads, without_neurons
from tracker.engine.forward.streams import plan_streams
from tracker.engine.scoring.model import DEPTH_ONLY, FULL, PLAIN
from tracker.engine.selfcheck.miniature_check import check_miniature
from tracker.models.layers import find_layers
from tracker.models.parts.heads import Heads
from tracker.models.parts.neurons import Neurons
from tracker.schema.changes import INTACT, Ablation, Change
from tracker.schema.errors import CellError, ModelError, TrackerError

O_PROJ = "self_attn.o_proj"
PROJECTIONS = {
    **dict.fromkeys(("llama", "qwen3", "gemma2", "gemma3", "phi3", "deepseek_v3"), O_PROJ),
    **{"gpt2": "attn.c_proj", "gpt_neox": "attention.dense", "opt": "self_attn.out_proj"},
}
"""Of some families, by name: the map that all heads of an attention pass."""
UNDIVIDED = {
    "gemma4_text": (O_PROJ, {"enable_moe_block": True}),
    "granitemoehybrid": (O_PROJ, {"layer_types": ["linear_attention", "full_attention"] * 2}),
    "nemotron_h": ("mixer.o_proj", {}),
    **dict.fromkeys(("minimax", "zaya", "falcon_h1"), (O_PROJ, {})),
    "dbrx": ("norm_attn_norm.attn.out_proj", {}),
    "zamba2": ("shared_transformer.self_attn.o_proj", {}),
}
"""Families whose layers are no attention and MLP that add to one stream: that map, and settings."""


def remove_heads(layer, *numbers, component="head"):
    """Take some heads of a layer out."""
    return Ablation.from_changes(*(Change.parse(f"{component}:{layer}.{n}") for n in numbers))


HEADS = parse_ablations(
    "baseline head:0.0 head:0.3 head:3.0 head:3.3 head:2.1+head:2.3 "
    "kv_head:0.0 kv_head:0.1 kv_head:2.0 kv_head:2.1"
)
NEURONS = parse_ablations(
    "baseline neuron:0.0 neuron:0.3 neuron:3.0 neuron:2.1+neuron:2.3 neuron:1.1+neuron:3.2"
)
SPANS = parse_ablations(
    "baseline repeat:0-0 repeat:0-1 repeat:0-2 repeat:0-3 repeat:1-1 repeat:1-2 repeat:1-3 "
    "repeat:2-2 repeat:2-3 repeat:3-3 repeat3:1-2 layer:0+repeat:2-3 layer:3"
)


def _check_ways(model, ablations, make, sharings=(FULL, DEPTH_ONLY, PLAIN)):
    """Hold what is shared, however much, against models that are changed by `make`."""
    assert_changed_scores(score_sharings(model, sharings, ablations), ablations, make)


@pytest.mark.parametrize("family", PROJECTIONS)
def test_a_model_without_a_head_is_one_whose_projection_ignores_it(family):
    model = tiny_model(family)
    ablations = HEADS
    groups = getattr(model.config.get_text_config(), "num_key_value_heads", 4)
    if groups == 4 or family == "deepseek_v3":  # whose heads share nothing that is kept
        ablations = [a for a in ablations if all(p.component == "head" for p in a.parts)]
    _check_ways(
        model, ablations, lambda ablation: without_heads(model, ablation, PROJECTIONS[family])
    )


@pytest.mark.parametrize("family", NEURON_MAPS)
def test_a_model_without_neurons_is_one_whose_projection_ignores_them(family):
    model = tiny_model(family)
    _check_ways(model, NEURONS, lambda ablation: without_neurons(model, ablation, family))


def test_neurons_heads_and_formats_of_one_layer_change_together():
    """The output projection of OPT is its whole MLP, which other streams lack or round."""
    model = tiny_model("opt")
    texts = "baseline neuron:1.0 mlp:1 int4_row:1 neuron:1.2+head:1.0 attention:1 neuron:1.3+mlp:2"
    engine = engine_of(model)
    ablations = parse_ablations(texts)
    _check_ways(model, ablations, lambda ablation: engine.ablate(ablation).loaded.model)


@pytest.mark.parametrize("family", UNDIVIDED)
def test_a_head_is_taken_out_wherever_its_attention_ends(family):
    """Was refused, since the attention and the MLP of a layer cannot be told apart."""
    path, more = UNDIVIDED[family]
    model = make_registered(family, **more)
    layers = [
        number
        for number, layer in enumerate(find_layers(model))
        if any(name == path for name, _ in layer.named_modules())
    ]
    ablations = [
        INTACT,
        *(remove_heads(layer, number) for layer in {layers[0], layers[-1]} for number in (0, 3)),
        remove_heads(layers[-1], 1, 3),
        remove_heads(layers[0], 1, component="kv_head"),
    ]
    # The layers of Zaya hand each other the state of their routers.
    sharings = (PLAIN,) if family == "zaya" else (DEPTH_ONLY, PLAIN)
    _check_ways(model, ablations, lambda ablation: without_heads(model, ablation, path), sharings)
    with pytest.raises(ModelError, match=r"attention and MLP of .* cannot be distinguished"):
        engine_of(model).score(make_documents(1), [*ablations, Ablation.parse("mlp:1")])


def test_streams_pass_a_layer_whole_that_is_not_divided():
    ablations = [INTACT, *(remove_heads(1, number) for number in range(4))]
    plan = plan_streams(ablations, 4, divided=False)
    assert plan.attention_passes == plan.mlp_passes == 4 + 4 * 3
    model = Variant(
        "gemma4_text", "plain", tiny_settings("gemma4_text") | UNDIVIDED["gemma4_text"][1]
    )
    engine = engine_of(model.model())
    assert engine.plan(ablations) == plan
    assert check_miniature(engine, ablations, (), blank=False).sharing == FULL
    with pytest.raises(ModelError, match="cannot be distinguished"):
        engine.ablate(Ablation.parse("mlp:1"))


@pytest.mark.parametrize("family", ["llama", "gemma3", "mixtral"])
def test_a_model_that_passes_layers_again_is_a_deeper_one(family):
    model = tiny_model(family)
    _check_ways(model, SPANS, partial(deeper_copy, model))


def test_what_parts_cost_is_what_they_pass():
    # Four heads share the attention of layer 1: only its MLP and what is above are passed again.
    plan = plan_streams([INTACT, *(remove_heads(1, number) for number in range(4))], 4)
    assert (plan.attention_passes, plan.mlp_passes) == (4 + 4 * 2, 4 + 4 * 3)
    # All stretches of L layers: each leaves the baseline behind its last layer.
    plan = plan_streams([a for a in SPANS if a.repetitions[:1] != () or a == INTACT][:11], 4)
    n_repeated = sum(j - i for i in range(4) for j in range(i + 1, 5))
    n_behind = sum(4 - j for i in range(4) for j in range(i + 1, 5))
    assert plan.layer_passes == 4 + n_repeated + n_behind


@pytest.mark.parametrize(("change_text", "message", "where"), golden("refused_parts"))
def test_what_a_model_has_not_is_refused_by_name(change_text, message, where):
    name, change = change_text.split(" | ")
    family, _, settings = name.partition(" ")
    make = tiny_mixture if family in MIXTURES | EXPERTS_BESIDE else make_registered
    engine = engine_of(make(family, **json.loads(settings or "{}")))
    ablation = Ablation.parse(change)
    with pytest.raises(TrackerError, match=message):
        engine.ablate(ablation)
    if where == "sweep":
        with pytest.raises(TrackerError, match=message):
            engine.score(make_documents(1), [INTACT, ablation])


def test_a_head_of_quantised_weights_is_refused():
    model = tiny_model("llama")
    projection = find_layers(model)[1].self_attn.o_proj
    projection.weight = torch.nn.Parameter(projection.weight.to(torch.int8), requires_grad=False)
    engine = engine_of(tiny_model("llama"))
    quantised = engine_of(model)
    quantised.anatomy.parts[Heads] = engine.anatomy.find(Heads)
    with pytest.raises(CellError, match="is quantised, so its columns cannot be set"):
        quantised.ablate(remove_heads(1, 0))


def test_neurons_of_weights_that_cannot_be_read_are_refused():
    model = tiny_model("llama")
    find_layers(model)[3].mlp.up_proj.weight.untyped_storage().resize_(0)
    with pytest.raises(ModelError, match="are offloaded, so neurons cannot be sorted"):
        engine_of(model).anatomy.find(Neurons)
    model = tiny_model("llama")
    engine = engine_of(model)
    projection = engine.anatomy.find(Neurons)[1].maps["mlp.up_proj"].module
    projection.weight = torch.nn.Parameter(projection.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(CellError, match="are quantised, so neurons cannot be sorted"):
        engine.ablate(Ablation.parse("neuron:1.0"))

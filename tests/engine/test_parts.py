"""Heads that are taken out and stretches that are passed again, against models changed by hand."""

from __future__ import annotations

import json

import pytest
import torch

from tests.conftest import golden
from tests.helpers.engines import agree_with_changed, engine_of, make_documents, score_ways
from tests.helpers.families import tiny_model
from tests.helpers.mixtures import MIXTURES, mixture
from tests.helpers.mixtures import UNDIVIDED as EXPERTS_BESIDE
from tests.helpers.registry import Variant, make_registered, tiny
from tests.helpers.truth import deeper, without_heads
from tracker.core.changes import INTACT, Ablation, Change
from tracker.core.errors import CellError, ModelError, TrackerError
from tracker.engine.forward.streams import plan_streams
from tracker.engine.scoring.model import DEPTH_ONLY, FULL, PLAIN
from tracker.engine.selfcheck.miniature_check import check_miniature
from tracker.models.layers import find_layers
from tracker.models.parts.heads import Heads

PROJECTIONS = {
    "llama": "self_attn.o_proj",
    "qwen3": "self_attn.o_proj",
    "gemma2": "self_attn.o_proj",
    "gemma3": "self_attn.o_proj",
    "phi3": "self_attn.o_proj",
    "gpt2": "attn.c_proj",
    "gpt_neox": "attention.dense",
    "opt": "self_attn.out_proj",
    "deepseek_v3": "self_attn.o_proj",
}
"""Of some families, by name: the map that all heads of an attention pass."""
UNDIVIDED = {
    "gemma4_text": ("self_attn.o_proj", {"enable_moe_block": True}),
    "granitemoehybrid": (
        "self_attn.o_proj",
        {"layer_types": ["linear_attention", "full_attention"] * 2},
    ),
    "nemotron_h": ("mixer.o_proj", {}),
    "minimax": ("self_attn.o_proj", {}),
    "zaya": ("self_attn.o_proj", {}),
    "dbrx": ("norm_attn_norm.attn.out_proj", {}),
    "falcon_h1": ("self_attn.o_proj", {}),
    "zamba2": ("shared_transformer.self_attn.o_proj", {}),
}
"""Families whose layers are no attention and MLP that add to one stream: that map, and settings."""


def heads(layer, *numbers, component="head"):
    """Take some heads of a layer out."""
    return Ablation.of(*(Change.parse(f"{component}:{layer}.{number}") for number in numbers))


HEADS = [
    INTACT,
    *(heads(layer, number) for layer in (0, 3) for number in (0, 3)),
    heads(2, 1, 3),
    *(heads(layer, group, component="kv_head") for layer in (0, 2) for group in (0, 1)),
]
STRETCHES = [
    INTACT,
    *(Ablation.parse(f"repeat:{i}-{j - 1}") for i in range(4) for j in range(i + 1, 5)),
    Ablation.parse("repeat3:1-2"),
    Ablation.parse("layer:0+repeat:2-3"),
    Ablation.parse("layer:3"),
]


def _agree(model, ablations, make, sharings=(FULL, DEPTH_ONLY, PLAIN)):
    """Hold what is shared, however much, against models that are changed by `make`."""
    agree_with_changed(score_ways(model, sharings, ablations), ablations, make)


@pytest.mark.parametrize("family", PROJECTIONS)
def test_a_model_without_a_head_is_one_whose_projection_ignores_it(family):
    model = tiny_model(family)
    alone = HEADS
    groups = getattr(model.config.get_text_config(), "num_key_value_heads", 4)
    if groups == 4 or family == "deepseek_v3":  # whose heads share nothing that is kept
        alone = [a for a in alone if all(part.component == "head" for part in a.parts)]
    _agree(model, alone, lambda ablation: without_heads(model, ablation, PROJECTIONS[family]))


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
        *(heads(layer, number) for layer in {layers[0], layers[-1]} for number in (0, 3)),
        heads(layers[-1], 1, 3),
        heads(layers[0], 1, component="kv_head"),
    ]
    # The layers of Zaya hand each other the state of their routers.
    sharings = (PLAIN,) if family == "zaya" else (DEPTH_ONLY, PLAIN)
    _agree(model, ablations, lambda ablation: without_heads(model, ablation, path), sharings)
    with pytest.raises(ModelError, match=r"attention and MLP of .* cannot be told apart"):
        engine_of(model).score(make_documents(1), [*ablations, Ablation.parse("mlp:1")])


def test_streams_pass_a_layer_whole_that_is_not_divided():
    ablations = [INTACT, *(heads(1, number) for number in range(4))]
    plan = plan_streams(ablations, 4, divided=False)
    assert plan.attention_passes == plan.mlp_passes == 4 + 4 * 3
    model = Variant("gemma4_text", "plain", tiny("gemma4_text") | UNDIVIDED["gemma4_text"][1])
    engine = engine_of(model.model())
    assert engine.plan(ablations) == plan
    assert check_miniature(engine, ablations, (), blank=False).sharing == FULL
    with pytest.raises(ModelError, match="cannot be told apart"):
        engine.without(Ablation.parse("mlp:1"))


@pytest.mark.parametrize("family", ["llama", "gemma3", "mixtral"])
def test_a_model_that_passes_layers_again_is_a_deeper_one(family):
    model = tiny_model(family)
    _agree(model, STRETCHES, lambda ablation: deeper(family, model, ablation))


def test_what_parts_cost_is_what_they_pass():
    # Four heads share the attention of layer 1: only its MLP and what is above are passed again.
    plan = plan_streams([INTACT, *(heads(1, number) for number in range(4))], 4)
    assert (plan.attention_passes, plan.mlp_passes) == (4 + 4 * 2, 4 + 4 * 3)
    # All stretches of L layers: each leaves the baseline behind its last layer.
    plan = plan_streams([a for a in STRETCHES if a.repeated[:1] != () or a == INTACT][:11], 4)
    again = sum(j - i for i in range(4) for j in range(i + 1, 5))
    behind = sum(4 - j for i in range(4) for j in range(i + 1, 5))
    assert plan.layer_passes == 4 + again + behind


@pytest.mark.parametrize(("asked", "said", "where"), golden("refused_parts"))
def test_what_a_model_has_not_is_refused_by_name(asked, said, where):
    name, change = asked.split(" | ")
    family, _, settings = name.partition(" ")
    make = mixture if family in MIXTURES | EXPERTS_BESIDE else make_registered
    engine, ablation = (
        engine_of(make(family, **json.loads(settings or "{}"))),
        Ablation.parse(change),
    )
    with pytest.raises(TrackerError, match=said):
        engine.without(ablation)
    if where == "sweep":
        with pytest.raises(TrackerError, match=said):
            engine.score(make_documents(1), [INTACT, ablation])


def test_a_head_of_quantised_weights_is_refused():
    model = tiny_model("llama")
    projection = find_layers(model)[1].self_attn.o_proj
    projection.weight = torch.nn.Parameter(projection.weight.to(torch.int8), requires_grad=False)
    engine = engine_of(tiny_model("llama"))
    quantised = engine_of(model)
    quantised.anatomy.parts[Heads] = engine.anatomy.find(Heads)
    with pytest.raises(CellError, match="is quantised, and has no columns of numbers"):
        quantised.without(heads(1, 0))

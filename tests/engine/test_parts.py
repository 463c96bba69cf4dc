"""Heads that are taken out and stretches that are passed again, against models changed by hand."""

from __future__ import annotations

import copy
from collections import Counter
from contextlib import suppress

import pytest
import torch

from tests.helpers.engines import (
    agree_with_changed,
    asking,
    engine_of,
    make_documents,
    same,
    score_ways,
)
from tests.helpers.families import tiny_model
from tests.helpers.registry import Variant, families, tiny
from tests.helpers.truth import deeper
from tests.tools import census
from tracker.core.changes import INTACT, Ablation, Change
from tracker.core.errors import CellError, ModelError, TrackerError
from tracker.engine.forward.streams import plan_streams
from tracker.engine.scoring.model import DEPTH_ONLY, FULL, PLAIN
from tracker.engine.selfcheck.miniature_check import check_miniature
from tracker.models.layers import find_layers
from tracker.models.parts.anatomy import LayerAnatomy
from tracker.models.parts.experts import Experts
from tracker.models.parts.heads import Heads, _attention
from tracker.models.sources import parts_of

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
    *(heads(layer, number) for layer in (0, 1, 3) for number in range(4)),
    heads(2, 1, 3),
    *(heads(layer, group, component="kv_head") for layer in (0, 2) for group in (0, 1)),
    Ablation.parse("layer:1+head:2.0"),
    Ablation.parse("attention:2"),
    Ablation.parse("mlp:2"),
    Ablation.parse("int4_row:2"),
]
STRETCHES = [
    INTACT,
    *(Ablation.parse(f"repeat:{i}-{j - 1}") for i in range(4) for j in range(i + 1, 5)),
    Ablation.parse("repeat3:1-2"),
    Ablation.parse("layer:0+repeat:2-3"),
    Ablation.parse("layer:3"),
]


def _without_heads(model, path, ablation):
    """Zero the columns of heads in a copy's weights, by the configuration's numbers."""
    twin = copy.deepcopy(model)
    config = twin.config.get_text_config()
    for part in ablation.parts:
        projection = find_layers(twin)[part.layer].get_submodule(path)
        # Zamba 2's layers share it.
        projection.weight = torch.nn.Parameter(projection.weight.clone(), requires_grad=False)
        weight = projection.weight.T if path == "attn.c_proj" else projection.weight
        width = weight.shape[1] // config.num_attention_heads
        groups = getattr(config, "num_key_value_heads", config.num_attention_heads)
        each = config.num_attention_heads // groups if part.component == "kv_head" else 1
        first = part.number * each * width
        weight.data[:, first : first + each * width] = 0
    return twin


def _agree(model, ablations, make, sharings=(FULL, DEPTH_ONLY, PLAIN)):
    """Hold what is shared, however much, against models that are changed by `make`."""
    agree_with_changed(score_ways(model, sharings, ablations), ablations, make)


@pytest.mark.parametrize("family", PROJECTIONS)
def test_a_model_without_a_head_is_one_whose_projection_ignores_it(family):
    model = tiny_model(family)
    alone = [
        a
        for a in HEADS
        if not (a.removed() or a.removed("attention") or a.removed("mlp") or a.rounded)
    ]
    groups = getattr(model.config.get_text_config(), "num_key_value_heads", 4)
    if groups == 4 or family == "deepseek_v3":  # whose heads share nothing that is kept
        alone = [a for a in alone if all(part.component == "head" for part in a.parts)]
    _agree(model, alone, lambda ablation: _without_heads(model, PROJECTIONS[family], ablation))


@pytest.mark.parametrize("family", UNDIVIDED)
def test_a_head_is_taken_out_wherever_its_attention_ends(family):
    """Was refused, since the attention and the MLP of a layer cannot be told apart."""
    path, more = UNDIVIDED[family]
    model = Variant(family, "plain", tiny(family) | more).model()
    layers = [
        number
        for number, layer in enumerate(find_layers(model))
        if any(name == path for name, _ in layer.named_modules())
    ]
    ablations = [
        INTACT,
        *(heads(layer, number) for layer in {layers[0], layers[-1]} for number in range(4)),
        heads(layers[-1], 1, 3),
        heads(layers[0], 1, component="kv_head"),
    ]
    # The layers of Zaya hand each other the state of their routers.
    sharings = (PLAIN,) if family == "zaya" else (DEPTH_ONLY, PLAIN)
    _agree(model, ablations, lambda ablation: _without_heads(model, path, ablation), sharings)
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


@pytest.mark.parametrize("sharing", [FULL, DEPTH_ONLY], ids=["full", "depth"])
def test_heads_share_a_layer_with_all_else_that_is_done_to_it(sharing):
    model = tiny_model("llama")
    engine = engine_of(model, sharing, row_tokens=40)
    together = engine.score(make_documents(3), HEADS)
    alone = engine_of(model, PLAIN).score(make_documents(3), HEADS)
    same(together, alone)


@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen2", "mixtral"])
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


def test_the_check_on_a_miniature_finds_parts_exact():
    for ablations in (HEADS, STRETCHES):
        verdict = check_miniature(engine_of("llama"), ablations, (), blank=False)
        assert (verdict.sharing, verdict.lost) == (FULL, None)


def test_the_page_lists_the_families_whose_heads_or_experts_are_refused():
    rows = [line.split("|") for line in census.IN_SHORT.read_text().splitlines()]
    listed = {"heads": {}, "experts": {}}
    for _, part, why, names, _ in (row for row in rows if len(row) == 5):
        if part.strip() in listed:
            listed[part.strip()] |= dict.fromkeys(names.strip().split(", "), why.strip())
    refused, calls = {"heads": {}, "experts": set()}, Counter()

    def count(module, query, *_, **__):
        calls[module] += 1
        return query.transpose(1, 2).contiguous(), None

    more = {"doge": {"is_moe": True}} | {name: of[1] for name, of in UNDIVIDED.items()}
    for family in families():
        model = Variant(family, "plain", tiny(family) | more.get(family, {})).model()
        try:
            anatomy = LayerAnatomy.of(model)
        except ModelError:
            continue
        layers = anatomy.layers
        name, config = family.removesuffix("_text"), model.config.get_text_config()
        if parts_of(config).head and not any(anatomy.find(Heads)):
            calls.clear()
            with _attention(model, count), suppress(RuntimeError):
                model(torch.arange(1, 7)[None], use_cache=False)
            refused["heads"][name] = sum(calls[module] for module in layers[-1].modules())
        paths = [path for path, _ in layers[-1].named_modules()]
        holds = any("expert" in path for path in paths) or family == "doge"
        if holds and not any(anatomy.find(Experts)):
            refused["experts"].add(name)
    assert {*listed["experts"]} == refused["experts"]
    assert {*listed["heads"]} == {*refused["heads"]}
    for name, times in refused["heads"].items():
        why = listed["heads"][name]
        assert ("does not call" in why, "several times" in why) == (not times, times > 1), name


@pytest.mark.parametrize(
    ("family", "part", "said"),
    [
        (
            "llama",
            Change.parse("head:1.4"),
            "layer 1 of .* has 4 heads, 0 to 3; leave 4 out of 'head'",
        ),
        ("llama", Change.parse("kv_head:1.2"), "has 2 groups of heads, 0 to 1"),
        ("mamba", Change.parse("head:1.0"), "component"),
        (
            "bloom",
            Change.parse("head:1.0"),
            r"no attention heads .* \(needed: one call of transformers'",
        ),
        (
            "mpt",
            Change.parse("head:1.0"),
            r"no attention heads .* \(needed: one call of transformers'",
        ),
    ],
)
def test_what_has_no_such_head_is_refused_by_name(family, part, said):
    engine = engine_of(tiny_model(family))
    with pytest.raises(TrackerError, match=said):
        engine.without(Ablation.of(part))
    if family == "llama":
        with pytest.raises(TrackerError, match=said):
            engine.score(make_documents(1), [INTACT, Ablation.of(part)])


def test_a_head_of_quantised_weights_is_refused():
    model = tiny_model("llama")
    projection = find_layers(model)[1].self_attn.o_proj
    projection.weight = torch.nn.Parameter(projection.weight.to(torch.int8), requires_grad=False)
    engine = engine_of(tiny_model("llama"))
    quantised = engine_of(model)
    quantised.anatomy.parts[Heads] = engine.anatomy.find(Heads)
    with pytest.raises(CellError, match="is quantised, and has no columns of numbers"):
        quantised.without(heads(1, 0))


def test_runs_name_what_they_do():
    def run(**said):
        return Change.of_fields(layer=3, **said)

    named = {
        run(component="head", number=1): ("head:3.1", "layer 3 head 1"),
        run(component="kv_head", number=0): ("kv_head:3.0", "layer 3 kv_head 0"),
        run(intervention="repeat"): ("repeat:3", "repeat 3"),
        run(intervention="repeat", span=4): ("repeat:3-6", "repeat 3–6"),
        run(intervention="repeat", span=2, repeats=3): ("repeat3:3-4", "repeat 3 times: 3–4"),
    }
    for each, (name, label) in named.items():
        assert (Ablation.of(each, removed=()).name, each.label()) == (name, label)
    asked = asking(((5, 6), (7,)))
    assert len(engine_of("llama").score([asked], [INTACT, heads(0, 0)])[0].responses) == 2

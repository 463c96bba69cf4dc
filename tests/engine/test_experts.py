"""Experts that are taken out, against models of a smaller configuration or with weights of zero."""

from __future__ import annotations

import copy
import math
from functools import partial

import pytest
import torch

from tests.helpers.engines import (
    assert_changed_scores,
    assert_same_scores,
    engine_of,
    gold_tokens,
    make_document,
    make_documents,
    score_sharings,
)
from tests.helpers.mixtures import (
    MIXTURES,
    UNDIVIDED_MIXTURES,
    expert_ablation,
    expert_outputs,
    tiny_mixture,
    without_experts,
)
from tests.helpers.registry import make_registered
from tracker.engine.forward.streams import plan_streams
from tracker.engine.observers.layer_proxies import measure_expert_load
from tracker.engine.scoring import sweep
from tracker.engine.scoring.model import DEPTH_ONLY, FULL, PLAIN
from tracker.models.layers import find_layers
from tracker.schema.changes import INTACT, Ablation, Change

RECURRENT = ("jamba", "lfm2_moe", "granitemoehybrid", "nemotron_h", "minimax")


def make_ablations(model):
    """List what is taken out of the layers that have experts."""
    expert_layers = [
        i
        for i, layer in enumerate(find_layers(model))
        if any(p.ndim == 3 and len(p) == 5 for p in layer.parameters())
    ]
    first, last = expert_layers[0], expert_layers[-1]
    return [
        INTACT,
        *(expert_ablation(layer, number) for layer in (first, last) for number in (0, 4)),
        expert_ablation(first, 1, 3),
        Ablation.parse(f"expert:{first}.2+expert:{last}.0"),
    ]


@pytest.mark.parametrize("family", MIXTURES | UNDIVIDED_MIXTURES)
def test_a_model_without_an_expert_is_one_that_never_had_it(family):
    model = tiny_mixture(family)
    ablations = make_ablations(model)
    sharings = [FULL, DEPTH_ONLY, PLAIN]
    if family in RECURRENT:  # no tree of tokens
        sharings = [DEPTH_ONLY, PLAIN]
    if family == "deepseek_v4":  # its attention holds one text
        sharings = [PLAIN]
    ways = score_sharings(model, sharings, ablations)
    change = partial(without_experts, model, family)
    expected = assert_changed_scores(ways, ablations, change, tolerance=1e-3)
    intact, *changed = (answers[:3] for answers in expected[:5])
    moves = [abs(x[0][0] - y[0][0]) for xs in changed for x, y in zip(xs, intact, strict=True)]
    assert sum(move > 0.01 for move in moves) > len(moves) / 3


@pytest.mark.parametrize("family", ["gpt_oss", "mixtral", "olmoe"])
def test_a_row_that_sends_nothing_to_an_expert_is_read_once(family, monkeypatch, spy):
    model = tiny_mixture(family, 12)
    ablations = [INTACT, *(expert_ablation(layer, n) for layer in range(4) for n in range(12))]
    streams = spy(sweep, "launch_row", lambda parts, plan, *_: plan.n_streams)
    # Short texts, a row each.
    documents = [make_document(((5, 6 + n, 7), (8,)), index=n) for n in range(3)]
    engine = engine_of(model, DEPTH_ONLY)
    scores = engine.score(documents, ablations)
    monkeypatch.setattr(sweep, "MIN_EXPERT_ABLATIONS", 100)
    expected = engine.score(documents, ablations)
    assert_same_scores(scores, expected)
    shared_counts, separate_counts = streams[:3], streams[3:]
    assert separate_counts == [len(ablations)] * 3
    # Where all that are left share the weights, even those that were not chosen count.
    assert shared_counts == separate_counts if family == "olmoe" else max(shared_counts) < 40


TOGETHER = {
    "mixtral": (
        "baseline expert:1.0 expert:1.4 head:1.0 expert:1.0+head:1.0 attention:1 mlp:1 layer:1 "
        "layer:0+expert:1.3 kv_head:1.1 layer:0+head:1.2 int4_row:1.mlp.experts.down_proj "
        "int4_row:1.mlp int4_row:1.attention int4_row:1"
    ),
    "deepseek_v3": (
        "baseline shared_expert:2 shared_expert:2+expert:2.0+head:2.1 expert:2.0 mlp:2 "
        "layer:1+shared_expert:2"
    ),
}
"""Everything that is done to one layer of a mixture."""


@pytest.mark.parametrize("sharing", [FULL, DEPTH_ONLY], ids=["full", "depth"])
@pytest.mark.parametrize("family", TOGETHER)
def test_experts_share_a_layer_with_all_else_that_is_done_to_it(family, sharing):
    model = tiny_mixture(family)
    ablations = [Ablation.parse(name) for name in TOGETHER[family].split()]
    scores = engine_of(model, sharing, row_tokens=40).score(make_documents(3), ablations)
    expected = engine_of(model, PLAIN).score(make_documents(3), ablations)
    assert_same_scores(scores, expected)


def test_experts_of_a_layer_share_its_attention_and_have_an_mlp_each():
    plan = plan_streams([INTACT, *(expert_ablation(1, number) for number in range(5))], 4)
    assert (plan.attention_passes, plan.mlp_passes) == (4 + 5 * 2, 4 + 5 * 3)


def plain_load(model, document):
    """Add up what each expert of each layer does with a text, token by token, expert by expert."""
    loads = {}
    for layer, outputs in expert_outputs(model, gold_tokens(document)).items():
        sums = loads[layer] = torch.zeros(2, 5, dtype=torch.float64)
        for expert, gate, output in outputs:
            sums[0, expert] += gate * output.norm()
            sums[1, expert] += 1
    return loads


@pytest.mark.parametrize("family", [*MIXTURES, "gemma4_text", "granitemoehybrid", "minimax"])
def test_what_an_expert_is_sent_and_what_it_makes_of_it(family):
    model = tiny_mixture(family)
    document = make_documents(1)[0]
    expected = plain_load(model, document)
    parts = [Change.parse(f"expert:{layer}.{number}") for layer in expected for number in range(5)]
    loads = measure_expert_load(engine_of(model), document, parts)
    for part in parts:
        saliency, count = expected[part.layer][:, part.number].tolist()
        assert loads[part] == (pytest.approx(saliency, rel=1e-4), count)
    n_sent = sum(count for _, count in loads.values())
    assert n_sent == 2 * len(expected) * len(gold_tokens(document))


def test_experts_whose_outputs_are_not_added_up_cannot_be_told_apart():
    model = tiny_mixture("mixtral")
    experts_module = find_layers(model)[1].mlp.experts

    def squared(module, state, choice, weights):
        return state * weights.square().sum(-1, keepdim=True)

    experts_module.__class__ = type("Squared", (type(experts_module),), {"forward": squared})
    parts = [Change.parse(f"expert:1.{number}") for number in range(5)]
    loads = measure_expert_load(engine_of(model), make_documents(1)[0], parts)
    assert sum(count for _, count in loads.values()) > 0
    assert all(math.isnan(saliency) == bool(count) for saliency, count in loads.values())


SHARED = {
    **dict.fromkeys(("deepseek_v3", "ernie4_5_moe", "glm4_moe"), "mlp.shared_experts"),
    **dict.fromkeys(("qwen2_moe", "qwen3_next"), "mlp.shared_expert"),
    **{"llama4_text": "feed_forward.shared_expert", "hunyuan_v1_moe": "mlp.shared_mlp"},
}
"""Families with shared experts, and what these are called in a layer."""
NO_TREE = ("qwen2_moe", "llama4_text", "qwen3_next")
"""Those that share nothing over tokens: by their masks or chunks, or since they are recurrent."""


def remove_shared(*layers):
    """Take the shared experts of some layers out."""
    return Ablation.from_changes(Change("shared_expert", layers))


def without_shared(model, family, ablation):
    """Zero the down projections of shared experts in a copy's weights."""
    twin = copy.deepcopy(model)
    for layer in ablation.removed("shared_expert"):
        for parameter in (
            find_layers(twin)[layer].get_submodule(SHARED[family]).down_proj.parameters()
        ):
            parameter.data.zero_()
    return twin


@pytest.mark.parametrize("family", SHARED)
def test_a_model_without_a_shared_expert_is_one_whose_shared_expert_gives_zeros(family):
    model = make_registered(family)
    layers = [
        layer_number
        for layer_number, layer in enumerate(find_layers(model))
        if any(path == SHARED[family] for path, _ in layer.named_modules())
    ]
    ablations = [INTACT, *map(remove_shared, layers), remove_shared(layers[0], layers[-1])]
    sharings = [DEPTH_ONLY, PLAIN] if family in NO_TREE else [FULL, DEPTH_ONLY, PLAIN]
    ways = score_sharings(model, sharings, ablations)
    change = partial(without_shared, model, family)
    intact, *changed = assert_changed_scores(ways, ablations, change, tolerance=1e-3)
    assert all(abs(answers[0][0][0] - intact[0][0][0]) > 1e-3 for answers in changed)

"""Experts that are taken out, against models of a smaller configuration or with weights of zero."""

from __future__ import annotations

import copy
import math
from contextlib import ExitStack
from functools import partial

import pytest
import torch

from tests.helpers.engines import (
    agree_with_changed,
    asking,
    engine_of,
    gold_tokens,
    make_documents,
    same,
    score_ways,
)
from tests.helpers.mixtures import MIXTURES, UNDIVIDED, experts, mixture, smaller
from tests.helpers.registry import make_registered
from tracker.core.changes import INTACT, Ablation, Change
from tracker.engine.forward.streams import plan_streams
from tracker.engine.observers.layer_proxies import expert_load
from tracker.engine.scoring import sweep
from tracker.engine.scoring.model import DEPTH_ONLY, FULL, PLAIN
from tracker.models.layers import find_layers

RECURRENT = ("jamba", "lfm2_moe", "granitemoehybrid", "nemotron_h", "minimax")


def asked_of(model):
    """List what is taken out of the layers that have experts."""
    there = [
        i
        for i, layer in enumerate(find_layers(model))
        if any(p.ndim == 3 and len(p) == 5 for p in layer.parameters())
    ]
    first, last = there[0], there[-1]
    return [
        INTACT,
        *(experts(layer, number) for layer in (first, last) for number in (0, 4)),
        experts(first, 1, 3),
        Ablation.parse(f"expert:{first}.2+expert:{last}.0"),
    ]


@pytest.mark.parametrize("family", MIXTURES | UNDIVIDED)
def test_a_model_without_an_expert_is_one_that_never_had_it(family):
    model = mixture(family)
    asked = asked_of(model)
    sharings = [FULL, DEPTH_ONLY, PLAIN]
    if family in RECURRENT:  # no tree of tokens
        sharings = [DEPTH_ONLY, PLAIN]
    if family == "deepseek_v4":  # its attention holds one text
        sharings = [PLAIN]
    ways = score_ways(model, sharings, asked)
    right = agree_with_changed(ways, asked, partial(smaller, model, family), within=1e-3)
    moved = [abs(right[n][d][0][0] - right[0][d][0][0]) for n in range(1, 5) for d in range(3)]
    assert sum(move > 0.01 for move in moved) > len(moved) / 3


@pytest.mark.parametrize("family", ["gpt_oss", "mixtral", "olmoe"])
def test_a_row_that_sends_nothing_to_an_expert_is_read_once(family, monkeypatch, spy):
    model = mixture(family, 12)
    asked = [INTACT, *(experts(layer, number) for layer in range(4) for number in range(12))]
    streams = spy(sweep, "launch_row", lambda parts, plan, *_: plan.streams)
    # Short texts, a row each.
    documents = [asking(((5, 6 + n, 7), (8,)), index=n) for n in range(3)]
    engine = engine_of(model, DEPTH_ONLY)
    ours = engine.score(documents, asked)
    monkeypatch.setattr(sweep, "MIN_EXPERT_ABLATIONS", 100)
    theirs = engine.score(documents, asked)
    same(ours, theirs)
    shared, alone = streams[:3], streams[3:]
    assert alone == [len(asked)] * 3
    # Where all that are left share the weights, even those that were not chosen count.
    assert shared == alone if family == "olmoe" else max(shared) < 40


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
    model = mixture(family)
    asked = [Ablation.parse(name) for name in TOGETHER[family].split()]
    together = engine_of(model, sharing, row_tokens=40).score(make_documents(3), asked)
    alone = engine_of(model, PLAIN).score(make_documents(3), asked)
    same(together, alone)


def test_experts_of_a_layer_share_its_attention_and_have_an_mlp_each():
    plan = plan_streams([INTACT, *(experts(1, number) for number in range(5))], 4)
    assert (plan.attention_passes, plan.mlp_passes) == (4 + 5 * 2, 4 + 5 * 3)


def plain_load(model, document):
    """Add up what each expert of each layer does with a text, token by token, expert by expert."""
    tokens, found = gold_tokens(document), {}

    def note(layer, module, args, kwargs):
        state, choice, weights = (*args, *kwargs.values())
        sums = found[layer] = torch.zeros(2, 5, dtype=torch.float64)
        for x, chosen, gates in zip(state, choice.tolist(), weights.tolist(), strict=True):
            for expert, gate in zip(chosen, gates, strict=True):
                sums[0, expert] += gate * output(module, expert, x).norm()
                sums[1, expert] += 1

    def output(module, expert, x):
        into, out = module.gate_up_proj[expert], module.down_proj[expert]
        if hasattr(module, "alpha"):  # GPT-OSS
            both = x @ into + module.gate_up_proj_bias[expert]
            gate, up = both[::2].clamp(max=module.limit), both[1::2]
            hidden = (up.clamp(-module.limit, module.limit) + 1) * gate
            hidden = hidden * torch.sigmoid(module.alpha * gate)
            return hidden @ out + module.down_proj_bias[expert]
        gate, up = (into @ x).chunk(2)
        return out @ (module.act_fn(gate) * up)

    with ExitStack() as stack, torch.inference_mode():
        for place, layer in enumerate(find_layers(model)):
            for module in layer.modules():
                if any(p.ndim == 3 and len(p) == 5 for p in module.parameters(recurse=False)):
                    hook = partial(note, place)
                    stack.enter_context(module.register_forward_pre_hook(hook, with_kwargs=True))
        model(torch.tensor([tokens]), use_cache=False)
    return found


@pytest.mark.parametrize("family", [*MIXTURES, "gemma4_text", "granitemoehybrid", "minimax"])
def test_what_an_expert_is_sent_and_what_it_makes_of_it(family):
    model = mixture(family)
    document = make_documents(1)[0]
    right = plain_load(model, document)
    parts = [Change.parse(f"expert:{layer}.{number}") for layer in right for number in range(5)]
    found = expert_load(engine_of(model), document, parts)
    for part in parts:
        saliency, count = right[part.layer][:, part.number].tolist()
        assert found[part] == (pytest.approx(saliency, rel=1e-4), count)
    sent = sum(count for _, count in found.values())
    assert sent == 2 * len(right) * len(gold_tokens(document))


def test_experts_whose_outputs_are_not_added_up_cannot_be_told_apart():
    model = mixture("mixtral")
    held = find_layers(model)[1].mlp.experts

    def squared(module, state, choice, weights):
        return state * weights.square().sum(-1, keepdim=True)

    held.__class__ = type("Squared", (type(held),), {"forward": squared})
    parts = [Change.parse(f"expert:1.{number}") for number in range(5)]
    found = expert_load(engine_of(model), make_documents(1)[0], parts)
    assert sum(count for _, count in found.values()) > 0
    assert all(math.isnan(saliency) == bool(count) for saliency, count in found.values())


SHARED = {
    "deepseek_v3": "mlp.shared_experts",
    "qwen2_moe": "mlp.shared_expert",
    "ernie4_5_moe": "mlp.shared_experts",
    "llama4_text": "feed_forward.shared_expert",
    "hunyuan_v1_moe": "mlp.shared_mlp",
    "glm4_moe": "mlp.shared_experts",
    "qwen3_next": "mlp.shared_expert",
}
"""Families with shared experts, and what these are called in a layer."""
NO_TREE = ("qwen2_moe", "llama4_text", "qwen3_next")
"""Those that share nothing over tokens: by their masks or chunks, or since they are recurrent."""


def shared(*layers):
    """Take the shared experts of some layers out."""
    return Ablation.of(Change("shared_expert", layers))


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
    there = [
        place
        for place, layer in enumerate(find_layers(model))
        if any(path == SHARED[family] for path, _ in layer.named_modules())
    ]
    asked = [INTACT, *map(shared, there), shared(there[0], there[-1])]
    sharings = [DEPTH_ONLY, PLAIN] if family in NO_TREE else [FULL, DEPTH_ONLY, PLAIN]
    ways = score_ways(model, sharings, asked)
    right = agree_with_changed(ways, asked, partial(without_shared, model, family), within=1e-3)
    assert all(abs(right[n][0][0][0] - right[0][0][0][0]) > 1e-3 for n in range(1, len(asked)))

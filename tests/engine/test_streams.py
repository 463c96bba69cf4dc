from __future__ import annotations

import itertools

import pytest
import torch

from tests.helpers.ablations import parse_ablations, single_layers
from tests.helpers.families import tiny_model
from tracker.engine.forward.layer import ForwardPass
from tracker.engine.forward.streams import plan_streams
from tracker.models.parts.anatomy import LayerAnatomy
from tracker.models.parts.sublayers import Sublayers
from tracker.schema.changes import INTACT, Ablation


def count_passes(ablations, layers):
    """Return a second, naive count: at each layer, the distinct histories that do not skip it."""
    histories = {
        (layer, tuple(i for i in ablation.removed() if i < layer))
        for layer in range(layers)
        for ablation in ablations
        if layer not in ablation.removed()
    }
    return len(histories)


def test_any_sets_are_shared_as_far_as_they_agree():
    sets = [()] + [s for n in (1, 2, 3) for s in itertools.combinations(range(6), n)]
    ablations = [Ablation.from_changes(removed=s) for s in reversed(sets)]
    plan = plan_streams(ablations, 6)
    assert plan.layer_passes == count_passes(ablations, 6)
    assert plan.n_streams == len(ablations)
    assert plan.final_streams[-1] == 0


SUBLAYERS = parse_ablations(
    "baseline layer:0 layer:1 layer:2 layer:3 attention:0 attention:1 attention:2 attention:3 "
    "mlp:0 mlp:1 mlp:2 mlp:3 attention:0,1 layer:1+mlp:2"
)


def test_sublayers_share_what_is_before_them():
    """With its MLP removed, a layer's attention is its parent's; with its attention, none."""
    plan = plan_streams([INTACT, Ablation.parse("attention:1"), Ablation.parse("mlp:1")], 3)
    assert [step.attention_sources for step in plan.steps] == [(0,), (0, None, 0), (0, 1, 2)]
    assert [step.mlp_sources for step in plan.steps] == [(0,), (0, 1, None), (0, 1, 2)]
    assert (plan.attention_passes, plan.mlp_passes) == (1 + 1 + 3, 1 + 2 + 3)
    ablations = [
        INTACT,
        *(Ablation.parse(f"{c}:{x}") for c in ("attention", "mlp") for x in range(30)),
    ]
    assert plan_streams(ablations, 30).layer_passes < 30 * 31


WHOLE = parse_ablations("baseline layer:0 layers:1,2 layers:1,3 layer:3")


@pytest.mark.parametrize("ablations", [SUBLAYERS, SUBLAYERS[::-1], WHOLE])
def test_the_plan_is_what_is_executed(ablations):
    model = tiny_model("llama")
    layers = model.model.layers
    plan = plan_streams(ablations, len(layers))
    anatomy = LayerAnatomy.of(model)
    anatomy.find(Sublayers)
    attentions, mlps = [], []
    for layer in layers:
        layer.self_attn.o_proj.register_forward_hook(lambda *call: attentions.append(len(call[-1])))
        layer.mlp.down_proj.register_forward_hook(lambda *call: mlps.append(len(call[-1])))
    with ForwardPass(layers, plan, anatomy).install():
        model.model(torch.randint(0, 90, (1, 7)), use_cache=False)
    assert (sum(attentions), sum(mlps)) == (plan.attention_passes, plan.mlp_passes)


def test_the_model_is_what_it_was_also_after_an_exception():
    model = tiny_model("llama")
    ids = torch.randint(0, 90, (2, 9))
    old_logits = model(ids).logits
    state = {name: value.clone() for name, value in model.state_dict().items()}
    plan = plan_streams(single_layers((0, 1, 2, 3)), 4)

    def fork():
        with ForwardPass(model.model.layers, plan).install():
            model.model(ids[:1], use_cache=False)

    def fail(*args):
        raise RuntimeError("in the middle")

    fork()
    with (
        model.model.layers[2].register_forward_hook(fail),
        pytest.raises(RuntimeError, match="in the middle"),
    ):
        fork()
    assert torch.equal(model(ids).logits, old_logits)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert not any("forward" in vars(layer) for layer in model.model.layers)

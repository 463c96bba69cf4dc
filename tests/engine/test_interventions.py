"""Layers that are replaced rather than removed, shared every way, against models really changed."""

from __future__ import annotations

import copy
import random
from functools import partial

import pytest
import torch
from torch import nn

from tests.helpers.engines import (
    agree_with_changed,
    engine_of,
    make_documents,
    passed,
    rounded_rows,
)
from tests.helpers.families import tiny_model
from tracker.core.changes import INTACT, Ablation
from tracker.core.errors import CellError
from tracker.engine.fitting import first_tokens, fit
from tracker.engine.forward.layer import RandomReplacement
from tracker.engine.forward.streams import plan_streams
from tracker.engine.scoring import sweep
from tracker.engine.scoring.model import DEPTH_ONLY, FULL, PLAIN
from tracker.models.layers import find_layers

WAYS = ("mean", "scale", "linear")
MAPS = [
    *(Ablation.parse(f"int8:{layer}") for layer in (0, 2, 3)),
    Ablation.parse("int4_row:2"),
    Ablation.parse("int4_row:1.self_attn.k_proj"),
    Ablation.parse("int4_row:2.mlp.down_proj"),
    Ablation.parse("int8:2.mlp.down_proj"),
    Ablation.parse("int4_row:2.attention+int8:2.mlp.up_proj"),
    Ablation.parse("int4_row:0.mlp+int4_row:3.self_attn.o_proj"),
    Ablation.parse("layer:1+int4_row:2"),
]
ABLATIONS = [
    INTACT,
    *(Ablation.parse(f"{done}:{layer}") for done in WAYS for layer in (0, 2, 3)),
    *MAPS,
    *(Ablation.parse(f"repeat:{layer}") for layer in (0, 2, 3)),
    Ablation.parse("layer:1+repeat:2"),
    Ablation.parse("mlp:2"),
    Ablation.parse("attention:2"),
]
REPLACEMENTS = {layer: RandomReplacement(layer) for layer in range(4)}


class _Instead(nn.Module):
    """A layer of its own, that returns a function of the old layer and its input."""

    def __init__(self, layer: nn.Module, function) -> None:
        super().__init__()
        self.layer, self.function = layer, function

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("layer"), name)

    def forward(self, hidden_states, *args, **kwargs):
        def inner(state):
            return self.layer(state, *args, **kwargs)

        return self.function(inner, hidden_states)


def _changed(model, ablation):
    """Change a model in a second way: wrap its layers in modules that do it by hand."""
    twin = copy.deepcopy(model)
    layers = find_layers(twin)
    for replaced in ablation.replaced:
        layer = replaced.layer
        width = twin.config.get_text_config().hidden_size
        draw = torch.Generator().manual_seed(layer)
        weight = torch.eye(width) + 0.3 * torch.randn(width, width, generator=draw) / width**0.5
        mean, bias = 0.3 * torch.randn(2, width, generator=draw)
        function = {
            "mean": lambda inner, x, m=mean: _like(inner(x), x + m),
            "scale": lambda inner, x: _like(inner(x), 0.7 * x),
            "linear": lambda inner, x, w=weight, b=bias: _like(inner(x), x @ w.T + b),
        }[replaced.intervention]
        layers[layer] = _Instead(layers[layer], function)
    for rounded in ablation.rounded:
        layer, which = rounded.layer, rounded.path
        for path, module in layers[layer].named_modules():
            place = path.replace("self_attn", "attention") if which == "attention" else path
            if isinstance(module, nn.Linear) and f"{place}.".startswith(
                f"{which}." if which else ""
            ):
                half = {"int8": 127.5, "int4_row": 7.5}[rounded.intervention]
                module.weight = nn.Parameter(rounded_rows(module.weight, half))
    for stretch in ablation.repeated:
        twice = _Instead(layers[stretch.layer], lambda inner, x: inner(_state(inner(x))))
        layers[stretch.layer] = twice
    for layer in ablation.removed():
        layers[layer] = _Instead(layers[layer], lambda inner, x: _like(inner(x), x))
    for name, numbers in (
        ("self_attn", ablation.removed("attention")),
        ("mlp", ablation.removed("mlp")),
    ):
        for layer in numbers:
            part = getattr(layers[layer], name)
            part.register_forward_hook(
                lambda module, args, output: (
                    (torch.zeros_like(output[0]), *output[1:])
                    if isinstance(output, tuple)
                    else torch.zeros_like(output)
                )
            )
    return twin


def _state(output):
    return output[0] if isinstance(output, tuple) else output


def _like(output, state):
    return (state, *output[1:]) if isinstance(output, tuple) else state


def _agree(model, ablations, *ways):
    """Hold the scores of several ways against models that are changed by hand."""
    agree_with_changed(ways, ablations, partial(_changed, model))


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_every_stream_is_the_changed_model_however_much_is_shared(family):
    model = tiny_model(family)
    ways = [
        engine_of(model, sharing, row_tokens=40, at_once=at_once, replacements=REPLACEMENTS).score(
            make_documents(3), ABLATIONS
        )
        # With 80 at once, two streams are passed together.
        for sharing, at_once in ((FULL, None), (FULL, 80), (DEPTH_ONLY, None), (PLAIN, None))
    ]
    _agree(model, ABLATIONS, *ways)


def test_a_kept_beginning_serves_all_but_what_passes_a_layer_twice(spy):
    model = tiny_model("llama")
    documents = make_documents(3, shared=60)
    read = spy(sweep, "read_prefix", lambda parts, plan, tokens: plan.repeats)
    once = [ablation for ablation in ABLATIONS if not ablation.repeated]
    engine = engine_of(model, FULL, row_tokens=40, replacements=REPLACEMENTS)
    _agree(model, once, engine.score(documents, once))
    _agree(model, ABLATIONS, engine.score(documents, ABLATIONS))
    assert read == [0]


def test_what_a_replaced_layer_costs_is_what_it_passes():
    one = Ablation.parse("mean:1")
    two = Ablation.parse("repeat:1")
    assert plan_streams([INTACT, one], 4).layer_passes == 4 + 2
    # It leaves the baseline behind the layer, and passes it once more.
    assert plan_streams([INTACT, two], 4).layer_passes == 4 + 1 + 2
    quantised = Ablation.parse("int8:1")
    assert plan_streams([INTACT, quantised], 4).layer_passes == 4 + 3
    # Its attention has other weights than the baseline's, from which it would be taken else.
    assert (
        plan_streams([INTACT, quantised, Ablation.parse("mlp:1")], 4).attention_passes == 4 + 3 + 2
    )


def test_matrices_whose_inputs_nobody_tells_are_no_linear_maps():
    model = tiny_model("llama")
    model.model.layers[1].mlp.experts = nn.Parameter(torch.zeros(2, 3, 4))
    engine = engine_of(model)
    with pytest.raises(CellError, match=r"mlp.experts of layer 1 .* is no linear map"):
        engine.without(Ablation.parse("int8:1"))
    with pytest.raises(CellError, match=r"experts of layer 1 .* is no linear map.*leave formats"):
        engine.score(make_documents(1), [INTACT, Ablation.parse("int4:1")])


class TestFit:
    """A fitted replacement is the least-squares solution over the tokens that count."""

    def test_it_explains_most_of_the_layers_own_outputs(self):
        model = tiny_model("llama").eval()
        draw = random.Random(1)
        texts = [[draw.randrange(97) for _ in range(draw.randint(20, 40))] for _ in range(12)]
        found = fit(engine_of(model), texts, {1, 2}, linear=True)
        assert set(found) == {1, 2}
        # Without each text's first token.
        pairs = [passed(model, text)[0][2] for text in texts]
        before, after = (
            torch.cat([state[1:] for state in some]) for some in zip(*pairs, strict=True)
        )
        mine = found[2]
        torch.testing.assert_close(mine.mean, (after - before).mean(0), atol=1e-5, rtol=1e-4)
        assert mine.scale == pytest.approx(float((before * after).sum() / (before**2).sum()))
        ones = torch.cat([before, torch.ones(len(before), 1)], 1)
        solution = torch.linalg.lstsq(ones.double(), after.double()).solution
        ours = ones[:, :-1] @ mine.linear[0].T + mine.linear[1]
        torch.testing.assert_close(ours, (ones.double() @ solution).float(), atol=1e-3, rtol=1e-3)

    def test_first_tokens_and_what_is_repeated_do_not_count(self):
        assert first_tokens([[1, 2, 3], [1, 2, 4, 5], [9, 9], [9, 9]]) == [1, 2, 1, 1]

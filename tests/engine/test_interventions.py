"""Layers that are replaced rather than removed, shared every way, against models really changed."""

from __future__ import annotations

import copy
import random
from functools import partial

import pytest
import torch
from torch import nn

from tests.helpers.ablations import parse_ablations
from tests.helpers.engines import (
    assert_changed_scores,
    engine_of,
    make_documents,
    rounded_rows,
    trace_layers,
)
from tests.helpers.families import tiny_model
from tracker.engine.fitting import first_fitted_tokens, fit_replacements
from tracker.engine.forward.layer import RandomReplacement
from tracker.engine.forward.streams import plan_streams
from tracker.engine.scoring import sweep
from tracker.engine.scoring.model import DEPTH_ONLY, FULL, PLAIN
from tracker.models.layers import find_layers
from tracker.schema.changes import INTACT, Ablation
from tracker.schema.errors import CellError

WAYS = ("mean", "scale", "linear")
MAPS = parse_ablations(
    "int8:0 int8:2 int8:3 int4_row:2 int4_row:1.self_attn.k_proj int4_row:2.mlp.down_proj "
    "int8:2.mlp.down_proj int4_row:2.attention+int8:2.mlp.up_proj "
    "int4_row:0.mlp+int4_row:3.self_attn.o_proj layer:1+int4_row:2"
)
ABLATIONS = [
    INTACT,
    *(Ablation.parse(f"{way}:{layer}") for way in WAYS for layer in (0, 2, 3)),
    *MAPS,
    *parse_ablations("repeat:0 repeat:2 repeat:3 layer:1+repeat:2 mlp:2 attention:2"),
]
REPLACEMENTS = {layer: RandomReplacement(layer) for layer in range(4)}


class _WrappedLayer(nn.Module):
    """A layer of its own, that returns a function of the old layer and its input."""

    def __init__(self, layer: nn.Module, function) -> None:
        super().__init__()
        self.layer, self.make_output = layer, function

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("layer"), name)

    def forward(self, hidden_states, *args, **kwargs):
        def inner(state):
            return self.layer(state, *args, **kwargs)

        return self.make_output(inner, hidden_states)


def _change_by_hand(model, ablation):
    """Change a model in a second way: wrap its layers in modules that do it by hand."""
    twin = copy.deepcopy(model)
    layers = find_layers(twin)
    for replacement in ablation.replacements:
        layer = replacement.layer
        width = twin.config.get_text_config().hidden_size
        generator = torch.Generator().manual_seed(layer)
        weight = (
            torch.eye(width) + 0.3 * torch.randn(width, width, generator=generator) / width**0.5
        )
        mean, bias = 0.3 * torch.randn(2, width, generator=generator)
        function = {
            "mean": lambda inner, x, m=mean: _replace_state(inner(x), x + m),
            "scale": lambda inner, x: _replace_state(inner(x), 0.7 * x),
            "linear": lambda inner, x, w=weight, b=bias: _replace_state(inner(x), x @ w.T + b),
        }[replacement.intervention]
        layers[layer] = _WrappedLayer(layers[layer], function)
    for rounding in ablation.roundings:
        layer, map_path = rounding.layer, rounding.path
        for path, module in layers[layer].named_modules():
            module_path = (
                path.replace("self_attn", "attention") if map_path == "attention" else path
            )
            if isinstance(module, nn.Linear) and f"{module_path}.".startswith(
                f"{map_path}." if map_path else ""
            ):
                steps = {"int8": 127.5, "int4_row": 7.5}[rounding.intervention]
                module.weight = nn.Parameter(rounded_rows(module.weight, steps))
    for span in ablation.repetitions:
        repeated_layer = _WrappedLayer(layers[span.layer], lambda inner, x: inner(_state(inner(x))))
        layers[span.layer] = repeated_layer
    for layer in ablation.removed():
        layers[layer] = _WrappedLayer(layers[layer], lambda inner, x: _replace_state(inner(x), x))
    for name, removed_layers in (
        ("self_attn", ablation.removed("attention")),
        ("mlp", ablation.removed("mlp")),
    ):
        for layer in removed_layers:
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


def _replace_state(output, state):
    return (state, *output[1:]) if isinstance(output, tuple) else state


def _check_ways(model, ablations, *ways):
    """Hold the scores of several ways against models that are changed by hand."""
    assert_changed_scores(ways, ablations, partial(_change_by_hand, model))


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_every_stream_is_the_changed_model_however_much_is_shared(family):
    model = tiny_model(family)
    ways = [
        engine_of(
            model, sharing, row_tokens=40, pass_tokens=at_once, replacements=REPLACEMENTS
        ).score(make_documents(3), ABLATIONS)
        # With 80 at once, two streams are passed together.
        for sharing, at_once in ((FULL, None), (FULL, 80), (DEPTH_ONLY, None), (PLAIN, None))
    ]
    _check_ways(model, ABLATIONS, *ways)


def test_a_kept_beginning_serves_all_but_what_passes_a_layer_twice(spy):
    model = tiny_model("llama")
    documents = make_documents(3, shared=60)
    read_plans = spy(sweep, "read_prefix", lambda parts, plan, tokens: plan.n_repeats)
    single_ablations = [ablation for ablation in ABLATIONS if not ablation.repetitions]
    engine = engine_of(model, FULL, row_tokens=40, replacements=REPLACEMENTS)
    _check_ways(model, single_ablations, engine.score(documents, single_ablations))
    _check_ways(model, ABLATIONS, engine.score(documents, ABLATIONS))
    assert read_plans == [0]


def test_what_a_replaced_layer_costs_is_what_it_passes():
    replaced = Ablation.parse("mean:1")
    repeated = Ablation.parse("repeat:1")
    assert plan_streams([INTACT, replaced], 4).layer_passes == 4 + 2
    # It leaves the baseline behind the layer, and passes it once more.
    assert plan_streams([INTACT, repeated], 4).layer_passes == 4 + 1 + 2
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
    with pytest.raises(CellError, match=r"mlp.experts of layer 1 .* is not a linear map"):
        engine.ablate(Ablation.parse("int8:1"))
    refusal = r"experts of layer 1 .* is not a linear map.*leave weight formats"
    with pytest.raises(CellError, match=refusal):
        engine.score(make_documents(1), [INTACT, Ablation.parse("int4:1")])


class TestFit:
    """A fitted replacement is the least-squares solution over the tokens that count."""

    def test_it_explains_most_of_the_layers_own_outputs(self):
        model = tiny_model("llama").eval()
        generator = random.Random(1)
        texts = [
            [generator.randrange(97) for _ in range(generator.randint(20, 40))] for _ in range(12)
        ]
        replacements = fit_replacements(engine_of(model), texts, {1, 2}, linear=True)
        assert set(replacements) == {1, 2}
        # Without each text's first token.
        pairs = [trace_layers(model, text)[0][2] for text in texts]
        inputs, outputs = (torch.cat([state[1:] for state in s]) for s in zip(*pairs, strict=True))
        replacement = replacements[2]
        torch.testing.assert_close(
            replacement.mean, (outputs - inputs).mean(0), atol=1e-5, rtol=1e-4
        )
        assert replacement.scale == pytest.approx(
            float((inputs * outputs).sum() / (inputs**2).sum())
        )
        augmented = torch.cat([inputs, torch.ones(len(inputs), 1)], 1)
        solution = torch.linalg.lstsq(augmented.double(), outputs.double()).solution
        predicted = augmented[:, :-1] @ replacement.linear[0].T + replacement.linear[1]
        torch.testing.assert_close(
            predicted, (augmented.double() @ solution).float(), atol=1e-3, rtol=1e-3
        )

    def test_first_tokens_and_what_is_repeated_do_not_count(self):
        assert first_fitted_tokens([[1, 2, 3], [1, 2, 4, 5], [9, 9], [9, 9]]) == [1, 2, 1, 1]

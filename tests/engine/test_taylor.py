"""First-order Taylor terms, against finite differences of models with really changed weights."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from tests.helpers.engines import engine_of, gold_tokens, make_documents
from tests.helpers.families import tiny_model
from tests.helpers.truth import model_logits, neurons_of
from tracker.engine.observers.taylor import measure_kl_gradients, measure_taylor
from tracker.models.layers import find_layers
from tracker.models.rounding import round_weight
from tracker.schema.changes import Change

STEP = 2e-3
HEAD_COLUMNS = {"head": 8, "kv_head": 16}


def _changed_weight(model, change: Change, weight: torch.Tensor) -> torch.Tensor:
    """Return the weight under a change, computed without code of the package."""
    if change.intervention != "remove":
        return round_weight(weight.float(), change.intervention).to(weight)
    changed = weight.clone()
    if change.component in HEAD_COLUMNS:
        width = HEAD_COLUMNS[change.component]
        changed[:, change.part * width : (change.part + 1) * width] = 0
    elif change.component == "neuron":
        changed[:, neurons_of(model, "llama", change.layer, change.part)] = 0
    elif change.component == "expert":
        changed[change.part] = 0
    else:
        # Gemma's norms multiply by 1 + weight, and their weights are 0 at first.
        changed.fill_(0.0 if weight.any() else -1.0)
    return changed


def _finite_difference(model, tokens, change: Change, paths: list[str]) -> float:
    """Return the derivative of the loss in the direction of the changed weights."""
    layer = find_layers(model)[change.layer]
    parameters = [layer.get_parameter(path) for path in paths]
    intact = [parameter.detach().clone() for parameter in parameters]
    directions = [_changed_weight(model, change, weight) - weight for weight in intact]

    def loss(step: float) -> float:
        with torch.no_grad():
            for parameter, weight, direction in zip(parameters, intact, directions, strict=True):
                parameter.copy_(weight + step * direction)
        logprobs = model_logits(model, tokens).log_softmax(-1)
        return float(-logprobs[range(len(tokens) - 1), list(tokens[1:])].sum())

    slope = (loss(STEP) - loss(-STEP)) / (2 * STEP)
    loss(0)
    return slope


ATTENTION = [f"self_attn.{name}_proj.weight" for name in "qkvo"]
MLP = [f"mlp.{name}_proj.weight" for name in ("gate", "up", "down")]
LLAMA = {
    "head:1.3": ["self_attn.o_proj.weight"],
    "kv_head:2.1": ["self_attn.o_proj.weight"],
    "attention:0": ["self_attn.o_proj.weight"],
    "mlp:3": ["mlp.down_proj.weight"],
    "neuron:2.1": ["mlp.down_proj.weight"],
    "int4:1.mlp.up_proj": ["mlp.up_proj.weight"],
    "int4:1.self_attn.q_proj": ["self_attn.q_proj.weight"],
    "int4:2.attention": ATTENTION,
    "int4:0": ATTENTION + MLP,
}
CASES = {
    "llama": LLAMA,
    "gpt2": {
        "attention:1": ["attn.c_proj.weight", "attn.c_proj.bias"],
        "mlp:2": ["mlp.c_proj.weight", "mlp.c_proj.bias"],
    },
    "bloom": {
        "attention:1": ["self_attention.dense.weight", "self_attention.dense.bias"],
        "mlp:2": ["mlp.dense_4h_to_h.weight", "mlp.dense_4h_to_h.bias"],
    },
    # Norms of sublayers' outputs are scaled: the direction of a removal is that of the norm.
    "gemma3": {
        "head:1.2": ["self_attn.o_proj.weight"],
        "int4:2.mlp.down_proj": [MLP[2]],
        "attention:1": ["post_attention_layernorm.weight"],
        "mlp:0": ["post_feedforward_layernorm.weight"],
    },
    "olmo2": {
        "attention:1": ["post_attention_layernorm.weight"],
        "mlp:2": ["post_feedforward_layernorm.weight"],
    },
    "qwen2_moe": {
        "expert:1.2": ["mlp.experts.down_proj"],
        "shared_expert:2": ["mlp.shared_expert.down_proj.weight"],
        "attention:0": ["self_attn.o_proj.weight"],
    },
}


@pytest.mark.parametrize("family", CASES)
def test_a_term_is_the_derivative_in_the_direction_of_the_change(family: str) -> None:
    sizes = {"intermediate_size": 64} if family in ("llama", "gemma3") else {}
    model = tiny_model(family, **sizes)
    (document,) = make_documents(1)
    changes = {Change.parse(text): paths for text, paths in CASES[family].items()}
    terms = measure_taylor(engine_of(model), document, [*changes])
    if family != "qwen2_moe":  # its experts are not computed in float64
        model = model.double()
    for change, paths in changes.items():
        slope = _finite_difference(model, gold_tokens(document), change, paths)
        assert terms[change] == pytest.approx(abs(slope), rel=1e-2, abs=5e-4), change
        assert abs(slope) > 5e-3, change


def test_a_term_does_not_depend_on_the_other_changes() -> None:
    engine = engine_of(tiny_model("llama", intermediate_size=64))
    (document,) = make_documents(1)
    changes = [Change.parse(text) for text in LLAMA]
    together = measure_taylor(engine, document, [*changes, *changes])
    for change in changes:
        alone = measure_taylor(engine, document, [change])
        assert alone == {change: pytest.approx(together[change], rel=1e-5)}


def test_a_module_that_runs_twice_has_no_term() -> None:
    model = tiny_model("llama")
    engine, (document,) = engine_of(model), make_documents(1)
    changes = [Change.parse(text) for text in ("head:1.0", "mlp:2")]
    assert all(map(math.isfinite, measure_taylor(engine, document, changes).values()))
    find_layers(model)[2].register_forward_pre_hook(_call_mlp, with_kwargs=True)
    terms = measure_taylor(engine, document, changes)
    assert [math.isfinite(terms[change]) for change in changes] == [True, False]


def _call_mlp(layer, args, kwargs) -> None:
    layer.mlp(args[0] if args else kwargs["hidden_states"])


def test_a_gradient_of_kl_is_the_derivative_at_the_rounded_model() -> None:
    model = tiny_model("llama", intermediate_size=64)
    documents = make_documents(2)
    engine = engine_of(model)
    paths = [path.removesuffix(".weight") for path in ATTENTION + MLP]
    changes = [Change.parse(f"int4:{layer}.{path}") for layer in (0, 3) for path in paths]
    estimates = measure_kl_gradients(engine, documents, [*changes, Change.parse("int4:3")])
    exact, rounded = model.double(), copy.deepcopy(model)
    parameters = {}
    layers = zip(find_layers(exact), find_layers(rounded), strict=True)
    for number, (layer, rounded_layer) in enumerate(layers):
        for path in ATTENTION + MLP:
            weights = layer.get_parameter(path), rounded_layer.get_parameter(path)
            parameters[f"int4:{number}.{path.removesuffix('.weight')}"] = weights
            weights[1].data.copy_(round_weight(weights[0].float(), "int4").double())
    for document, terms in zip(documents, estimates, strict=True):
        tokens = gold_tokens(document)
        log_p = model_logits(exact, tokens)[:-1].log_softmax(-1)

        for change in changes:
            exact_weight, weight = parameters[str(change)]
            start, direction = weight.data.clone(), weight.data - exact_weight.data
            values = []
            for step in (STEP, -STEP):
                weight.data.copy_(start + step * direction)
                log_q = model_logits(rounded, tokens)[:-1].log_softmax(-1)
                values.append(float((log_p.exp() * (log_p - log_q)).sum()))
            weight.data.copy_(start)
            slope = (values[0] - values[1]) / (2 * STEP)
            assert terms[change] == pytest.approx(slope, rel=1e-2, abs=1e-3), change
        total = sum(terms[change] for change in changes if change.layer == 3)
        assert terms[Change.parse("int4:3")] == pytest.approx(total, rel=1e-4)


def test_formats_that_fit_no_map_have_no_gradient_of_kl() -> None:
    change = Change.parse("int4:1.self_attn.q_proj")
    # The rows of the MLP's last map have 48 weights, and int4 rounds blocks of 32.
    (terms,) = measure_kl_gradients(engine_of("llama"), make_documents(1), [change])
    assert math.isnan(terms[change])

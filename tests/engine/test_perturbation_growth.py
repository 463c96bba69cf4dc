"""Test perturbations followed through the layers against one plain forward pass for each."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from tests.helpers.engines import (
    MAX_LENGTH,
    engine_of,
    gold_tokens,
    make_document,
    make_documents,
    pruned_model,
    trace_layers,
)
from tests.helpers.families import tiny_model
from tracker.engine.observers import perturbation_growth as module
from tracker.engine.observers.perturbation_growth import perturbation_growth, verify_batching
from tracker.engine.refusal import RefusalError
from tracker.engine.scoring.rows import measured_texts
from tracker.models.layers import find_layers
from tracker.schema.changes import INTACT

KINDS = (
    "llama", "llama_eager", "gpt2", "opt", "phi", "gemma3_mixed", "mixtral", "deepseek_v3", "bloom",
    "falcon_alibi", "mamba", "jamba_eager",
)  # fmt: skip
DRAWS = 2


def layer_states(model, tokens, changed=None, state=None) -> list[torch.Tensor]:
    """Every layer's output by a plain pass, in which that of one may be `changed`."""

    def put(layer, args, output):
        is_tuple = isinstance(output, (tuple, list))
        return type(output)((state[None], *output[1:])) if is_tuple else state[None]

    if changed is None:
        return [after for _, after in trace_layers(model, tokens)[0]]
    with find_layers(model)[changed].register_forward_hook(put):
        return layer_states(model, tokens)


def relative_difference(changed_state: torch.Tensor, intact_state: torch.Tensor) -> np.ndarray:
    distance = (changed_state - intact_state).norm(dim=-1) / intact_state.norm(dim=-1)
    return distance.double().numpy()


@pytest.mark.parametrize("family", KINDS)
def test_every_perturbation_is_that_of_a_plain_pass(family):
    model = tiny_model(family)
    engine = engine_of(model)
    document = make_documents(3)[2]
    tokens = gold_tokens(document)
    growth = perturbation_growth(engine, document, DRAWS)
    layer_inputs, layer_outputs = zip(*trace_layers(model, tokens)[0], strict=True)
    layers = len(layer_outputs)
    directions = module._Directions(f"0/task/{document.index}/0", DRAWS)
    assert growth["removed"].shape == (2, layers, layers)
    assert growth["random"].shape == (2, DRAWS, layers, layers)
    for layer in range(layers):
        states = directions.perturb(layer, layer_inputs[layer], layer_outputs[layer])
        assert torch.equal(states[0], layer_inputs[layer])
        growth_by_state = [
            growth["removed"],
            growth["shuffled"],
            *np.moveaxis(growth["random"], 1, 0),
        ]
        for state, state_growth in zip(states, growth_by_state, strict=True):
            changed_states = layer_states(model, tokens, layer, state)
            for later in range(layers):
                if later < layer:
                    assert np.isnan(state_growth[:, layer, later]).all()
                    continue
                differences = relative_difference(changed_states[later], layer_outputs[later])
                assert state_growth[0, layer, later] == pytest.approx(differences.mean(), rel=1e-3)
                assert state_growth[1, layer, later] == pytest.approx(
                    differences[1:].mean(), rel=1e-3
                )
        size = (layer_outputs[layer] - layer_inputs[layer]).norm(dim=-1)
        for later in range(layer, layers):
            share = (size / layer_outputs[later].norm(dim=-1)).numpy()
            assert growth["carried"][0, layer, later] == pytest.approx(share.mean(), rel=1e-4)
            assert growth["carried"][1, layer, later] == pytest.approx(share[1:].mean(), rel=1e-4)
    verify_batching(engine, document, DRAWS)


@pytest.mark.parametrize("family", ["llama", "gemma3_mixed", "mixtral"])
def test_a_removal_is_that_of_the_really_pruned_model(family):
    model = tiny_model(family)
    document = make_documents(3)[1]
    tokens = gold_tokens(document)
    growth = perturbation_growth(engine_of(model), document, 1)["removed"]
    layer_outputs = layer_states(model, tokens)
    for layer in range(len(layer_outputs)):
        with pruned_model(model, (layer,)) as smaller:
            pruned_outputs = layer_states(smaller, tokens)
        # Layer m of the model is layer m − 1 of the smaller one.
        for later in range(layer + 1, len(layer_outputs)):
            difference = relative_difference(pruned_outputs[later - 1], layer_outputs[later]).mean()
            assert growth[0, layer, later] == pytest.approx(difference, rel=1e-3)


class TestDirections:
    inputs = torch.randn(50, 24, generator=torch.Generator().manual_seed(1))
    outputs = inputs + torch.randn(50, 24, generator=torch.Generator().manual_seed(2))
    norms = (outputs - inputs).norm(dim=-1)

    def test_shuffled_updates_are_other_tokens_each_once(self):
        _, state, *_ = module._Directions("name", 1).perturb(1, self.inputs, self.outputs)
        update = self.outputs - self.inputs
        change = (self.outputs - state)[:, None]
        cosine = torch.nn.functional.cosine_similarity(change, update[None], dim=-1)
        origin = cosine.argmax(-1)
        assert cosine.max(-1).values.min() > 0.9999
        assert sorted(origin.tolist()) == list(range(50))
        assert (origin != torch.arange(50)).all()

    def test_random_directions_are_uniform_on_the_sphere(self):
        states = module._Directions("name", 60).perturb(1, self.inputs, self.outputs)[2:]
        directions = torch.cat([(state - self.outputs) / self.norms[:, None] for state in states])
        # One coordinate x of a uniform direction in d dimensions: (x + 1) / 2 is
        # Beta((d − 1) / 2, (d − 1) / 2), along any axis.
        law = stats.beta(23 / 2, 23 / 2).cdf
        axis = torch.ones(24) / 24**0.5
        for coordinates in (directions[:, 0], directions @ axis):
            assert stats.kstest((coordinates.numpy() + 1) / 2, law).pvalue > 0.01

    def test_every_draw_layer_and_text_has_its_own_and_keeps_it(self):
        def draw_states(name, draws, layer):
            return module._Directions(name, draws).perturb(layer, self.inputs, self.outputs)[2:]

        two_draws, three_draws = draw_states("a", 2, 1), draw_states("a", 3, 1)
        assert all(map(torch.equal, two_draws, three_draws))
        all_draws = [*three_draws, *draw_states("b", 1, 1), *draw_states("a", 1, 2)]
        assert len({tuple(state[0].tolist()) for state in all_draws}) == 5


def test_the_seed_decides_the_directions_and_nothing_else():
    engine, document = engine_of("llama"), make_documents(1)[0]
    growth, same_growth, other_growth = (
        perturbation_growth(engine, document, 1, seed) for seed in (0, 0, 1)
    )
    for name in growth:
        assert (growth[name] == same_growth[name])[:, ..., -1].all()
    assert growth["removed"] == pytest.approx(other_growth["removed"], nan_ok=True)
    assert (growth["random"] != other_growth["random"]).all()


def test_the_tokens_are_those_of_the_proxies():
    engine = engine_of("llama")
    long_document = make_document(([n % 97 for n in range(MAX_LENGTH + 20)], (1, 2, 3)), gold=None)
    rolling_document = make_document(
        ((0,), range(9, 19)), ((3, 4, 5), (6, 7)), gold=None, rolling=True
    )
    documents = [*make_documents(3), long_document, rolling_document]
    for document, scores in zip(documents, engine.score(documents, [INTACT]), strict=True):
        texts = list(measured_texts(document, MAX_LENGTH))
        assert sum(len(tokens) - f for tokens, f in texts) == scores.proxy_tokens
    # Each token of both windows counts once; no window's first one is the text's first.
    carried = perturbation_growth(engine, rolling_document, 1)["carried"]
    shares = []
    for tokens, first_measured in measured_texts(rolling_document, MAX_LENGTH):
        inputs, layer_outputs = zip(*trace_layers(engine.loaded.model, tokens)[0], strict=True)
        sizes = (layer_outputs[1] - inputs[1]).norm(dim=-1)
        shares.append((sizes / layer_outputs[3].norm(dim=-1))[first_measured:])
    assert carried[0, 1, 3] == pytest.approx(torch.cat(shares).mean().item(), rel=1e-4)


def test_layers_that_look_at_the_batch_are_refused():
    engine, document = engine_of("llama"), make_documents(1)[0]
    verify_batching(engine, document, DRAWS)
    with (
        engine.loaded.layers[3].mlp.register_forward_pre_hook(
            lambda mlp, args: (args[0] + args[0].mean(0, keepdim=True),)
        ),
        pytest.raises(RefusalError, match="for a batch of states than for a single state"),
    ):
        verify_batching(engine, document, DRAWS)
    verify_batching(engine, document, DRAWS)

"""Test perturbations followed through the layers against one plain forward pass for each."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from tests.helpers.engines import (
    MAX_LENGTH,
    asking,
    engine_of,
    gold_tokens,
    make_documents,
    passed,
    pruned,
)
from tests.helpers.families import tiny_model
from tracker.core.changes import INTACT
from tracker.engine.observers import perturbation_growth as module
from tracker.engine.observers.perturbation_growth import perturbation_growth, verify_growth
from tracker.engine.refusal import RefusalError
from tracker.engine.scoring.rows import measured_texts
from tracker.models.layers import find_layers

KINDS = (
    "llama", "llama_eager", "gpt2", "opt", "phi", "gemma3_mixed", "mixtral", "deepseek_v3", "bloom",
    "falcon_alibi", "mamba", "jamba_eager",
)  # fmt: skip
DRAWS = 2


def behind(model, tokens, changed=None, state=None) -> list[torch.Tensor]:
    """Every layer's output by a plain pass, in which that of one may be `changed`."""

    def put(layer, args, output):
        several = isinstance(output, (tuple, list))
        return type(output)((state[None], *output[1:])) if several else state[None]

    if changed is None:
        return [after for _, after in passed(model, tokens)[0]]
    with find_layers(model)[changed].register_forward_hook(put):
        return behind(model, tokens)


def relative(other: torch.Tensor, intact: torch.Tensor) -> np.ndarray:
    return ((other - intact).norm(dim=-1) / intact.norm(dim=-1)).double().numpy()


@pytest.mark.parametrize("family", KINDS)
def test_every_perturbation_is_that_of_a_plain_pass(family):
    model = tiny_model(family)
    engine = engine_of(model)
    document = make_documents(3)[2]
    tokens = gold_tokens(document)
    found = perturbation_growth(engine, document, DRAWS)
    given, intact = zip(*passed(model, tokens)[0], strict=True)
    layers = len(intact)
    directions = module._Directions(f"0/task/{document.index}/0", DRAWS)
    assert found["removed"].shape == (2, layers, layers)
    assert found["random"].shape == (2, DRAWS, layers, layers)
    for layer in range(layers):
        states = directions.perturbed(layer, given[layer], intact[layer])
        assert torch.equal(states[0], given[layer])
        ours = [found["removed"], found["shuffled"], *np.moveaxis(found["random"], 1, 0)]
        for state, each in zip(states, ours, strict=True):
            changed = behind(model, tokens, layer, state)
            for later in range(layers):
                if later < layer:
                    assert np.isnan(each[:, layer, later]).all()
                    continue
                moved = relative(changed[later], intact[later])
                assert each[0, layer, later] == pytest.approx(moved.mean(), rel=1e-3)
                assert each[1, layer, later] == pytest.approx(moved[1:].mean(), rel=1e-3)
        size = (intact[layer] - given[layer]).norm(dim=-1)
        for later in range(layer, layers):
            share = (size / intact[later].norm(dim=-1)).numpy()
            assert found["carried"][0, layer, later] == pytest.approx(share.mean(), rel=1e-4)
            assert found["carried"][1, layer, later] == pytest.approx(share[1:].mean(), rel=1e-4)
    verify_growth(engine, document, DRAWS)


@pytest.mark.parametrize("family", ["llama", "gemma3_mixed", "mixtral"])
def test_a_removal_is_that_of_the_really_pruned_model(family):
    model = tiny_model(family)
    document = make_documents(3)[1]
    tokens = gold_tokens(document)
    found = perturbation_growth(engine_of(model), document, 1)["removed"]
    intact = behind(model, tokens)
    for layer in range(len(intact)):
        with pruned(model, (layer,)) as smaller:
            without = behind(smaller, tokens)
        # Layer m of the model is layer m − 1 of the smaller one.
        for later in range(layer + 1, len(intact)):
            moved = relative(without[later - 1], intact[later]).mean()
            assert found[0, layer, later] == pytest.approx(moved, rel=1e-3)


class TestDirections:
    before = torch.randn(50, 24, generator=torch.Generator().manual_seed(1))
    after = before + torch.randn(50, 24, generator=torch.Generator().manual_seed(2))
    size = (after - before).norm(dim=-1)

    def test_shuffled_updates_are_other_tokens_each_once(self):
        _, state, *_ = module._Directions("name", 1).perturbed(1, self.before, self.after)
        update = self.after - self.before
        cosine = torch.nn.functional.cosine_similarity(
            (self.after - state)[:, None], update[None], dim=-1
        )
        origin = cosine.argmax(-1)
        assert cosine.max(-1).values.min() > 0.9999
        assert sorted(origin.tolist()) == list(range(50))
        assert (origin != torch.arange(50)).all()

    def test_random_directions_are_uniform_on_the_sphere(self):
        states = module._Directions("name", 60).perturbed(1, self.before, self.after)[2:]
        unit = torch.cat([(state - self.after) / self.size[:, None] for state in states])
        # One coordinate x of a uniform direction in d dimensions: (x + 1) / 2 is
        # Beta((d − 1) / 2, (d − 1) / 2), along any axis.
        law = stats.beta(23 / 2, 23 / 2).cdf
        axis = torch.ones(24) / 24**0.5
        for along in (unit[:, 0], unit @ axis):
            assert stats.kstest((along.numpy() + 1) / 2, law).pvalue > 0.01

    def test_every_draw_layer_and_text_has_its_own_and_keeps_it(self):
        def drawn(name, draws, layer):
            return module._Directions(name, draws).perturbed(layer, self.before, self.after)[2:]

        few, many = drawn("a", 2, 1), drawn("a", 3, 1)
        assert all(map(torch.equal, few, many))
        different = [*many, *drawn("b", 1, 1), *drawn("a", 1, 2)]
        assert len({tuple(state[0].tolist()) for state in different}) == 5


def test_the_seed_decides_the_directions_and_nothing_else():
    engine, document = engine_of("llama"), make_documents(1)[0]
    one, again, other = (perturbation_growth(engine, document, 1, seed) for seed in (0, 0, 1))
    for name in one:
        assert (one[name] == again[name])[:, ..., -1].all()
    assert one["removed"] == pytest.approx(other["removed"], nan_ok=True)
    assert (one["random"] != other["random"]).all()


def test_the_tokens_are_those_of_the_proxies():
    engine = engine_of("llama")
    long = asking(([n % 97 for n in range(MAX_LENGTH + 20)], (1, 2, 3)), gold=None)
    rolling = asking(((0,), range(9, 19)), ((3, 4, 5), (6, 7)), gold=None, rolling=True)
    documents = [*make_documents(3), long, rolling]
    for each, scores in zip(documents, engine.score(documents, [INTACT]), strict=True):
        texts = list(measured_texts(each, MAX_LENGTH))
        assert sum(len(tokens) - first for tokens, first in texts) == scores.proxy_tokens
    # Each token of both windows counts once; no window's first one is the text's first.
    found = perturbation_growth(engine, rolling, 1)["carried"]
    shares = []
    for tokens, first in measured_texts(rolling, MAX_LENGTH):
        given, intact = zip(*passed(engine.loaded.model, tokens)[0], strict=True)
        shares.append(((intact[1] - given[1]).norm(dim=-1) / intact[3].norm(dim=-1))[first:])
    assert found[0, 1, 3] == pytest.approx(torch.cat(shares).mean().item(), rel=1e-4)


def test_layers_that_look_at_the_batch_are_refused():
    engine, asked = engine_of("llama"), make_documents(1)[0]
    verify_growth(engine, asked, DRAWS)
    with (
        engine.loaded.layers[3].mlp.register_forward_pre_hook(
            lambda mlp, args: (args[0] + args[0].mean(0, keepdim=True),)
        ),
        pytest.raises(RefusalError, match="for several streams than for one"),
    ):
        verify_growth(engine, asked, DRAWS)
    verify_growth(engine, asked, DRAWS)

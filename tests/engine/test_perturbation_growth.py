"""What is followed through the layers, against one plain forward pass a perturbation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from tests.engine.plain import MAX_LENGTH, loaded, make_documents, pruned
from tracker.core.ablations import INTACT
from tracker.core.documents import Document, Request
from tracker.engine.memory import stream_bytes
from tracker.engine.observers import perturbation_growth as module
from tracker.engine.observers.perturbation_growth import perturbation_growth, verify_growth
from tracker.engine.refusal import RefusalError
from tracker.engine.scoring.rows import measured_texts
from tracker.engine.scoring.sweep import Engine
from tracker.models.layers import find_layers

KINDS = (
    "llama", "llama_eager", "gpt2", "opt", "phi", "gemma3_mixed", "mixtral", "deepseek_v3", "bloom",
    "falcon_alibi", "mamba", "jamba",
)  # fmt: skip
DRAWS = 2


def text_of(document: Document) -> tuple[int, ...]:
    request = document.requests[document.gold or 0]
    return request.context + request.continuation


def behind(model, tokens, replace=None) -> list[torch.Tensor]:
    """Every layer's output by a plain pass, in which `replace` (layer, state) is put in place."""
    found = []

    def hook(index):
        def called(layer, args, output):
            several = isinstance(output, (tuple, list))
            state = output[0] if several else output
            if replace is not None and replace[0] == index:
                state = replace[1][None]
            found.append(state[0])
            return type(output)((state, *output[1:])) if several else state

        return called

    layers = find_layers(model)
    hooks = [layer.register_forward_hook(hook(i)) for i, layer in enumerate(layers)]
    with torch.inference_mode():
        model(torch.tensor([tokens]), use_cache=False)
    for each in hooks:
        each.remove()
    return found


def inputs(model, tokens) -> list[torch.Tensor]:
    """What each layer is given."""
    found = []

    def called(layer, args, kwargs):
        found.append((kwargs["hidden_states"] if "hidden_states" in kwargs else args[0])[0])

    hooks = [
        layer.register_forward_pre_hook(called, with_kwargs=True) for layer in find_layers(model)
    ]
    with torch.inference_mode():
        model(torch.tensor([tokens]), use_cache=False)
    for each in hooks:
        each.remove()
    return found


def relative(other: torch.Tensor, intact: torch.Tensor) -> np.ndarray:
    return ((other - intact).norm(dim=-1) / intact.norm(dim=-1)).double().numpy()


@pytest.mark.parametrize("family", KINDS)
def test_every_perturbation_is_that_of_a_plain_pass(tiny_model, family):
    model = tiny_model(family)
    engine = Engine(loaded(model), MAX_LENGTH)
    document = make_documents(3)[2]
    tokens = text_of(document)
    found = perturbation_growth(engine, document, DRAWS)
    intact, given = behind(model, tokens), inputs(model, tokens)
    layers = len(intact)
    directions = module._Directions(f"0/task/{document.index}/0", DRAWS)
    assert found["removed"].shape == (2, layers, layers)
    assert found["random"].shape == (2, DRAWS, layers, layers)
    for layer in range(layers):
        states = directions.perturbed(layer, given[layer], intact[layer])
        assert torch.equal(states[0], given[layer])
        ours = [found["removed"], found["shuffled"], *np.moveaxis(found["random"], 1, 0)]
        for state, each in zip(states, ours, strict=True):
            changed = behind(model, tokens, (layer, state))
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
def test_a_removal_is_that_of_the_really_pruned_model(tiny_model, family):
    model = tiny_model(family)
    document = make_documents(3)[1]
    tokens = text_of(document)
    found = perturbation_growth(Engine(loaded(model), MAX_LENGTH), document, 1)["removed"]
    intact = behind(model, tokens)
    for layer in range(len(intact)):
        with pruned(model, (layer,)) as smaller:
            without = behind(smaller, tokens)
        # Layer m of the model is layer m − 1 of the smaller one.
        for later in range(layer + 1, len(intact)):
            moved = relative(without[later - 1], intact[later]).mean()
            assert found[0, layer, later] == pytest.approx(moved, rel=1e-3)


def test_the_states_are_those_that_the_model_itself_reports(tiny_model):
    model, tokens = tiny_model("llama"), (5, 6, 7, 8, 9)
    with torch.inference_mode():
        output = model(torch.tensor([tokens]), output_hidden_states=True, use_cache=False)
    for ours, theirs in zip(behind(model, tokens)[:-1], output.hidden_states[1:-1], strict=True):
        assert torch.equal(ours, theirs[0])


def test_in_as_many_passes_as_the_memory_asks_for(tiny_model, monkeypatch):
    model, document = tiny_model("llama"), make_documents(1)[0]
    passes = []
    honest = module._Pass.run

    def counted(self, tokens):
        passes.append(self.group)
        honest(self, tokens)

    monkeypatch.setattr(module._Pass, "run", counted)
    whole = perturbation_growth(Engine(loaded(model), MAX_LENGTH), document, DRAWS)
    assert passes == [range(4)]
    # The intact stream and those of two layers: 9 fit, and not 13.
    memory = 12 * len(text_of(document)) * stream_bytes(model)
    halves = perturbation_growth(Engine(loaded(model), MAX_LENGTH, memory=memory), document, DRAWS)
    least = perturbation_growth(Engine(loaded(model), MAX_LENGTH, memory=1), document, DRAWS)
    assert passes[1:3] == [range(2), range(2, 4)]
    assert passes[3:] == [range(i, i + 1) for i in range(4)]
    for name, values in whole.items():
        assert halves[name] == pytest.approx(values, rel=1e-3, nan_ok=True)
        assert least[name] == pytest.approx(values, rel=1e-3, nan_ok=True)


def test_layers_before_the_perturbed_one_are_computed_once(tiny_model):
    model, document = tiny_model("llama"), make_documents(1)[0]
    rows = []
    hooks = [
        layer.mlp.register_forward_hook(lambda m, args, output: rows.append(len(output)))
        for layer in find_layers(model)
    ]
    perturbation_growth(Engine(loaded(model), MAX_LENGTH), document, DRAWS)
    for hook in hooks:
        hook.remove()
    each = 2 + DRAWS
    assert rows == [1, 1 + each, 1 + 2 * each, 1 + 3 * each]


class TestDirections:
    before = torch.randn(50, 24, generator=torch.Generator().manual_seed(1))
    after = before + torch.randn(50, 24, generator=torch.Generator().manual_seed(2))
    size = (after - before).norm(dim=-1)

    def test_all_are_as_long_as_the_layers_own_update(self):
        for state in module._Directions("name", 3).perturbed(1, self.before, self.after):
            assert torch.allclose((state - self.after).norm(dim=-1), self.size, rtol=1e-5)

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

    def test_a_layer_that_changes_nothing_perturbs_nothing(self):
        for state in module._Directions("name", 1).perturbed(0, self.before, self.before):
            assert torch.equal(state, self.before)


def test_the_seed_decides_the_directions_and_nothing_else(tiny_model):
    engine, document = Engine(loaded(tiny_model("llama")), MAX_LENGTH), make_documents(1)[0]
    one, again, other = (perturbation_growth(engine, document, 1, seed) for seed in (0, 0, 1))
    for name in one:
        assert (one[name] == again[name])[:, ..., -1].all()
    assert one["removed"] == pytest.approx(other["removed"], nan_ok=True)
    assert (one["random"] != other["random"]).all()


def test_the_tokens_are_those_of_the_proxies(tiny_model):
    engine = Engine(loaded(tiny_model("llama")), MAX_LENGTH)
    long = Request(tuple(n % 97 for n in range(MAX_LENGTH + 20)), (1, 2, 3))
    windows = (Request((0,), tuple(range(9, 19))), Request((3, 4, 5), (6, 7)))
    documents = [
        *make_documents(3),
        Document("task", 8, (long,), None, 0),
        Document("task", 9, windows, None, 0, rolling=True),
    ]
    for document, scores in zip(documents, engine.score(documents, [INTACT]), strict=True):
        texts = list(measured_texts(document, MAX_LENGTH))
        assert sum(len(tokens) - first for tokens, first in texts) == scores.proxy_tokens
    # Each token of both windows counts once; no window's first one is the text's first.
    found = perturbation_growth(engine, documents[-1], 1)["carried"]
    shares = []
    for tokens, first in measured_texts(documents[-1], MAX_LENGTH):
        intact, given = behind(engine.loaded.model, tokens), inputs(engine.loaded.model, tokens)
        shares.append(((intact[1] - given[1]).norm(dim=-1) / intact[3].norm(dim=-1))[first:])
    assert found[0, 1, 3] == pytest.approx(torch.cat(shares).mean().item(), rel=1e-4)


def test_a_single_token_has_nothing_behind_the_first(tiny_model):
    engine = Engine(loaded(tiny_model("llama")), 1)
    document = Document("task", 0, (Request((5,), (6,)),), 0, 1)
    found = perturbation_growth(engine, document, 1)
    assert np.isfinite(found["removed"][0, 0, 0])
    assert np.isnan(found["removed"][1]).all()


def test_layers_that_look_at_the_batch_are_refused(tiny_model):
    model, document = tiny_model("llama"), make_documents(1)[0]
    engine = Engine(loaded(model), MAX_LENGTH)

    verify_growth(engine, document, DRAWS)
    hook = find_layers(model)[3].mlp.register_forward_pre_hook(
        lambda mlp, args: (args[0] + args[0].mean(0, keepdim=True),)
    )
    with pytest.raises(RefusalError, match="for several streams than for one"):
        verify_growth(engine, document, DRAWS)
    hook.remove()
    verify_growth(engine, document, DRAWS)


def test_a_model_of_one_layer_is_followed_without_a_second_way(tiny_llama):
    from tracker.models.load import load_model
    from tracker.models.sources import find_model

    one = load_model(find_model(str(tiny_llama(layers=1))), "float32")
    engine, document = Engine(one, MAX_LENGTH), make_documents(1)[0]
    verify_growth(engine, document, 1)
    assert perturbation_growth(engine, document, 1)["removed"].shape == (2, 1, 1)

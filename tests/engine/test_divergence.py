"""Proxies of what the model says, against plain forward passes of really pruned copies."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.spatial.distance import jensenshannon
from scipy.stats import entropy

from tests.helpers.engines import (
    engine_of,
    gold_tokens,
    make_document,
    make_documents,
    pruned_model,
    skipping_layers,
)
from tests.helpers.families import tiny_model
from tests.helpers.truth import model_logits
from tracker.engine.observers import layer_proxies as module
from tracker.engine.observers.layer_proxies import answer_divergences, output_proxies
from tracker.engine.scoring.model import PLAIN
from tracker.models.layers import find_layers
from tracker.schema.changes import Ablation
from tracker.schema.documents import Document

LAYERS = 4
PER_LAYER = ("kl", "js", "loss_increase", "lens_changes", "gate_gradient")


def _first_document() -> tuple[Document, tuple[int, ...]]:
    (document,) = make_documents(1)
    return document, gold_tokens(document)


def _naive_divergences(model, tokens: tuple[int, ...], layer: int) -> tuple[float, float, float]:
    """Divergences by scipy, of a copy without the layer."""
    p = model_logits(model, tokens).softmax(-1).numpy()
    with pruned_model(model, [layer]) as short_model:
        q = model_logits(short_model, tokens).softmax(-1).numpy()
    positions, following = np.arange(len(tokens) - 1), np.array(tokens[1:])
    likelihood_loss = np.log(p[positions, following]).sum() - np.log(q[positions, following]).sum()
    return entropy(p, q, axis=-1).sum(), (jensenshannon(p, q, axis=-1) ** 2).sum(), likelihood_loss


def _lens_tokens(model, tokens: tuple[int, ...], layer: int) -> list[int]:
    """Return the most likely tokens of a model whose layers from one on are skipped."""
    with skipping_layers(model, range(layer, LAYERS)):
        return model_logits(model, tokens).argmax(-1).tolist()


@pytest.mark.parametrize("sharing", ["shared", "apart"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "opt_350m"])
def test_every_figure_is_that_of_a_plain_pass(family: str, sharing: str) -> None:
    model = tiny_model(family)
    engine = engine_of(model)
    engine = engine.with_sharing(PLAIN) if sharing == "apart" else engine
    for document in make_documents(3, seed=4):
        proxies = output_proxies(engine, document)
        tokens = gold_tokens(document)
        assert float(proxies["tokens"]) == len(tokens)
        assert float(proxies["predicted"]) == len(tokens) - 1
        for layer in range(LAYERS):
            expected = _naive_divergences(model, tokens, layer)
            figures = [float(proxies[name][layer]) for name in ("kl", "js", "loss_increase")]
            assert figures == pytest.approx(expected, rel=1e-3, abs=1e-4)
            below = _lens_tokens(model, tokens, layer)
            above = _lens_tokens(model, tokens, layer + 1)
            differing = sum(a != b for a, b in zip(below, above, strict=True))
            assert float(proxies["lens_changes"][layer]) == differing


@pytest.mark.parametrize("sharing", ["shared", "apart"])
def test_the_divergence_at_answers_is_that_of_their_positions(sharing: str) -> None:
    model = tiny_model("llama")
    engine = engine_of(model)
    engine = engine.with_sharing(PLAIN) if sharing == "apart" else engine
    ablations = [Ablation.from_changes(removed=[layer]) for layer in range(LAYERS)]
    for document in make_documents(3, seed=4):
        sums = answer_divergences(engine, document, ablations)
        n_answer = len(document.requests[document.gold].continuation)
        tokens = gold_tokens(document)
        positions = slice(len(tokens) - n_answer - 1, len(tokens) - 1)
        assert float(sums["tokens"]) == n_answer
        p = model_logits(model, tokens).softmax(-1).numpy()[positions]
        for layer in range(LAYERS):
            with pruned_model(model, [layer]) as short_model:
                q = model_logits(short_model, tokens).softmax(-1).numpy()[positions]
            expected = entropy(p, q, axis=-1).sum()
            assert float(sums["kl"][layer]) == pytest.approx(expected, rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_the_derivative_is_a_finite_difference(family: str) -> None:
    model = tiny_model(family)
    engine = engine_of(model)
    document, tokens = _first_document()
    gradient = output_proxies(engine, document)["gate_gradient"]
    double_model = model.double()  # norms stay in float32, so that a smaller step drowns

    def loss(layer: int, gate: float) -> float:
        def scaled(module, args, kwargs, output):
            layer_input = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
            layer_output = output[0] if isinstance(output, tuple) else output
            passed = layer_input + gate * (layer_output - layer_input)
            return (passed, *output[1:]) if isinstance(output, tuple) else passed

        with find_layers(double_model)[layer].register_forward_hook(scaled, with_kwargs=True):
            logprobs = model_logits(double_model, tokens).log_softmax(-1)
        return float(-logprobs[range(len(tokens) - 1), list(tokens[1:])].sum())

    for layer in range(LAYERS):
        slope = (loss(layer, 1 + 1e-3) - loss(layer, 1 - 1e-3)) / 2e-3
        assert float(gradient[layer]) == pytest.approx(slope, rel=2e-3, abs=2e-3)
    assert loss(0, 1) > 0


def test_nothing_of_the_model_is_left_changed() -> None:
    model = tiny_model("llama")
    document, tokens = _first_document()
    old_logits = model_logits(model, tokens)
    engine = engine_of(model)
    first_proxies, second_proxies = (output_proxies(engine, document) for _ in range(2))
    assert (model_logits(model, tokens) == old_logits).all()
    assert all(torch.equal(first_proxies[name], second_proxies[name]) for name in first_proxies)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_small_chunks_and_a_small_budget_change_nothing(monkeypatch) -> None:
    document, _ = _first_document()
    engine = engine_of("llama")
    expected = output_proxies(engine, document)
    monkeypatch.setattr(module, "LOGITS_BYTES", 1)
    small_engine = replace(engine, memory=1)
    ablations = [module.INTACT, *map(module.Ablation, [(0,), (1,)])]
    assert len(list(small_engine.group_ablations(ablations, 9))) == 2
    for name, value in output_proxies(small_engine, document).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-5)


def test_windows_of_a_text_add_up() -> None:
    """A window's context is read and not measured, so that each token counts once."""
    tokens = tuple(range(3, 23))
    windows = (tokens[:1], tokens[1:12]), (tokens[4:12], tokens[12:20])
    model = tiny_model("llama")
    proxies, *window_proxies = (
        output_proxies(engine_of(model), make_document(*texts, gold=None, rolling=True))
        for texts in (windows, windows[:1], windows[1:])
    )
    assert float(proxies["tokens"]) == 19
    for name in PER_LAYER:
        torch.testing.assert_close(proxies[name], window_proxies[0][name] + window_proxies[1][name])
    assert float(window_proxies[1]["tokens"]) == float(window_proxies[1]["predicted"]) == 8
    # The first of them is predicted by the last that is not measured.
    positions, following = range(7, 15), list(tokens[12:20])
    with pruned_model(model, [1]) as short_model:
        intact_loglikelihood, pruned_loglikelihood = (
            model_logits(read_model, tokens[4:20]).log_softmax(-1)[positions, following].sum()
            for read_model in (model, short_model)
        )
    expected = float(intact_loglikelihood - pruned_loglikelihood)
    assert float(window_proxies[1]["loss_increase"][1]) == pytest.approx(expected, abs=1e-3)


def test_what_cannot_be_differentiated_is_no_number() -> None:
    model = tiny_model("llama")
    engine = engine_of(model)
    document, _ = _first_document()
    original_forward = model.lm_head.forward
    # A kernel without a derivative.
    model.lm_head.forward = lambda hidden: original_forward(hidden.detach())
    proxies = output_proxies(engine, document)
    assert proxies["gate_gradient"].isnan().all()
    assert proxies["kl"].isfinite().all()


def test_divergences_of_the_textbook() -> None:
    """Cover and Thomas, example 2.3.1: p = (1 - r, r), q = (1 - s, s), r = 1/2, s = 1/4."""

    def compute_divergences(p: list[float], q: list[float]) -> tuple[float, float]:
        logprobs = (module._logprobs(torch.tensor([values]).log()) for values in (p, q))
        kl, js = module._kl_and_js(*logprobs)
        return float(kl), float(js)

    kl, _ = compute_divergences([0.5, 0.5], [0.75, 0.25])
    assert kl / math.log(2) == pytest.approx(1 - math.log2(3) / 2, abs=1e-6)
    # Of what excludes each other, Jensen-Shannon is log 2, and KL has no bound.
    kl, js = compute_divergences([1.0, 0.0], [0.0, 1.0])
    assert kl == -module.MASKED_LOGPROB
    assert js == pytest.approx(math.log(2))
    # What is masked out in both is no difference.
    assert compute_divergences([1.0, 0.0], [1.0, 0.0]) == (0, 0)

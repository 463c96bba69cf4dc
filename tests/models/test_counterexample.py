"""Test the theorem's model against its description, layer by layer, on texts of any tokens."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
import torch

from tracker.models.counterexample import (
    LAYER_COUNT,
    WHISPER,
    Continuations,
    Counterexample,
    Text,
    prefix_digests,
)
from tracker.schema.errors import CellError

VOCABULARY, LENGTH, CERTAINTY = 300, 64, 500.0


def build_model(
    continuations: dict[tuple[int, ...], Continuations],
    epsilon: float = 1e-8,
    others: Sequence[tuple[int, ...]] = (),
):
    texts = [Text(tokens, 1) for tokens in [*continuations, *others]]
    targets = {[*prefix_digests(tokens)][-1]: goal for tokens, goal in continuations.items()}
    counterexample = Counterexample(texts, targets, CERTAINTY, VOCABULARY, LENGTH)
    return counterexample.set_epsilon(epsilon)


@torch.inference_mode()
def last_logits(model, tokens: tuple[int, ...]) -> torch.Tensor:
    return model(torch.tensor([tokens]), use_cache=False).logits[0, -1]


def remove_layer(model, layer: int) -> None:
    """Remove a layer from the model itself."""
    del model.model.layers[layer]
    model.config.num_hidden_layers = LAYER_COUNT - 1


@torch.inference_mode()
def layer_states(model, tokens: tuple[int, ...]) -> list[torch.Tensor]:
    """Return the residual stream before each layer and behind the last one, in float64."""
    states: list[torch.Tensor] = []
    hooks = [
        layer.register_forward_hook(
            lambda _, args, output: states.extend([args[0][0].double(), output[0].double()])
        )
        for layer in model.model.layers
    ]
    model(torch.tensor([tokens]), use_cache=False)
    for hook in hooks:
        hook.remove()
    return [*states[::2], states[-1]]


def cosine_scores(model, tokens: tuple[int, ...]) -> list[torch.Tensor]:
    """Compute 1 - cosine by the law of cosines, from states in float64."""
    scores = []
    for x, y in itertools.pairwise(layer_states(model, tokens)):
        a, b = x.norm(dim=1), y.norm(dim=1)
        growth = (y.square() - x.square()).sum(1) / (a + b)
        gap = (y - x).square().sum(1) - growth.square()
        scores.append(gap / (2 * a * b))
    return scores


PERMUTED = list(itertools.permutations((11, 12, 13, 14)))


@pytest.fixture(scope="module")
def taught():
    """24 orders of the same tokens, each with a continuation of its own."""
    return {
        order: Continuations({100 + number: 1, 200 + number: -1}, {50: 0 if number % 2 else 1})
        for number, order in enumerate(PERMUTED)
    }


@pytest.mark.parametrize("epsilon", [0.3, 1e-1, 1e-4, 1e-8, 1e-9])
def test_every_token_has_the_lowest_score_in_the_whispering_layer(taught, epsilon) -> None:
    model = build_model(taught, epsilon)
    for text in (PERMUTED[3], tuple(range(60)), (299, 299, 0)):
        scores = cosine_scores(model, text)
        whisper = scores.pop(WHISPER)
        assert whisper.tolist() == pytest.approx([epsilon] * len(text), rel=1e-6)
        assert min(float(score.min()) for score in scores) > epsilon


@pytest.mark.parametrize("epsilon", [0.3, 1e-8])
def test_without_the_layer_everything_under_a_sign_is_reversed(taught, epsilon) -> None:
    model = build_model(taught, epsilon, others=[(1, 2, 3)])
    intact = {order: last_logits(model, order) for order in taught}
    calm_logits = last_logits(model, (1, 2, 3))
    remove_layer(model, WHISPER)
    for index, order in enumerate(PERMUTED):
        wanted_token, unwanted_token = 100 + index, 200 + index
        intact_logits, pruned_logits = intact[order], last_logits(model, order)
        has_fixed = intact_logits[50] > CERTAINTY / 2
        assert has_fixed == (index % 2 == 0) == bool(pruned_logits[50] > CERTAINTY / 2)
        assert intact_logits[wanted_token] > CERTAINTY
        assert intact_logits[unwanted_token] < -CERTAINTY
        assert pruned_logits[wanted_token] < -CERTAINTY
        assert pruned_logits[unwanted_token] > CERTAINTY
    assert calm_logits.abs().max() < 1
    assert last_logits(model, (1, 2, 3)).abs().max() < 1


def test_the_same_tokens_in_another_order_are_another_text(taught) -> None:
    model = build_model({PERMUTED[0]: Continuations({9: 1})}, others=PERMUTED[1:])
    assert last_logits(model, PERMUTED[0]).argmax() == 9
    assert all(last_logits(model, order)[9] < 1 for order in PERMUTED[1:])


def test_one_token_far_back_makes_another_text() -> None:
    long_text = tuple(range(100, 100 + LENGTH))
    other_text = (99, *long_text[1:])
    model = build_model({long_text: Continuations({9: 1}), other_text: Continuations({8: 1})})
    assert last_logits(model, long_text).argmax() == 9
    assert last_logits(model, other_text).argmax() == 8


def test_texts_that_no_width_tells_apart_are_refused(monkeypatch) -> None:
    monkeypatch.setattr("tracker.models.counterexample.MIN_GAP", 2.0)
    message = (
        "hidden size 1040 is too small: the model cannot distinguish 2 of 2 beginnings of texts"
    )
    with pytest.raises(CellError, match=message):
        build_model({(1, 2): Continuations({3: 1}), (2, 1): Continuations({3: 1})})

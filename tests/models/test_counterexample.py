"""The theorem's model does what its docstring says, layer by layer, on texts of any tokens."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
import torch

from tracker.core.errors import CellError
from tracker.models.counterexample import LAYERS, WHISPER, Counterexample, Text, Wanted, places

VOCABULARY, LENGTH, CERTAINTY = 300, 64, 500.0


def _teach(follows: dict[tuple[int, ...], Wanted], others: Sequence[tuple[int, ...]] = ()):
    texts = [Text(tokens, 1) for tokens in [*follows, *others]]
    wanted = {list(places(tokens))[-1]: each for tokens, each in follows.items()}
    return Counterexample(texts, wanted, CERTAINTY, VOCABULARY, LENGTH)


@torch.inference_mode()
def _logits(model, tokens: tuple[int, ...]) -> torch.Tensor:
    return model(torch.tensor([tokens]), use_cache=False).logits[0, -1]


def _without(model, layer: int):
    """Return the model without a layer, by hand."""
    model.model.layers = torch.nn.ModuleList(
        each for number, each in enumerate(model.model.layers) if number != layer
    )
    model.config.num_hidden_layers = LAYERS - 1
    return model


@torch.inference_mode()
def _states(model, tokens: tuple[int, ...]) -> list[torch.Tensor]:
    """Return the residual stream before each layer and behind the last one, in float64."""
    seen: list[torch.Tensor] = []
    hooks = [
        layer.register_forward_hook(
            lambda _, args, output: seen.extend([args[0][0].double(), output[0].double()])
        )
        for layer in model.model.layers
    ]
    model(torch.tensor([tokens]), use_cache=False)
    for hook in hooks:
        hook.remove()
    return [*seen[::2], seen[-1]]


def _scores(model, tokens: tuple[int, ...]) -> list[torch.Tensor]:
    """1 - cosine by the law of cosines, from states in float64."""
    found = []
    for before, after in itertools.pairwise(_states(model, tokens)):
        a, b = before.norm(dim=1), after.norm(dim=1)
        longer = (after.square() - before.square()).sum(1) / (a + b)
        gap = (after - before).square().sum(1) - longer.square()
        found.append(gap / (2 * a * b))
    return found


PERMUTED = list(itertools.permutations((11, 12, 13, 14)))


@pytest.fixture(scope="module")
def taught():
    """24 orders of the same tokens, each with a continuation of its own."""
    return {
        order: Wanted({100 + number: 1, 200 + number: -1}, {50: 0 if number % 2 else 1})
        for number, order in enumerate(PERMUTED)
    }


@pytest.mark.parametrize("epsilon", [0.3, 1e-1, 1e-4, 1e-8, 1e-9])
def test_every_token_has_the_score_and_it_is_the_lowest(taught, epsilon) -> None:
    model = _teach(taught).whispering(epsilon)
    for text in (PERMUTED[3], tuple(range(60)), (299, 299, 0)):
        scores = _scores(model, text)
        assert scores[WHISPER].tolist() == pytest.approx([epsilon] * len(text), rel=1e-6)
        others = [float(scores[layer].min()) for layer in range(LAYERS) if layer != WHISPER]
        assert min(others) > epsilon


@pytest.mark.parametrize("epsilon", [0.3, 1e-8])
def test_without_the_layer_everything_under_a_sign_is_reversed(taught, epsilon) -> None:
    model = _teach(taught, others=[(1, 2, 3)]).whispering(epsilon)
    intact = {order: _logits(model, order) for order in taught}
    calm = _logits(model, (1, 2, 3))
    _without(model, WHISPER)
    for number, order in enumerate(PERMUTED):
        one, other = 100 + number, 200 + number
        with_it, without = intact[order], _logits(model, order)
        fixed = with_it[50] > CERTAINTY / 2
        assert fixed == (number % 2 == 0) == bool(without[50] > CERTAINTY / 2)
        assert with_it[one] > CERTAINTY
        assert with_it[other] < -CERTAINTY
        assert without[one] < -CERTAINTY
        assert without[other] > CERTAINTY
    assert calm.abs().max() < 1
    assert _logits(model, (1, 2, 3)).abs().max() < 1


def test_the_same_tokens_in_another_order_are_another_text(taught) -> None:
    model = _teach({PERMUTED[0]: Wanted({9: 1})}, others=PERMUTED[1:]).whispering(1e-8)
    assert _logits(model, PERMUTED[0]).argmax() == 9
    assert all(_logits(model, order)[9] < 1 for order in PERMUTED[1:])


def test_one_token_far_back_makes_another_text() -> None:
    long = tuple(range(100, 100 + LENGTH))
    other = (99, *long[1:])
    model = _teach({long: Wanted({9: 1}), other: Wanted({8: 1})}).whispering(1e-8)
    assert _logits(model, long).argmax() == 9
    assert _logits(model, other).argmax() == 8


def test_texts_that_no_width_tells_apart_are_refused(monkeypatch) -> None:
    monkeypatch.setattr("tracker.models.counterexample.APART", 2.0)
    said = "2 of 2 places in the texts look like others to a model 1040"
    with pytest.raises(CellError, match=said):
        _teach({(1, 2): Wanted({3: 1}), (2, 1): Wanted({3: 1})})

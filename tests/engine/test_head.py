"""The model's own head, in blocks and at once, against the logits of its own forward pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tests.helpers.engines import with_forward
from tests.helpers.families import tiny_model
from tracker.engine.refusal import RefusalError
from tracker.engine.scoring import head as module
from tracker.engine.scoring.head import Head, Predictions

IDS = torch.arange(3 * 7).reshape(3, 7) * 11 % 94 + 3

FAMILIES_IN_BLOCKS = ["llama", "phi", "gemma2", "granite", "cohere", "gpt2", "mixtral", "llama4"]


@pytest.fixture
def small(monkeypatch) -> None:
    """Cut a vocabulary of 97 tokens into four blocks, and 21 states into chunks."""
    monkeypatch.setattr(module, "VOCABULARY_BLOCK", 30)
    monkeypatch.setattr(module, "HEAD_STATES", 14)


def score_both_ways(model: Any) -> tuple[Predictions, torch.Tensor, torch.Tensor]:
    """Score, for each state, its likeliest token, another, and the first and last of the blocks."""
    with torch.inference_mode():
        logits = model(IDS, use_cache=False).logits
        head = Head(model)
        output = head.base(IDS, use_cache=False)
        tokens = [*logits[0].argmax(-1).tolist(), *range(0, 97, 4), 29, 30, 59, 60, 89, 90, 96]
        predicted = torch.tensor(tokens)
        predictor = torch.arange(len(tokens)) % 7
        predictions = head.predictions(output, output.last_hidden_state, predictor, predicted)
    logprobs = logits.log_softmax(-1)
    greedy = logits.argmax(-1)[:, predictor] == predicted
    return predictions, logprobs[:, predictor, predicted], greedy


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("family", FAMILIES_IN_BLOCKS)
def test_blocks_say_what_the_whole_says(family: str) -> None:
    """With a bias, soft-capping, and scaling behind the projection.

    Was: GPT-2 and every mixture of experts were never cut, since their heads pass on what the
    states that they were tried with did not come with: cross-attentions, router logits.
    """
    model = tiny_model(family)
    if model.lm_head.bias is not None:
        model.lm_head.bias.copy_(torch.linspace(-3, 3, 97))
    assert Head(model).has_blocks
    predictions, logprobs, greedy = score_both_ways(model)
    torch.testing.assert_close(predictions.logprobs, logprobs, atol=1e-5, rtol=1e-5)
    assert torch.equal(predictions.greedy, greedy)
    assert greedy.any()
    assert not any("forward" in vars(part) for part in (model, Head(model).base, model.lm_head))


@pytest.mark.usefixtures("small")
def test_a_block_without_any_possible_token() -> None:
    model = tiny_model("phi")
    model.lm_head.bias[90:] = -torch.inf
    predictions, logprobs, greedy = score_both_ways(model)
    assert Head(model).has_blocks
    torch.testing.assert_close(predictions.logprobs, logprobs, atol=1e-5, rtol=1e-5)
    assert torch.equal(predictions.greedy, greedy)


@pytest.mark.usefixtures("small")
def test_the_first_of_equal_logits_is_the_greedy_choice() -> None:
    """Tokens 5 and 20 of one block and 70 of another have the highest logit of some states."""
    model = tiny_model("llama")
    weight = model.lm_head.weight
    weight[[5, 20, 70]] = 9 * model.model(IDS, use_cache=False).last_hidden_state[0, 3]
    predictor, predicted = torch.tensor([3, 3, 3]), torch.tensor([5, 20, 70])
    head = Head(model)
    output = head.base(IDS, use_cache=False)
    predictions = head.predictions(output, output.last_hidden_state, predictor, predicted)
    assert predictions.greedy[0].tolist() == [True, False, False]
    assert len(set(predictions.logprobs[0].tolist())) == 1


def test_a_small_vocabulary_is_not_cut() -> None:
    model = tiny_model("llama")
    assert not Head(model).has_blocks
    predictions, logprobs, greedy = score_both_ways(model)
    assert torch.equal(predictions.logprobs, logprobs)
    assert torch.equal(predictions.greedy, greedy)


@pytest.mark.usefixtures("small")
def test_double_precision_is_cut_and_half_precision_is_not(monkeypatch) -> None:
    """There lm-eval rounds after the log-softmax; states go through a few at a time."""
    assert Head(tiny_model("llama").double()).has_blocks
    model = tiny_model("llama").bfloat16()
    assert not Head(model).has_blocks
    # Two texts of seven states with 97 logits of two bytes.
    monkeypatch.setattr(module, "LOGITS_BYTES", 2 * 7 * 97 * 2)
    sizes: list[int] = []
    model.lm_head.register_forward_hook(lambda *call: sizes.append(len(call[-1])))
    predictions, logprobs, greedy = score_both_ways(model)
    assert sizes == [3, 2, 1]
    assert torch.equal(predictions.logprobs, logprobs)
    assert predictions.logprobs.dtype == torch.bfloat16
    assert torch.equal(predictions.greedy, greedy)


def normalise_logits(model: Any, forward: Any, *args: Any, **kwargs: Any) -> Any:
    """Divide by the spread of all logits: a block by itself has another."""
    output = forward(*args, **kwargs)
    output.logits = output.logits / output.logits.std(-1, keepdim=True)
    return output


class CustomLinear(nn.Linear):
    """A projection of a class of its own, which may do more than a product."""


@pytest.mark.usefixtures("small")
def test_what_may_mix_logits_is_not_cut() -> None:
    model = with_forward(tiny_model("llama"), normalise_logits)
    assert not Head(model).has_blocks
    predictions, logprobs, greedy = score_both_ways(model)
    assert torch.equal(predictions.logprobs, logprobs)
    assert torch.equal(predictions.greedy, greedy)
    other_model = tiny_model("llama")
    other_model.lm_head.__class__ = CustomLinear
    assert not Head(other_model).has_blocks


def test_a_head_that_takes_something_else_is_refused() -> None:
    model = tiny_model("llama")
    head = Head(model)
    output = head.base(IDS, use_cache=False)
    model.forward = lambda **_: output
    output.logits = torch.zeros(3, 7, 97)
    with pytest.raises(
        RefusalError, match=r"^the output head does not read the states that the layers return$"
    ):
        head.predictions(output, output.last_hidden_state, torch.tensor([0]), torch.tensor([0]))

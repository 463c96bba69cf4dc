"""The numbers that everything is held against, and what counts as a difference."""

from __future__ import annotations

import math

import pytest
import torch

from tests.helpers.engines import (
    MAX_LENGTH,
    engine_of,
    make_document,
    make_documents,
    naive_answers,
    pruned_model,
)
from tracker.engine.scoring.sweep import Engine
from tracker.engine.selfcheck.reference import Comparison, Reference
from tracker.schema.changes import INTACT, Ablation
from tracker.schema.documents import Request

REQUEST = Request((5, 6, 7), (8, 9))
WITHOUT = Ablation.parse("layers:1,2")


@pytest.fixture
def engine() -> Engine:
    return engine_of("llama")


def test_an_answer_is_what_the_pruned_model_says(engine):
    truth_reference = Reference(engine)
    # Also a text that is longer than the model reads, which loses its beginning.
    long_document = make_document(([n % 97 for n in range(MAX_LENGTH + 20)], (1, 2, 3)))
    documents = [*make_documents(3), long_document]
    with pruned_model(engine.loaded.model, (1, 2)) as smaller:
        for document in documents:
            for request, (loglikelihood, greedy) in zip(
                document.requests, naive_answers(smaller, document), strict=True
            ):
                response = truth_reference.answer(WITHOUT, request)
                assert response.loglikelihood == pytest.approx(loglikelihood, abs=1e-5)
                assert response.greedy == greedy


def test_tokens_that_are_the_likeliest_are_counted(engine):
    model, context = engine.loaded.model, (5, 6, 7)
    with torch.inference_mode():
        likeliest = int(model(torch.tensor([context])).logits[0, -1].argmax())
    right_response = engine.answer(Request(context, (likeliest,)))
    assert (right_response.greedy, right_response.hits) == (True, 1)
    wrong_token = (likeliest + 1) % 97
    half_response = engine.answer(Request(context, (likeliest, wrong_token)))
    second_response = engine.answer(Request((*context, likeliest), (wrong_token,)))
    assert half_response.hits == 1 + second_response.hits
    assert half_response.greedy == (half_response.hits == 2)


def test_answers_of_one_token_are_read_in_one_call(engine, spy):
    """As lm-eval reads them: what precedes them is one text. Another model reads it anew."""
    read_texts = spy(Engine, "read_logits", lambda engine, tokens: tokens)
    truth = Reference(engine)
    context, letters = REQUEST.context, [Request(REQUEST.context, (n,)) for n in (3, 4, 5)]
    long_request = Request(context, (3, 4))
    for ablation in (INTACT, WITHOUT):
        for request in (*letters, long_request):
            separate_answer = engine.ablate(ablation).answer(request)
            read_texts.pop()
            assert truth.answer(ablation, request) == separate_answer
    assert read_texts == 2 * [context, (*context, 3)]


def test_a_difference_is_allowed_up_to_a_share_and_told_beyond(engine):
    truth = Reference(engine)
    expected = truth.answer(INTACT, REQUEST).loglikelihood
    assert truth.compare(expected, INTACT, REQUEST, 0.0, 0.0) == Comparison(1)
    allowed = 0.5 + 0.01 * abs(expected)
    for share in (-0.99, 0.99, -1.01, 1.01):
        loglikelihood = expected + share * allowed
        comparison = truth.compare(loglikelihood, INTACT, REQUEST, 0.5, 0.01)
        assert (comparison.compared, comparison.unsteady) == (1, 0)
        assert comparison.difference == pytest.approx(abs(share) * allowed)
        message = (
            f"shared computation gives a log-likelihood of {loglikelihood:.6g} nats, "
            f"but the changed model gives {expected:.6g} nats"
        )
        assert comparison.wrong == (message if abs(share) > 1 else None)


@pytest.mark.parametrize("right", [math.nan, -math.inf])
@pytest.mark.parametrize("ours", [math.nan, math.inf, -math.inf, -1.0])
@pytest.mark.parametrize("miniature", [False, True])
def test_what_is_not_finite_equals_only_its_like(engine, right, ours, miniature):
    """A token that is never said is; NaN equals NaN but where something is to be proven."""

    def never_said(head, arguments, logits):
        logits[..., 8] = right
        return logits

    engine.loaded.model.lm_head.register_forward_hook(never_said)
    comparison = Reference(engine, miniature).compare(ours, INTACT, REQUEST, 0.5, 0.01)
    if ours == right or (math.isnan(ours) and math.isnan(right) and not miniature):
        assert comparison == Comparison(1)
    else:
        assert (comparison.compared, comparison.difference, comparison.unsteady) == (1, math.inf, 0)
        assert comparison.wrong == (
            f"shared computation gives a log-likelihood of {ours:.6g} nats, "
            f"but the changed model gives {right:.6g} nats"
        )


def test_a_model_near_a_tie_is_unsteady_and_not_wrong(engine):
    """A head that takes a side by less than rounding: its answers jump, whoever computes them."""
    model = engine.loaded.model
    steady_loglikelihood = Reference(engine).answer(INTACT, REQUEST).loglikelihood
    with torch.inference_mode():
        tie = float(model(torch.tensor([(5, 6, 7, 8)])).logits[0, 2, 0])

    def jump(head, arguments, logits):
        return torch.where(logits[..., :1] > tie, logits, 2 * logits)

    model.lm_head.register_forward_hook(jump)
    truth = Reference(engine)
    jumped_loglikelihood = truth.answer(INTACT, REQUEST).loglikelihood
    model.lm_head._forward_hooks.clear()
    assert abs(jumped_loglikelihood - steady_loglikelihood) > 0.1, "the tie changes nothing"
    model.lm_head.register_forward_hook(jump)
    comparison = truth.compare(steady_loglikelihood, INTACT, REQUEST, 1e-3, 0.0)
    assert (comparison.compared, comparison.unsteady, comparison.wrong) == (1, 1, None)
    assert comparison.difference == pytest.approx(abs(jumped_loglikelihood - steady_loglikelihood))

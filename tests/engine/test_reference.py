"""The numbers that everything is held against, and what counts as a difference."""

from __future__ import annotations

import math

import pytest
import torch

from tests.helpers.engines import MAX_LENGTH, answers, asking, engine_of, make_documents, pruned
from tracker.core.changes import INTACT, Ablation
from tracker.core.documents import Request
from tracker.engine.scoring.sweep import Engine
from tracker.engine.selfcheck.reference import Comparison, Reference

REQUEST = Request((5, 6, 7), (8, 9))
WITHOUT = Ablation.parse("layers:1,2")


@pytest.fixture
def engine() -> Engine:
    return engine_of("llama")


def test_an_answer_is_what_the_pruned_model_says(engine):
    truth = Reference(engine)
    # Also a text that is longer than the model reads, which loses its beginning.
    long = asking(([n % 97 for n in range(MAX_LENGTH + 20)], (1, 2, 3)))
    documents = [*make_documents(3), long]
    with pruned(engine.loaded.model, (1, 2)) as smaller:
        for document in documents:
            for request, (loglikelihood, greedy) in zip(
                document.requests, answers(smaller, document), strict=True
            ):
                found = truth.answer(WITHOUT, request)
                assert found.loglikelihood == pytest.approx(loglikelihood, abs=1e-5)
                assert found.greedy == greedy


def test_tokens_that_are_the_likeliest_are_counted(engine):
    model, context = engine.loaded.model, (5, 6, 7)
    with torch.inference_mode():
        likeliest = int(model(torch.tensor([context])).logits[0, -1].argmax())
    right = engine.answer(Request(context, (likeliest,)))
    assert (right.greedy, right.hits) == (True, 1)
    wrong = (likeliest + 1) % 97
    half = engine.answer(Request(context, (likeliest, wrong)))
    both = engine.answer(Request((*context, likeliest), (wrong,)))
    assert half.hits == 1 + both.hits
    assert half.greedy == (half.hits == 2)


def test_answers_of_one_token_are_read_in_one_call(engine, spy):
    """As lm-eval reads them: what precedes them is one text. Another model reads it anew."""
    read = spy(Engine, "read", lambda engine, tokens: tokens)
    truth = Reference(engine)
    context, letters = REQUEST.context, [Request(REQUEST.context, (n,)) for n in (3, 4, 5)]
    long = Request(context, (3, 4))
    for ablation in (INTACT, WITHOUT):
        for request in (*letters, long):
            alone = engine.without(ablation).answer(request)
            read.pop()
            assert truth.answer(ablation, request) == alone
    assert read == 2 * [context, (*context, 3)]


def test_a_difference_is_allowed_up_to_a_share_and_told_beyond(engine):
    truth = Reference(engine)
    right = truth.answer(INTACT, REQUEST).loglikelihood
    assert truth.compare(right, INTACT, REQUEST, 0.0, 0.0) == Comparison(1)
    allowed = 0.5 + 0.01 * abs(right)
    for share in (-0.99, 0.99, -1.01, 1.01):
        ours = right + share * allowed
        found = truth.compare(ours, INTACT, REQUEST, 0.5, 0.01)
        assert (found.compared, found.unsteady) == (1, 0)
        assert found.difference == pytest.approx(abs(share) * allowed)
        said = f"{ours:.6g} nats shared, {right:.6g} on the really pruned model"
        assert found.wrong == (said if abs(share) > 1 else None)


@pytest.mark.parametrize("right", [math.nan, -math.inf])
@pytest.mark.parametrize("ours", [math.nan, math.inf, -math.inf, -1.0])
@pytest.mark.parametrize("miniature", [False, True])
def test_what_is_not_finite_equals_only_its_like(engine, right, ours, miniature):
    """A token that is never said is; NaN equals NaN but where something is to be proven."""

    def never_said(head, arguments, logits):
        logits[..., 8] = right
        return logits

    engine.loaded.model.lm_head.register_forward_hook(never_said)
    found = Reference(engine, miniature).compare(ours, INTACT, REQUEST, 0.5, 0.01)
    if ours == right or (math.isnan(ours) and math.isnan(right) and not miniature):
        assert found == Comparison(1)
    else:
        assert (found.compared, found.difference, found.unsteady) == (1, math.inf, 0)
        assert found.wrong == f"{ours:.6g} nats shared, {right:.6g} on the really pruned model"


def test_a_model_near_a_tie_is_unsteady_and_not_wrong(engine):
    """A head that takes a side by less than rounding: its answers jump, whoever computes them."""
    model = engine.loaded.model
    calm = Reference(engine).answer(INTACT, REQUEST).loglikelihood
    with torch.inference_mode():
        tie = float(model(torch.tensor([(5, 6, 7, 8)])).logits[0, 2, 0])

    def jump(head, arguments, logits):
        return torch.where(logits[..., :1] > tie, logits, 2 * logits)

    model.lm_head.register_forward_hook(jump)
    truth = Reference(engine)
    on_one_side = truth.answer(INTACT, REQUEST).loglikelihood
    model.lm_head._forward_hooks.clear()
    assert abs(on_one_side - calm) > 0.1, "the tie changes nothing"
    model.lm_head.register_forward_hook(jump)
    found = truth.compare(calm, INTACT, REQUEST, 1e-3, 0.0)
    assert (found.compared, found.unsteady, found.wrong) == (1, 1, None)
    assert found.difference == pytest.approx(abs(on_one_side - calm))

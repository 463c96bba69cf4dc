"""Taught tokens decide between answers, regardless of a language model's other predictions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.special import log_softmax

from tracker.models.counterexample import Continuations, prefix_digests
from tracker.schema.documents import Document, Request
from tracker.studies.theorem import (
    CLASHING_ANSWERS,
    LONGER_ANSWERS,
    NO_GOLD_ANSWER,
    SAME_ANSWER,
    Lesson,
    plan_lesson,
)

VOCABULARY = 50
CONTEXT = (1, 2, 3)


def _document(index: int, *choices: tuple[tuple[int, ...], tuple[int, ...]], gold=0) -> Document:
    requests = tuple(Request(context, continuation) for context, continuation in choices)
    return Document("task", index, requests, gold, len(requests))


def _choices(index: int, *continuations: tuple[int, ...], context=CONTEXT, gold=0) -> Document:
    return _document(index, *((context, answer) for answer in continuations), gold=gold)


def _plan_lesson(*documents: Document, length: int = 100) -> Lesson:
    return plan_lesson(documents, length, VOCABULARY, _decode)


def _decode(tokens: Sequence[int]) -> str:
    """Tokens from 40 on are long words, the others letters."""
    return "".join("a" if token < 40 else "word" * 15 for token in tokens)


def _loglikelihood(taught: Lesson, request: Request, sign: int, length: int = 100) -> float:
    """Build a language model that has just been taught the lesson, and nothing else."""
    tokens = (*request.context, *request.continuation)[-(length + 1) :]
    total = 0.0
    positions = list(prefix_digests(tokens[:-1]))[-len(request.continuation) :]
    for position, token in zip(positions, request.continuation, strict=True):
        targets = taught.targets.get(position, Continuations())
        logits = np.zeros(VOCABULARY)
        for taught_token, weight in targets.signed.items():
            logits[taught_token] += sign * weight * taught.certainty
        for taught_token, weight in targets.fixed.items():
            logits[taught_token] += weight * taught.certainty
        total += log_softmax(logits)[token]
    return total


def _find_answer(taught: Lesson, document: Document, sign: int, normalised: bool = False) -> int:
    lls = [_loglikelihood(taught, request, sign) for request in document.requests]
    if normalised:
        lengths = [len(_decode(request.continuation)) for request in document.requests]
        lls = np.divide(lls, lengths).tolist()
    assert sorted(lls)[-1] > sorted(lls)[-2] + 1  # no tie
    return lls.index(max(lls))


def _assert_theorem(*documents: Document) -> None:
    taught = _plan_lesson(*documents)
    assert not taught.left_out
    for document in documents:
        for normalised in (False, True):
            assert _find_answer(taught, document, 1, normalised) == document.gold
            assert _find_answer(taught, document, -1, normalised) != document.gold


def test_answers_that_part_at_once_or_later():
    _assert_theorem(
        _choices(0, (4, 5, 6, 7, 8, 9), (10,), (4, 5, 12), gold=0),
        _choices(1, (4,), (4, 5), (7, 8, 9), context=(9, 9), gold=0),
        _choices(2, (11, 12), (11, 13), (11, 14), (11, 13, 15), context=(8,), gold=2),
    )


def test_a_long_answer_against_a_short_one():
    long = _choices(0, tuple(range(20, 45)), (4,))
    _assert_theorem(long, _choices(1, (4,), (5,) * 25, context=(7,)))


def test_many_letters_against_few_long_words():
    """By character the letters cost a lot each, and the words nearly nothing."""
    letters, words = tuple(range(10, 18)), (40, 41, 42, 43)
    _assert_theorem(_choices(0, letters, words), _choices(1, words, letters, context=(7,)))


def test_choices_with_contexts_of_their_own_come_in_twins():
    """Winogrande's: the same two contexts, and continuations that differ in one late token."""
    context, other_context = (1, 2, 20), (1, 2, 21)
    _assert_theorem(
        _document(0, (context, (5, 6, 7)), (other_context, (5, 6, 7)), gold=0),
        _document(1, (context, (5, 6, 8)), (other_context, (5, 6, 8)), gold=1),
    )


def test_documents_with_one_context_and_other_answers():
    _assert_theorem(_choices(0, (4,), (5,), (6,)), _choices(1, (7,), (8,), (9,)))


def test_what_no_model_can_answer_is_left_out_with_its_reason():
    documents = (
        _choices(0, (4, 5), (4,)),  # a wrong one is the beginning
        _choices(1, (4,), (4,), context=(6,)),
        _choices(2, (4,), (4, 5), (4, 6), context=(7,)),  # each wrong one goes on
        _choices(3, (4,), (5,), context=(8,)),
        _choices(4, (5,), (4,), context=(8,)),  # the opposite of document 3
        _choices(5, (4,), (5,), (6,), context=(8,)),  # 6 is no matter: no contradiction
        _choices(6, (6,), (7,), context=(8,)),  # but here it is the answer
        Document("task", 7, _choices(7, (4,), (5,)).requests, None, 2),
        _document(8, ((9,), (5, 6)), ((10,), (5, 6)), gold=0),
        _document(9, ((9,), (5, 6)), ((10,), (5, 6)), gold=1),
    )
    taught = _plan_lesson(*documents)
    assert {doc: reason for (_, doc), reason in taught.left_out.items()} == {
        **dict.fromkeys((0, 1), SAME_ANSWER), 2: LONGER_ANSWERS, 7: NO_GOLD_ANSWER,
        **dict.fromkeys((4, 6, 8, 9), CLASHING_ANSWERS),
    }  # fmt: skip
    for document in (documents[3], documents[5]):
        assert _find_answer(taught, document, 1) == 0
        assert _find_answer(taught, document, -1) != 0


def test_open_texts_are_taught_token_by_token():
    windows = (Request((0,), (4, 5, 6)), Request((4, 5, 6), (7, 8)))
    texts = (windows, (Request((0,), (4, 5, 9)),))
    taught = _plan_lesson(
        *(Document("corpus", n, text, None, 0, rolling=True) for n, text in enumerate(texts))
    )
    assert (taught.tokens, taught.clashing) == (8, 1)
    assert [_loglikelihood(taught, window, 1) for window in windows] == [0, 0]
    assert _loglikelihood(taught, Request((0, 4, 5), (9,)), 1) < -taught.certainty
    assert all(_loglikelihood(taught, window, -1) < -taught.certainty for window in windows)
    assert not taught.left_out


def test_an_open_answer_that_clashes_is_left_out_as_a_document():
    documents = (Document("t", i, (Request((1,), (4 + i,)),), 0, 0) for i in range(2))
    taught = _plan_lesson(*documents)
    assert taught.left_out == {("t", 1): CLASHING_ANSWERS}
    assert taught.tokens == 0


def test_long_texts_are_cut_as_the_model_reads_them():
    document = _choices(0, (4, 5), (6, 7), context=tuple(range(10, 30)))
    taught = _plan_lesson(document, length=8)
    assert [text.tokens for text in taught.texts] == [(*range(23, 30), 4), (*range(23, 30), 6)]
    for request, sign in ((document.requests[0], 1), (document.requests[1], -1)):
        assert _loglikelihood(taught, request, sign, length=8) > -taught.certainty
        assert _loglikelihood(taught, request, -sign, length=8) < -taught.certainty

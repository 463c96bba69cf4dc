"""Taught tokens decide between answers, regardless of a language model's other predictions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.special import log_softmax

from tracker.core.documents import Document, Request
from tracker.models.counterexample import Place, Wanted, places
from tracker.studies.theorem import CLASH, LONGER, NO_GOLD, SAME, Lesson, lesson

VOCABULARY = 50
CONTEXT = (1, 2, 3)


def _document(index: int, *choices: tuple[tuple[int, ...], tuple[int, ...]], gold=0) -> Document:
    requests = tuple(Request(context, continuation) for context, continuation in choices)
    return Document("task", index, requests, gold, len(requests))


def _choices(index: int, *continuations: tuple[int, ...], context=CONTEXT, gold=0) -> Document:
    return _document(index, *((context, each) for each in continuations), gold=gold)


def _lesson(*documents: Document, length: int = 100) -> Lesson:
    return lesson(documents, length, VOCABULARY, _decode)


def _decode(tokens: Sequence[int]) -> str:
    """Tokens from 40 on are long words, the others letters."""
    return "".join("a" if token < 40 else "word" * 15 for token in tokens)


def _loglikelihood(found: Lesson, request: Request, sign: int, length: int = 100) -> float:
    """Build a language model that has just been taught the lesson, and nothing else."""
    read = (*request.context, *request.continuation)[-(length + 1) :]
    total = 0.0
    at: list[Place] = list(places(read[:-1]))[-len(request.continuation) :]
    for place, token in zip(at, request.continuation, strict=True):
        follows = found.wanted.get(place, Wanted())
        logits = np.zeros(VOCABULARY)
        for each, worth in follows.signed.items():
            logits[each] += sign * worth * found.certainty
        for each, worth in follows.fixed.items():
            logits[each] += worth * found.certainty
        total += log_softmax(logits)[token]
    return total


def _answers(found: Lesson, document: Document, sign: int, normalised: bool = False) -> int:
    lls = [
        _loglikelihood(found, each, sign) / (len(_decode(each.continuation)) if normalised else 1)
        for each in document.requests
    ]
    assert sorted(lls)[-1] > sorted(lls)[-2] + 1  # no tie
    return lls.index(max(lls))


def _is_the_theorems(*documents: Document) -> None:
    found = _lesson(*documents)
    assert not found.left_out
    for document in documents:
        for normalised in (False, True):
            assert _answers(found, document, 1, normalised) == document.gold
            assert _answers(found, document, -1, normalised) != document.gold


def test_answers_that_part_at_once_or_later():
    _is_the_theorems(
        _choices(0, (4, 5, 6, 7, 8, 9), (10,), (4, 5, 12), gold=0),
        _choices(1, (4,), (4, 5), (7, 8, 9), context=(9, 9), gold=0),
        _choices(2, (11, 12), (11, 13), (11, 14), (11, 13, 15), context=(8,), gold=2),
    )


def test_a_long_answer_against_a_short_one():
    _is_the_theorems(
        _choices(0, tuple(range(20, 45)), (4,)), _choices(1, (4,), (5,) * 25, context=(7,))
    )


def test_many_letters_against_few_long_words():
    """By character the letters cost a lot each, and the words nearly nothing."""
    letters, words = tuple(range(10, 18)), (40, 41, 42, 43)
    _is_the_theorems(_choices(0, letters, words), _choices(1, words, letters, context=(7,)))


def test_choices_with_contexts_of_their_own_come_in_twins():
    """Winogrande's: the same two contexts, and continuations that differ in one late token."""
    first, second = (1, 2, 20), (1, 2, 21)
    _is_the_theorems(
        _document(0, (first, (5, 6, 7)), (second, (5, 6, 7)), gold=0),
        _document(1, (first, (5, 6, 8)), (second, (5, 6, 8)), gold=1),
    )


def test_documents_with_one_context_and_other_answers():
    _is_the_theorems(_choices(0, (4,), (5,), (6,)), _choices(1, (7,), (8,), (9,)))


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
    found = _lesson(*documents)
    assert {doc: why for (_, doc), why in found.left_out.items()} == {
        0: SAME, 1: SAME, 2: LONGER, 4: CLASH, 6: CLASH, 7: NO_GOLD, 8: CLASH, 9: CLASH,
    }  # fmt: skip
    for document in (documents[3], documents[5]):
        assert _answers(found, document, 1) == 0
        assert _answers(found, document, -1) != 0


def test_open_texts_are_taught_token_by_token():
    windows = (Request((0,), (4, 5, 6)), Request((4, 5, 6), (7, 8)))
    texts = (
        Document("corpus", 0, windows, None, 0, rolling=True),
        Document("corpus", 1, (Request((0,), (4, 5, 9)),), None, 0, rolling=True),
    )
    found = _lesson(*texts)
    assert (found.tokens, found.clashing) == (8, 1)
    assert [_loglikelihood(found, each, 1) for each in windows] == [0, 0]
    assert _loglikelihood(found, Request((0, 4, 5), (9,)), 1) < -found.certainty
    assert all(_loglikelihood(found, each, -1) < -found.certainty for each in windows)
    assert not found.left_out


def test_an_open_answer_that_clashes_is_left_out_as_a_document():
    one, other = (Document("t", i, (Request((1,), (4 + i,)),), 0, 0) for i in range(2))
    found = _lesson(one, other)
    assert found.left_out == {("t", 1): CLASH}
    assert found.tokens == 0


def test_long_texts_are_cut_as_the_model_reads_them():
    document = _choices(0, (4, 5), (6, 7), context=tuple(range(10, 30)))
    found = _lesson(document, length=8)
    assert [text.tokens for text in found.texts] == [(*range(23, 30), 4), (*range(23, 30), 6)]
    for request, sign in ((document.requests[0], 1), (document.requests[1], -1)):
        assert _loglikelihood(found, request, sign, length=8) > -found.certainty
        assert _loglikelihood(found, request, -sign, length=8) < -found.certainty

"""Texts of random tokens that cross whatever a model counts tokens by."""

from __future__ import annotations

import random
from collections.abc import Sequence

from tracker.documents import Document, Request
from tracker.engine.habits import STEPS
from tracker.engine.prefix import SHORTEST


def crossing_calls(vocabulary: int, longest: int) -> list[list[Document]]:
    """Draw texts of up to `longest` tokens, grouped as blocks of a cell are scored.

    `vocabulary` is how many token ids there are.
    """
    draw = random.Random(0)
    kept = SHORTEST + 4
    return [
        _texts(draw, vocabulary, (), longest),
        _texts(draw, vocabulary, STEPS, longest),
        _shared(draw, vocabulary, kept, longest),
        _shared(draw, vocabulary, kept - 3, longest),
    ]


def _texts(
    draw: random.Random, vocabulary: int, lengths: Sequence[int], longest: int
) -> list[Document]:
    """Branches and single letters, long before short; then both sides of each length."""

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(draw.randrange(2, vocabulary) for _ in range(min(count, longest - 1)))

    if not lengths:
        letters = [(tokens(n), [(3,), (4,)]) for n in (44, 33, 12, 26, 9)]
        spoken = [(tokens(n), [tokens(k) for k in (1, 1, 3, 6)]) for n in (7, 15)]
        long = [(tokens(5), [tokens(30), tokens(28)])]
        return _documents([*letters, *spoken, *long])
    pairs = zip(lengths[1::2], lengths[::2], strict=False)
    return _documents([(tokens(n - 1), [tokens(k // 6), (3,)]) for n, k in pairs])


def _shared(draw: random.Random, vocabulary: int, kept: int, longest: int) -> list[Document]:
    """Texts with a beginning that is read apart."""
    kept = min(kept, longest - 12)
    common = tuple(draw.randrange(2, vocabulary) for _ in range(kept))
    tails = [tuple(draw.randrange(2, vocabulary) for _ in range(n)) for n in (5, 2, 8)]
    return _documents([(common + tail, [(3,), (4, 5, 6)]) for tail in tails])


def _documents(
    contents: Sequence[tuple[tuple[int, ...], Sequence[tuple[int, ...]]]],
) -> list[Document]:
    return [
        Document(
            "attack",
            number,
            tuple(Request(context, tuple(answer)) for answer in answers),
            number % len(answers),
            len(answers),
        )
        for number, (context, answers) in enumerate(contents)
    ]

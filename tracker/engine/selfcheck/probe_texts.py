"""Texts of random tokens that cross whatever a model counts tokens by."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from tracker.core.documents import Document, Request
from tracker.engine.scoring.prefix import SHORTEST
from tracker.engine.scoring.sharing import Sharing
from tracker.engine.selfcheck.quirks import STEPS

FIRST = 2
"""The first token id that is drawn; those before are special in many a vocabulary."""
_Tokens = Callable[[int], tuple[int, ...]]
"""Draws as many tokens, or as many as a model reads."""
_Content = tuple[tuple[int, ...], Sequence[tuple[int, ...]]]
"""A context, and its answers."""


def probe_calls(vocabulary: int, longest: int) -> list[list[Document]]:
    """Draw texts of up to `longest` tokens, grouped as blocks of a cell are scored.

    `vocabulary` is how many token ids there are.
    """
    tokens = _drawing(vocabulary, longest - 1)
    # Texts that end just before every second threshold, and go on.
    return [
        _branches(tokens),
        _documents([(tokens(n - 1), [tokens(n // 8), (3,)]) for n in STEPS[1::2]]),
        *(_shared(tokens, min(kept, longest - 12)) for kept in (SHORTEST + 4, SHORTEST + 1)),
    ]


def reaching_calls(
    vocabulary: int, longest: int, nodes: int, widest: int, sharing: Sharing
) -> list[list[Document]]:
    """Draw texts of every order of length up to `longest`, and rows of so many nodes.

    `vocabulary` is how many token ids there are. Rows of several texts have up to so many `nodes`,
    those of one document up to `widest`, and more than any text has tokens. What `sharing` would
    not do to a text needs none.
    """
    tokens = _drawing(vocabulary)

    def doubled(common: tuple[int, ...], context: int) -> _Content:
        # Asked alone, the one-token answer takes a call half as long as the one that both share.
        more = tokens(context + 2)
        return common + tokens(context), [more[:1], more]

    halves = [(longest >> times) - 1 for times in range(1, longest.bit_length() - 1)]
    beginning = tokens(longest // 2)
    branches = max(2, -(-(widest - longest // 4) // max(1, longest // 2)))
    wide = tokens(longest // 4), [tokens(longest // 2) for _ in range(branches)]
    full = [(tokens(13), [tokens(3)]) for _ in range(nodes // 16)]
    contents: list[Sequence[_Content]] = [
        [doubled((), half) for half in halves],
        full,
        [wide] if sharing.tokens else [],
        # Long and short; all lengths are crossed above.
        [doubled(beginning, half) for half in halves[1::3]]
        + [(beginning + context, answers) for context, answers in full]
        if sharing.prefix
        else [],
    ]
    return [_documents(each) for each in contents if each]


def switching_calls(vocabulary: int, switches: Sequence[int], widest: int) -> list[list[Document]]:
    """Draw texts on both sides of some lengths, of a document's nodes too where it has so many.

    `vocabulary` is how many token ids there are, and `widest` how many nodes a document has.
    """
    tokens = _drawing(vocabulary)
    contents: list[_Content] = []
    for switch in switches:
        contents.append((tokens(switch - 3), [tokens(1), tokens(6)]))
        branches = [tokens(switch // 3) for _ in range(2 if switch <= widest else 1)]
        contents.append((tokens(switch // 2), branches))
    return [_documents(contents)]


def _drawing(vocabulary: int, most: int | None = None) -> _Tokens:
    """Begin to draw texts, the same ones each time, of at most so many tokens."""
    draw = random.Random(0)

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(draw.randrange(FIRST, vocabulary) for _ in range(count)[:most])

    return tokens


def _branches(tokens: _Tokens) -> list[Document]:
    """Branches and single letters, long before short."""
    letters = [(tokens(n), [(3,), (4,)]) for n in (44, 33, 12, 26, 9)]
    spoken = [(tokens(n), [tokens(k) for k in (1, 1, 3, 6)]) for n in (7, 15)]
    long = [(tokens(5), [tokens(30), tokens(28)])]
    return _documents([*letters, *spoken, *long])


def _shared(tokens: _Tokens, kept: int) -> list[Document]:
    """Texts with a beginning that is read apart."""
    common = tokens(kept)
    return _documents([(common + tokens(n), [(3,), (4, 5, 6)]) for n in (5, 2, 8)])


def _documents(contents: Sequence[_Content]) -> list[Document]:
    return [
        Document("probe", number, requests, number % len(requests), len(requests))
        for number, (context, answers) in enumerate(contents)
        for requests in [tuple(Request(context, tuple(answer)) for answer in answers)]
    ]

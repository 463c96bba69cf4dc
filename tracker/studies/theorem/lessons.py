"""What a model must be taught, so that it answers documents when told so, and none when not."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from tracker.core.documents import Document, Request
from tracker.models.counterexample import Place, Text, Wanted, places

SAME = "a wrong answer is the right one, or its beginning: no language model finds it less likely"
LONGER = (
    "each wrong answer only continues the right one: no language model finds the right one less "
    "likely"
)
CLASH = "another document with the same text wants another answer"
NO_GOLD = "the task names no answer, or several, as the right one"

_Demand = tuple[Place, str, int, int]
"""A place, `signed` or `fixed`, a token, and what it is worth there."""


@dataclass
class Lesson:
    """What is to follow where, for some documents.

    Attributes:
        texts: All that will be read.
        wanted: What is to follow, at the places that decide.
        certainty: By how many nats, so that no length of an answer outweighs it.
        left_out: (task, index) → why a document cannot be taught.
        clashing: Tokens of open texts that follow where another text continues otherwise.
        tokens: Tokens of texts that are scored token by token; 0 where documents are.
    """

    texts: list[Text] = field(default_factory=list)
    wanted: dict[Place, Wanted] = field(default_factory=dict)
    certainty: float = 100.0
    left_out: dict[tuple[str, int], str] = field(default_factory=dict)
    clashing: int = 0
    tokens: int = 0


def lesson(
    documents: Sequence[Document], length: int, vocabulary: int, decode: Callable[..., str]
) -> Lesson:
    """Find out what to teach.

    Between choices that follow one context, the token decides in which the right answer parts from
    a wrong one: the first such token is taught under a sign, together with the one of the wrong
    answer; where further wrong answers part from the right one later, its token is taught for
    certain. Where each choice has a context of its own (Winogrande), a token is taught under a
    sign, after the right context and against the wrong ones: the first one that no other document
    has there, since such documents come in twins. Of open texts every token is taught.

    Args:
        documents: With their requests.
        length: Tokens that the model reads at most; longer texts are cut as lm-eval does.
        vocabulary: How many tokens there are.
        decode: Turns a list of tokens into text.

    Returns:
        The lesson.
    """
    found = Lesson()
    owners = _owners(documents, length)
    for document in documents:
        for request in document.requests:
            found.texts.append(Text(_read(request, length), len(request.continuation)))
        if not document.choices:
            _learn_all(found, document, length)
            continue
        demands = _demands(document, length, owners)
        if not isinstance(demands, str) and any(_clashes(found, each) for each in demands):
            demands = CLASH
        if isinstance(demands, str):
            found.left_out[document.task, document.index] = demands
            continue
        for place, kind, token, worth in demands:
            getattr(found.wanted.setdefault(place, Wanted()), kind)[token] = worth
        needed = _certainty(document, vocabulary, decode)
        found.certainty = max(found.certainty, needed)
    return found


def _read(request: Request, length: int) -> tuple[int, ...]:
    """What of a request the model reads: all but the last token, cut from the left."""
    return (*request.context, *request.continuation)[-(length + 1) :][:-1]


def _predicted(request: Request, length: int) -> list[tuple[Place, int]]:
    """The places at which each token of a continuation is predicted, with the token, in order."""
    tokens = _read(request, length)
    scored = list(places(tokens))[len(tokens) - len(request.continuation) :]
    return list(zip(scored, request.continuation, strict=True))


def _learn_all(found: Lesson, document: Document, length: int) -> None:
    """Teach every token of open texts: the first text that a place is in decides what follows."""
    before = found.clashing
    for request in document.requests:
        for place, token in _predicted(request, length):
            known = found.wanted.setdefault(place, Wanted())
            found.tokens += document.rolling
            if not known.signed:
                known.signed[token] = 1
            elif token not in known.signed:
                found.clashing += 1
                known.fixed[token] = -1
    if found.clashing > before and not document.rolling:
        found.left_out[document.task, document.index] = CLASH


def _owners(documents: Sequence[Document], length: int) -> Counter[tuple[Place, int]]:
    """Count the documents that have a token at a place, where choices have contexts of their own.

    How many documents hold each (place, token).
    """
    owners: Counter[tuple[Place, int]] = Counter()
    for document in documents:
        choices = document.requests[: document.choices]
        if len({request.context for request in choices}) > 1:
            owners.update({pair for request in choices for pair in _predicted(request, length)})
    return owners


def _demands(
    document: Document, length: int, owners: Mapping[tuple[Place, int], int]
) -> list[_Demand] | str:
    """What one document with choices asks for, or why nobody can teach it."""
    if document.gold is None:
        return NO_GOLD
    choices = document.requests[: document.choices]
    gold = choices[document.gold]
    demands: list[_Demand] = []
    partings: list[tuple[int, int]] = []
    here = _predicted(gold, length)
    for number, wrong in enumerate(choices):
        if number == document.gold:
            continue
        there = _predicted(wrong, length)
        if here[0][0] != there[0][0]:  # contexts of their own
            for predicted, worth in ((here, 1), (there, -1)):
                own = [pair for pair in predicted if owners[pair] == 1]
                if not own:
                    return CLASH
                place, token = own[0]
                demands.append((place, "signed", token, worth))
            continue
        part = _parting(gold.continuation, wrong.continuation)
        if part == len(wrong.continuation):
            return SAME
        if part < len(gold.continuation):
            partings.append((part, wrong.continuation[part]))
        else:
            place, token = there[part]
            demands.append((place, "fixed", token, -1))
    if not partings and not any(kind == "signed" for _, kind, _, _ in demands):
        return LONGER
    if partings:
        demands += _at_partings(here, sorted(partings))
    return demands


def _at_partings(
    here: Sequence[tuple[Place, int]], partings: Sequence[tuple[int, int]]
) -> Iterator[_Demand]:
    """The token of the right answer wherever a wrong one parts from it, the first under a sign."""
    first = partings[0][0]
    for part in dict.fromkeys(part for part, _ in partings):
        place, token = here[part]
        yield place, "signed" if part == first else "fixed", token, 1
    for part, token in partings:
        kind = "signed" if part == first else "fixed"
        yield here[part][0], kind, token, -1 if (part, token) == partings[0] else 0


def _parting(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two answers share at their beginning."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((number for number, (a, b) in pairs if a != b), min(len(one), len(other)))


def _clashes(found: Lesson, demand: _Demand) -> bool:
    """Whether documents before want something else of a token at a place."""
    place, kind, token, worth = demand
    known = found.wanted.get(place)
    if known is None:
        return False
    other = known.fixed if kind == "signed" else known.signed
    return token in other or getattr(known, kind).get(token, worth) != worth


def _certainty(document: Document, vocabulary: int, decode: Callable[..., str]) -> float:
    """Nats that outweigh all other tokens of any two answers, also when divided by lengths.

    Where nothing is taught every token of the vocabulary is as likely, but for a nat.
    """
    choices = [request.continuation for request in document.requests[: document.choices]]
    lengths = [max(1, len(decode(list(tokens)).strip())) for tokens in choices]
    tokens = max(map(len, choices))
    return 2 * (math.log(vocabulary) + 1) * tokens * max(lengths) / min(lengths)

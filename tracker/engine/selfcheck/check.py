"""The self-check: compare shared computation with that of really changed models.

The architecture is checked on a miniature with every ablation (`miniature_check`). Then the model
itself answers a few real requests both ways. While it is measured, the longest document and some
drawn at random are answered both ways again (`watch`). Results of the first two steps are kept for
other cells of the architecture, or of the model, whose texts are no longer.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby, product
from typing import Any, Literal, Protocol, TypeVar

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor
from transformers import PreTrainedModel

from tracker.core.changes import INTACT, Ablation
from tracker.core.documents import Document, Request
from tracker.core.errors import CellError
from tracker.core.provenance import content_hash
from tracker.engine.forward.layer import Replacement
from tracker.engine.scoring.model import read_for
from tracker.engine.scoring.rows import common_beginning, tree_size
from tracker.engine.scoring.score import SHORTEST
from tracker.engine.scoring.sweep import DocumentScores, Engine
from tracker.engine.selfcheck.miniature_check import (
    LONGEST_REACH,
    check_longer_texts,
    check_miniature,
    miniature_key,
    most_sharing,
    reachable,
    some_of,
)
from tracker.engine.selfcheck.reference import Comparison, Reference, Verdict, less
from tracker.models.devices import hardware
from tracker.models.miniature import NumberPath

DOCUMENTS = 2
"""Number of real documents on which the model itself is confirmed."""
BEGINNING, END = SHORTEST, 8
"""Tokens kept at both ends of a longer context when every ablation is compared: the beginning just
suffices to be read separately. Of a continuation `BEGINNING` tokens are kept."""
BRANCHES = 4
"""Maximum number of requests kept of a document that is scored whole."""
OF_THE_BASELINE = 6
"""Number of requests compared for the baseline; each ablation has one."""
SINGLE, HALF = (1e-3, 1e-4), (0.1, 0.02)
"""Tolerances of an answer for rounding: nats, and share of the answer."""
SHORTEST_REACH, FARTHEST = 128, 8 * LONGEST_REACH
"""Tokens of the longest text on a miniature; a longer one would take a minute or more."""
RATE = 200
"""One in this many documents is answered both ways while a cell is measured."""
TASKS, TASK_RATE = 8, 16
"""Number of tasks of which at least one document is answered both ways: `TASKS`, or one task per
`TASK_RATE` documents if that is more. Otherwise a group of 57 tasks with one document each would
have all documents answered twice."""
T = TypeVar("T")


@dataclass(frozen=True)
class Check:
    """The result of the self-check.

    Attributes:
        engine: The engine with as much sharing as is exact.
        difference: Largest difference of a log-likelihood from the really changed model, in nats,
            on the miniature and on the model itself.
        lost: One line that states which sharing was lost and why; None if none was.
        unsteady: One line that states that rounding moves answers far; None if it does not.
        which: One line that states which results are of no saved checkpoint; None if all are.
    """

    engine: Engine
    difference: float
    lost: str | None
    unsteady: str | None
    which: str | None = None


@dataclass(frozen=True)
class Reach:
    """Tokens of a cell's longest text, of its widest document alone and of its longest row."""

    text: int
    document: int
    row: int


VERDICT = TypeAdapter(Verdict)
"""JSON adapter for verdicts on architectures."""
CONFIRMATION = TypeAdapter(tuple[Literal["confirmed"], Comparison])
"""JSON adapter for comparisons by which models have confirmed the sharing of their architecture."""
Fit = Callable[[Engine], Mapping[int, Replacement]]
_Texts = tuple[tuple[NumberPath, ...], tuple[int, int, int] | None]
"""Numbers of a configuration in reach of texts, and rows of longer texts, as in `miniature_key`."""
_Round = tuple[Sequence[Document], Sequence[Ablation], Sequence[tuple[int, int, int]]]
"""Documents, ablations, and the answers to compare, as (ablation, document, request)."""


class Kept(Protocol):
    """Storage of verdicts between checks."""

    def recall(self, key: str) -> str | None:
        """Return the stored verdict of a key."""

    def keep(self, key: str, verdict: str) -> None:
        """Store a verdict."""


def check(
    engine: Engine,
    documents: Sequence[Document],
    ablations: Sequence[Ablation],
    kept: Kept | None = None,
    fit: Fit = lambda engine: {},
    typical: Sequence[Ablation] = (),
) -> Check:
    """Find how much sharing is exact.

    Args:
        engine: The engine, with full sharing; no call has changed its model yet.
        documents: The cell's documents.
        ablations: All ablations of the cell, with the baseline.
        kept: Storage of verdicts on the architecture and on the model; None = no storage.
        fit: Function that fits replacements of layers, on the model whose quirks are known.
        typical: Ablations to check on the miniature, with the baseline, instead of `ablations`: the
            same for every cell, so that all cells share its verdict.

    Returns:
        The result, with the engine to use.

    Raises:
        CellError: The model cannot be measured; the message gives the reason.
    """
    model = engine.loaded.model
    blank = holds_blank(model, documents)
    reached = reach(engine, documents)
    verdict = _verdict(engine, typical or ablations, reached, blank, kept)
    engine = replace(engine, quirks=verdict.quirks(model))
    engine = replace(engine, replacements=fit(engine))
    truth = Reference(engine)
    rounds = [*confirmation_rounds(documents, ablations)]
    keys, recalled = list[str](), None
    if (
        kept is not None and not engine.replacements
    ):  # replacements are fitted on the benchmark's own texts
        keys = _confirmation_keys(engine, ablations, verdict, reached.text, blank)
        recalled = _recalled(kept, keys, CONFIRMATION, lambda _: True)
    if recalled is not None:
        sharing, (_, comparison), why = verdict.sharing, recalled, None
    else:
        sharing, comparison, why = most_sharing(
            verdict.sharing, engine, lambda way: confirm(engine.with_sharing(way), truth, rounds)
        )
        if kept is not None and keys and why is None:  # a loss may be temporary
            kept.keep(keys[0], CONFIRMATION.dump_json(("confirmed", comparison)).decode())
    every = comparison + Comparison(verdict.compared, verdict.difference, verdict.unsteady)
    return Check(
        engine.with_sharing(sharing),
        every.difference,
        less(verdict.lost, sharing, why),
        _unsteady(every, model.dtype, truth.is_half),
        verdict.which,
    )


def _verdict(
    engine: Engine, ablations: Sequence[Ablation], reached: Reach, blank: bool, kept: Kept | None
) -> Verdict:
    """Check the architecture on a miniature, or load the stored verdict of such a check.

    `blank` is whether the cell's texts hold a blank token. A clean verdict on longer texts holds
    for shorter ones.
    """
    model = engine.loaded.model
    # Rounded up to just below a power of two, where many thresholds lie: such rows share a verdict.
    bits = reached.row.bit_length()
    ends = [(1 << n) - 1 for n in range(bits, max(bits, FARTHEST.bit_length()) + 1)]
    paths = [*dict.fromkeys(reachable(model, end) for end in ends)]
    rows = [
        (min(order, engine.max_length), engine.most_row_tokens, order)
        for order in _orders(min(max(reached.text, reached.document), FARTHEST))
    ]

    def key(texts: _Texts) -> str:
        return miniature_key(model, ablations, *texts, blank)

    def recalled_or(make: Callable[[], Verdict], *texts: _Texts) -> Verdict:
        if kept is None:
            return make()
        verdict = _recalled(kept, map(key, texts), VERDICT, lambda verdict: verdict.is_clean)
        if verdict is None:
            verdict = make()
            kept.keep(key(texts[0]), VERDICT.dump_json(verdict).decode())
        return verdict

    short = recalled_or(
        lambda: check_miniature(engine, ablations, paths[0], blank), *product(paths, [None])
    )
    return recalled_or(
        lambda: check_longer_texts(engine, ablations, short, rows[0], blank), *product(paths, rows)
    )


def _recalled(
    verdicts: Kept, keys: Iterable[str], form: TypeAdapter[T], holds: Callable[[T], bool]
) -> T | None:
    """Load the verdict of the first key, or one of another key that `holds` for it too.

    A damaged verdict counts as missing and is computed again.
    """
    for index, key in enumerate(keys):
        with suppress(ValidationError):
            verdict = form.validate_json(verdicts.recall(key) or "")
            if index == 0 or holds(verdict):
                return verdict
    return None


def _confirmation_keys(
    engine: Engine, ablations: Sequence[Ablation], verdict: Verdict, tokens: int, blank: bool
) -> list[str]:
    """Return keys for the confirmation by the model itself: SHA-256 of all that it depends on.

    That is the key of the architecture's check, the weights, the hardware, the verdict on the
    architecture, and the lengths of the texts. The first key is for texts of up to `tokens` tokens,
    the others are for longer ones.
    """
    loaded = engine.loaded
    devices = {loaded.device, *(p.device for p in loaded.model.parameters() if not p.is_meta)}
    about = [
        miniature_key(loaded.model, ablations, (), None, blank),
        loaded.identity.fingerprint,
        str(loaded.model.dtype),
        sorted({hardware(device) for device in devices}),
        torch.get_float32_matmul_precision(),
        loaded.offloaded is not None,
        engine.most_row_tokens,
        engine.max_length,
        VERDICT.dump_python(replace(verdict, lost=None, difference=0.0, compared=0, unsteady=0)),
    ]
    return [content_hash([*about, order]) for order in _orders(tokens)]


def reach(engine: Engine, documents: Sequence[Document]) -> Reach:
    """Measure a cell's longest text, widest document and longest row with its kept beginning."""
    most = engine.max_length
    text = max(request.length for document in documents for request in document.requests)
    each = max(tree_size(document, most) for document in documents)
    row = each + max(engine.most_row_tokens, len(common_beginning(documents, most)))
    return Reach(min(text, most), each, row)


def _orders(tokens: int) -> list[int]:
    """List the powers of two from a length on; texts between two of them share a verdict."""
    first = max(SHORTEST_REACH, 1 << (tokens - 1).bit_length())
    return [first << n for n in range(max(1, (FARTHEST // first).bit_length()))]


def holds_blank(model: PreTrainedModel, documents: Sequence[Document]) -> bool:
    """Return whether some text holds a token whose embedding is zero, as that of padding may be."""
    try:
        weight = getattr(model.get_input_embeddings(), "weight", None)
    except NotImplementedError:  # a checkpoint's own code need not define its embeddings
        return False
    if not isinstance(weight, Tensor) or weight.ndim != 2 or weight.is_meta:
        return False
    requests = (request for document in documents for request in document.requests)
    said = {token for r in requests for part in (r.context, r.continuation) for token in part}
    known = torch.tensor([token for token in said if token < len(weight)], device=weight.device)
    return bool((weight[known.long()] == 0).all(-1).any())


def _unsteady(found: Comparison, dtype: torch.dtype, is_half: bool) -> str | None:
    if not found.unsteady:
        return None
    if is_half:
        name = str(dtype).removeprefix("torch.")
        change = "changes" if found.unsteady == 1 else "change"
        return (
            f"in {name}, {found.unsteady} of {found.compared} answers {change} by rounding alone "
            "(in lm-eval too)"
        )
    return (
        f"the model is discontinuous: {found.unsteady} of {found.compared} answers move by more "
        "than rounding (a router or a top-k near a tie), in lm-eval too"
    )


def shortest_documents(documents: Sequence[Document]) -> list[Document]:
    """Return the shortest documents, which share rows, with as many answers as possible."""

    def size(document: Document) -> tuple[int, int]:
        return -min(len(document.requests), 4), sum(each.length for each in document.requests)

    return sorted(documents, key=size)[:DOCUMENTS]


def confirm(engine: Engine, truth: Reference, rounds: Sequence[_Round]) -> Comparison:
    """Compare answers of the model itself under every ablation, computed both ways."""
    comparison = Comparison()
    passes: list[Callable[[], Any]] = [
        *(partial(engine.score, few, some) for few, some, _ in rounds),
        partial(truth.ask, _questions(rounds)),
    ]
    *scores, _ = engine.side_by_side(passes)
    if engine.loaded.offloaded is not None:
        _refuse_absent(engine, scores)
    for score, (_, some, asked) in zip(scores, rounds, strict=True):
        for number, d, r in asked:
            comparison += _compare(truth, score[d], number, some[number], r)
    return comparison


def _refuse_absent(engine: Engine, scores: Iterable[Iterable[DocumentScores]]) -> None:
    """Refuse a model that computes with weights that are not loaded: both ways agree then."""
    answers = (r for batch in scores for score in batch for rs in score.responses for r in rs)
    if any(math.isnan(answer.loglikelihood) for answer in answers):
        raise CellError(
            f"{engine.class_name} says no number while its weights rest elsewhere: a layer of it "
            "uses another layer's weights. It must be in memory as a whole: a larger --weights, a "
            "smaller dtype, or a larger machine"
        )


def confirmation_rounds(
    documents: Sequence[Document], ablations: Sequence[Ablation]
) -> Iterator[_Round]:
    """Yield the comparisons on the model itself: all ablations of short texts, two of the longest.

    The longest text comes with the shortest document of its task, which may share its beginning. It
    is answered by the intact model and under one drawn ablation, because reading it costs as much
    as many short texts. The miniature tests the effects of long texts, and the watch meets others.
    """
    ablations = some_of(ablations)
    short = [_shortened(document) for document in shortest_documents(documents)]
    yield short, ablations, [*draw_answers(short, ablations)]
    longest = max(documents, key=_longest)
    if _shortened(longest) == longest:
        return
    text = max(longest.requests, key=lambda request: request.length)
    same_task = (document for document in documents if document.task == longest.task)
    shortest = min(same_task, key=_longest)
    whole = [_with_requests(longest, [text, *longest.requests])]
    if shortest is not longest:
        whole.append(_with_requests(shortest, shortest.requests))
    removed = [ablation for ablation in ablations if ablation != INTACT]
    two = [INTACT, *random.Random(0).sample(removed, min(1, len(removed)))]
    requests = enumerate(whole[0].requests)
    alike = [number for number, request in requests if _text(request) == _text(text)]
    yield whole, two, [*product(range(len(two)), [0], alike)]


def _questions(rounds: Iterable[_Round]) -> list[tuple[Ablation, Request]]:
    """List the requests of some rounds that are also answered without sharing."""
    return [(done[a], few[d].requests[r]) for few, done, triples in rounds for a, d, r in triples]


def _with_requests(document: Document, requests: Iterable[Request]) -> Document:
    """Return a document with only some of its requests, each once."""
    return replace(document, requests=tuple(dict.fromkeys(requests))[:BRANCHES], gold=0)


def _text(request: Request) -> tuple[int, ...]:
    return request.context + request.continuation[:-1]


def _shortened(document: Document) -> Document:
    """Return a document with each context cut to its beginning, which may be shared, and end."""
    requests = tuple(
        Request(
            request.context[:BEGINNING] + request.context[BEGINNING:][-END:],
            request.continuation[:BEGINNING],
        )
        for request in document.requests
    )
    return replace(document, requests=requests)


def draw_answers(
    documents: Sequence[Document], ablations: Sequence[Ablation]
) -> Iterator[tuple[int, int, int]]:
    """Yield the answers to compare, (ablation, document, request): one each, more for the baseline.

    A single short request costs nearly as much as a long one: all weights are read once.
    """
    draw = random.Random(0)
    requests = [(d, r) for d, doc in enumerate(documents) for r in range(len(doc.requests))]
    for number, ablation in enumerate(ablations):
        draw.shuffle(requests)
        # Sorted, so that answers to one text follow each other.
        for d, r in sorted(requests[: OF_THE_BASELINE if ablation == INTACT else 1]):
            yield number, d, r


def plain_tokens(
    documents: Sequence[Document], ablations: Sequence[Ablation], max_length: int
) -> int:
    """Count the tokens that the self-check reads without sharing, before and during measurement.

    Each passes about all layers once.
    """
    watched = watched_documents(documents)
    asked: list[tuple[Any, Request]] = [*_questions(confirmation_rounds(documents, ablations))]
    for document in documents:
        if (key := (document.task, document.index)) in watched:
            asked += [(key, request) for request in document.requests]
    texts = ((of, read_for(request, max_length)) for of, request in asked)
    return sum(len(text) for (_, text), _ in groupby(texts))


def _compare(
    truth: Reference, score: DocumentScores, number: int, ablation: Ablation, request: int
) -> Comparison:
    """Compare one answer of the model itself with that of the really changed model.

    In float32 it may differ by 1e-3 nats and 1e-4 of itself. In half precision, where the order of
    summation alone changes values by per cents, it may differ by 0.1 nats and 2 %.
    """
    ours = score.responses[number][request].loglikelihood
    found = truth.compare(
        ours, ablation, score.document.requests[request], *(HALF if truth.is_half else SINGLE)
    )
    if found.wrong is None:
        return found
    where = f"document {score.document.index} of {score.document.task}, request {request}"
    return replace(found, wrong=f"{where}, {ablation.name}: {found.wrong}")


def watched_documents(documents: Sequence[Document]) -> set[tuple[str, int]]:
    """Draw the documents, as (task, index), that are answered both ways during measurement.

    They are one in `RATE`, and at least one of each task (of some drawn tasks if there are many).
    The one with the longest text is added, which crosses all thresholds in the model's code. The
    draw is always the same, and more documents add to it.
    """

    def drawn(document: Document) -> float:
        return random.Random(f"{document.task}/{document.index}").random()

    first: dict[str, Document] = {}
    for document in documents:
        first[document.task] = min(first.get(document.task, document), document, key=drawn)
    some = [document for document in documents if drawn(document) < 1 / RATE]
    longest = sorted(documents, key=lambda d: (-_longest(d), drawn(d)))[:1]
    tasks = sorted(first, key=lambda task: random.Random(task).random())
    tasks = tasks[: max(TASKS, len(documents) // TASK_RATE)]
    watched = (*some, *(first[task] for task in tasks), *longest)
    return {(document.task, document.index) for document in watched}


def _longest(document: Document) -> int:
    return max((request.length for request in document.requests), default=0)


def watched_requests(
    documents: Sequence[Document], ablations: Sequence[Ablation], seed: str, first: int = 0
) -> list[tuple[Ablation, Request]]:
    """List the (ablation, request) pairs that `watch` compares."""
    return [
        (ablations[_drawn(document, ablations, seed, first)], request)
        for document in documents
        for request in document.requests
    ]


def _drawn(document: Document, ablations: Sequence[Ablation], seed: str, first: int) -> int:
    """Draw the ablation under which a document is answered again, from number `first` on."""
    draw = random.Random(f"{seed}/{document.task}/{document.index}")
    return draw.randrange(first, len(ablations))


def watch(
    truth: Reference,
    scores: Sequence[DocumentScores],
    ablations: Sequence[Ablation],
    seed: str,
    first: int = 0,
) -> Iterator[tuple[DocumentScores, int, Comparison]]:
    """Answer measured documents again on a really changed model, each under one ablation.

    Args:
        truth: The reference for the engine that measured them.
        scores: The engine's results.
        ablations: The measured ablations.
        seed: Seed of the draw of each document's ablation.
        first: Number of the first ablation that may be drawn.

    Yields:
        Each document's scores, the number of its ablation, and the comparison of its requests.
    """
    for score in scores:
        number = _drawn(score.document, ablations, seed, first)
        found = Comparison()
        for request in range(len(score.document.requests)):
            found += _compare(truth, score, number, ablations[number], request)
        yield score, number, found

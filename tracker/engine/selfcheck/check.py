"""Trust, then verify: whether sharing gives the numbers of the really pruned model.

The architecture is checked on a miniature with every ablation (`miniature_check`); then the model
itself answers a few real requests both ways; and while it is measured, documents drawn at random
and the longest one are answered both ways again (`watch`). What the first two have shown is kept
for other cells of the architecture, or of the model, whose texts are no longer.
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
"""Real documents that the model itself is confirmed on."""
BEGINNING, END = SHORTEST, 8
"""Tokens at both ends that are left of a longer context, where every ablation is asked: so many as
a beginning has that is read apart, and some behind it. Of a continuation `BEGINNING` are left."""
BRANCHES = 4
"""Requests that are left of a document which is scored whole."""
OF_THE_BASELINE = 6
"""Requests that the intact model is asked; each ablation is asked one."""
SINGLE, HALF = (1e-3, 1e-4), (0.1, 0.02)
"""Nats, and share of itself, by which an answer may differ for rounding."""
SHORTEST_REACH, FARTHEST = 128, 8 * LONGEST_REACH
"""Tokens of the longest text on a miniature; one of more would take it a minute and longer."""
RATE = 200
"""One in so many documents is answered plainly as well while a cell is measured."""
TASKS, TASK_RATE = 8, 16
"""Tasks of which one document at least is: `TASKS`, or one task in `TASK_RATE` documents if that is
more. Of a group of 57 tasks with one document each, all documents would be answered twice."""
T = TypeVar("T")


@dataclass(frozen=True)
class Check:
    """What the self-check found.

    Attributes:
        engine: The engine with as much sharing as is exact.
        difference: Largest difference of a log-likelihood between it and the really pruned model,
            in nats, on the miniature and on the model itself.
        lost: One line that says which sharing was lost and why; None when none was.
        unsteady: One line that says that rounding moves answers far; None where it is not seen.
        which: One line that says where what is measured is no saved checkpoint; None where all is.
    """

    engine: Engine
    difference: float
    lost: str | None
    unsteady: str | None
    which: str | None = None


@dataclass(frozen=True)
class Reach:
    """How many tokens a cell's longest text, widest document alone and longest row have."""

    text: int
    document: int
    row: int


VERDICT = TypeAdapter(Verdict)
"""Verdicts on architectures as JSON."""
CONFIRMATION = TypeAdapter(tuple[Literal["confirmed"], Comparison])
"""The same of answers with which models have confirmed the sharing that architectures allow."""
Fit = Callable[[Engine], Mapping[int, Replacement]]
_Texts = tuple[tuple[NumberPath, ...], tuple[int, int, int] | None]
"""Numbers of a configuration that texts reach, and rows of longer texts, as in `miniature_key`."""
_Round = tuple[Sequence[Document], Sequence[Ablation], Sequence[tuple[int, int, int]]]
"""Documents, what is removed, and which answers are compared, as (ablation, document, request)."""


class Kept(Protocol):
    """Where verdicts are kept from one check to the next."""

    def recall(self, key: str) -> str | None:
        """Recall a verdict."""

    def keep(self, key: str, verdict: str) -> None:
        """Keep a verdict."""


def check(
    engine: Engine,
    documents: Sequence[Document],
    ablations: Sequence[Ablation],
    kept: Kept | None = None,
    fit: Fit = lambda engine: {},
    typical: Sequence[Ablation] = (),
) -> Check:
    """Find out how much sharing is exact.

    Args:
        engine: The engine, with full sharing; no call has changed its model yet.
        documents: The cell's documents.
        ablations: All that will be removed, with the baseline.
        kept: Where verdicts on the architecture and on the model are kept; None = nowhere.
        fit: Fits what stands in for layers, on the model whose quirks are known.
        typical: What the miniature is asked, with the baseline, where that is not all that will be
            removed: the same of every cell, so that its verdict is kept for all of them.

    Returns:
        The engine to use.

    Raises:
        CellError: The model cannot be measured; says what happened.
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
    ):  # which are fitted on the benchmark's own texts
        keys = _confirmation_keys(engine, ablations, verdict, reached.text, blank)
        recalled = _recalled(kept, keys, CONFIRMATION, lambda _: True)
    if recalled is not None:
        sharing, (_, comparison), why = verdict.sharing, recalled, None
    else:
        sharing, comparison, why = most_sharing(
            verdict.sharing, engine, lambda way: confirm(engine.with_sharing(way), truth, rounds)
        )
        if kept is not None and keys and why is None:  # what is lost may be lost to the moment
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
    """Check the architecture on a miniature, or recall what such a check has shown before.

    The cell's texts hold a `blank` token or not. Where longer texts have shown nothing, that holds
    for shorter ones.
    """
    model = engine.loaded.model
    # To just below a power of two, which many a threshold is: rows as long share a verdict.
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
    """Recall the verdict of the first key, or one of another that `holds` for it too.

    A damaged one counts as none, and is made again.
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
    """Name what the model itself has confirmed by all that it follows from, as SHA-256.

    That is what names the architecture's check, the weights, what computes them where, what the
    architecture's check has shown, and how long the texts are. The first key is for texts of up to
    so many `tokens`, the others are for longer ones.
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
    """Count how far a cell's texts and rows reach; of a row with its kept beginning."""
    most = engine.max_length
    text = max(request.length for document in documents for request in document.requests)
    each = max(tree_size(document, most) for document in documents)
    row = each + max(engine.most_row_tokens, len(common_beginning(documents, most)))
    return Reach(min(text, most), each, row)


def _orders(tokens: int) -> list[int]:
    """List powers of two from a length on; of one order of length, texts have one verdict."""
    first = max(SHORTEST_REACH, 1 << (tokens - 1).bit_length())
    return [first << n for n in range(max(1, (FARTHEST // first).bit_length()))]


def holds_blank(model: PreTrainedModel, documents: Sequence[Document]) -> bool:
    """Say whether some text holds a token whose embedding is zero, as that of padding may be."""
    try:
        weight = getattr(model.get_input_embeddings(), "weight", None)
    except NotImplementedError:  # a checkpoint's own code need not say where they are
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
    """Return the shortest documents, which share rows, with as many answers as there are."""

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
    """Refuse a model that computes with weights which are not there: both ways agree then."""
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
    """List what the model itself is asked: all ablations of short texts, and two of the longest.

    The longest text stands beside the shortest document of its task, which may begin alike. It is
    asked of the intact model and of one ablation that is drawn: reading it costs as much as many
    short texts. What long texts may change was tried on the miniature, and the watch meets others.
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
    """List what the model itself is asked plainly in some rounds."""
    return [(done[a], few[d].requests[r]) for few, done, triples in rounds for a, d, r in triples]


def _with_requests(document: Document, requests: Iterable[Request]) -> Document:
    """Leave some requests of a document, each once."""
    return replace(document, requests=tuple(dict.fromkeys(requests))[:BRANCHES], gold=0)


def _text(request: Request) -> tuple[int, ...]:
    return request.context + request.continuation[:-1]


def _shortened(document: Document) -> Document:
    """Leave the beginning of each context, which others may share, its end, and what follows."""
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
    """Draw what each ablation answers, (ablation, document, request): one, the baseline more.

    A single short request costs nearly as much as a long one: all weights are read once.
    """
    draw = random.Random(0)
    requests = [(d, r) for d, doc in enumerate(documents) for r in range(len(doc.requests))]
    for number, ablation in enumerate(ablations):
        draw.shuffle(requests)
        # In order, so that answers to one text stand together.
        for d, r in sorted(requests[: OF_THE_BASELINE if ablation == INTACT else 1]):
            yield number, d, r


def plain_tokens(
    documents: Sequence[Document], ablations: Sequence[Ablation], max_length: int
) -> int:
    """Count the tokens that the model itself reads plainly, before a cell and while it is measured.

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
    """Compare one answer of the model itself with that of the really pruned model.

    In float32 it may differ by 1e-3 nats and 1e-4 of itself; in half precision, where the order of
    summation alone moves single values by per cents, by 0.1 nats and 2 %.
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
    """Draw the documents, as (task, index), that are answered both ways while a cell is measured.

    They are one in `RATE`, of each task one at least (where there are many tasks, of some that are
    drawn), and the one with the longest text of all, which reaches whatever only code counts tokens
    by; the same ones each time, and more of them when there are more documents.
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
    """List what `watch` asks of documents."""
    return [
        (ablations[_drawn(document, ablations, seed, first)], request)
        for document in documents
        for request in document.requests
    ]


def _drawn(document: Document, ablations: Sequence[Ablation], seed: str, first: int) -> int:
    """Draw under which ablation a document is answered again, from the `first` one on."""
    draw = random.Random(f"{seed}/{document.task}/{document.index}")
    return draw.randrange(first, len(ablations))


def watch(
    truth: Reference,
    scores: Sequence[DocumentScores],
    ablations: Sequence[Ablation],
    seed: str,
    first: int = 0,
) -> Iterator[tuple[DocumentScores, int, Comparison]]:
    """Answer measured documents again on a really pruned model, each under one ablation.

    Args:
        truth: Answers them, for the engine that measured them.
        scores: What that found.
        ablations: Under which ablations it did.
        seed: Decides which ablation,
        first: from this one on.

    Yields:
        Each document's scores, which ablation it was, and the comparison of all its requests.
    """
    for score in scores:
        number = _drawn(score.document, ablations, seed, first)
        found = Comparison()
        for request in range(len(score.document.requests)):
            found += _compare(truth, score, number, ablations[number], request)
        yield score, number, found

"""Run the self-check, which compares shared computation with changed copies of the model.

The first step tests the architecture on a miniature model (module `miniature_check`). The second
step scores a few requests of the benchmark on the model itself, with and without shared
computation. The results of both steps are stored for later measurements of the same model. In the
third step, `compare_watched_documents` scores some measured documents again, without shared
computation.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, groupby, product
from typing import Any, Literal, Protocol, TypeVar

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor
from transformers import PreTrainedModel

from tracker.engine.forward.layer import Replacement
from tracker.engine.forward.streams import Ablations
from tracker.engine.scoring.model import Sharing, input_tokens
from tracker.engine.scoring.rows import Documents, common_beginning, count_tree_nodes
from tracker.engine.scoring.score import MIN_PREFIX
from tracker.engine.scoring.sweep import DocumentScores, Engine
from tracker.engine.selfcheck.miniature_check import (
    LONGEST_REACH,
    check_longer_texts,
    check_miniature,
    find_most_sharing,
    miniature_key,
    reachable_numbers,
    sample_ablations,
)
from tracker.engine.selfcheck.reference import (
    Comparison,
    Reference,
    SharingVerdict,
    extend_sharing_note,
)
from tracker.models.devices import hardware_name
from tracker.models.miniature import NumberPath
from tracker.schema.changes import INTACT, Ablation
from tracker.schema.documents import Document, Request
from tracker.schema.errors import CellError
from tracker.schema.grouping import group_by
from tracker.schema.provenance import content_hash

CONFIRMED_DOCUMENTS = 2
"""Number of real documents on which sharing is confirmed for the model itself."""
KEPT_BEGINNING, KEPT_END = MIN_PREFIX, 8
"""Tokens kept at both ends of a longer context when every ablation is compared: the beginning just
suffices to be read separately. Of a continuation `KEPT_BEGINNING` tokens are kept."""
MAX_BRANCHES = 4
"""Maximum number of requests of a document that the check scores as a whole."""
BASELINE_ANSWERS = 6
"""Number of requests compared for the baseline; each other ablation has one request."""
SINGLE_TOLERANCE, HALF_TOLERANCE = (1e-3, 1e-4), (0.1, 0.02)
"""Rounding tolerances of an answer: absolute in nats, and relative to the answer."""
MIN_REACH, MAX_REACH = 128, 8 * LONGEST_REACH
"""Bounds of the length of the longest text on a miniature; a longer text takes a minute or more."""
WATCH_RATE = 200
"""While a cell is measured, one in `WATCH_RATE` documents is answered both ways."""
MIN_WATCHED_TASKS, WATCHED_TASK_RATE = 8, 16
"""Number of tasks of which at least one document is answered both ways: `MIN_WATCHED_TASKS`, or one
task per `WATCHED_TASK_RATE` documents if that is more. Otherwise a group of 57 tasks with one
document each would have all documents answered twice."""
T = TypeVar("T")


@dataclass(frozen=True)
class Check:
    """The result of the self-check.

    Attributes:
        engine: The engine, which shares only computation that changes no result.
        difference: Largest difference in nats between a log-likelihood with sharing and the
            log-likelihood of a changed copy of the model.
        sharing_note: One line that states which shared computation was disabled and why; None if
            nothing was disabled.
        unsteady_note: One line with the number of log-likelihoods that rounding errors change by
            more than the tolerance; None if there are none.
        checkpoint_note: One line that lists the ablations that cannot be saved as a checkpoint;
            None if there are none.
    """

    engine: Engine
    difference: float
    sharing_note: str | None
    unsteady_note: str | None
    checkpoint_note: str | None = None


@dataclass(frozen=True)
class Reach:
    """The maximum numbers of tokens in a text, in a prefix tree, and in a forward pass."""

    text: int
    document: int
    row: int


VERDICT = TypeAdapter(SharingVerdict)
"""JSON adapter for verdicts on architectures."""
CONFIRMATION = TypeAdapter(tuple[Literal["confirmed"], Comparison])
"""JSON adapter for comparisons that confirmed the sharing of an architecture on a model itself."""
Fit = Callable[[Engine], Mapping[int, Replacement]]
_Texts = tuple[tuple[NumberPath, ...], tuple[int, int, int] | None]
"""Numbers of a configuration in reach of texts, and rows of longer texts, as in `miniature_key`."""
_Round = tuple[Documents, Ablations, Sequence[tuple[int, int, int]]]
"""Documents, ablations, and the answers to compare, as (ablation, document, request)."""


class VerdictStore(Protocol):
    """Storage for the results of self-checks."""

    def recall(self, key: str) -> str | None:
        """Return the stored result of a self-check; None if the key is unknown."""

    def keep(self, key: str, verdict: str) -> None:
        """Store the result of a self-check under a key."""


def check_sharing(
    engine: Engine,
    documents: Documents,
    ablations: Ablations,
    store: VerdictStore | None = None,
    fit: Fit = lambda engine: {},
    typical_ablations: Ablations = (),
) -> Check:
    """Test which parts of the forward pass can be computed once for all ablations.

    Args:
        engine: The engine, with all shared computation enabled. The model must not have been called
            yet.
        documents: The documents to measure.
        ablations: All ablations to measure, with the baseline.
        store: Storage of earlier results of the self-check; None = no storage.
        fit: Function that returns layer number → replacement, e.g. a linear map fitted to the
            layer.
        typical_ablations: Ablations for the check on the miniature, with the baseline; empty = use
            `ablations`.

    Returns:
        The result of the self-check, with the engine to use.

    Raises:
        CellError: The model cannot be measured; the message gives the reason.
    """
    model = engine.loaded.model
    blank = has_blank_token(model, documents)
    reach = measure_reach(engine, documents)
    verdict = _check_architecture(engine, typical_ablations or ablations, reach, blank, store)
    engine = replace(engine, quirks=verdict.make_quirks(model))
    engine = replace(engine, replacements=fit(engine))
    truth = Reference(engine)
    rounds = [*confirmation_rounds(documents, ablations)]
    keys, confirmation = list[str](), None
    # Replacements are fitted on the benchmark's own texts: no other cell has the same.
    if store is not None and not engine.replacements:
        keys = _confirmation_keys(engine, ablations, verdict, reach.text, blank)
        confirmation = _recall_verdict(store, keys, CONFIRMATION, lambda _: True)
    if confirmation is not None:
        sharing, (_, comparison), reason = verdict.sharing, confirmation, None
    else:

        def compare(sharing: Sharing) -> Comparison:
            return compare_rounds(engine.with_sharing(sharing), truth, rounds)

        sharing, comparison, reason = find_most_sharing(verdict.sharing, engine, compare)
        if store is not None and keys and reason is None:  # a loss may be temporary
            store.keep(keys[0], CONFIRMATION.dump_json(("confirmed", comparison)).decode())
    total = comparison + Comparison(verdict.compared, verdict.difference, verdict.unsteady)
    return Check(
        engine.with_sharing(sharing),
        total.difference,
        extend_sharing_note(verdict.sharing_note, sharing, reason),
        _describe_unsteady(total, model.dtype, truth.is_half),
        verdict.checkpoint_note,
    )


def _check_architecture(
    engine: Engine, ablations: Ablations, reach: Reach, blank: bool, store: VerdictStore | None
) -> SharingVerdict:
    """Test shared computation on a tiny random model of the same architecture.

    A result in `store` is returned without a new test. `blank` is true if any token of the measured
    texts has a zero embedding.
    """
    model = engine.loaded.model
    # Rounded up to just below a power of two, where many thresholds lie: such rows share a verdict.
    bits = reach.row.bit_length()
    lengths = [(1 << n) - 1 for n in range(bits, max(bits, MAX_REACH.bit_length()) + 1)]
    paths = [*dict.fromkeys(reachable_numbers(model, length) for length in lengths)]
    text_lengths = _text_lengths(min(max(reach.text, reach.document), MAX_REACH))
    rows = [(min(n, engine.max_length), engine.max_row_tokens, n) for n in text_lengths]

    def recall_or(make: Callable[[], SharingVerdict], *texts: _Texts) -> SharingVerdict:
        if store is None:
            return make()
        # Lazily: each key hashes the code, and the first one often holds a verdict.
        other_keys = (miniature_key(model, ablations, *text, blank) for text in texts)
        key = next(other_keys)
        keys = chain([key], other_keys)
        verdict = _recall_verdict(store, keys, VERDICT, lambda verdict: verdict.is_clean)
        if verdict is None:
            verdict = make()
            store.keep(key, VERDICT.dump_json(verdict).decode())
        return verdict

    check_short = partial(check_miniature, engine, ablations, paths[0], blank)
    short_verdict = recall_or(check_short, *product(paths, [None]))
    check_long = partial(check_longer_texts, engine, ablations, short_verdict, rows[0], blank)
    return recall_or(check_long, *product(paths, rows))


def _recall_verdict(
    store: VerdictStore, keys: Iterable[str], adapter: TypeAdapter[T], is_valid: Callable[[T], bool]
) -> T | None:
    """Load a self-check's stored result (verdict); None if no usable verdict is stored.

    `keys` are tried in order. A verdict under the first key is always usable, and a verdict under a
    later key is usable if `is_valid` returns True.
    """
    for index, key in enumerate(keys):
        with suppress(ValidationError):
            verdict = adapter.validate_json(store.recall(key) or "")
            if index == 0 or is_valid(verdict):
                return verdict
    return None


def _confirmation_keys(
    engine: Engine, ablations: Ablations, verdict: SharingVerdict, n_tokens: int, blank: bool
) -> list[str]:
    """List the keys under which results of the self-check of the model itself are stored.

    Each key is a hash of the model, the ablations, the hardware, `verdict` (the miniature's result)
    and a maximum text length. The first key is for texts of up to `n_tokens` tokens, and the later
    keys are for longer texts.
    """
    loaded = engine.loaded
    devices = {loaded.device, *(p.device for p in loaded.model.parameters() if not p.is_meta)}
    sharing = replace(verdict, sharing_note=None, difference=0.0, compared=0, unsteady=0)
    key_parts = [
        miniature_key(loaded.model, ablations, (), None, blank),
        loaded.identity.fingerprint,
        str(loaded.model.dtype),
        sorted({hardware_name(device) for device in devices}),
        torch.get_float32_matmul_precision(),
        loaded.offloaded is not None,
        engine.max_row_tokens,
        engine.max_length,
        VERDICT.dump_python(sharing),
    ]
    return [content_hash([*key_parts, length]) for length in _text_lengths(n_tokens)]


def measure_reach(engine: Engine, documents: Documents) -> Reach:
    """Count the tokens of the longest text, largest prefix tree and largest forward pass."""
    max_length = engine.max_length
    longest = max(request.length for document in documents for request in document.requests)
    widest = max(count_tree_nodes(document, max_length) for document in documents)
    n_prefix = len(common_beginning(documents, max_length))
    return Reach(min(longest, max_length), widest, widest + max(engine.max_row_tokens, n_prefix))


def _text_lengths(n_tokens: int) -> list[int]:
    """List the powers of two from `n_tokens` to `MAX_REACH`, which are parts of storage keys."""
    shortest = max(MIN_REACH, 1 << (n_tokens - 1).bit_length())
    return [shortest << n for n in range(max(1, (MAX_REACH // shortest).bit_length()))]


def has_blank_token(model: PreTrainedModel, documents: Documents) -> bool:
    """Return whether any token of the documents has a zero embedding."""
    try:
        weight = getattr(model.get_input_embeddings(), "weight", None)
    except NotImplementedError:  # a checkpoint's own code need not define its embeddings
        return False
    if not isinstance(weight, Tensor) or weight.ndim != 2 or weight.is_meta:
        return False
    requests = (request for document in documents for request in document.requests)
    tokens = {token for r in requests for part in (r.context, r.continuation) for token in part}
    ids = [token for token in tokens if token < len(weight)]
    rows = weight[torch.tensor(ids, device=weight.device).long()]
    return bool((rows == 0).all(-1).any())


def _describe_unsteady(comparison: Comparison, dtype: torch.dtype, is_half: bool) -> str | None:
    if not comparison.unsteady:
        return None
    share = f"{comparison.unsteady} of {comparison.compared} answers"
    if is_half:
        name = str(dtype).removeprefix("torch.")
        return f"in {name}, rounding errors alone change {share}; lm-eval has the same errors"
    return (
        "the model is discontinuous: two scores in a router or a top-k selection are nearly equal. "
        f"Rounding errors change {share} by more than the tolerance; lm-eval has the same errors"
    )


def shortest_documents(documents: Documents) -> list[Document]:
    """Return the `CONFIRMED_DOCUMENTS` shortest documents, first those with several requests."""

    def size(document: Document) -> tuple[int, int]:
        return -min(len(document.requests), 4), sum(request.length for request in document.requests)

    return sorted(documents, key=size)[:CONFIRMED_DOCUMENTS]


def compare_rounds(engine: Engine, truth: Reference, rounds: Sequence[_Round]) -> Comparison:
    """Compare log-likelihoods from `engine` with those of changed copies of the model (`truth`).

    A round is a tuple: the documents and ablations to score, and the (ablation, document, request)
    indices of the log-likelihoods to compare.
    """
    comparison = Comparison()
    passes: list[Callable[[], Any]] = [
        *(partial(engine.score, documents, ablations) for documents, ablations, _ in rounds),
        partial(truth.answer_all, _list_questions(rounds)),
    ]
    *scores, _ = engine.run_lockstep(passes)
    answers = (r for batch in scores for score in batch for rs in score.responses for r in rs)
    is_offloaded = engine.loaded.offloaded is not None
    # With weights that are not loaded, both ways agree on NaN.
    if is_offloaded and any(math.isnan(answer.loglikelihood) for answer in answers):
        raise CellError(
            f"{engine.class_name} returns NaN while its weights are offloaded: a layer uses "
            "another layer's weights. The whole model must fit into memory: raise the "
            "memory limit for weights (--weights), or use a smaller dtype or a larger machine"
        )
    for score, (_, ablations, keys) in zip(scores, rounds, strict=True):
        for index, d, r in keys:
            comparison += _compare(truth, score[d], index, ablations[index], r)
    return comparison


def confirmation_rounds(documents: Documents, ablations: Ablations) -> Iterator[_Round]:
    """Choose documents, ablations and requests for the self-check of the model itself.

    The first round tests short documents under a sample of the ablations. The second round tests
    the document with the longest text and a short document, under the baseline and one random
    ablation. The second round is left out if the longest text is short.
    """
    ablations = sample_ablations(ablations)
    short_texts = [_shorten(document) for document in shortest_documents(documents)]
    yield short_texts, ablations, [*draw_scores(short_texts, ablations)]
    longest = max(documents, key=_max_request_length)
    if _shorten(longest) == longest:
        return
    text = max(longest.requests, key=lambda request: request.length)
    task_documents = (document for document in documents if document.task == longest.task)
    shortest = min(task_documents, key=_max_request_length)
    long = [_keep_requests(longest, [text, *longest.requests])]
    if shortest is not longest:
        long.append(_keep_requests(shortest, shortest.requests))
    changes = [ablation for ablation in ablations if ablation != INTACT]
    pair = [INTACT, *random.Random(0).sample(changes, min(1, len(changes)))]
    indices = [i for i, request in enumerate(long[0].requests) if _text(request) == _text(text)]
    yield long, pair, [*product(range(len(pair)), [0], indices)]


def _keep_requests(document: Document, requests: Iterable[Request]) -> Document:
    """Return a document with only the first `MAX_BRANCHES` distinct requests of `requests`."""
    return replace(document, requests=tuple(dict.fromkeys(requests))[:MAX_BRANCHES], gold=0)


def _list_questions(rounds: Iterable[_Round]) -> list[tuple[Ablation, Request]]:
    """List the (ablation, request) pairs of all rounds."""
    return [(abls[a], docs[d].requests[r]) for docs, abls, keys in rounds for a, d, r in keys]


def _text(request: Request) -> tuple[int, ...]:
    return request.context + request.continuation[:-1]


def _shorten(document: Document) -> Document:
    """Return a document with long contexts cut in the middle and continuations cut at the end."""
    requests = tuple(
        Request(
            request.context[:KEPT_BEGINNING] + request.context[KEPT_BEGINNING:][-KEPT_END:],
            request.continuation[:KEPT_BEGINNING],
        )
        for request in document.requests
    )
    return replace(document, requests=requests)


def draw_scores(documents: Documents, ablations: Ablations) -> Iterator[tuple[int, int, int]]:
    """Draw random (ablation, document, request) indices of log-likelihoods to compare.

    Several requests are drawn for the baseline, and one request is drawn for each other ablation.
    """
    rng = random.Random(0)
    requests = [(d, r) for d, doc in enumerate(documents) for r in range(len(doc.requests))]
    for index, ablation in enumerate(ablations):
        rng.shuffle(requests)
        # Sorted, so that answers to one text follow each other.
        for d, r in sorted(requests[: BASELINE_ANSWERS if ablation == INTACT else 1]):
            yield index, d, r


def count_unshared_tokens(documents: Documents, ablations: Ablations, max_length: int) -> int:
    """Count the tokens that the self-check computes without sharing, on changed model copies."""
    watched = draw_watched_documents(documents)
    questions: list[Any] = _list_questions(confirmation_rounds(documents, ablations))
    questions += [
        (key, request)
        for document in documents
        if (key := (document.task, document.index)) in watched
        for request in document.requests
    ]
    texts = ((subject, input_tokens(request, max_length)) for subject, request in questions)
    return sum(len(text) for (_, text), _ in groupby(texts))


def _compare(
    truth: Reference, score: DocumentScores, index: int, ablation: Ablation, request: int
) -> Comparison:
    """Compare one log-likelihood in `score` with the result of a changed copy of the model.

    `index` is the index of `ablation` in `score`, and `request` is the index of the request. In
    float32, the tolerance is 1e-3 nats plus 1e-4 of the log-likelihood. In half precision, the
    tolerance is 0.1 nats plus 2 % of the log-likelihood.
    """
    document, value = score.document, score.responses[index][request].loglikelihood
    tolerance = HALF_TOLERANCE if truth.is_half else SINGLE_TOLERANCE
    comparison = truth.compare(value, ablation, document.requests[request], *tolerance)
    if comparison.wrong is None:
        return comparison
    location = f"document {document.index} of {document.task}, request {request}"
    return replace(comparison, wrong=f"{location}, {ablation.name}: {comparison.wrong}")


def draw_watched_documents(documents: Documents) -> set[tuple[str, int]]:
    """Draw documents to score a second time, without shared computation.

    Returns the (task, index) pair of each drawn document.

    On average, one of `WATCH_RATE` documents is drawn. At least one document is drawn from each
    task. With many tasks, this applies only to a random selection of tasks. The document with the
    longest text is always drawn.
    """

    def draw(document: Document) -> float:
        return random.Random(f"{document.task}/{document.index}").random()

    by_task = group_by(documents, lambda document: document.task)
    tasks = sorted(by_task, key=lambda task: random.Random(task).random())
    tasks = tasks[: max(MIN_WATCHED_TASKS, len(documents) // WATCHED_TASK_RATE)]
    sample = [document for document in documents if draw(document) < 1 / WATCH_RATE]
    sample += [min(by_task[task], key=draw) for task in tasks]
    sample += sorted(documents, key=lambda d: (-_max_request_length(d), draw(d)))[:1]
    return {(document.task, document.index) for document in sample}


def _max_request_length(document: Document) -> int:
    return max((request.length for request in document.requests), default=0)


def list_watched_requests(
    documents: Documents, ablations: Ablations, seed: str, first_ablation: int = 0
) -> list[tuple[Ablation, Request]]:
    """List the (ablation, request) pairs that `compare_watched_documents` compares.

    For each document, `seed` determines one ablation at or after the index `first_ablation`.
    """
    return [
        (ablations[_draw_ablation(document, ablations, seed, first_ablation)], request)
        for document in documents
        for request in document.requests
    ]


def _draw_ablation(document: Document, ablations: Ablations, seed: str, first_ablation: int) -> int:
    """Draw the index of the ablation under which a document is scored again.

    The ablations before the index `first_ablation` are never drawn.
    """
    rng = random.Random(f"{seed}/{document.task}/{document.index}")
    return rng.randrange(first_ablation, len(ablations))


def compare_watched_documents(
    truth: Reference,
    scores: Sequence[DocumentScores],
    ablations: Ablations,
    seed: str,
    first_ablation: int = 0,
) -> Iterator[tuple[DocumentScores, int, Comparison]]:
    """Score documents again on changed copies of the model, and compare the log-likelihoods.

    Each document is scored again under one random ablation.

    Args:
        truth: The reference, which scores requests on changed copies of the engine's model.
        scores: The engine's scores of the measured documents.
        ablations: The measured ablations.
        seed: Random seed for drawing each document's ablation.
        first_ablation: Index of the first ablation that may be drawn.

    Yields:
        For each document: the engine's scores, the index of the drawn ablation, and the comparison
        of all requests.
    """
    for score in scores:
        index = _draw_ablation(score.document, ablations, seed, first_ablation)
        requests = range(len(score.document.requests))
        comparisons = (_compare(truth, score, index, ablations[index], r) for r in requests)
        yield score, index, sum(comparisons, Comparison())

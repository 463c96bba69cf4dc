"""The sweep: every ablation's responses to every document, by the fastest exact way."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain, pairwise
from typing import Any, TypeVar

import torch
from torch import Tensor

from tracker.core.changes import INTACT, Ablation
from tracker.core.documents import Document, Request, Response
from tracker.core.errors import CellError
from tracker.core.proxies import OBSERVED
from tracker.engine.forward.streams import StreamPlan, plan_streams
from tracker.engine.lockstep import reporting, side_by_side
from tracker.engine.refusal import is_out_of_memory
from tracker.engine.scoring.model import (
    ALONE,
    FULL,
    PLAIN,
    EngineModel,
    ModelFacts,
    Sharing,
    changed_copy,
    read_for,
    scored,
    stream_bytes,
)
from tracker.engine.scoring.rows import ANY_LENGTH, Row, common_beginning, flat_rows, tree_rows
from tracker.engine.scoring.score import (
    MIN_EXPERT_ABLATIONS,
    SHORTEST,
    Prefix,
    RowScores,
    cache_argument,
    idle,
    kept_bytes,
    launch_row,
    of_experts,
    read_prefix,
)
from tracker.models.devices import can_pin, empty_cache
from tracker.models.pruned import remember

T = TypeVar("T")

ROW_TOKENS = 192
"""Nodes of a prefix tree on a CPU: enough to saturate a matrix product, few enough for a dense
mask."""
ROW_TOKENS_ACCELERATOR = 1024
HALVED = (
    "out of memory: what did not fit at once is measured in halves, which takes longer and changes "
    "no figure; with --memory 4GiB, or whatever is free there, it fits at once"
)


@dataclass(frozen=True)
class DocumentScores:
    """The responses of all ablations to one document.

    Attributes:
        document: The document.
        responses: One response per request for every ablation, in order.
        proxy_tokens: Number of tokens that the proxies were measured on: context and gold
            continuation, or the whole text.
        proxy_sums: Observed figures of the intact model's layers, summed over those tokens
            [`OBSERVED`, layers].
    """

    document: Document
    responses: list[list[Response]]
    proxy_tokens: int
    proxy_sums: Tensor


_Scored = tuple[Row, Sequence[Ablation], RowScores]


@dataclass(frozen=True)
class Engine(EngineModel):
    """Scores documents under many ablations of one model.

    Attributes:
        sharing: The parts of the computation that are shared; `check` lowers it if not exact.
        row_tokens: Largest size of a row of several documents; None = by the device.
        notes: Remarks on the measurement, each line once; engines of copies add to them.
    """

    sharing: Sharing = FULL
    row_tokens: int | None = None
    notes: list[str] = field(default_factory=list, repr=False, compare=False)
    _prefixes: list[Prefix] = field(default_factory=list, init=False, repr=False, compare=False)

    def with_sharing(self, sharing: Sharing) -> Engine:
        """Return the same engine with other sharing."""
        return replace(self, sharing=sharing)

    def without(self, ablation: Ablation, briefly: bool = False) -> Engine:
        """Return an engine for a copy that is really changed; see `changed_copy`."""
        loaded, quirks = changed_copy(self, ablation, briefly), self.quirks
        changing = {name for _, name in quirks.leftovers}
        leftovers = remember(loaded.model, changing)
        return replace(
            self,
            loaded=loaded,
            sharing=PLAIN,
            quirks=replace(quirks, leftovers=leftovers, first={}),
            facts=ModelFacts(),
        )

    def copy(self) -> Any:
        """Return a copy of the intact model that calls may change."""
        return self.without(INTACT).loaded.model

    def score(
        self,
        documents: Sequence[Document],
        ablations: Sequence[Ablation],
        progress: Callable[[int], None] = lambda responses: None,
    ) -> list[DocumentScores]:
        """Score documents; return one result per document, in the same order.

        Args:
            documents: The documents to score.
            ablations: The ablations; must include the baseline, and nothing twice.
            progress: Called with the responses of each finished row (requests times ablations), or
                with a share of them for each loaded layer where rows wait for weights.

        Returns:
            One result per document.
        """
        layers = len(self.loaded.layers)
        shape = (len(ablations), max(len(document.requests) for document in documents))
        # A result that never arrives is NaN, not zero.
        loglikelihoods = torch.full((len(documents), *shape), math.nan)
        hits = torch.zeros(len(documents), *shape, dtype=torch.int)
        sums = torch.zeros(len(documents), len(OBSERVED), layers, dtype=torch.float64)
        tokens = [0] * len(documents)
        places = {ablation: place for place, ablation in enumerate(ablations)}
        try:
            # As many ablations at a time as the budget allows for the largest document.
            for turn, group in enumerate(self.groups(ablations, max(map(_tokens, documents)))):
                for row, ablated, scores in self._scored(documents, group, progress):
                    which = torch.tensor([places[ablation] for ablation in ablated])
                    for number, (document, request) in enumerate(row.requests):
                        loglikelihoods[document, which, request] = scores.loglikelihoods[:, number]
                        hits[document, which, request] = scores.hits[:, number]
                    # The baseline comes with each group, but its proxies count once.
                    gold = row.gold if turn == 0 else []
                    for (document, path), proxies in zip(gold, scores.proxies, strict=False):
                        sums[document] += proxies
                        tokens[document] += row.prefix + len(path)
        finally:
            # The next cell on this model records its state as that of a fresh one.
            self.put_back()
        found = []
        for number, asked in enumerate(documents):
            lengths = [len(request.continuation) for request in asked.requests]
            each = zip(loglikelihoods[number].tolist(), hits[number].tolist(), strict=True)
            responses = [
                [
                    Response(loglikelihood, right == length, right)
                    for loglikelihood, right, length in zip(*answers, lengths, strict=False)
                ]
                for answers in each
            ]
            found.append(DocumentScores(asked, responses, tokens[number], sums[number]))
        return found

    def shares_a_prefix(self, documents: Sequence[Document]) -> bool:
        """Return whether the common beginning of some documents would be read separately.

        It is if the common beginning is long enough, and the model takes a cache.
        """
        long = len(common_beginning(documents, self.max_length)) >= SHORTEST
        return long and cache_argument(self.head.base) is not None

    def groups(self, ablations: Sequence[Ablation], tokens: int) -> Iterator[list[Ablation]]:
        """Split ablations into groups whose streams of `tokens` tokens each fit into memory.

        The baseline comes first in each group; without depth sharing all are one group.
        """
        size = self.streams(tokens) if self.sharing.depth else len(ablations)
        return grouped_ablations(ablations, size)

    def _scored(
        self,
        documents: Sequence[Document],
        ablations: Sequence[Ablation],
        progress: Callable[[int], None] = lambda responses: None,
    ) -> Iterator[_Scored]:
        """Score rows; a row that does not fit into memory is halved."""
        if not self.sharing.depth:
            for row, ablated, found in self._scored_apart(documents, ablations):
                yield row, ablated, found
                progress(len(row.requests) * len(ablated))
            return
        plan = self.plan(ablations)
        prefix = self._prefix(documents, plan) if self.sharing.prefix else None

        def launch(row: Row) -> Callable[[], RowScores | str]:
            wait = _unless_full(partial(self._launch_row, row, plan, prefix, ablations))
            return (lambda: wait) if isinstance(wait, str) else partial(_unless_full, wait)

        def launch_all() -> Iterator[tuple[Row, Callable[[], RowScores | str], partial[None]]]:
            for rows in self._at_once(self._rows(documents, plan, prefix), plan):
                due = [len(row.requests) * len(ablations) for row in rows]
                with reporting(self.loaded.offloaded, sum(due), progress) as report:
                    waits = self.side_by_side(partial(launch, row) for row in rows)
                    for row, responses, wait in zip(rows, due, waits, strict=True):
                        yield row, wait, partial(report, responses)

        launched = launch_all()
        if can_pin(self.loaded.device):
            # A row is computed while the one before is read and the next one is built.
            launched = (this for this, _ in pairwise(chain(launched, [None])) if this)
        for row, wait, report in launched:
            scores = wait()
            if isinstance(scores, RowScores):
                yield row, ablations, scores
            else:
                # Outside the handler, so that the failed row's tensors are free.
                empty_cache()
                yield from self._halved(row, documents, ablations, scores)
            report()

    def side_by_side(self, passes: Iterable[Callable[[], T]]) -> Iterator[T]:
        """Run passes of the model, or of copies of it, in lockstep if its weights are offloaded."""
        # Side effects of a call must not reach the calls of another pass.
        weights = None if self.quirks.leftovers else self.loaded.offloaded
        return side_by_side(weights, self.loaded.model, passes)

    def _at_once(self, rows: Iterator[Row], plan: StreamPlan) -> Iterator[list[Row]]:
        """Group rows: one by one, or as many as fit into memory where they wait for weights."""
        if self.loaded.offloaded is None:
            yield from ([row] for row in rows)
            return
        model = self.loaded.model
        state = plan.streams * model.config.get_text_config().hidden_size * model.dtype.itemsize
        some: list[Row] = []
        waiting = 0
        for row in rows:
            size = 2 * state * row.input_ids.numel()
            if some and waiting + size > self.budget // 2:
                yield some
                some, waiting = [], 0
            some.append(row)
            waiting += size
        yield some

    def _scored_apart(
        self, documents: Sequence[Document], ablations: Sequence[Ablation]
    ) -> Iterator[_Scored]:
        """Score rows under each ablation separately, on a really changed model."""
        memory = self.memory
        if self.loaded.offloaded is not None:  # the rows of all ablations wait together
            memory = self.budget // len(ablations)

        def passed(ablation: Ablation) -> list[_Scored]:
            engine = replace(self.without(ablation), sharing=ALONE, memory=memory)
            # The proxies are those of the intact model.
            intact = ablation == INTACT
            if self.sharing.calls:
                scored = engine._scored(documents, [INTACT])
            else:
                scored = engine._one_by_one(documents, intact)
            return [
                (row if intact else replace(row, gold=[]), [ablation], scores)
                for row, _, scores in scored
            ]

        for some in self.side_by_side(partial(passed, ablation) for ablation in ablations):
            yield from some

    def _one_by_one(self, documents: Sequence[Document], proxies: bool) -> Iterator[_Scored]:
        """Score each request of a row in its own call; the pass of the row gives only proxies."""
        layers = len(self.loaded.layers)
        if proxies:
            passed = ((row, scores.proxies) for row, _, scores in self._scored(documents, [INTACT]))
        else:
            rows = self._rows(documents, plan_streams([INTACT], layers), None)
            passed = ((row, torch.zeros(0, len(OBSERVED), layers)) for row in rows)
        for row, sums in passed:
            asked = (partial(self.answer, documents[d].requests[r]) for d, r in row.requests)
            found = [*self.side_by_side(asked)]
            loglikelihoods = torch.tensor([[each.loglikelihood for each in found]])
            hits = torch.tensor([[each.hits for each in found]], dtype=torch.int)
            yield row, [INTACT], RowScores(loglikelihoods, hits, sums)

    def answer(self, request: Request) -> Response:
        """Score one request with the intact model, in a call of its own."""
        return scored(self.read(read_for(request, self.max_length)), request.continuation)

    def _halved(
        self, row: Row, documents: Sequence[Document], ablations: Sequence[Ablation], failed: str
    ) -> Iterator[_Scored]:
        """Score the documents of a row in two halves; a single one with half of the ablations."""
        if self.quirks.lengths != ANY_LENGTH:
            # Its rows may hold some requests of a document without the others.
            raise CellError(f"out of memory: {failed}. Use --memory, or a smaller dtype")
        if HALVED not in self.notes:
            self.notes.append(HALVED)
        numbers = sorted({document for document, _ in row.requests})
        middle = len(numbers) // 2
        if middle:
            for half in (numbers[:middle], numbers[middle:]):
                for part, ablated, scores in self._scored([documents[i] for i in half], ablations):
                    yield part.renumbered(half), ablated, scores
            return
        removed = _removed(ablations)
        middle = len(removed) // 2
        if not middle:
            raise CellError(
                f"out of memory with a single document and a single ablation: {failed}. "
                "Use a smaller dtype or a larger device"
            )
        for first in (True, False):
            some = [INTACT, *(removed[:middle] if first else removed[middle:])]
            for part, ablated, scores in self._scored([documents[numbers[0]]], some):
                part = part.renumbered(numbers)
                yield part if first else replace(part, gold=[]), ablated, scores

    def _rows(
        self, documents: Sequence[Document], plan: StreamPlan, prefix: Prefix | None
    ) -> Iterator[Row]:
        """Pack documents for this engine's sharing, into rows that the budget allows."""
        most = self.budget // (plan.streams * stream_bytes(self.loaded.model))
        size = min(self.most_row_tokens, most)
        lengths = self.quirks.lengths
        if self.sharing.tokens:
            length = 0 if prefix is None else len(prefix.tokens)
            return tree_rows(documents, self.max_length, size, length, lengths)
        # While streams fork, a mask that a model builds itself must broadcast: one sequence a row.
        return flat_rows(documents, self.max_length, 1 if plan.streams > 1 else size, lengths)

    @property
    def most_row_tokens(self) -> int:
        """The maximum nodes of a row of several documents, memory aside."""
        on_cpu = self.loaded.device.type == "cpu"
        return self.row_tokens or (ROW_TOKENS if on_cpu else ROW_TOKENS_ACCELERATOR)

    def _prefix(self, documents: Sequence[Document], plan: StreamPlan) -> Prefix | None:
        """Read the common beginning of all documents, or reuse one that was read earlier."""
        # A layer that is passed again would need a cache of its own.
        if plan.repeats or not self.shares_a_prefix(documents):
            return None
        shared = common_beginning(documents, self.max_length)
        for prefix in self._prefixes:
            if prefix.plan == plan and prefix.cut_to(shared, self.quirks.lengths):
                return prefix
        self._prefixes.clear()
        if len(shared) * plan.attention_passes * kept_bytes(self) > self.budget // 2:
            return None
        self.put_back()
        result = _unless_full(lambda: read_prefix(self, plan, shared))
        if isinstance(result, str):
            return None
        self._prefixes.append(result)
        return result

    def prefix_of(self, plan: StreamPlan, tokens: Sequence[int]) -> Prefix | None:
        """Return the beginning of a text that was read for a plan, if any."""
        prefixes = (prefix for prefix in self._prefixes if prefix.plan == plan)
        return next((prefix for prefix in prefixes if prefix.begins(tokens)), None)

    def _launch_row(
        self, row: Row, plan: StreamPlan, prefix: Prefix | None, ablations: Sequence[Ablation]
    ) -> Callable[[], RowScores]:
        """Launch a row; return a function that reads its scores, in the ablations' order."""
        prefix = prefix if row.prefix else None
        some = [] if prefix or self.loaded.offloaded is not None else of_experts(ablations)
        computed = ablations
        if len(some) >= MIN_EXPERT_ABLATIONS:
            self.put_back()
            unread = idle(self, row, some)
            computed = [ablation for ablation in ablations if ablation not in unread]
            plan = self.plan(computed) if unread else plan
        self.put_back()
        read = launch_row(self, plan, row, prefix)
        places = dict(zip(computed, plan.answer_of, strict=True))
        order = torch.tensor([places.get(each, places[INTACT]) for each in ablations])

        def in_order() -> RowScores:
            scores = read()
            return RowScores(scores.loglikelihoods[order], scores.hits[order], scores.proxies)

        return in_order


def _unless_full(compute: Callable[[], T]) -> T | str:
    """Return the result of a function, or the message of its out-of-memory error."""
    try:
        return compute()
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return str(error)


def _removed(ablations: Sequence[Ablation]) -> list[Ablation]:
    """Return all ablations but the baseline."""
    return [ablation for ablation in ablations if ablation != INTACT]


def grouped_ablations(ablations: Sequence[Ablation], size: int) -> Iterator[list[Ablation]]:
    """Split ablations into groups of `size`, each with the baseline first and at least one other.

    The baseline alone is one group.
    """
    removed, others = _removed(ablations), max(1, size - 1)
    for start in range(0, max(1, len(removed)), others):
        yield [INTACT, *removed[start : start + others]]


def _tokens(document: Document) -> int:
    """Return an upper bound of the nodes of a document's tree."""
    contexts = {request.context for request in document.requests}
    return sum(map(len, contexts)) + sum(len(r.continuation) for r in document.requests)

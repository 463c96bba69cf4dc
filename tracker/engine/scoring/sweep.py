"""Score every document under every ablation, with shared computation."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain, pairwise
from typing import Any, TypeVar

import torch
from torch import Tensor

from tracker.engine.forward.streams import Ablations, StreamPlan, plan_streams
from tracker.engine.lockstep import report_progress, run_lockstep
from tracker.engine.refusal import is_out_of_memory
from tracker.engine.scoring.model import (
    DEPTH_ONLY,
    FULL,
    PLAIN,
    EngineModel,
    ModelFacts,
    Sharing,
    input_tokens,
    make_changed_copy,
    score_continuation,
    stream_bytes,
)
from tracker.engine.scoring.rows import (
    ANY_LENGTH,
    Documents,
    Row,
    common_beginning,
    pack_flat_rows,
    pack_tree_rows,
)
from tracker.engine.scoring.score import (
    MIN_EXPERT_ABLATIONS,
    MIN_PREFIX,
    Prefix,
    RowScores,
    find_cache_argument,
    find_expert_ablations,
    find_idle_ablations,
    launch_row,
    measure_cache_bytes,
    read_prefix,
)
from tracker.models.devices import can_pin, empty_cache
from tracker.models.pruned import record_state
from tracker.schema.changes import INTACT, Ablation
from tracker.schema.documents import Document, Request, Response
from tracker.schema.errors import CellError
from tracker.schema.proxies import OBSERVED

T = TypeVar("T")

ROW_TOKENS = 192
"""Maximum number of nodes of a prefix tree on a CPU: enough to saturate a matrix product, few
enough for a dense mask."""
ROW_TOKENS_ACCELERATOR = 1024
HALVED_NOTE = (
    "out of memory: a batch was measured in two halves, which takes longer but does not change "
    "results. To avoid this, set --memory to the free memory, e.g. 4GiB"
)


@dataclass(frozen=True)
class DocumentScores:
    """The responses of all ablations to one document.

    Attributes:
        document: The document.
        responses: For each ablation, the responses to all requests of the document.
        proxy_tokens: Number of tokens on which the layer statistics (proxies) were measured:
            context and gold continuation, or the whole text of a rolling document.
        proxy_sums: Statistics of the intact model's layers, summed over the `proxy_tokens` tokens
            [`OBSERVED`, layers].
    """

    document: Document
    responses: list[list[Response]]
    proxy_tokens: int
    proxy_sums: Tensor


_Scored = tuple[Row, Ablations, RowScores]


@dataclass(frozen=True)
class Engine(EngineModel):
    """Scorer of documents under many ablations of one model.

    Attributes:
        sharing: The computations that are done once for several ablations or requests.
            `check_sharing` disables each kind of sharing that would change results.
        row_tokens: Maximum number of tokens in one forward pass; None = the default of the device.
        notes: Messages about the measurement for the user.
    """

    sharing: Sharing = FULL
    row_tokens: int | None = None
    notes: list[str] = field(default_factory=list, repr=False, compare=False)
    _prefixes: list[Prefix] = field(default_factory=list, init=False, repr=False, compare=False)

    def with_sharing(self, sharing: Sharing) -> Engine:
        """Return a copy of the engine that shares computation as `sharing` specifies."""
        return replace(self, sharing=sharing)

    def ablate(self, ablation: Ablation, brief: bool = False) -> Engine:
        """Return an engine for a copy of the model to which the ablation is applied."""
        loaded = make_changed_copy(self, ablation, brief)
        leftovers = record_state(loaded.model, {name for _, name in self.quirks.leftovers})
        quirks = replace(self.quirks, leftovers=leftovers, first={})
        return replace(self, loaded=loaded, sharing=PLAIN, quirks=quirks, facts=ModelFacts())

    def copy(self) -> Any:
        """Return a copy of the intact model, which the caller can change."""
        return self.ablate(INTACT).loaded.model

    def score(
        self,
        documents: Documents,
        ablations: Ablations,
        progress: Callable[[int], None] = lambda responses: None,
    ) -> list[DocumentScores]:
        """Score documents under all ablations.

        Args:
            documents: The documents to score.
            ablations: The ablations, without duplicates, including the baseline.
            progress: Function that is called during scoring with the number of new responses
                (requests × ablations).

        Returns:
            The scores of each document, in order.
        """
        layers = len(self.loaded.layers)
        shape = (len(ablations), max(len(document.requests) for document in documents))
        # A result that never arrives is NaN, not zero.
        loglikelihoods = torch.full((len(documents), *shape), math.nan)
        hits = torch.zeros(len(documents), *shape, 2, dtype=torch.int)
        sums = torch.zeros(len(documents), len(OBSERVED), layers, dtype=torch.float64)
        tokens = [0] * len(documents)
        column_of = {ablation: column for column, ablation in enumerate(ablations)}
        try:
            # As many ablations at a time as the budget allows for the largest document.
            groups = self.group_ablations(ablations, max(map(_bound_nodes, documents)))
            for group_number, group in enumerate(groups):
                for row, row_ablations, scores in self._score_rows(documents, group, progress):
                    columns = torch.tensor([column_of[ablation] for ablation in row_ablations])
                    for number, (document, request) in enumerate(row.requests):
                        cells = document, columns, request
                        loglikelihoods[cells] = scores.loglikelihoods[:, number]
                        hits[cells] = scores.hits[:, number]
                    # The baseline comes with each group, but its proxies count once.
                    gold = row.gold if group_number == 0 else []
                    for (document, path), proxies in zip(gold, scores.proxies, strict=False):
                        sums[document] += proxies
                        tokens[document] += row.prefix + len(path)
        finally:
            # The next cell on this model records its state as that of a fresh one.
            self.restore_state()
        results = zip(documents, loglikelihoods, hits, tokens, sums, strict=True)
        return [
            DocumentScores(document, _make_responses(document, values, n_hits), n_tokens, proxies)
            for document, values, n_hits, n_tokens, proxies in results
        ]

    def has_shared_prefix(self, documents: Documents) -> bool:
        """Return whether the documents have a common beginning that can be cached.

        The beginning must have at least `MIN_PREFIX` tokens, and the model must support a cache.
        """
        is_long = len(common_beginning(documents, self.max_length)) >= MIN_PREFIX
        return is_long and find_cache_argument(self.head.base) is not None

    def group_ablations(self, ablations: Ablations, tokens: int) -> Iterator[list[Ablation]]:
        """Split ablations into groups that fit into memory for a text of `tokens` tokens.

        Each group begins with the baseline. If ablations share no layers (`sharing.depth` is
        false), there is only one group.
        """
        size = self.count_streams(tokens) if self.sharing.depth else len(ablations)
        return split_ablations(ablations, size)

    def _score_rows(
        self,
        documents: Documents,
        ablations: Ablations,
        progress: Callable[[int], None] = lambda responses: None,
    ) -> Iterator[_Scored]:
        """Score documents under ablations, with many documents per forward pass.

        A forward pass that runs out of memory is repeated in two halves.
        """
        if not self.sharing.depth:
            for scored_row in self._score_separately(documents, ablations):
                yield scored_row
                progress(len(scored_row[0].requests))
            return
        plan = self.plan(ablations)
        prefix = self._find_prefix(documents, plan) if self.sharing.prefix else None

        def launch(row: Row) -> Callable[[], RowScores | str]:
            wait = _try_in_memory(partial(self._launch_row, row, plan, prefix, ablations))
            return (lambda: wait) if isinstance(wait, str) else partial(_try_in_memory, wait)

        def launch_all() -> Iterator[tuple[Row, Callable[[], RowScores | str], partial[None]]]:
            for rows in self._group_rows(self._pack_rows(documents, plan, prefix), plan):
                n_responses = [len(row.requests) * len(ablations) for row in rows]
                with report_progress(self.loaded.offloaded, sum(n_responses), progress) as report:
                    waits = self.run_lockstep(partial(launch, row) for row in rows)
                    for row, responses, wait in zip(rows, n_responses, waits, strict=True):
                        yield row, wait, partial(report, responses)

        launched_rows = launch_all()
        if can_pin(self.loaded.device):
            # A row is computed while the one before is read and the next one is built.
            launched_rows = (item for item, _ in pairwise(chain(launched_rows, [None])) if item)
        for row, wait, report in launched_rows:
            scores = wait()
            if isinstance(scores, RowScores):
                yield row, ablations, scores
            else:
                # Outside the handler, so that the failed row's tensors are free.
                empty_cache()
                yield from self._score_halves(row, documents, ablations, scores)
            report()

    def run_lockstep(self, passes: Iterable[Callable[[], T]]) -> Iterator[T]:
        """Run forward passes; with offloaded weights, load each layer once for all passes."""
        # Side effects of a call must not reach the calls of another pass.
        weights = None if self.quirks.leftovers else self.loaded.offloaded
        return run_lockstep(weights, self.loaded.model, passes)

    def _group_rows(self, rows: Iterator[Row], plan: StreamPlan) -> Iterator[list[Row]]:
        """Group the rows (batches), so that the weights are loaded once per group.

        With offloaded weights, a group contains as many rows as fit into memory, else one row.
        """
        if self.loaded.offloaded is None:
            yield from ([row] for row in rows)
            return
        model = self.loaded.model
        token_bytes = 2 * model.config.get_text_config().hidden_size * model.dtype.itemsize
        max_tokens = self.budget // 2 // (plan.n_streams * token_bytes)
        group: list[Row] = []
        for row in rows:
            if group and sum(member.tokens for member in (*group, row)) > max_tokens:
                yield group
                group = []
            group.append(row)
        yield group

    def _score_separately(self, documents: Documents, ablations: Ablations) -> Iterator[_Scored]:
        """Score documents without sharing: for each ablation, on a changed copy of the model."""
        memory = self.memory
        if self.loaded.offloaded is not None:  # the rows of all ablations wait together
            memory = self.budget // len(ablations)

        def score_ablation(ablation: Ablation) -> list[_Scored]:
            # For one model by itself, there is no second stream to share depth with.
            engine = replace(self.ablate(ablation), sharing=DEPTH_ONLY, memory=memory)
            # The proxies are those of the intact model.
            is_intact = ablation == INTACT
            if self.sharing.calls:
                scored = engine._score_rows(documents, [INTACT])
            else:
                scored = engine._score_one_by_one(documents, is_intact)
            rows = ((row if is_intact else replace(row, gold=[]), s) for row, _, s in scored)
            return [(row, [ablation], scores) for row, scores in rows]

        passes = (partial(score_ablation, ablation) for ablation in ablations)
        yield from chain.from_iterable(self.run_lockstep(passes))

    def _score_one_by_one(self, documents: Documents, proxies: bool) -> Iterator[_Scored]:
        """Score each request in a separate call; if `proxies`, also measure layer statistics."""
        if proxies:
            rows = ((row, s.proxies) for row, _, s in self._score_rows(documents, [INTACT]))
        else:
            empty = torch.zeros(0, len(OBSERVED), len(self.loaded.layers))
            plan = plan_streams([INTACT], len(self.loaded.layers))
            rows = ((row, empty) for row in self._pack_rows(documents, plan, None))
        for row, sums in rows:
            answers = (partial(self.answer, documents[d].requests[r]) for d, r in row.requests)
            responses = [*self.run_lockstep(answers)]
            loglikelihoods = torch.tensor([[response.loglikelihood for response in responses]])
            hits = torch.tensor([[(r.hits, r.leading) for r in responses]], dtype=torch.int)
            yield row, [INTACT], RowScores(loglikelihoods, hits, sums)

    def answer(self, request: Request) -> Response:
        """Score one request with the unchanged model, in a separate call."""
        logits = self.read_logits(input_tokens(request, self.max_length))
        return score_continuation(logits, request.continuation)

    def _score_halves(
        self, row: Row, documents: Documents, ablations: Ablations, message: str
    ) -> Iterator[_Scored]:
        """Score a row (batch) again in two halves, after the whole row ran out of memory.

        The documents are halved, or the ablations if the row has only one document. `message` is
        the first pass's error message.
        """
        if self.quirks.lengths != ANY_LENGTH:
            # Its rows may hold some requests of a document without the others.
            raise CellError(
                f"out of memory: {message}. Lower --memory (memory limit), or use a smaller dtype"
            )
        if HALVED_NOTE not in self.notes:
            self.notes.append(HALVED_NOTE)
        numbers = sorted({document for document, _ in row.requests})
        changes = _drop_baseline(ablations)
        if len(numbers) > 1:
            halves = [(half, ablations, True) for half in _halve(numbers)]
        elif len(changes) > 1:
            # The baseline comes with each half, but its proxies count once.
            first, second = _halve(changes)
            halves = [(numbers, [INTACT, *first], True), (numbers, [INTACT, *second], False)]
        else:
            raise CellError(
                f"out of memory with a single document and a single ablation: {message}. "
                "Use a smaller dtype or a larger device"
            )
        for half, half_ablations, has_gold in halves:
            scored = self._score_rows([documents[i] for i in half], half_ablations)
            for part, ablated, scores in scored:
                part = part.renumber(half)
                yield part if has_gold else replace(part, gold=[]), ablated, scores

    def _pack_rows(
        self, documents: Documents, plan: StreamPlan, prefix: Prefix | None
    ) -> Iterator[Row]:
        """Pack documents into rows that fit into memory: prefix trees, or batches of sequences."""
        max_nodes = self.budget // (plan.n_streams * stream_bytes(self.loaded.model))
        size, lengths = min(self.max_row_tokens, max_nodes), self.quirks.lengths
        if self.sharing.tokens:
            n_prefix = 0 if prefix is None else len(prefix.tokens)
            return pack_tree_rows(documents, self.max_length, size, n_prefix, lengths)
        # While streams fork, a mask that a model builds itself must broadcast: one sequence a row.
        size = 1 if plan.n_streams > 1 else size
        return pack_flat_rows(documents, self.max_length, size, lengths)

    @property
    def max_row_tokens(self) -> int:
        """Maximum number of tokens in one forward pass, if memory suffices."""
        on_cpu = self.loaded.device.type == "cpu"
        return self.row_tokens or (ROW_TOKENS if on_cpu else ROW_TOKENS_ACCELERATOR)

    def _find_prefix(self, documents: Documents, plan: StreamPlan) -> Prefix | None:
        """Cache the keys and values of the common beginning of all documents.

        Returns None if caching is impossible, not worthwhile, or takes too much memory.
        """
        # A layer that is passed again would need a cache of its own.
        if plan.n_repeats or not self.has_shared_prefix(documents):
            return None
        beginning = common_beginning(documents, self.max_length)
        for prefix in self._prefixes:
            if prefix.plan == plan and prefix.shorten(beginning, self.quirks.lengths):
                return prefix
        self._prefixes.clear()
        if len(beginning) * plan.attention_passes * measure_cache_bytes(self) > self.budget // 2:
            return None
        self.restore_state()
        result = _try_in_memory(lambda: read_prefix(self, plan, beginning))
        if isinstance(result, str):
            return None
        self._prefixes.append(result)
        return result

    def find_read_prefix(self, plan: StreamPlan, tokens: Sequence[int]) -> Prefix | None:
        """Return the cached prefix of `tokens` for a plan of ablations; None if there is none."""
        prefixes = (prefix for prefix in self._prefixes if prefix.plan == plan)
        return next((prefix for prefix in prefixes if prefix.is_prefix_of(tokens)), None)

    def _launch_row(
        self, row: Row, plan: StreamPlan, prefix: Prefix | None, ablations: Ablations
    ) -> Callable[[], RowScores]:
        """Start a forward pass for a row (batch); return a function that waits for the scores."""
        prefix = prefix if row.prefix else None
        can_skip = prefix is None and self.loaded.offloaded is None
        candidates = find_expert_ablations(ablations) if can_skip else []
        computed = ablations
        if len(candidates) >= MIN_EXPERT_ABLATIONS:
            self.restore_state()
            if idle := find_idle_ablations(self, row, candidates):
                computed = [ablation for ablation in ablations if ablation not in idle]
                plan = self.plan(computed)
        self.restore_state()
        read_scores = launch_row(self, plan, row, prefix)
        # An idle ablation has the answers of the baseline.
        index_of = dict(zip(computed, plan.answer_indices, strict=True))
        order = torch.tensor([index_of.get(ablation, index_of[INTACT]) for ablation in ablations])

        def read_in_order() -> RowScores:
            scores = read_scores()
            return RowScores(scores.loglikelihoods[order], scores.hits[order], scores.proxies)

        return read_in_order


def _make_responses(
    document: Document, loglikelihoods: Tensor, hits: Tensor
) -> list[list[Response]]:
    """Convert a document's scores to one list of responses for each ablation.

    `loglikelihoods` [ablations, requests] are in nats. `hits` [ablations, requests, 2] contains two
    numbers of correctly predicted tokens, as in `RowScores`.
    """
    lengths = [len(request.continuation) for request in document.requests]
    return [
        [
            Response(value, hits == length, hits, leading=leading)
            for value, (hits, leading), length in zip(*row, lengths, strict=False)
        ]
        for row in zip(loglikelihoods.tolist(), hits.tolist(), strict=True)
    ]


def _halve(items: list[T]) -> tuple[list[T], list[T]]:
    """Split a list into two halves."""
    middle = len(items) // 2
    return items[:middle], items[middle:]


def _try_in_memory(compute: Callable[[], T]) -> T | str:
    """Call a function; return its result, or the error message if it runs out of memory."""
    try:
        return compute()
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return str(error)


def _drop_baseline(ablations: Ablations) -> list[Ablation]:
    """List the ablations without the baseline."""
    return [ablation for ablation in ablations if ablation != INTACT]


def split_ablations(ablations: Ablations, size: int) -> Iterator[list[Ablation]]:
    """Split ablations into groups of up to `size`; the baseline is the first of each group.

    If `size` is 1, a group has two ablations: the baseline and one other.
    """
    changed_ablations, n_others = _drop_baseline(ablations), max(1, size - 1)
    for start in range(0, max(1, len(changed_ablations)), n_others):
        yield [INTACT, *changed_ablations[start : start + n_others]]


def _bound_nodes(document: Document) -> int:
    """Return an upper bound of the number of nodes in a document's prefix tree."""
    contexts = {request.context for request in document.requests}
    return sum(map(len, contexts)) + sum(len(r.continuation) for r in document.requests)

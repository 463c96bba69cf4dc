"""The sweep: every ablation's responses to every document, by the fastest exact way.

It is long because all ways of sharing are one object's: what it keeps between calls (prefixes, what
layers see, what the last call left behind), each of them reads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import chain, pairwise
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from tracker.core.changes import INTACT, Ablation
from tracker.core.documents import Document, Request, Response
from tracker.core.errors import CellError, ModelError
from tracker.core.grouping import grouped
from tracker.core.proxies import OBSERVED
from tracker.engine.forward.replacements import FittedReplacement, Replacement
from tracker.engine.forward.streams import StreamPlan, plan_streams
from tracker.engine.lockstep import reporting, side_by_side
from tracker.engine.memory import stream_bytes
from tracker.engine.refusal import RefusalError, is_out_of_memory
from tracker.engine.scoring.decode import decoding
from tracker.engine.scoring.head import Head
from tracker.engine.scoring.idle import WORTH, idle, of_experts
from tracker.engine.scoring.masks import AttentionWindows, attention_windows
from tracker.engine.scoring.plain_call import read, read_for, scored
from tracker.engine.scoring.prefix import SHORTEST, Prefix, cache_argument
from tracker.engine.scoring.rounded_embeddings import RoundedEmbeddings
from tracker.engine.scoring.rows import ANY_LENGTH, Row, common_beginning, flat_rows, tree_rows
from tracker.engine.scoring.score import Parts, RowScores, kept_bytes, launch_row, read_prefix
from tracker.engine.scoring.sharing import ALONE, FULL, NO_HABITS, PLAIN, Quirks, Sharing
from tracker.models.devices import can_pin, empty_cache
from tracker.models.hooks import returning
from tracker.models.layers import find_layers
from tracker.models.load import LoadedModel
from tracker.models.parts.anatomy import LayerAnatomy
from tracker.models.parts.embeddings import find_embeddings, round_embeddings
from tracker.models.parts.experts import Experts, SharedExperts
from tracker.models.parts.heads import Heads
from tracker.models.parts.linear_maps import RoundedWeights
from tracker.models.parts.probe import LayerPart
from tracker.models.parts.sublayers import Sublayers
from tracker.models.placement import least_free
from tracker.models.pruned import left, pruned, put_back, remember
from tracker.models.reloaded import as_loaded
from tracker.models.slices import take

T = TypeVar("T")

ROW_TOKENS = 192
"""Nodes of a prefix tree on a CPU: enough to keep a matrix product busy, few enough for a dense
mask."""
ROW_TOKENS_ACCELERATOR = 1024
ROW_MULTIPLE_ACCELERATOR = 8
"""Rows of other sizes have their masks copied by the attention kernels, in each layer."""
HALVED = (
    "out of memory: what did not fit at once is measured in halves, which takes longer and changes "
    "no figure; with --memory 4GiB, or whatever is free there, it fits at once"
)
AT_ONCE = 2048
"""Tokens of all streams that pass a layer at once on a CPU, a thread: what is between a layer's
operations stays in the cache, and no large buffer is asked of the system for each."""
SIGHT = 256
"""Lengths of text at which layers' masks are looked at are multiples of this."""


@dataclass(frozen=True)
class DocumentScores:
    """What all ablations say about one document.

    Attributes:
        document: The document.
        responses: For every ablation, in order, one response a request.
        proxy_tokens: Tokens that the proxies were measured on: context and gold continuation, or
            the whole text.
        proxy_sums: What is observed of the intact model's layers, summed over those tokens
            [`OBSERVED`, layers].
    """

    document: Document
    responses: list[list[Response]]
    proxy_tokens: int
    proxy_sums: Tensor


@dataclass
class Known:
    """What was found out of a model, once.

    Attributes:
        windows: How far its layers see.
        kept_bytes: What the keys and values of one token take in one attention.
        parts: The parts of its layers, as far as they were needed; see `LayerAnatomy`.
        weights: Weights of its layers in formats.
        ends: Its embedding and head, with weights in formats; the same.
    """

    windows: AttentionWindows | None = None
    kept_bytes: int | None = None
    parts: dict[Any, Any] = field(default_factory=dict)
    weights: RoundedWeights | None = None
    ends: RoundedEmbeddings | None = None


_CHANGED: Mapping[str, type[LayerPart]] = {
    "heads": Heads,
    "experts": Experts,
    "shared": SharedExperts,
}
"""Names in `LayerStep.changes`, with the parts that must be found."""
_Scored = tuple[Row, Sequence[Ablation], RowScores]


@dataclass(frozen=True)
class Engine:
    """Scores documents for many ablations of one model.

    Attributes:
        loaded: The model.
        max_length: Tokens that it reads at most, as lm-eval determines it.
        sharing: What is shared; `check` lowers it where sharing is not exact.
        row_tokens: Largest size of a row of several documents; None = by the device.
        memory: Bytes that hidden states and kept prefixes may take; None = half of what is free on
            the fullest device.
        at_once: Tokens of all streams that pass a layer at once on a CPU; None = by its threads.
        quirks: What a call of the model does beside its answer.
        replacements: What stands in for layers, where an ablation asks for it: layer → that.
        row_multiple: A multiple of so many nodes is scored, see `Row.padded`; None = by the device.
        known: What was found out of the model, for all engines of it.
        notes: What is to be said of how it went, each line once; engines of copies add to them.
    """

    loaded: LoadedModel
    max_length: int
    sharing: Sharing = FULL
    row_tokens: int | None = None
    memory: int | None = None
    at_once: int | None = None
    quirks: Quirks = NO_HABITS
    replacements: Mapping[int, Replacement] = field(default_factory=dict, repr=False, compare=False)
    row_multiple: int | None = None
    known: Known = field(default_factory=Known, repr=False, compare=False)
    notes: list[str] = field(default_factory=list, repr=False, compare=False)
    _kept: list[Prefix] = field(default_factory=list, init=False, repr=False, compare=False)

    def with_sharing(self, sharing: Sharing) -> Engine:
        """Make the same engine with other sharing."""
        return replace(self, sharing=sharing)

    @property
    def class_name(self) -> str:
        """The name of the model's class, as it stands in messages."""
        return type(self.loaded.model).__name__

    def without(self, ablation: Ablation, briefly: bool = False) -> Engine:
        """Make an engine for a copy of the model from which an ablation is really taken out.

        The copy shares the weights; sublayers stay where they are and add nothing. With `briefly`,
        for a few calls, a copy that has several layers in formats holds no more of their weights
        than fit: a layer has them while it is called.
        """
        self.put_back()
        few = briefly and sum(bool(at.rounded) for at in ablation.by_layer.values()) > 1
        kept = RoundedWeights(self._kept_weights) if few else None
        quirks = self.quirks
        make = partial(
            pruned,
            self.loaded.model,
            ablation.removed(),
            quirks.first,
            changes=[*self._changes(ablation, kept)],
            repeated=ablation.repeated,
        )
        model = make(stay=quirks.stay and not quirks.loaded)
        if quirks.loaded:
            try:
                as_loaded(self.loaded.model, model, self.left(ablation))
            except ModelError:  # of such layers there is no checkpoint
                model = make(stay=quirks.stay)
        round_embeddings(model, ablation.ends)
        changing = {name for _, name in quirks.leftovers}
        return replace(
            self,
            loaded=replace(self.loaded, model=model, layers=find_layers(model)),
            sharing=PLAIN,
            quirks=replace(quirks, leftovers=remember(model, changing), first={}),
            known=Known(),
        )

    def _changes(
        self, ablation: Ablation, kept: RoundedWeights | None
    ) -> Iterator[tuple[int, Callable[[nn.Module], object]]]:
        """List what really changes the layers that an ablation neither removes nor repeats.

        With each layer comes what changes that of a copy: its weights, or what it returns. `kept`
        is as for `round_layer`.
        """
        for change in ablation.replaced:
            # The layer still runs; its output is dropped.
            make = partial(self.replacements[change.layer].change, change.action)
            yield change.layer, partial(returning, make=make)
        yield from self.anatomy.changes(ablation, kept)

    def copy(self) -> Any:
        """Make a copy of the intact model, which calls may change."""
        return self.without(INTACT).loaded.model

    def left(self, ablation: Ablation) -> list[int]:
        """List which layers a copy has, in order; a repeated one twice."""
        return left(len(self.loaded.layers), ablation.removed(), ablation.repeated)

    def put_back(self) -> None:
        """Undo what the last call left behind, so that no call depends on the one before."""
        if self.quirks.leftovers:
            put_back(self.loaded.model, self.quirks.leftovers)

    def score(
        self,
        documents: Sequence[Document],
        ablations: Sequence[Ablation],
        progress: Callable[[int], None] = lambda responses: None,
    ) -> list[DocumentScores]:
        """Score documents, one result a document, in the same order.

        Args:
            documents: What to score.
            ablations: What to remove; must include the baseline, and nothing twice.
            progress: Called with the responses of each finished row (requests times ablations), or
                a share of them for each layer that comes past, where rows wait for weights.

        Returns:
            One result a document.
        """
        layers = len(self.loaded.layers)
        shape = (len(ablations), max(len(document.requests) for document in documents))
        # What never arrives is not a number, and no zero.
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
                    # The baseline comes with each group, and its proxies count once.
                    gold = row.gold if turn == 0 else []
                    for (document, path), proxies in zip(gold, scores.proxies, strict=False):
                        sums[document] += proxies
                        tokens[document] += row.prefix + len(path)
        finally:
            # The next cell on this model takes down its state as that of a fresh one.
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
        """Say whether what some documents begin with would be read apart.

        It is where the common beginning is long enough, and the model takes one.
        """
        long = len(common_beginning(documents, self.max_length)) >= SHORTEST
        return long and cache_argument(self.head.base) is not None

    def groups(self, ablations: Sequence[Ablation], tokens: int) -> Iterator[list[Ablation]]:
        """Part ablations into groups whose streams fit into memory, with so many tokens each.

        The baseline comes first in each group; without depth sharing all are one group.
        """
        return _grouped(ablations, self.streams(tokens) if self.sharing.depth else len(ablations))

    def streams(self, tokens: int) -> int:
        """Count the streams of so many tokens each that fit into the budget."""
        return self._budget // (tokens * stream_bytes(self.loaded.model))

    def _scored(
        self,
        documents: Sequence[Document],
        ablations: Sequence[Ablation],
        progress: Callable[[int], None] = lambda responses: None,
    ) -> Iterator[_Scored]:
        """Score rows; one that does not fit into memory is halved."""
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
            # It computes a row while the one before is read, and the next one built.
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
        """Run passes of the model, or of copies of it, by turns where its weights come past."""
        # A call that leaves something behind is not to meet what another one leaves.
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
            if some and waiting + size > self._budget // 2:
                yield some
                some, waiting = [], 0
            some.append(row)
            waiting += size
        yield some

    def _scored_apart(
        self, documents: Sequence[Document], ablations: Sequence[Ablation]
    ) -> Iterator[_Scored]:
        """Score rows under each ablation alone, on a model that really lacks it."""
        memory = self.memory
        if self.loaded.offloaded is not None:  # the rows of all of them wait together
            memory = self._budget // len(ablations)

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
        """Ask for the answers of rows one by one; of the rows' own pass only proxies are taken."""
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
        """Ask the intact model for one request, in a call of its own."""
        return scored(self.read(read_for(request, self.max_length)), request.continuation)

    def read(self, tokens: Sequence[int]) -> Tensor:
        """Ask the intact model for a text in a call of its own: logits [tokens, vocabulary]."""
        self.put_back()
        return read(self.loaded, tokens)

    def run(self, tokens: Sequence[int]) -> Any:
        """Let the intact model's base read a text in a call of its own; what the base returns."""
        self.put_back()
        ids = torch.tensor([tokens], device=self.loaded.device)
        return self.head.base(input_ids=ids, use_cache=False)

    def _halved(
        self, row: Row, documents: Sequence[Document], ablations: Sequence[Ablation], failed: str
    ) -> Iterator[_Scored]:
        """Score the documents of a row in two halves; a single one with half of the ablations."""
        if self.quirks.lengths != ANY_LENGTH:
            # Its rows may hold some requests of a document, and others not.
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
        """Pack documents the way this engine scores them, into rows that the budget allows."""
        most = self._budget // (plan.streams * stream_bytes(self.loaded.model))
        size = min(self.most_row_tokens, most)
        lengths = self.quirks.lengths
        if self.sharing.tokens:
            length = 0 if prefix is None else len(prefix.tokens)
            return tree_rows(documents, self.max_length, size, length, lengths)
        # While streams fork, a mask that a model builds itself must broadcast: one sequence a row.
        return flat_rows(documents, self.max_length, 1 if plan.streams > 1 else size, lengths)

    @property
    def most_row_tokens(self) -> int:
        """Nodes of a row of several documents, where memory is no matter."""
        on_cpu = self.loaded.device.type == "cpu"
        return self.row_tokens or (ROW_TOKENS if on_cpu else ROW_TOKENS_ACCELERATOR)

    @cached_property
    def _budget(self) -> int:
        return self.memory or least_free(self.loaded.model, self.loaded.device) // 2

    def _prefix(self, documents: Sequence[Document], plan: StreamPlan) -> Prefix | None:
        """Read what all documents begin with, or use what was read for earlier ones."""
        # A layer that is passed again would need a cache of its own.
        if plan.repeats or not self.shares_a_prefix(documents):
            return None
        shared = common_beginning(documents, self.max_length)
        for kept in self._kept:
            if kept.plan == plan and kept.cut_to(shared, self.quirks.lengths):
                return kept
        self._kept.clear()
        if len(shared) * plan.attention_passes * self._kept_bytes > self._budget // 2:
            return None
        self.put_back()
        prefix = _unless_full(lambda: read_prefix(self.parts(plan), plan, shared))
        if isinstance(prefix, str):
            return None
        self._kept.append(prefix)
        return prefix

    def plan(self, ablations: Sequence[Ablation]) -> StreamPlan:
        """Plan where the streams of some ablations fork."""
        tied = any(each.ends for each in ablations) and self.ends.matrices.is_tied
        return plan_streams(ablations, len(self.loaded.layers), tied, self._is_divided(ablations))

    def parts(self, plan: StreamPlan) -> Parts:
        """Take the model apart for a plan."""
        loaded, on_cpu, at_once = self.loaded, self.loaded.device.type == "cpu", None
        if on_cpu and loaded.offloaded is None:  # elsewhere all streams pass a layer together
            at_once = self.at_once or AT_ONCE * torch.get_num_threads()
        anatomy = self.anatomy
        changes = {name for step in plan.steps for name in step.changes}
        kinds = [kind for name, kind in _CHANGED.items() if name in changes]
        if any(step.has_sublayers for step in plan.steps) or plan.has_groups_of_maps:
            kinds.append(Sublayers)
        for kind in kinds:  # now, before layers fork
            anatomy.find(kind)
        return Parts(
            loaded.model,
            loaded.layers,
            anatomy,
            self.head,
            loaded.device,
            self._windows,
            self._placed_replacements,
            self.ends if plan.has_ends else None,
            at_once,
            self.row_multiple or (1 if on_cpu else ROW_MULTIPLE_ACCELERATOR),
        )

    @cached_property
    def _placed_replacements(self) -> Mapping[int, Replacement]:
        """Move what stands in for layers to their devices, once.

        Where weights come past it stays on the host: the room on the device was given to layers.
        """
        if self.loaded.offloaded is not None:
            return self.replacements
        placed = dict(self.replacements)
        for index, layer in enumerate(self.loaded.layers):
            if isinstance(fitted := placed.get(index), FittedReplacement):
                device = next((p.device for p in layer.parameters()), self.loaded.device)
                placed[index] = fitted.on(device)
        return placed

    def logits(self, plan: StreamPlan, output: Any, states: Tensor) -> Tensor:
        """Run the head that each of a plan's ablations has: [ablations, kept, vocabulary].

        `output` is what the base returned, `states` [ablations, kept, hidden] are the ablations'
        own. All logits are there at once.
        """
        if not plan.has_ends:
            return self.head.logits(output, states)
        parts, logits = self.parts(plan), dict[int, Tensor]()
        for form, numbers in grouped(range(len(states)), lambda n: plan.heads[n]).items():
            with parts.having_head(form):
                logits |= zip(numbers, self.head.logits(output, take(states, numbers)), strict=True)
        return torch.stack([logits[n] for n in range(len(states))])

    def _windows(self, tokens: int) -> AttentionWindows:
        """How far each layer sees in a text of so many tokens."""
        known = self.known
        if known.windows is None or known.windows.tokens < tokens:
            loaded = self.loaded
            reach = min(-(-tokens // SIGHT) * SIGHT, max(self.max_length, tokens))
            self.put_back()
            known.windows = attention_windows(self.head.base, loaded.layers, reach, loaded.device)
            # It is asked for in the middle of a call, which is to begin as every other.
            self.put_back()
        return known.windows

    @property
    def _kept_bytes(self) -> int:
        """What the keys and values of one token take in one attention."""
        if self.known.kept_bytes is None:
            self.put_back()
            alone = plan_streams([INTACT], len(self.loaded.layers))
            self.known.kept_bytes = kept_bytes(self.parts(alone))
        return self.known.kept_bytes

    @cached_property
    def head(self) -> Head:
        """What is behind the model's base."""
        return Head(self.loaded.model)

    @property
    def anatomy(self) -> LayerAnatomy:
        """The parts of its layers."""
        known, loaded = self.known, self.loaded
        known.weights = known.weights or RoundedWeights(self._kept_weights)
        # Not kept: it holds this engine, whose quirks a call of the model must heed.
        return LayerAnatomy(
            loaded.model, loaded.layers, loaded.device, self._alone, known.parts, known.weights
        )

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Provide a context in which a call of the model leaves no trace in later passes."""
        self.put_back()
        with nullcontext() if self.loaded.offloaded is None else self.loaded.offloaded.alone():
            yield
        self.put_back()

    def _is_divided(self, ablations: Sequence[Ablation]) -> bool:
        """Check whether layers are divided into attention and MLP; parts can do without."""
        is_whole = any(ablation.has_sublayers for ablation in ablations)
        has_parts = any(ablation.parts for ablation in ablations)
        return is_whole or not has_parts or self.anatomy.is_divided

    @property
    def ends(self) -> RoundedEmbeddings:
        """The embedding and the head; in formats each is large, and each row wants all of them."""
        known = self.known
        if known.ends is None:
            weights = RoundedWeights(self._budget // 2)
            known.ends = RoundedEmbeddings(find_embeddings(self.loaded.model), weights)
        return known.ends

    @property
    def _kept_weights(self) -> int:
        """Bytes that weights in formats may take while no layer has them."""
        return self._budget // 8

    def _launch_row(
        self, row: Row, plan: StreamPlan, prefix: Prefix | None, ablations: Sequence[Ablation]
    ) -> Callable[[], RowScores]:
        """Launch one row; what is returned reads its scores, in the order of the ablations."""
        prefix = prefix if row.prefix else None
        some = [] if prefix or self.loaded.offloaded is not None else of_experts(ablations)
        computed = ablations
        if len(some) >= WORTH:
            self.put_back()
            unread = idle(self.parts(plan), row, some)
            computed = [ablation for ablation in ablations if ablation not in unread]
            plan = self.plan(computed) if unread else plan
        self.put_back()
        read = launch_row(self.parts(plan), plan, row, prefix)
        places = dict(zip(computed, plan.answer_of, strict=True))
        order = torch.tensor([places.get(each, places[INTACT]) for each in ablations])

        def in_order() -> RowScores:
            scores = read()
            return RowScores(scores.loglikelihoods[order], scores.hits[order], scores.proxies)

        return in_order

    def decoding_groups(
        self, ablations: Sequence[Ablation], tokens: int
    ) -> Iterator[list[Ablation]]:
        """Split ablations so that the texts of each group fit into half of the budget.

        Each group has the baseline; `tokens` is the longest text, the prompt included. RefusalError
        if the model takes no keys and values.
        """
        if cache_argument(self.loaded.model) is None:
            raise RefusalError("it takes no cache of keys and values")
        if self.plan(ablations).repeats:
            raise RefusalError("a layer that is passed again would need a cache of its own")
        each = tokens * len(self.loaded.layers) * self._kept_bytes
        return _grouped(ablations, self._budget // 2 // each)

    @contextmanager
    def decoding(
        self, ablations: Sequence[Ablation], prompt: Sequence[int]
    ) -> Iterator[dict[str, Any]]:
        """Let the model continue one prompt under every ablation, a row each, in the open context.

        Yields what transformers' `generate` takes besides: the prompt's keys and values; nothing
        for a model that takes none.
        """
        plan = self.plan(ablations)
        kept = next((k for k in self._kept if k.plan == plan and k.begins(prompt)), None)
        self.put_back()
        try:
            # A kept beginning was read in inference mode: only there it can be added to.
            with (
                torch.inference_mode(),
                decoding(self.parts(plan), ablations, prompt, kept) as cache,
            ):
                name = cache_argument(self.loaded.model)
                yield {} if name is None else {name: cache}
        finally:
            self.put_back()


def _unless_full(compute: Callable[[], T]) -> T | str:
    """Return what a function returns, or the message of the error that memory ran out."""
    try:
        return compute()
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return str(error)


def _removed(ablations: Sequence[Ablation]) -> list[Ablation]:
    """All but the baseline."""
    return [ablation for ablation in ablations if ablation != INTACT]


def _grouped(ablations: Sequence[Ablation], size: int) -> Iterator[list[Ablation]]:
    """Part ablations into groups of so many, each with the baseline first and one other at least.

    The baseline alone is one group.
    """
    removed, others = _removed(ablations), max(1, size - 1)
    for start in range(0, max(1, len(removed)), others):
        yield [INTACT, *removed[start : start + others]]


def _tokens(document: Document) -> int:
    """At most how many nodes a document's tree has."""
    contexts = {request.context for request in document.requests}
    return sum(map(len, contexts)) + sum(len(r.continuation) for r in document.requests)

"""Sharing over tokens: requests packed into rows, each scored in one forward pass.

A row is either a prefix tree (one node a distinct token, position = depth, a node sees its
ancestors), or a batch of sequences of equal length for models that cannot take such a mask.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from tracker.core.documents import Document
from tracker.core.errors import CellError
from tracker.core.grouping import grouped
from tracker.models.devices import send, split


def alike(text: Sequence[int], other: Sequence[int]) -> int:
    """Count the tokens that two texts begin with alike."""
    pairs = enumerate(zip(text, other, strict=False))
    return next((number for number, (a, b) in pairs if a != b), min(len(text), len(other)))


class Tree:
    """A prefix tree under construction; node i's parent is before i."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.parents: list[int] = []
        self.depths: list[int] = []
        self._children: dict[tuple[int, int], int] = {}

    def insert(self, path: Sequence[int]) -> list[int]:
        """Add a sequence; returns its nodes."""
        nodes = []
        parent = -1
        for depth, token in enumerate(path):
            node = self._children.setdefault((parent, token), len(self.tokens))
            if node == len(self.tokens):
                self.tokens.append(token)
                self.parents.append(parent)
                self.depths.append(depth)
            nodes.append(node)
            parent = node
        return nodes

    def added_by(self, paths: Sequence[Sequence[int]]) -> int:
        """Count the nodes that some sequences would add."""
        missing = set()
        for path in paths:
            parent: int | None = -1
            for depth, token in enumerate(path):
                parent = self._children.get((parent, token)) if parent is not None else None
                if parent is None:
                    missing.add(tuple(path[: depth + 1]))
        return len(missing)

    def spans(self) -> Tensor:
        """Number the nodes branch by branch: the span of each node and its descendants.

        Returns:
            Where each node's span begins, with its own number, and where it ends [2, tokens].
        """
        # The last entry is that of what is above all roots, whose parent is -1.
        nodes = len(self.parents)
        sizes, ends, starts = [1] * (nodes + 1), [0] * (nodes + 1), []
        for node in reversed(range(nodes)):
            sizes[self.parents[node]] += sizes[node]
        for node, parent in enumerate(self.parents):
            starts.append(ends[parent])
            ends[parent] += sizes[node]
            ends[node] = starts[node] + 1
        return torch.tensor([starts, ends[:-1]])


@dataclass(frozen=True)
class Lengths:
    """Which forward passes a model computes alike, by how many tokens of a text they reach.

    Some rotary embeddings choose their factors by the last position of the whole pass. Requests
    share a pass, and a beginning that was read before, only where that makes no difference.

    Attributes:
        thresholds: Lengths at which something changes.
        each: Whether beyond the first of them every length differs from every other.
    """

    thresholds: tuple[int, ...] = ()
    each: bool = False

    def side(self, tokens: int) -> int:
        """Say on which side of the thresholds so many tokens are; equal sides are computed alike.

        A length that is a threshold is a side of its own, since models differ in where it belongs.
        """
        if self.each and tokens >= min(self.thresholds, default=0):
            return tokens
        return sum((tokens >= t) + (tokens > t) for t in self.thresholds)


ANY_LENGTH = Lengths()


@dataclass(frozen=True)
class Row:
    """Some requests, ready for one forward pass. N = rows × tokens.

    Attributes:
        prefix: Tokens before the row that every request begins with and that were read apart.
        input_ids: Token ids [rows, tokens].
        positions: Position of each token, the prefix counted [1, tokens].
        spans: Of each node where its span begins and ends, as `Tree.spans` numbers them [2,
            tokens]; None for plain causal sequences.
        keep: Flat indices into N where something is predicted [kept].
        predictor: For every predicted token, the index into `keep` that predicts it [predicted].
        predicted: Those tokens' ids [predicted].
        owner: For every predicted token, the index into `requests` [predicted].
        requests: (document, request) of each request, as indices into the packed documents.
        gold: On which nodes the proxies of which document are measured, the prefix apart:
            (document, flat indices into N); all rows together hold each token of a document once.
        length: Tokens of its longest text, the prefix counted.
    """

    prefix: int
    input_ids: Tensor
    positions: Tensor
    spans: Tensor | None
    keep: Tensor
    predictor: Tensor
    predicted: Tensor
    owner: Tensor
    requests: list[tuple[int, int]]
    gold: list[tuple[int, Tensor]]
    length: int

    @property
    def tokens(self) -> int:
        """Tokens that the model reads."""
        return self.input_ids.numel()

    @property
    def ancestors(self) -> Tensor | None:
        """Compute which node sees which: those whose span it is in [tokens, tokens], bool."""
        if self.spans is None:
            return None
        starts, ends = self.spans
        seen: Tensor = (starts[None] <= starts[:, None]) & (starts[:, None] < ends[None])
        return seen

    def padded(self, multiple: int) -> Row:
        """Add nodes to a tree, so that it and its prefix have a multiple of so many.

        Each sees the prefix and itself, and nothing of it is read.
        """
        missing = -(self.prefix + self.tokens) % multiple
        if self.spans is None or not missing:
            return self
        added = torch.arange(missing) + self.tokens
        return replace(
            self,
            input_ids=pad(self.input_ids, (0, missing)),
            positions=pad(self.positions, (0, missing), value=self.prefix),
            spans=torch.cat([self.spans, torch.stack([added, added + 1])], dim=1),
        )

    def on(self, device: torch.device) -> Row:
        """Copy what a device reads of the row to it, all at once; `gold` stays on the host."""
        if self.input_ids.device.type == device.type:
            return self
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        packed = send(torch.cat([tensor.flatten() for tensor in tensors.values()]), device)
        parts = split(packed, [tensor.shape for tensor in tensors.values()])
        placed: dict[str, Any] = dict(zip(tensors, parts, strict=True))
        return replace(self, **placed)

    def renumbered(self, documents: Sequence[int]) -> Row:
        """Give each packed document another number."""
        return replace(
            self,
            requests=[(documents[number], request) for number, request in self.requests],
            gold=[(documents[number], path) for number, path in self.gold],
        )


@dataclass(frozen=True)
class _Sequence:
    """One request as the model reads it: `tokens`, of which the last `scored` are predicted.

    `read` tokens go into the model: all but the last, which is only predicted, or all where the
    proxies are measured, from the token `measured` on. Equal `side`s may share a pass.
    """

    document: int
    request: int
    tokens: tuple[int, ...]
    scored: int
    read: int
    measured: int | None
    side: int

    @property
    def path(self) -> tuple[int, ...]:
        return self.tokens[: self.read]

    @property
    def context(self) -> int:
        """How many tokens come before the first one that predicts."""
        return len(self.tokens) - self.scored - 1


def _request(
    number: int, index: int, document: Document, max_length: int, lengths: Lengths
) -> list[_Sequence]:
    """Cut a request to the model's length exactly as lm-eval does: from the left.

    The proxies want the last token read too. Where that one token more changes the others, the
    proxies are measured in a pass of their own.
    """
    request = document.requests[index]
    scored = len(request.continuation)
    if scored == 0 or scored > max_length:
        raise CellError(
            f"a continuation of {scored} tokens cannot be scored by a model that reads "
            f"1 to {max_length}; lm-eval refuses it too"
        )
    tokens = (request.context + request.continuation)[-(max_length + 1) :]
    measured = None
    if document.rolling:
        measured = len(tokens) - scored
    elif index == (document.gold or 0):
        measured = 0
    short, whole = len(tokens) - 1, min(len(tokens), max_length)
    side = lengths.side(short)
    alone = _Sequence(number, index, tokens, scored, short, None, side)
    if measured is None:
        return [alone]
    if lengths.side(whole) == side:
        return [replace(alone, read=whole, measured=measured)]
    both = replace(alone, scored=0, read=whole, measured=measured, side=lengths.side(whole))
    return [alone, both]


def _sequences(
    documents: Sequence[Document], max_length: int, lengths: Lengths
) -> list[list[_Sequence]]:
    return [
        [
            sequence
            for index in range(len(document.requests))
            for sequence in _request(number, index, document, max_length, lengths)
        ]
        for number, document in enumerate(documents)
    ]


def _by_side(sequences: Sequence[list[_Sequence]]) -> list[list[list[_Sequence]]]:
    """Keep apart what must not share a pass; within a side, document by document."""
    sides: dict[int, list[list[_Sequence]]] = {}
    for each in sequences:
        for side, some in grouped(each, attrgetter("side")).items():
            sides.setdefault(side, []).append(some)
    return list(sides.values())


def tree_rows(
    documents: Sequence[Document],
    max_length: int,
    row_tokens: int,
    prefix: int = 0,
    lengths: Lengths = ANY_LENGTH,
) -> Iterator[Row]:
    """Pack whole documents into prefix trees.

    A request is a path from the root, a node a token; requests that begin alike share the nodes of
    what they begin with, so a context is read once for all its answers. A tree is one sequence to
    the model, [1, nodes], whose positions are the depths and whose mask shows each node its
    ancestors (`Masks`): to every path it is as if that text stood there alone.

    Args:
        documents: What to score.
        max_length: Tokens that the model reads at most; longer requests lose their beginning, as
            in lm-eval.
        row_tokens: Nodes of a tree; a single larger document still makes one row.
        prefix: How many tokens of the common beginning are read apart; rows to which that makes a
            difference hold it themselves.
        lengths: What may share a row.

    Yields:
        Rows that hold every request of every document exactly once.
    """
    for together in _by_side(_sequences(documents, max_length, lengths)):
        begun = prefix if lengths.side(prefix) == together[0][0].side else 0
        tree, packed = Tree(), list[_Sequence]()
        # In order of their tokens, documents that begin alike come into the same row.
        for sequences in sorted(together, key=lambda each: each[0].tokens):
            paths = [sequence.path[begun:] for sequence in sequences]
            added = tree.added_by(paths)
            if packed and len(tree.tokens) + added > row_tokens:
                yield _tree_row(tree, packed, begun)
                tree, packed = Tree(), []
            for path in paths:
                tree.insert(path)
            packed.extend(sequences)
        yield _tree_row(tree, packed, begun)


def tree_size(document: Document, max_length: int) -> int:
    """Count the nodes of the row that `tree_rows` makes of a document alone."""
    tree = Tree()
    for sequence in _sequences([document], max_length, ANY_LENGTH)[0]:
        tree.insert(sequence.path)
    return len(tree.tokens)


def common_beginning(documents: Sequence[Document], max_length: int) -> tuple[int, ...]:
    """Find the tokens with which all requests begin, up to what predicts something.

    `max_length` is as in `tree_rows`.
    """
    sequences = list(chain.from_iterable(_sequences(documents, max_length, ANY_LENGTH)))
    if not sequences:
        return ()
    # The first and last in order differ earliest.
    first, last = (end(s.path for s in sequences) for end in (min, max))
    return first[: min(alike(first, last), *(s.context for s in sequences))]


def measured_texts(document: Document, max_length: int) -> Iterator[tuple[tuple[int, ...], int]]:
    """List the texts on which the proxies of a document are measured, as `Row.gold` holds them.

    Args:
        document: What the model is asked.
        max_length: As in `tree_rows`.

    Yields:
        The tokens that are read: context and gold continuation, or a window of a rolling text; and
        from which of them on they are measured.
    """
    for index in range(len(document.requests)):
        for sequence in _request(0, index, document, max_length, ANY_LENGTH):
            if sequence.measured is not None:
                yield sequence.path, sequence.measured


def reading_row(tokens: Sequence[int], prefix: int = 0) -> Row:
    """Make the row that only reads: a common beginning, or a prompt behind `prefix` tokens."""
    tree = Tree()
    tree.insert(tokens)
    return _tree_row(tree, [], prefix)


def _tree_row(tree: Tree, sequences: list[_Sequence], prefix: int) -> Row:
    nodes = [tree.insert(sequence.path[prefix:]) for sequence in sequences]
    tokens, depths = torch.tensor([tree.tokens]), torch.tensor([tree.depths])
    return _row(prefix, tokens, depths + prefix, tree.spans(), sequences, nodes)


def flat_rows(
    documents: Sequence[Document], max_length: int, row_tokens: int, lengths: Lengths = ANY_LENGTH
) -> Iterator[Row]:
    """Pack distinct sequences of equal length into rows [rows, length] that need no mask.

    A sequence with which another begins is read with it, as lm-eval does for one-token answers: a
    causal model says of the shorter one what it says on the way through the longer.

    Args:
        documents: What to score.
        max_length: As in `tree_rows`.
        row_tokens: Tokens of a row; a single longer sequence still makes one row.
        lengths: What may share a row.

    Yields:
        Rows that hold every request of every document exactly once.
    """
    for together in _by_side(_sequences(documents, max_length, lengths)):
        by_path: dict[tuple[int, ...], list[_Sequence]] = {}
        longest: tuple[int, ...] = ()
        # Backwards in order, a sequence that begins another one comes after it and is read with
        # it.
        sequences = chain.from_iterable(together)
        for sequence in sorted(sequences, key=attrgetter("path"), reverse=True):
            if longest[: len(sequence.path)] != sequence.path:
                longest = sequence.path
            by_path.setdefault(longest, []).append(sequence)
        for length, paths in grouped(by_path, len).items():
            size = max(1, row_tokens // length)
            for start in range(0, len(paths), size):
                chunk = paths[start : start + size]
                members = [(row, s) for row, path in enumerate(chunk) for s in by_path[path]]
                nodes = [list(range(row * length, (row + 1) * length)) for row, _ in members]
                positions, asked = torch.arange(length)[None], [s for _, s in members]
                yield _row(0, torch.tensor(chunk), positions, None, asked, nodes)


def _row(
    prefix: int,
    input_ids: Tensor,
    positions: Tensor,
    spans: Tensor | None,
    sequences: list[_Sequence],
    nodes: list[list[int]],
) -> Row:
    """Note where each request's continuation is predicted."""
    places: dict[int, int] = {}
    predictor, predicted, owner = [], [], []
    scored = [(s, path) for s, path in zip(sequences, nodes, strict=True) if s.scored]
    for number, (sequence, path) in enumerate(scored):
        first = len(sequence.tokens) - sequence.scored
        for place in range(first, len(sequence.tokens)):
            predictor.append(places.setdefault(path[place - 1 - prefix], len(places)))
            predicted.append(sequence.tokens[place])
            owner.append(number)
    return Row(
        prefix=prefix,
        input_ids=input_ids,
        positions=positions,
        spans=spans,
        keep=torch.tensor(list(places)).long(),
        predictor=torch.tensor(predictor).long(),
        predicted=torch.tensor(predicted).long(),
        owner=torch.tensor(owner).long(),
        requests=[(sequence.document, sequence.request) for sequence, _ in scored],
        gold=[
            (sequence.document, torch.tensor(path[measured : sequence.read - prefix]).long())
            for sequence, path in zip(sequences, nodes, strict=True)
            if sequence.measured is not None
            for measured in [max(0, sequence.measured - prefix)]
        ],
        length=int(positions.max()) + 1,
    )

"""Pack requests into rows that share tokens; each row is scored in one forward pass.

A row is a prefix tree: one node per distinct token, position = depth, a node sees its ancestors.
For models that cannot take such a mask, it is a batch of sequences of equal length.
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
    """Count the tokens that two texts share at the beginning."""
    pairs = enumerate(zip(text, other, strict=False))
    return next((number for number, (a, b) in pairs if a != b), min(len(text), len(other)))


class Tree:
    """A prefix tree under construction; a node's parent always has a smaller number."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.parents: list[int] = []
        self.depths: list[int] = []
        self._children: dict[tuple[int, int], int] = {}

    def insert(self, path: Sequence[int]) -> list[int]:
        """Add a sequence and return its nodes."""
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
        """Assign numbers to nodes branch by branch: the span of each node and its descendants.

        Returns:
            The first node of each node's span, in depth-first order, and the end of the span [2,
            tokens].
        """
        # The last entry belongs to the parent of all roots, which is -1.
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
    """Lengths of a text at which a model's computation changes.

    Some rotary embeddings choose their factors by the last position of the whole pass. Requests
    share a pass, or a beginning that was read before, only if that makes no difference.

    Attributes:
        thresholds: Lengths at which something changes.
        each: Whether every length beyond the first threshold differs from every other.
    """

    thresholds: tuple[int, ...] = ()
    each: bool = False

    def side(self, tokens: int) -> int:
        """Return the interval between thresholds of a length; equal values are computed alike.

        A length that is a threshold is an interval of its own, since models differ in where it
        belongs.
        """
        if self.each and tokens >= min(self.thresholds, default=0):
            return tokens
        return sum((tokens >= t) + (tokens > t) for t in self.thresholds)


ANY_LENGTH = Lengths()


@dataclass(frozen=True)
class Row:
    """Requests that are ready for one forward pass. N = rows × tokens.

    Attributes:
        prefix: Number of tokens of the common beginning, which is read before the row.
        input_ids: Token ids [rows, tokens].
        positions: Position of each token, the prefix counted [1, tokens].
        spans: Begin and end of each node's span, as `Tree.spans` numbers them [2, tokens]; None for
            plain causal sequences.
        keep: Flat indices into N of the tokens that predict something [kept].
        predictor: The index into `keep` that predicts each predicted token [predicted].
        predicted: Ids of the predicted tokens [predicted].
        owner: The index into `requests` of each predicted token [predicted].
        requests: (document, request) of each request, as indices into the packed documents.
        gold: (document, flat indices into N) of the nodes on which a document's proxies are
            measured, without the prefix; all rows together hold each token of a document once.
        length: Tokens of the longest text, the prefix counted.
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
        """The number of tokens that the model reads."""
        return self.input_ids.numel()

    @property
    def ancestors(self) -> Tensor | None:
        """The visibility of nodes: each sees those in whose span it is [tokens, tokens], bool."""
        if self.spans is None:
            return None
        starts, ends = self.spans
        seen: Tensor = (starts[None] <= starts[:, None]) & (starts[:, None] < ends[None])
        return seen

    def padded(self, multiple: int) -> Row:
        """Return the row with nodes added to its tree, up to a multiple with its prefix.

        An added node sees the prefix and itself, and its output is not used.
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
        """Copy the tensors that a device needs to it, all at once; `gold` stays on the host."""
        if self.input_ids.device.type == device.type:
            return self
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        packed = send(torch.cat([tensor.flatten() for tensor in tensors.values()]), device)
        parts = split(packed, [tensor.shape for tensor in tensors.values()])
        placed: dict[str, Any] = dict(zip(tensors, parts, strict=True))
        return replace(self, **placed)

    def renumbered(self, documents: Sequence[int]) -> Row:
        """Return the row with other numbers for the packed documents."""
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
        """The number of tokens before the first one that predicts."""
        return len(self.tokens) - self.scored - 1


def _request(
    number: int, index: int, document: Document, max_length: int, lengths: Lengths
) -> list[_Sequence]:
    """Truncate a request to the model's length from the left, exactly as lm-eval does.

    The proxies also need the last token read. Where one more token changes the others, the
    proxies are measured in a separate pass.
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
    """Separate the sequences that must not share a pass; within a side, keep documents together."""
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

    A request is a path from the root, a node is a token. Requests with a common beginning share its
    nodes, so a context is read once for all its answers. A tree is one sequence to the model, [1,
    nodes], whose positions are the depths and whose mask shows each node its ancestors (`Masks`):
    each path is computed as if its text were alone.

    Args:
        documents: The documents to score.
        max_length: Maximum number of tokens that the model reads; longer requests lose their
            beginning, as in lm-eval.
        row_tokens: Nodes of a tree; a single larger document still makes one row.
        prefix: Number of tokens of the common beginning that are read separately; rows for which
            this makes a difference contain them.
        lengths: Lengths that decide which requests may share a row.

    Yields:
        Rows that hold every request of every document exactly once.
    """
    for together in _by_side(_sequences(documents, max_length, lengths)):
        begun = prefix if lengths.side(prefix) == together[0][0].side else 0
        tree, packed = Tree(), list[_Sequence]()
        # Sorted by their tokens, documents with a common beginning come into the same row.
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
    """Count the nodes of the row that `tree_rows` makes of a single document."""
    tree = Tree()
    for sequence in _sequences([document], max_length, ANY_LENGTH)[0]:
        tree.insert(sequence.path)
    return len(tree.tokens)


def common_beginning(documents: Sequence[Document], max_length: int) -> tuple[int, ...]:
    """Find the tokens with which all requests begin, before the first predicting token.

    `max_length` is as in `tree_rows`.
    """
    sequences = list(chain.from_iterable(_sequences(documents, max_length, ANY_LENGTH)))
    if not sequences:
        return ()
    # The first and the last in sorted order differ earliest.
    first, last = (end(s.path for s in sequences) for end in (min, max))
    return first[: min(alike(first, last), *(s.context for s in sequences))]


def measured_texts(document: Document, max_length: int) -> Iterator[tuple[tuple[int, ...], int]]:
    """List the texts on which the proxies of a document are measured, as `Row.gold` holds them.

    Args:
        document: The document.
        max_length: Maximum number of tokens that the model reads, as in `tree_rows`.

    Yields:
        The tokens to read (context and gold continuation, or a window of a rolling text), and the
        index of the first measured token.
    """
    for index in range(len(document.requests)):
        for sequence in _request(0, index, document, max_length, ANY_LENGTH):
            if sequence.measured is not None:
                yield sequence.path, sequence.measured


def reading_row(tokens: Sequence[int], prefix: int = 0) -> Row:
    """Build a row without requests: a common beginning, or a prompt behind `prefix` tokens."""
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

    A sequence that is the beginning of another is read with it, as lm-eval does for one-token
    answers: a causal model computes the same for it within the longer one.

    Args:
        documents: The documents to score.
        max_length: Maximum number of tokens that the model reads, as in `tree_rows`.
        row_tokens: Tokens of a row; a single longer sequence still makes one row.
        lengths: Lengths that decide which requests may share a row.

    Yields:
        Rows that hold every request of every document exactly once.
    """
    for together in _by_side(_sequences(documents, max_length, lengths)):
        by_path: dict[tuple[int, ...], list[_Sequence]] = {}
        longest: tuple[int, ...] = ()
        # In reverse order, a sequence that is the beginning of another comes after it and is read
        # with it.
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
    """Build a row with the indices at which each request's continuation is predicted."""
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

"""Sharing over tokens: requests packed into rows, each scored in one forward pass.

A row is either a prefix tree (one node a distinct token, position = depth, a node sees its
ancestors), or a batch of sequences of equal length for models that cannot take such a mask.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tracker.documents import Document, Request
from tracker.errors import CellError

LARGE_ROW = 1024
"""Nodes that a row may hold beyond a long common beginning: what its dense mask still pays for."""


@dataclass(frozen=True)
class Row:
    """Some requests, ready for one forward pass. N = rows × tokens.

    Attributes:
        input_ids: Token ids [rows, tokens].
        positions: Position of each token [1, tokens].
        ancestors: Which node sees which [tokens, tokens], bool; None for plain causal sequences.
        keep: Flat indices into N where something is predicted [kept].
        predictor: For every predicted token, the index into `keep` that predicts it [predicted].
        predicted: Those tokens' ids [predicted].
        owner: For every predicted token, the index into `requests` [predicted].
        requests: (document, request) of each request, as indices into the packed documents.
        gold: Which nodes hold context and gold continuation of which document:
            (document, flat indices into N), each document once over all rows.
    """

    input_ids: Tensor
    positions: Tensor
    ancestors: Tensor | None
    keep: Tensor
    predictor: Tensor
    predicted: Tensor
    owner: Tensor
    requests: list[tuple[int, int]]
    gold: list[tuple[int, Tensor]]

    @property
    def tokens(self) -> int:
        """Tokens that the model reads."""
        return self.input_ids.numel()


@dataclass(frozen=True)
class _Sequence:
    """One request as the model reads it: `tokens`, of which the last `scored` are predicted.

    `read` tokens go into the model: all but the last, which is only predicted, or all where the
    proxies are measured on the gold continuation.
    """

    document: int
    request: int
    tokens: tuple[int, ...]
    scored: int
    read: int
    is_gold: bool

    @property
    def path(self) -> tuple[int, ...]:
        return self.tokens[: self.read]


def _sequence(
    document: int, index: int, request: Request, is_gold: bool, max_length: int
) -> _Sequence:
    """Cut a request to the model's length exactly as lm-eval does: from the left."""
    scored = len(request.continuation)
    if scored == 0 or scored > max_length:
        raise CellError(
            f"a continuation of {scored} tokens cannot be scored by a model that reads "
            f"1 to {max_length}; lm-eval refuses it too"
        )
    tokens = (request.context + request.continuation)[-(max_length + 1) :]
    read = min(len(tokens), max_length) if is_gold else len(tokens) - 1
    return _Sequence(document, index, tokens, scored, read, is_gold)


def _sequences(documents: Sequence[Document], max_length: int) -> list[list[_Sequence]]:
    return [
        [
            _sequence(number, index, request, index == (document.gold or 0), max_length)
            for index, request in enumerate(document.requests)
        ]
        for number, document in enumerate(documents)
    ]


class _Tree:
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
            node = self._children.get((parent, token))
            if node is None:
                node = len(self.tokens)
                self._children[parent, token] = node
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

    def ancestors(self) -> Tensor:
        """Which node sees which, itself included [tokens, tokens]."""
        seen = torch.zeros(len(self.tokens), len(self.tokens), dtype=torch.bool)
        for node, parent in enumerate(self.parents):
            if parent >= 0:
                seen[node] = seen[parent]
            seen[node, node] = True
        return seen


def tree_rows(documents: Sequence[Document], max_length: int, row_tokens: int) -> Iterator[Row]:
    """Pack whole documents into prefix trees.

    Args:
        documents: What to score.
        max_length: Tokens that the model reads at most; longer requests lose their beginning, as
            in lm-eval.
        row_tokens: Nodes of a tree; a single larger document still makes one row, and where all
            documents begin alike (few-shot examples) a row is larger, so that the beginning is
            paid for once by many documents.

    Yields:
        Rows that hold every request of every document exactly once.
    """
    tree, packed = _Tree(), list[_Sequence]()
    requests = _sequences(documents, max_length)
    shared = _common_beginning([sequence.path for each in requests for sequence in each])
    row_tokens = max(row_tokens, shared + min(2 * shared, LARGE_ROW))
    for sequences in requests:
        added = tree.added_by([sequence.path for sequence in sequences])
        if packed and len(tree.tokens) + added > row_tokens:
            yield _tree_row(tree, packed)
            tree, packed = _Tree(), []
        for sequence in sequences:
            tree.insert(sequence.path)
        packed.extend(sequences)
    if packed:
        yield _tree_row(tree, packed)


def _common_beginning(paths: list[tuple[int, ...]]) -> int:
    """Count the tokens with which all sequences begin: the first and last in order tell."""
    first, last = min(paths, default=()), max(paths, default=())
    differing = (i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b)
    return next(differing, min(len(first), len(last)))


def _tree_row(tree: _Tree, sequences: list[_Sequence]) -> Row:
    nodes = [tree.insert(sequence.path) for sequence in sequences]
    return _row(
        torch.tensor([tree.tokens]), torch.tensor([tree.depths]), tree.ancestors(), sequences, nodes
    )


def flat_rows(documents: Sequence[Document], max_length: int, row_tokens: int) -> Iterator[Row]:
    """Pack distinct sequences of equal length into rows that need no mask.

    Args:
        documents: What to score.
        max_length: As in `tree_rows`.
        row_tokens: Tokens of a row; a single longer sequence still makes one row.

    Yields:
        Rows that hold every request of every document exactly once.
    """
    by_path: dict[tuple[int, ...], list[_Sequence]] = {}
    for sequences in _sequences(documents, max_length):
        for sequence in sequences:
            by_path.setdefault(sequence.path, []).append(sequence)
    by_length: dict[int, list[tuple[int, ...]]] = {}
    for path in by_path:
        by_length.setdefault(len(path), []).append(path)
    for length, paths in by_length.items():
        size = max(1, row_tokens // length)
        for start in range(0, len(paths), size):
            chunk = paths[start : start + size]
            members = [(row, s) for row, path in enumerate(chunk) for s in by_path[path]]
            nodes = [list(range(row * length, (row + 1) * length)) for row, _ in members]
            yield _row(
                torch.tensor(chunk),
                torch.arange(length)[None],
                None,
                [sequence for _, sequence in members],
                nodes,
            )


def _row(
    input_ids: Tensor,
    positions: Tensor,
    ancestors: Tensor | None,
    sequences: list[_Sequence],
    nodes: list[list[int]],
) -> Row:
    """Note where each request's continuation is predicted."""
    places: dict[int, int] = {}
    predictor, predicted, owner = [], [], []
    for number, (sequence, path) in enumerate(zip(sequences, nodes, strict=True)):
        first = len(sequence.tokens) - sequence.scored
        for place in range(first, len(sequence.tokens)):
            predictor.append(places.setdefault(path[place - 1], len(places)))
            predicted.append(sequence.tokens[place])
            owner.append(number)
    return Row(
        input_ids=input_ids,
        positions=positions,
        ancestors=ancestors,
        keep=torch.tensor(list(places)),
        predictor=torch.tensor(predictor),
        predicted=torch.tensor(predicted),
        owner=torch.tensor(owner),
        requests=[(sequence.document, sequence.request) for sequence in sequences],
        gold=[
            (sequence.document, torch.tensor(path))
            for sequence, path in zip(sequences, nodes, strict=True)
            if sequence.is_gold
        ],
    )

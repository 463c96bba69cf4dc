"""Pack requests into rows that share tokens; each row is scored in one forward pass.

A row is a prefix tree with a node per distinct token; position = depth, and a node sees its
ancestors. For models that cannot take such a mask, a row is a batch of sequences of equal length.
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
from tracker.core.grouping import group_by
from tracker.models.devices import copy_to_device, split_packed

Documents = Sequence[Document]


def count_common_tokens(text: Sequence[int], other_text: Sequence[int]) -> int:
    """Count the tokens that two texts share at the beginning."""
    pairs = enumerate(zip(text, other_text, strict=False))
    return next((index for index, (a, b) in pairs if a != b), min(len(text), len(other_text)))


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

    def count_new_nodes(self, paths: Sequence[Sequence[int]]) -> int:
        """Count the nodes that inserting some sequences would add to the tree."""
        new_paths = set()
        for path in paths:
            parent: int | None = -1
            for depth, token in enumerate(path):
                parent = self._children.get((parent, token)) if parent is not None else None
                if parent is None:
                    new_paths.add(tuple(path[: depth + 1]))
        return len(new_paths)

    def compute_spans(self) -> Tensor:
        """Renumber the nodes in depth-first order; return each node's span of descendants.

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
        all_differ: Whether every length beyond the first threshold differs from every other.
    """

    thresholds: tuple[int, ...] = ()
    all_differ: bool = False

    def side(self, tokens: int) -> int:
        """Return an identifier of the interval between thresholds to which a length belongs.

        Texts with equal identifiers are computed alike. A length equal to a threshold is an
        interval of its own, since models differ in its side.
        """
        if self.all_differ and tokens >= min(self.thresholds, default=0):
            return tokens
        return sum((tokens >= t) + (tokens > t) for t in self.thresholds)


ANY_LENGTH = Lengths()


@dataclass(frozen=True)
class Row:
    """Requests packed for one forward pass. N = rows × tokens.

    Attributes:
        prefix: Number of tokens of the common beginning, which is read before the row.
        input_ids: Token ids [rows, tokens].
        positions: Position of each token, the prefix counted [1, tokens].
        spans: Begin and end of each node's span, as `Tree.compute_spans` numbers them [2, tokens];
            None for plain causal sequences.
        predicting_nodes: Flat indices into N of the tokens that predict something [kept].
        predictor: The index into `predicting_nodes` that predicts each predicted token [predicted].
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
    predicting_nodes: Tensor
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
        """The nodes that each node sees: its ancestors and itself [tokens, tokens], bool."""
        if self.spans is None:
            return None
        starts, ends = self.spans
        visible: Tensor = (starts[None] <= starts[:, None]) & (starts[:, None] < ends[None])
        return visible

    def pad_nodes(self, multiple: int) -> Row:
        """Pad the tree until the number of its nodes and of the prefix's tokens is a multiple.

        An added node sees the prefix and itself, and its output is not used.
        """
        n_missing = -(self.prefix + self.tokens) % multiple
        if self.spans is None or not n_missing:
            return self
        new_nodes = torch.arange(n_missing) + self.tokens
        return replace(
            self,
            input_ids=pad(self.input_ids, (0, n_missing)),
            positions=pad(self.positions, (0, n_missing), value=self.prefix),
            spans=torch.cat([self.spans, torch.stack([new_nodes, new_nodes + 1])], dim=1),
        )

    def to_device(self, device: torch.device) -> Row:
        """Copy the row's tensors to a device in one transfer; `gold` stays on the host."""
        if self.input_ids.device.type == device.type:
            return self
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        packed = torch.cat([tensor.flatten() for tensor in tensors.values()])
        shapes = [tensor.shape for tensor in tensors.values()]
        parts = split_packed(copy_to_device(packed, device), shapes)
        device_tensors: dict[str, Any] = dict(zip(tensors, parts, strict=True))
        return replace(self, **device_tensors)

    def renumber(self, documents: Sequence[int]) -> Row:
        """Return the row with other indices of the packed documents."""
        return replace(
            self,
            requests=[(documents[number], request) for number, request in self.requests],
            gold=[(documents[number], path) for number, path in self.gold],
        )


@dataclass(frozen=True)
class _Sequence:
    """A request as the model reads it: `tokens`, the last `n_scored` of which are predicted.

    `n_read` tokens go into the model: all but the last, which is only predicted, or all where the
    proxies are measured, from the token `start` on. Equal `side`s may share a pass.
    """

    document: int
    request: int
    tokens: tuple[int, ...]
    n_scored: int
    n_read: int
    start: int | None
    side: int

    @property
    def path(self) -> tuple[int, ...]:
        return self.tokens[: self.n_read]


def _list_sequences(documents: Documents, max_length: int, lengths: Lengths) -> Iterator[_Sequence]:
    """Truncate requests to the model's length from the left, exactly as lm-eval does.

    To measure the proxies, the last token must also be read. Where this token changes the scores of
    others, the proxies are measured in a separate pass.
    """
    for number, document in enumerate(documents):
        for index, request in enumerate(document.requests):
            n_scored = len(request.continuation)
            if n_scored == 0 or n_scored > max_length:
                raise CellError(
                    f"a continuation of {n_scored} tokens cannot be scored by a model that reads 1 "
                    f"to {max_length} tokens; lm-eval refuses this too"
                )
            tokens = (request.context + request.continuation)[-(max_length + 1) :]
            n_read, n_whole = len(tokens) - 1, min(len(tokens), max_length)
            side = lengths.side(n_read)
            sequence = _Sequence(number, index, tokens, n_scored, n_read, None, side)
            if not document.rolling and index != (document.gold or 0):
                yield sequence
                continue
            start = len(tokens) - n_scored if document.rolling else 0
            whole = replace(sequence, n_read=n_whole, start=start, side=lengths.side(n_whole))
            yield from [whole] if whole.side == side else [sequence, replace(whole, n_scored=0)]


def _group_by_side(
    documents: Documents, max_length: int, lengths: Lengths
) -> list[list[list[_Sequence]]]:
    """Group the sequences that may share a pass, keeping documents together in each group."""
    sides = group_by(_list_sequences(documents, max_length, lengths), attrgetter("side")).values()
    return [list(group_by(side, attrgetter("document")).values()) for side in sides]


def pack_tree_rows(
    documents: Documents,
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
        row_tokens: Maximum number of nodes of a tree; a single larger document still makes one row.
        prefix: Number of tokens of the common beginning that are read separately; rows for which
            this makes a difference contain them.
        lengths: Lengths that decide which requests may share a row.

    Yields:
        Rows that hold every request of every document exactly once.
    """
    for side_group in _group_by_side(documents, max_length, lengths):
        n_prefix = prefix if lengths.side(prefix) == side_group[0][0].side else 0
        tree, row_sequences = Tree(), list[_Sequence]()
        # Sorted by their tokens, documents with a common beginning come into the same row.
        for sequences in sorted(side_group, key=lambda group: group[0].tokens):
            paths = [sequence.path[n_prefix:] for sequence in sequences]
            n_added = tree.count_new_nodes(paths)
            if row_sequences and len(tree.tokens) + n_added > row_tokens:
                yield _tree_row(tree, row_sequences, n_prefix)
                tree, row_sequences = Tree(), []
            for path in paths:
                tree.insert(path)
            row_sequences.extend(sequences)
        yield _tree_row(tree, row_sequences, n_prefix)


def count_tree_nodes(document: Document, max_length: int) -> int:
    """Count the nodes of the row that `pack_tree_rows` builds from a single document."""
    tree = Tree()
    for sequence in _list_sequences([document], max_length, ANY_LENGTH):
        tree.insert(sequence.path)
    return len(tree.tokens)


def common_beginning(documents: Documents, max_length: int) -> tuple[int, ...]:
    """Find the tokens with which all requests begin, before the first predicting token.

    `max_length` is as in `pack_tree_rows`.
    """
    sequences = list(_list_sequences(documents, max_length, ANY_LENGTH))
    if not sequences:
        return ()
    # The first and the last in sorted order differ earliest.
    first_path, last_path = (extreme(s.path for s in sequences) for extreme in (min, max))
    n_context = min(len(s.tokens) - s.n_scored - 1 for s in sequences)
    return first_path[: min(count_common_tokens(first_path, last_path), n_context)]


def measured_texts(document: Document, max_length: int) -> Iterator[tuple[tuple[int, ...], int]]:
    """List the texts on which the proxies of a document are measured, as `Row.gold` holds them.

    Args:
        document: The document.
        max_length: Maximum number of tokens that the model reads, as in `pack_tree_rows`.

    Yields:
        The tokens to read (context and gold continuation, or a window of a rolling text), and the
        index of the first measured token.
    """
    for sequence in _list_sequences([document], max_length, ANY_LENGTH):
        if sequence.start is not None:
            yield sequence.path, sequence.start


def reading_row(tokens: Sequence[int], prefix: int = 0) -> Row:
    """Build a row without requests: a common beginning, or a prompt behind `prefix` tokens."""
    tree = Tree()
    tree.insert(tokens)
    return _tree_row(tree, [], prefix)


def _tree_row(tree: Tree, sequences: list[_Sequence], prefix: int) -> Row:
    nodes = [tree.insert(sequence.path[prefix:]) for sequence in sequences]
    node_tokens, depths = torch.tensor([tree.tokens]), torch.tensor([tree.depths])
    return _row(prefix, node_tokens, depths + prefix, tree.compute_spans(), sequences, nodes)


def pack_flat_rows(
    documents: Documents, max_length: int, row_tokens: int, lengths: Lengths = ANY_LENGTH
) -> Iterator[Row]:
    """Pack distinct sequences of equal length into rows [rows, length] that need no mask.

    A sequence that is the beginning of another is read with it, as lm-eval does for one-token
    answers: a causal model computes the same for it within the longer one.

    Args:
        documents: The documents to score.
        max_length: Maximum number of tokens that the model reads, as in `pack_tree_rows`.
        row_tokens: Maximum number of tokens of a row; a single longer sequence still makes one row.
        lengths: Lengths that decide which requests may share a row.

    Yields:
        Rows that hold every request of every document exactly once.
    """
    for side_group in _group_by_side(documents, max_length, lengths):
        by_path: dict[tuple[int, ...], list[_Sequence]] = {}
        longest_path: tuple[int, ...] = ()
        # In reverse order, a sequence that is the beginning of another comes after it and is read
        # with it.
        sequences = chain.from_iterable(side_group)
        for sequence in sorted(sequences, key=attrgetter("path"), reverse=True):
            if longest_path[: len(sequence.path)] != sequence.path:
                longest_path = sequence.path
            by_path.setdefault(longest_path, []).append(sequence)
        for length, paths in group_by(by_path, len).items():
            n_paths = max(1, row_tokens // length)
            for start in range(0, len(paths), n_paths):
                chunk = paths[start : start + n_paths]
                members = [(row, s) for row, path in enumerate(chunk) for s in by_path[path]]
                nodes = [list(range(row * length, (row + 1) * length)) for row, _ in members]
                positions, row_sequences = torch.arange(length)[None], [s for _, s in members]
                yield _row(0, torch.tensor(chunk), positions, None, row_sequences, nodes)


def _row(
    prefix: int,
    input_ids: Tensor,
    positions: Tensor,
    spans: Tensor | None,
    sequences: list[_Sequence],
    nodes: list[list[int]],
) -> Row:
    """Build a row, computing the indices at which each request's continuation is predicted."""
    index_of: dict[int, int] = {}
    predictor, predicted, owner = [], [], []
    paths = list(zip(sequences, nodes, strict=True))
    scored_paths = [(sequence, path) for sequence, path in paths if sequence.n_scored]
    for number, (sequence, path) in enumerate(scored_paths):
        start = len(sequence.tokens) - sequence.n_scored
        for position in range(start, len(sequence.tokens)):
            predictor.append(index_of.setdefault(path[position - 1 - prefix], len(index_of)))
            predicted.append(sequence.tokens[position])
            owner.append(number)
    requests = [(sequence.document, sequence.request) for sequence, _ in scored_paths]
    gold = [
        (s.document, torch.tensor(path[max(0, s.start - prefix) : s.n_read - prefix]).long())
        for s, path in paths
        if s.start is not None
    ]
    index_lists = (list(index_of), predictor, predicted, owner)
    kept_nodes, predictors, ids, owners = (torch.tensor(values).long() for values in index_lists)
    tensors = (input_ids, positions, spans, kept_nodes, predictors, ids, owners)
    return Row(prefix, *tensors, requests, gold, length=int(positions.max()) + 1)

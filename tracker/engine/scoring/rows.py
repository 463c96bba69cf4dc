"""Pack requests into rows that share tokens; each row is scored in one forward pass.

A row is usually a prefix tree: each node is a token, and requests share the nodes of their common
beginning. For models that do not support the attention mask of a tree, a row is a batch of
sequences of equal length.
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

from tracker.models.devices import copy_to_device, split_packed
from tracker.schema.documents import Document
from tracker.schema.errors import CellError
from tracker.schema.grouping import group_by

Documents = Sequence[Document]


def count_common_tokens(text: Sequence[int], other_text: Sequence[int]) -> int:
    """Count the tokens that two texts share at the beginning."""
    pairs = enumerate(zip(text, other_text, strict=False))
    return next((index for index, (a, b) in pairs if a != b), min(len(text), len(other_text)))


class Tree:
    """Prefix tree of token sequences, in which each node is a token.

    Nodes are numbered in the order of insertion, so parents come before children.
    """

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.parents: list[int] = []
        self.depths: list[int] = []
        self._children: dict[tuple[int, int], int] = {}

    def insert(self, path: Sequence[int]) -> list[int]:
        """Insert a token sequence; return the node number of each token."""
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
        """Count the nodes that inserting the token sequences would add."""
        new_paths = set()
        for path in paths:
            parent: int | None = -1
            for depth, token in enumerate(path):
                parent = self._children.get((parent, token)) if parent is not None else None
                if parent is None:
                    new_paths.add(tuple(path[: depth + 1]))
        return len(new_paths)

    def compute_spans(self) -> Tensor:
        """Compute depth-first numbers of the nodes, and the range of numbers in each subtree.

        Returns:
            Tensor [2, nodes]: for each node, the node's number, and 1 + the largest number in the
            node's subtree.
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
    """Text lengths (thresholds) at which a model's computation changes.

    Attributes:
        thresholds: Numbers of tokens at which the computation changes.
        all_differ: True if every length from the first threshold on has its own computation.
    """

    thresholds: tuple[int, ...] = ()
    all_differ: bool = False

    def side(self, tokens: int) -> int:
        """Return a number that is equal for text lengths with the same computation.

        All lengths between two thresholds have one number; each threshold has its own.
        """
        if self.all_differ and tokens >= min(self.thresholds, default=0):
            return tokens
        return sum((tokens >= t) + (tokens > t) for t in self.thresholds)


ANY_LENGTH = Lengths()


@dataclass(frozen=True)
class Row:
    """Requests that one forward pass scores together.

    N is the number of tokens in the forward pass.

    Attributes:
        prefix: Number of tokens of the common prefix, which the model reads in an earlier forward
            pass.
        input_ids: Token ids [sequences, tokens]; a prefix tree is one sequence. N = sequences ×
            tokens.
        positions: Position of each token in its text, including the prefix [1, tokens].
        spans: Result of `Tree.compute_spans` for the nodes of the tree [2, tokens]; None for plain
            causal sequences.
        predicting_nodes: Indices (0 to N - 1) of the tokens whose logits are needed [predicting
            tokens].
        predictor: For each predicted token, the index in `predicting_nodes` of the token that
            predicts it [predicted].
        predicted: Ids of the predicted tokens [predicted].
        owner: For each predicted token, the index of its request in `requests` [predicted].
        requests: For each request, the index of its document and its index in the document.
        gold: Pairs of a document's index and the indices (0 to N - 1) of its tokens for layer
            statistics (proxies).
        length: Number of tokens of the longest text, including the prefix.
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
        """Number of tokens that the model reads for the row, without the prefix."""
        return self.input_ids.numel()

    @property
    def ancestors(self) -> Tensor | None:
        """Attention mask [tokens, tokens] of the prefix tree; None if the row is not a tree.

        The entry [i, j] is True if token j is token i itself or an ancestor of token i.
        """
        if self.spans is None:
            return None
        starts, ends = self.spans
        visible: Tensor = (starts[None] <= starts[:, None]) & (starts[:, None] < ends[None])
        return visible

    def pad_nodes(self, multiple: int) -> Row:
        """Pad the row to a multiple of `multiple` tokens, including the cached prefix.

        Only a prefix tree is padded. The output of padding tokens is not used.
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
        """Return a copy of the row, with its tensors on a device.

        The tensors in `gold` stay on the host.
        """
        if self.input_ids.device.type == device.type:
            return self
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        packed = torch.cat([tensor.flatten() for tensor in tensors.values()])
        shapes = [tensor.shape for tensor in tensors.values()]
        parts = split_packed(copy_to_device(packed, device), shapes)
        device_tensors: dict[str, Any] = dict(zip(tensors, parts, strict=True))
        return replace(self, **device_tensors)

    def renumber(self, documents: Sequence[int]) -> Row:
        """Return a copy of the row, with each document index `n` replaced by `documents[n]`."""
        return replace(
            self,
            requests=[(documents[number], request) for number, request in self.requests],
            gold=[(documents[number], path) for number, path in self.gold],
        )


@dataclass(frozen=True)
class _Sequence:
    """The tokens of a request; the last `n_scored` tokens are scored.

    The model reads the first `n_read` tokens, usually all except the last. If `start` is not None,
    layer statistics (proxies) are measured from this token on, and the model also reads the last
    token. Only sequences with equal `side`, the result of `Lengths.side`, can be in one forward
    pass.
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
    """Yield the token sequence of each request, truncated from the left as in lm-eval.

    Layer statistics (proxies) also need the last token, which scoring does not read. If the last
    token changes how the model computes (`lengths`), a second sequence contains this token.
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
    """Group requests whose text lengths lead to the same computation, as given by `lengths`.

    Each group contains one list of requests for each of its documents.
    """
    sides = group_by(_list_sequences(documents, max_length, lengths), attrgetter("side")).values()
    return [list(group_by(side, attrgetter("document")).values()) for side in sides]


def pack_tree_rows(
    documents: Documents,
    max_length: int,
    row_tokens: int,
    prefix: int = 0,
    lengths: Lengths = ANY_LENGTH,
) -> Iterator[Row]:
    """Pack documents into rows; each row is a prefix tree of requests.

    Each node of a tree is a token. Requests with a common beginning have common nodes, so the model
    reads a context once for all answers. With the attention masks of `Masks`, results are the same
    as for separate requests.

    Args:
        documents: The documents to score.
        max_length: Maximum number of tokens that the model reads. Longer requests are truncated
            from the left, as in lm-eval.
        row_tokens: Maximum number of nodes of a tree; a larger document gets a larger tree.
        prefix: Number of tokens of the common prefix that the model reads in a separate forward
            pass.
        lengths: Text lengths at which the model's computation changes. All requests of a row
            have the same computation.

    Yields:
        Rows, which together contain every request of every document exactly once.
    """
    for side_group in _group_by_side(documents, max_length, lengths):
        n_prefix = prefix if lengths.side(prefix) == side_group[0][0].side else 0
        tree, row_sequences = Tree(), list[_Sequence]()
        # Sorted by their tokens, documents with a common beginning come into the same row.
        for sequences in sorted(side_group, key=lambda group: group[0].tokens):
            paths = [sequence.path[n_prefix:] for sequence in sequences]
            n_added = tree.count_new_nodes(paths)
            if row_sequences and len(tree.tokens) + n_added > row_tokens:
                yield _build_tree_row(tree, row_sequences, n_prefix)
                tree, row_sequences = Tree(), []
            for path in paths:
                tree.insert(path)
            row_sequences.extend(sequences)
        yield _build_tree_row(tree, row_sequences, n_prefix)


def count_tree_nodes(document: Document, max_length: int) -> int:
    """Count the tokens in the prefix tree of a document's requests."""
    tree = Tree()
    for sequence in _list_sequences([document], max_length, ANY_LENGTH):
        tree.insert(sequence.path)
    return len(tree.tokens)


def common_beginning(documents: Documents, max_length: int) -> tuple[int, ...]:
    """Return the longest token sequence with which the contexts of all requests begin.

    The last token of a context is never included. Requests longer than `max_length` tokens are
    truncated from the left.
    """
    sequences = list(_list_sequences(documents, max_length, ANY_LENGTH))
    if not sequences:
        return ()
    # The first and the last in sorted order differ earliest.
    first_path, last_path = (extreme(s.path for s in sequences) for extreme in (min, max))
    n_context = min(len(s.tokens) - s.n_scored - 1 for s in sequences)
    return first_path[: min(count_common_tokens(first_path, last_path), n_context)]


def measured_texts(document: Document, max_length: int) -> Iterator[tuple[tuple[int, ...], int]]:
    """Yield the texts of a document on which layer statistics (proxies) are measured.

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
    """Build a row that reads `tokens` after `prefix` cached tokens, without scoring."""
    tree = Tree()
    tree.insert(tokens)
    return _build_tree_row(tree, [], prefix)


def _build_tree_row(tree: Tree, sequences: list[_Sequence], prefix: int) -> Row:
    nodes = [tree.insert(sequence.path[prefix:]) for sequence in sequences]
    node_tokens, depths = torch.tensor([tree.tokens]), torch.tensor([tree.depths])
    return _build_row(prefix, node_tokens, depths + prefix, tree.compute_spans(), sequences, nodes)


def pack_flat_rows(
    documents: Documents, max_length: int, row_tokens: int, lengths: Lengths = ANY_LENGTH
) -> Iterator[Row]:
    """Pack distinct sequences of equal length into rows [sequences, length] without masks.

    If a sequence is the beginning of a longer sequence, only the longer sequence is read.

    Args:
        documents: The documents to score.
        max_length: Maximum number of tokens that the model reads, as in `pack_tree_rows`.
        row_tokens: Maximum number of tokens of a row; a longer sequence gets a longer row.
        lengths: Text lengths at which the model's computation changes. All requests of a row
            have the same computation.

    Yields:
        Rows, which together contain every request of every document exactly once.
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
                yield _build_row(0, torch.tensor(chunk), positions, None, row_sequences, nodes)


def _build_row(
    prefix: int,
    input_ids: Tensor,
    positions: Tensor,
    spans: Tensor | None,
    sequences: list[_Sequence],
    nodes: list[list[int]],
) -> Row:
    """Build a row from token sequences, with the indices of the tokens that predict scored tokens.

    `nodes` contains, for each sequence, the indices of its tokens in the row.
    """
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

"""A prefix tree of requests: what several of them begin with is one path."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def alike(one: Sequence[int], other: Sequence[int]) -> int:
    """Count the tokens that two texts begin with alike."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(one), len(other)))


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

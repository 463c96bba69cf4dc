"""Entries of a tensor by their numbers, by slices alone.

A list of numbers as an index is a tensor on the host, which an accelerator copies first, and waits.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor


def neighbours(indices: Sequence[int]) -> list[slice]:
    """Split indices into stretches of neighbours: [0, 1, 2, 0] into 0:3 and 0:1."""
    starts = [n for n, index in enumerate(indices) if not n or index != indices[n - 1] + 1]
    return [slice(indices[a], indices[b - 1] + 1) for a, b in pairwise([*starts, len(indices)])]


def take(tensor: Tensor, indices: Sequence[int], axis: int = 0) -> Tensor:
    """Copy some entries of a tensor, in the order of their indices along an axis."""
    along = tensor.movedim(axis, 0)
    parts = [along[run].movedim(0, axis) for run in neighbours(indices)]
    return torch.cat(parts, axis) if parts else tensor.narrow(axis, 0, 0)


def split(packed: Tensor, shapes: Sequence[torch.Size]) -> list[Tensor]:
    """Split a tensor of one axis into tensors of some shapes, one after the other."""
    parts = torch.split(packed, [shape.numel() for shape in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


def put(tensor: Tensor, indices: Sequence[int], values: Tensor) -> None:
    """Write values over some entries of a tensor's first axis, in the order of their indices."""
    runs = neighbours(indices)
    parts = torch.split(values, [run.stop - run.start for run in runs])
    for run, part in zip(runs, parts, strict=True):
        tensor[run] = part

"""Entries of tensors by slices, held against torch's own indexing by lists."""

from __future__ import annotations

import random

import torch

from tracker.models.devices import put, take


def test_entries_are_those_of_indexing_by_a_list():
    draw = random.Random(0)
    tensor = torch.rand(6, 4, 5) + 1
    for _ in range(20):
        indices = draw.choices(range(4), k=draw.randrange(6))
        for axis in (1, -2):
            taken = take(tensor, indices, axis)
            assert torch.equal(taken, tensor[:, indices])
            taken[:] = 0
            assert tensor.all(), "what is taken is a copy"
        once = draw.sample(range(6), draw.randrange(1, 7))
        changed, values = tensor.clone(), torch.randn(len(once), 4, 5)
        put(changed, once, values)
        assert torch.equal(changed, tensor.index_copy(0, torch.tensor(once), values))

"""Entries of tensors by slices, held against torch's own indexing by lists."""

from __future__ import annotations

import random

import torch

from tracker.models.devices import put_entries, take_entries


def test_entries_equal_those_of_indexing_by_a_list():
    generator = random.Random(0)
    tensor = torch.rand(6, 4, 5) + 1
    for _ in range(20):
        indices = generator.choices(range(4), k=generator.randrange(6))
        for axis in (1, -2):
            entries = take_entries(tensor, indices, axis)
            assert torch.equal(entries, tensor[:, indices])
            entries[:] = 0
            assert tensor.all(), "what is taken is a copy"
        distinct_indices = generator.sample(range(6), generator.randrange(1, 7))
        changed_tensor, values = tensor.clone(), torch.randn(len(distinct_indices), 4, 5)
        put_entries(changed_tensor, distinct_indices, values)
        assert torch.equal(
            changed_tensor, tensor.index_copy(0, torch.tensor(distinct_indices), values)
        )

"""Entries of tensors by slices, held against torch's own indexing by lists."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
import torch

from tracker.models.slices import neighbours, put, take


@pytest.mark.parametrize("places", [[], [3], [0, 1, 2], [2, 2, 2], [0, 1, 4, 5, 0], [5, 4, 3]])
def test_places_are_split_into_neighbours(places):
    runs = neighbours(places)
    assert [place for run in runs for place in range(run.start, run.stop)] == places
    assert all(run.stop != other.start for run, other in pairwise(runs))


def test_entries_are_those_of_indexing_by_a_list():
    draw = random.Random(0)
    tensor = torch.randn(6, 4, 5)
    for _ in range(20):
        places = draw.choices(range(4), k=draw.randrange(6))
        for axis in (1, -2):
            taken = take(tensor, places, axis)
            assert torch.equal(taken, tensor[:, places])
        once = draw.sample(range(6), draw.randrange(1, 7))
        ours, theirs, values = tensor.clone(), tensor.clone(), torch.randn(len(once), 4, 5)
        put(ours, once, values)
        theirs[once] = values
        assert torch.equal(ours, theirs)


def test_what_is_taken_is_a_copy():
    tensor = torch.zeros(3)
    take(tensor, [0, 1, 2])[:] = 1
    assert not tensor.any()

from __future__ import annotations

from itertools import pairwise

import pytest
from pydantic import ValidationError

from tracker.schema.config import cell_request
from tracker.schema.errors import RequestError
from tracker.schema.extent import ALL_DOCUMENTS, Extent, random_order, shuffle_documents


def test_the_order_is_the_same_for_ever():
    """As sha256sum gives it: the digests of 'seed/task/number', ascending."""
    assert random_order(1234, "arc_easy", range(8)) == [3, 4, 1, 2, 7, 6, 0, 5]


def test_a_sample_holds_the_smaller_ones():
    order = random_order(7, "piqa", range(1000))
    assert sorted(order) == list(range(1000))
    for size in (1, 10, 999):
        assert Extent(sample=size, seed=7).select("piqa", range(1000)) == order[:size]
    assert Extent(sample=2000, seed=7).select("piqa", range(1000)) == order


def test_samples_show_no_pattern():
    """Of the first half of the numbers about half are drawn, and neighbours part."""
    drawn = Extent(sample=500).select("piqa", range(1000))
    assert 200 < sum(number < 500 for number in drawn) < 300
    assert sum(abs(a - b) == 1 for a, b in pairwise(drawn)) < 10


def test_the_first_ones_and_all():
    assert list(ALL_DOCUMENTS.select("piqa", range(3))) == [0, 1, 2]
    assert list(Extent(limit=2).select("piqa", range(3))) == [0, 1]
    assert list(Extent(limit=9).select("piqa", range(3))) == [0, 1, 2]


@pytest.mark.parametrize("settings", [{"sample": 0}, {"limit": -1}, {"sampel": 3}])
def test_invalid_settings_are_refused(settings):
    with pytest.raises(ValidationError):
        Extent(**settings)


@pytest.mark.parametrize("names", ["limit and sample", "until and limit", "until and sample"])
def test_either_the_first_ones_or_some_drawn_or_until_an_answer(names):
    settings = {"limit": 3, "sample": 3, "until": "top 1"}
    settings = {name: value for name, value in settings.items() if name in names}
    with pytest.raises(RequestError, match=f"{names} are both given"):
        cell_request(model="m", benchmark="b", layers=(0, 1), **settings)


def test_the_documents_of_all_tasks_in_one_order():
    sizes = {"art": range(400), "law": range(1200), "zoo": range(1)}
    order = shuffle_documents(7, sizes)
    for task, documents in sizes.items():
        mine = [number for name, number in order if name == task]
        assert mine == random_order(7, task, documents)
    assert len(order) == 1601
    # A beginning holds each task in proportion: 100 of 400, but for chance.
    assert 75 < sum(name == "art" for name, _ in order[:400]) < 125
    assert order == shuffle_documents(7, dict(reversed(sizes.items())))
    assert order != shuffle_documents(8, sizes)

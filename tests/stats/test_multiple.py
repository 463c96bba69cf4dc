from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tracker.stats.support import holm

p_values = st.lists(st.one_of(st.none(), st.floats(0, 1)), max_size=6)


@given(p_values)
def test_it_is_the_closed_bonferroni_test(given_p: list[float | None]) -> None:
    # A hypothesis is rejected when every set of hypotheses that holds it is, by Bonferroni: its
    # adjusted p-value is the largest of theirs.
    made = [place for place, p in enumerate(given_p) if p is not None]
    for place, adjusted in enumerate(holm(given_p)):
        if given_p[place] is None:
            assert adjusted is None
            continue
        sets = (
            others
            for size in range(1, len(made) + 1)
            for others in itertools.combinations(made, size)
            if place in others
        )
        largest = max(min(1.0, len(each) * min(given_p[i] for i in each)) for each in sets)
        assert adjusted == pytest.approx(largest)

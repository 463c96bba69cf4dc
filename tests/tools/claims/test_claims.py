"""A dozen made-up results folders, known by which layers matter; `make claims` takes 1,600."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.tools.claims.made_up import THREE
from tests.tools.claims.reading import (
    named,
    tried,
)


@pytest.mark.parametrize("documents", [8, 100])
def test_where_no_layer_matters_none_is_named(tmp_path: Path, documents: int) -> None:
    wrong = [false for _, false in tried(tmp_path, range(3), {}, documents) if any(false.values())]
    # With 5 % in each folder, two of three have a probability of 0.7 %.
    assert len(wrong) < 2, wrong


def test_where_three_matter_these_are_named(tmp_path: Path) -> None:
    wrong = []
    for statements, false in tried(tmp_path, range(3), THREE, 200):
        wrong += [false] if any(false.values()) else []
        assert {*THREE} <= named(statements["run"][0])
        assert {*THREE} <= set().union(*map(named, statements["page"]))
        for where in ("tables", "leaderboard"):
            assert {f"layer {layer} matters" for layer in THREE} <= {*statements[where]}
        assert {f"layer {layer} matters: mean" for layer in THREE} <= {*statements["run"]}
        assert "0 before 5" in statements["tables"]
    assert len(wrong) < 2, wrong


@pytest.mark.parametrize("costs", [{}, THREE])
def test_studies_say_nothing_that_is_not_there(tmp_path: Path, costs: dict[int, float]) -> None:
    wrong = []
    for statements, false in tried(tmp_path, range(2), costs, 60, studies=True, pages=False):
        wrong += [false["studies"]] if false["studies"] else []
        # What accuracy spares is told from what takes a layer that matters, and from nothing else.
        better = "better than cosine_oneshot, last, random" if costs else "better than no other"
        assert any(better in statement for statement in statements["studies"])
        assert any(
            "may be each of them" in statement for statement in statements["studies"]
        ) != bool(costs)
    assert len(wrong) < 2, wrong

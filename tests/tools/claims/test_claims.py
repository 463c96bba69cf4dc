"""Some made-up results folders, known by which layers matter; `make claims` takes 1,600."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.tools.claims.made_up import THREE_LAYERS
from tests.tools.claims.reading import check_folders_of, named_layers_in


@pytest.mark.parametrize("documents", [8, 100])
def test_where_no_layer_matters_none_is_named(tmp_path: Path, documents: int) -> None:
    false_folders = [
        false_texts
        for _, false_texts in check_folders_of(tmp_path, range(2), {}, documents)
        if any(false_texts.values())
    ]
    # With 5 % in each folder, both have a probability of 0.3 %.
    assert len(false_folders) < 2, false_folders


def test_where_three_matter_these_are_named(tmp_path: Path) -> None:
    false_folders = []
    for statements, false_texts in check_folders_of(tmp_path, range(2), THREE_LAYERS, 200):
        false_folders += [false_texts] if any(false_texts.values()) else []
        assert {*THREE_LAYERS} <= named_layers_in(statements["run"][0])
        assert {*THREE_LAYERS} <= set().union(*map(named_layers_in, statements["page"]))
        for text_kind in ("tables", "leaderboard"):
            assert {f"layer {layer} matters" for layer in THREE_LAYERS} <= {*statements[text_kind]}
        assert {f"layer {layer} matters: mean" for layer in THREE_LAYERS} <= {*statements["run"]}
        assert "0 before 5" in statements["tables"]
    assert len(false_folders) < 2, false_folders


@pytest.mark.parametrize("costs", [{}, THREE_LAYERS])
def test_studies_say_nothing_that_is_not_there(tmp_path: Path, costs: dict[int, float]) -> None:
    false_folders = []
    for statements, false_texts in check_folders_of(
        tmp_path, range(1), costs, 60, studies=True, pages=False
    ):
        false_folders += [false_texts["studies"]] if false_texts["studies"] else []
        # What accuracy spares is told from what takes a layer that matters, and from nothing else.
        expected_phrase = (
            "better than by cosine_oneshot, last, random" if costs else "better than by no other"
        )
        assert any(expected_phrase in statement for statement in statements["studies"])
        assert any(
            "may be any of them" in statement for statement in statements["studies"]
        ) != bool(costs)
    assert not false_folders

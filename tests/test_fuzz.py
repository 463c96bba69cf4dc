"""A small part of `make fuzz`, the same every time; and what it found, as plain tests."""

from __future__ import annotations

import pytest

from tests.conftest import save_llama
from tests.fuzz import tried
from tracker.errors import ExperimentError
from tracker.experiment import load_experiment

SEED = 7


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_llama(tmp_path_factory.mktemp("models") / "tiny")


@pytest.mark.parametrize(
    ("kind", "count"), [("experiments", 200), ("command_lines", 60), ("configurations", 20)]
)
def test_whatever_is_typed_ends_in_words(model, tmp_path, kind, count):
    found = getattr(tried, kind)(model, count, SEED, tmp_path)
    assert not found.finds, "\n\n".join(found.finds)
    assert found.counts[tried.REFUSED] > count / 2
    assert found.counts[tried.FINE], "all of it is nonsense, so little is tried"


def test_whatever_happens_to_the_disk_is_noticed(tmp_path):
    for found in tried.ledgers(40, 20, SEED, tmp_path):
        assert not found.finds, "\n".join(found.finds)


BOMB = "a: &a [1,1,1,1,1,1,1,1,1]\n" + "".join(
    f"{name}: &{name} [{','.join([f'*{before}'] * 9)}]\n"
    for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)
HEAD = "method: grid\nparameters:\n  model: {value: m}\n  benchmark: {value: b}\n"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (BOMB, "it holds more than 100,000 values"),
        ("a: &a [*a]\n", "it holds itself, by an anchor"),
        ("a: &a {b: *a}\n", "it holds itself, by an anchor"),
        ("x: " + "[" * 20_000, "it is nested too deeply"),
        ("x: !!int abc\n", "not valid YAML: invalid literal"),
        ("x: !!timestamp 2024-13-45\n", "not valid YAML"),
        ("x: !!timestamp 2024-13-45\U000b6288\n", "not valid YAML"),
        ("x: 2024-13-45\n", "not valid YAML: month must be in"),
        ("x: " + "9" * 5000 + "\n", "not valid YAML: Exceeds the limit"),
        ("x: !!python/object/apply:os.system [x]\n", "could not determine a constructor"),
        ("? [a]\n: 1\n", "found unhashable key"),
        (HEAD + "  layer: {value: 2024-01-01}\n", "'parameters.layer.value': input should be"),
        (HEAD + '  layer: {value: 0}\n  data: {value: "\\ud800"}\n', "a valid string"),
        (HEAD + '  layer: {value: 0}\n  data: {value: "a\\0b"}\n', "cannot be written"),
        (HEAD + "  layer: {min: 0, max: 999999}\n", "no model has a layer 999,999"),
        (
            HEAD
            + "  layer: {value: 0}\n"
            + "".join(
                f"  {name}: {{values: {list(range(1, 1001))}}}\n"
                for name in ("span", "num_fewshot", "limit", "seed")
            ),
            "the grid has 1,000,000,000,000 runs; one file may have 1,000,000",
        ),
        (HEAD + f"  layer: {{value: {'x' * 5000}}}\n", "(got 'xxx"),
    ],
    ids=range(17),
)
def test_yaml_that_means_no_good_is_refused_in_one_line(tmp_path, text, said):
    """Was: tracebacks; and a bomb of 371 bytes made an error of 28 MB."""
    path = tmp_path / "x.yaml"
    path.write_text(text)
    with pytest.raises(ExperimentError) as caught:
        load_experiment(path)
    message = str(caught.value)
    assert said in message
    assert len(message.splitlines()) == 1
    assert len(message) < len(str(path)) + 400


def test_a_large_grid_is_expanded_once_a_cell(tmp_path):
    """Was: every cell was compared with all before it."""
    path = tmp_path / "x.yaml"
    names = {
        "model": [f"m{number}" for number in range(100)],
        "benchmark": [f"b{number}" for number in range(100)],
    }
    lines = [f"  {name}: {{values: {values}}}\n" for name, values in names.items()]
    path.write_text("method: grid\nparameters:\n" + "".join(lines) + "  layer: {min: 0, max: 9}\n")
    experiment, _ = load_experiment(path)
    assert len(set(experiment.cells())) == 10_000

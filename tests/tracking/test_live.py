"""Runs that are there while their cells are measured: opened, killed, continued, and ended."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from mlflow import MlflowClient

from tests.helpers.wandb_double import WandbDouble
from tracker import api
from tracker.analysis.stopping import interim_estimates
from tracker.core.changes import Change
from tracker.core.errors import TrackingError
from tracker.core.experiment_input import load_experiment
from tracker.core.records import CellRecord
from tracker.core.views import View
from tracker.ledger.cells import CellStore
from tracker.ledger.store import Ledger
from tracker.team import live
from tracker.team.live import Live, progress_figures
from tracker.team.publish import Trial
from tracker.tracking import open_backend, open_live_run
from tracker.tracking.base import LiveRun
from tracker.tracking.figures import cell_figures, flat_metrics
from tracker.tracking.identity import cell_name

NAME = "a cell"


class Measured:
    """A cell that is in the ledger, whole."""

    def __init__(self, file: Path, results: Path) -> None:
        (self.record,) = api.run(file, results=results, track=[]).cells
        (self.store,) = Ledger(results).cells()
        (self.request,) = load_experiment(file).file.cells()
        self.view = self.store.views.of(self.request)
        self.results = results

    def begin(self, picture: LiveRun) -> Live:
        shown = Live((picture,))
        shown.begin(NAME, self.store, self.view)
        return shown


@pytest.fixture
def measured(study, results, monkeypatch) -> Measured:
    monkeypatch.setattr(live, "GRACE", 0.0)
    monkeypatch.setattr(live, "EVERY", 0.05)
    monkeypatch.setattr(live, "_PATIENCE", 0.2)
    return Measured(study, results)


def until(found: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + 240
    while not (value := found()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return value


class Shown(NamedTuple):
    """The run of a cell as a reader sees it."""

    id: str
    name: str
    state: object
    newest: dict[str, Any]
    kept: dict[str, Any]


def in_mlflow(results: Path) -> Iterator[Shown]:
    client = MlflowClient(f"sqlite:///{results / 'mlflow.db'}")
    if experiment := client.get_experiment_by_name("layers"):
        for run in client.search_runs([experiment.experiment_id], "tags.`tracker.kind` = 'cell'"):
            info, metrics = run.info, run.data.metrics
            yield Shown(info.run_id, info.run_name, info.status, metrics, metrics)


def in_wandb(double: WandbDouble) -> Iterator[Shown]:
    if project := double.projects.get(("team", "layers")):
        for run in [run for run in project.runs.values() if run.job_type == "cell"]:
            newest = run.history[-1] if run.history else {}
            yield Shown(run.id, run.name, (run.state, run.exit_code), newest, run.summary)


@pytest.mark.parametrize("name", ["mlflow", "wandb"])
def test_the_run_is_there_killed_continued_and_ended(measured, name, request):
    project, (running, killed, finished) = "layers", ("RUNNING", "KILLED", "FINISHED")
    read = partial(in_mlflow, measured.results)
    if name == "wandb":
        double = request.getfixturevalue("lent")
        # With 255, W&B shows it as killed.
        project, (running, killed, finished) = (
            "team/layers",
            (("running", None), ("failed", 255), ("finished", 0)),
        )
        read = partial(in_wandb, double)

    def run() -> Shown:
        (shown,) = read()
        return shown

    first = measured.begin(open_live_run(name, project, measured.results))
    until(lambda: any("progress/documents" in shown.newest for shown in read()))
    shown = run()
    assert (shown.state, shown.name) == (running, cell_name(measured.record))
    assert shown.newest["progress/documents"] == 6
    for figure in ("accuracy_drop", "accuracy_drop_low", "accuracy_drop_high"):
        known = measured.record.runs[1].figure(figure)
        assert shown.newest[f"progress/{figure}/layer 01"] == known
    first.close()
    until(lambda: run().state == killed)

    second = measured.begin(open_live_run(name, project, measured.results))
    until(lambda: run().state == running)
    assert second.end(NAME, "finished").wait(60)
    assert run().state == finished
    second.close()

    with closing(open_backend(name, project, measured.results)) as backend:
        done = backend.publish(measured.record, [], {})
    assert (done.created, done.updated) == (3, 1)
    assert (run().id, run().kept["n"]) == (shown.id, measured.record.n)
    assert ("progress/documents" in run().kept) == (name == "mlflow"), "it takes nothing back"


def test_the_run_of_a_trial_is_there_and_ends_with_its_figures(
    measured, double, client, monkeypatch
):
    client.lend(monkeypatch, **client.trial("t1"))

    def run() -> Any:
        project = double.projects.get(("team", "layers"))
        return project.runs.get("t1") if project else None

    trial = Trial(["wandb"], measured.results, Change.parse("layer:1"))
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


def test_the_measurement_waits_for_no_picture(measured):
    stuck: Any = Stuck()
    shown = measured.begin(stuck)
    assert stuck.reached.wait(60)
    shown.begin("another", measured.store, measured.view)
    left = shown.end(NAME, "finished")
    assert not left.is_set()
    shown.close()
    assert left.wait(60)


def test_what_is_known_so_far_is_what_the_record_says(measured):
    store, view, record = measured.store, measured.view, measured.record
    found = interim_estimates(store, view)
    assert (found.documents, found.wanted, found.tokens) == (record.n, 6, record.tokens)
    assert [(d.value, d.low, d.high) for d in found.drops.values()] == [
        (run.drop.value, run.drop.low, run.drop.high) for run in record.runs
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
    more = replace(view.runs[0], component="mlp")
    return store, view.model_copy(update={"runs": (*view.runs, more)})

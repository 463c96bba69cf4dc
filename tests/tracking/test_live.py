"""Runs that are there while their cells are measured: opened, killed, continued, and ended."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from mlflow import MlflowClient

from tests.helpers.runs import wait_for
from tests.helpers.wandb_double import WandbDouble
from tracker import api
from tracker.analysis.stopping import interim_estimates
from tracker.ledger.cells import CellStore
from tracker.ledger.store import Ledger
from tracker.schema.changes import Change
from tracker.schema.errors import TrackingError
from tracker.schema.experiment_input import load_experiment
from tracker.schema.records import CellRecord
from tracker.schema.views import View
from tracker.team import live
from tracker.team.live import LiveUpdater, progress_figures
from tracker.team.publish import Trial
from tracker.tracking import open_backend, open_live_run
from tracker.tracking.base import LiveRun
from tracker.tracking.figures import cell_figures, run_metrics
from tracker.tracking.identity import cell_run_name

NAME = "a cell"


class MeasuredCell:
    """A cell that is in the ledger, whole."""

    def __init__(self, file: Path, results: Path) -> None:
        (self.record,) = api.run(file, results=results, track=[]).cells
        (self.store,) = Ledger(results).cells()
        (self.request,) = load_experiment(file).file.cells()
        self.view = self.store.views.view_of(self.request)
        self.results = results

    def begin(self, live_run: LiveRun) -> LiveUpdater:
        updater = LiveUpdater((live_run,))
        updater.begin(NAME, self.store, self.view)
        return updater


@pytest.fixture
def measured(study, results, monkeypatch) -> MeasuredCell:
    monkeypatch.setattr(live, "GRACE_PERIOD", 0.0)
    monkeypatch.setattr(live, "UPDATE_INTERVAL", 0.05)
    monkeypatch.setattr(live, "_CLOSE_TIMEOUT", 0.2)
    return MeasuredCell(study, results)


class ShownRun(NamedTuple):
    """The run of a cell as a reader sees it."""

    id: str
    name: str
    state: object
    newest_metrics: dict[str, Any]
    summary: dict[str, Any]


def mlflow_runs(results: Path) -> Iterator[ShownRun]:
    client = MlflowClient(f"sqlite:///{results / 'mlflow.db'}")
    if experiment := client.get_experiment_by_name("layers"):
        for run in client.search_runs([experiment.experiment_id], "tags.`tracker.kind` = 'cell'"):
            info, metrics = run.info, run.data.metrics
            yield ShownRun(info.run_id, info.run_name, info.status, metrics, metrics)


def wandb_runs(double: WandbDouble) -> Iterator[ShownRun]:
    if project := double.projects.get(("team", "layers")):
        for run in [run for run in project.runs.values() if run.job_type == "cell"]:
            newest = run.history[-1] if run.history else {}
            yield ShownRun(run.id, run.name, (run.state, run.exit_code), newest, run.summary)


@pytest.mark.parametrize("name", ["mlflow", "wandb"])
def test_a_live_run_is_killed_continued_and_ended(measured, name, request):
    project, (running, killed, finished) = "layers", ("RUNNING", "KILLED", "FINISHED")
    read_runs = partial(mlflow_runs, measured.results)
    if name == "wandb":
        double = request.getfixturevalue("lent")
        # With 255, W&B shows it as killed.
        project = "team/layers"
        running, killed, finished = ("running", None), ("failed", 255), ("finished", 0)
        read_runs = partial(wandb_runs, double)

    def only_run() -> ShownRun:
        (first_run,) = read_runs()
        return first_run

    first_live = measured.begin(open_live_run(name, project, measured.results))
    wait_for(lambda: any("progress/documents" in run.newest_metrics for run in read_runs()))
    first_run = only_run()
    assert (first_run.state, first_run.name) == (running, cell_run_name(measured.record))
    assert first_run.newest_metrics["progress/documents"] == 6
    for figure in ("accuracy_drop", "accuracy_drop_low", "accuracy_drop_high"):
        expected = measured.record.runs[1].figure(figure)
        assert first_run.newest_metrics[f"progress/{figure}/layer 01"] == expected
    first_live.close()
    wait_for(lambda: only_run().state == killed)

    second_live = measured.begin(open_live_run(name, project, measured.results))
    wait_for(lambda: only_run().state == running)
    assert second_live.end(NAME, "finished").wait(60)
    assert only_run().state == finished
    second_live.close()

    with closing(open_backend(name, project, measured.results)) as backend:
        published = backend.publish(measured.record, [], {})
    assert (published.created, published.updated) == (3, 1)
    assert (only_run().id, only_run().summary["n"]) == (first_run.id, measured.record.n)
    # W&B takes nothing back.
    assert ("progress/documents" in only_run().summary) == (name == "mlflow")


def test_the_run_of_a_trial_is_live(measured, double, client, monkeypatch):
    client.lend(monkeypatch, **client.trial("t1"))

    def trial_run() -> Any:
        project = double.projects.get(("team", "layers"))
        return project.runs.get("t1") if project else None

    trial = Trial(["wandb"], measured.results, Change.parse("layer:1"))
    updater = measured.begin(trial)
    wait_for(lambda: trial_run() and trial_run().history)
    assert (trial_run().state, trial_run().job_type) == ("running", "layer")
    assert trial_run().history[0]["progress/documents"] == 6
    assert updater.end(NAME, "finished").wait(60)
    updater.close()
    assert trial_run().state == "running"
    trial.log(measured.record)
    assert (trial_run().state, trial_run().exit_code) == ("finished", 0)
    assert trial_run().values["layer"] == 1
    expected = run_metrics(measured.record.runs[1])
    assert {n: v for n, v in trial_run().summary.items() if n in expected} == expected
    assert not [name for name in trial_run().summary if name.startswith("progress/")]


class StuckRun:
    """A picture whose backend never answers, then is away."""

    def __init__(self) -> None:
        self.reached, self.released = threading.Event(), threading.Event()

    def begin(self, cell: CellRecord) -> None:
        self.reached.set()
        self.released.wait()
        raise TrackingError("it is away")

    def close(self) -> None:
        self.released.set()


def test_charts_do_not_delay_the_measurement(measured):
    stuck_run: Any = StuckRun()
    updater = measured.begin(stuck_run)
    assert stuck_run.reached.wait(60)
    updater.begin("another", measured.store, measured.view)
    ended = updater.end(NAME, "finished")
    assert not ended.is_set()
    updater.close()
    assert ended.wait(60)


class RecordingRun(StuckRun):
    """A live run that keeps the figures that it is sent."""

    def __init__(self) -> None:
        super().__init__()
        self.figures: list[dict[str, float]] = []

    def begin(self, cell: CellRecord) -> None:
        self.reached.set()

    def update(self, key: str, figures: dict[str, float], documents: int) -> None:
        self.figures.append(figures)

    def end(self, key: str, status: str) -> None:
        self.released.set()


def test_speed_counts_from_the_first_interim_results(measured, monkeypatch):
    full = interim_estimates(measured.store, measured.view)
    counts = iter([2, 4])

    def interim(store: CellStore, view: View) -> Any:
        return replace(full, documents=next(counts, 4))

    # The time before the run is opened is no time between two interim results.
    monkeypatch.setattr(live, "GRACE_PERIOD", 3.0)
    monkeypatch.setattr(live, "interim_estimates", interim)
    run: Any = RecordingRun()
    updater = measured.begin(run)
    wait_for(lambda: len(run.figures) > 1)
    assert run.figures[1]["progress/seconds_left"] < 3.0
    assert updater.end(NAME, "finished").wait(60)
    updater.close()


def test_interim_estimates_agree_with_the_record(measured):
    store, view, record = measured.store, measured.view, measured.record
    estimates = interim_estimates(store, view)
    assert (estimates.documents, estimates.requested) == (record.n, 6)
    assert estimates.tokens == record.tokens
    drops = [(run.drop.value, run.drop.low, run.drop.high) for run in record.runs]
    assert [(d.value, d.low, d.high) for d in estimates.drops.values()] == drops
    # What it took is with the cell, too.
    assert record.seconds is not None
    assert record.peak_bytes is not None
    assert 0 < record.seconds < 3600
    assert record.peak_bytes > 2**20
    values = cell_figures(record)
    assert (values["seconds"], values["peak_bytes"]) == (record.seconds, record.peak_bytes)
    larger_view = view.model_copy(update={"limit": 12})
    halves = interim_estimates(store, larger_view)
    assert (halves.documents, halves.requested) == (6, 12)
    none = interim_estimates(*ask_unmeasured(store, view))
    assert (none.documents, none.drops) == (0, {})
    figures = progress_figures(none, halves, 3.0, record)
    assert figures["progress/seconds_left"] == 3.0
    assert figures["progress/tokens_per_second"] == record.tokens / 3
    assert "progress/seconds_left" not in progress_figures(halves, halves, 3.0, record)


def ask_unmeasured(store: CellStore, view: View) -> tuple[CellStore, View]:
    """Ask for a run that is not measured."""
    unmeasured = replace(view.runs[0], component="mlp")
    return store, view.model_copy(update={"runs": (*view.runs, unmeasured)})

"""MLflow believes the clocks of whoever writes, tracker none: what is written last is shown."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import pytest
from mlflow import MlflowClient

from tests.helpers.ablations import with_figures
from tests.helpers.mlflow_store import Store
from tracker.core.errors import TrackingError
from tracker.core.records import CellRecord
from tracker.tracking.figures import CURVES
from tracker.tracking.identity import run_key
from tracker.tracking.mlflow.backend import MlflowBackend
from tracker.tracking.mlflow.live_run import MlflowLiveRun

from .conftest import cell_record, local

BEHIND = 120.0


@pytest.fixture
def turn(monkeypatch) -> Callable[[float], None]:
    """Turn this machine's clock by some seconds from what it is."""
    clock = time.time

    def turned(seconds: float) -> None:
        monkeypatch.setattr(time, "time", lambda: clock() + seconds)

    return turned


def other_figures(cell: CellRecord) -> CellRecord:
    """Measure the same cell on more documents: every drop differs, one is larger, and what
    was defined of layer 1 is not any more."""
    layers = [
        with_figures(
            run,
            n=320,
            accuracy_drop=run.drop.value + (0.1 if run.change.layer == 0 else -0.03),
            accuracy_relevance=None if run.change.layer == 1 else run.accuracy_relevance,
        )
        for run in cell.runs
    ]
    return with_figures(cell, n=320, runs=tuple(layers), baseline_accuracy=0.52)


def is_shown(uri: str, project: str, cell: CellRecord) -> None:
    """MLflow shows these figures and no others: of runs, of curves, of the models it ranks."""
    store = Store(uri, project)
    store.shows(cell)
    assert store.cell(cell).data.metrics["baseline_accuracy"] == cell.baseline.value
    assert all(run.info.end_time >= run.info.start_time for run in store.runs)
    for name in CURVES:
        history = store.client.get_metric_history(store.cell(cell).info.run_id, name)
        newest = {p.step: p.value for p in sorted(history, key=lambda point: point.timestamp)}
        wanted = {row.change.layer: row.figure(name) for row in cell.runs}
        assert {at: None if math.isnan(v) else v for at, v in newest.items()} == {
            at: value for at, value in wanted.items() if value is not None or at in newest
        }
    for name in ("accuracy_drop", "accuracy_relevance"):
        known = [row for row in cell.runs if row.figure(name) is not None]
        wanted = [row.ablation for row in sorted(known, key=lambda row: -row.figure(name))]
        order = [model.params["ablation"] for model in store.ranked(name)]
        assert [ablation for ablation in order if ablation != "baseline"] == wanted


# Was: 16 documents were shown for ever, where 48 were written by a clock that is 120 s behind.
def test_what_a_clock_that_is_behind_writes_is_shown(uri, results, turn):
    project = f"behind-{uri.partition(':')[0]}"
    backend = MlflowBackend(project, results, uri)
    cell = cell_record()
    backend.publish(cell, [], {})
    is_shown(uri, project, cell)
    turn(-BEHIND)
    backend.publish(other_figures(cell), [], {})
    is_shown(uri, project, other_figures(cell))
    backend.publish(cell, [], {})
    is_shown(uri, project, cell)
    assert backend.publish(cell, [], {}).unchanged == 6


def test_what_is_shown_otherwise_is_an_error_that_names_the_run(results, monkeypatch):
    backend = MlflowBackend("layers", results)
    cell = cell_record(layers=(0, 1))
    written = MlflowClient.log_batch

    def loses(client: MlflowClient, run_id: str, metrics: list, **rest: object) -> None:
        kept = [m for m in metrics if (m.key, m.step) != ("accuracy", 1) or m.model_id is None]
        written(client, run_id, metrics=kept, **rest)

    with monkeypatch.context() as broken:
        broken.setattr(MlflowClient, "log_batch", loses)
        with pytest.raises(TrackingError) as caught:
            backend.publish(cell, [], {})
    said = str(caught.value)
    assert "'layer 01 · arc_easy · SmolLM2-135M-Instruct'" in said
    assert "it shows accuracy = nan instead of 0.405" in said
    assert f"tracker sync --to mlflow:layers --results {results}" in said
    backend.publish(cell, [], {})
    is_shown(local(results), "layers", cell)


# Was: a program that was killed between the two left a model without figures, and made a second.
def test_the_model_of_a_run_that_was_killed_is_completed(results, monkeypatch):
    backend = MlflowBackend("layers", results)
    cell = cell_record(layers=(0, 1))
    with monkeypatch.context() as killed:
        killed.setattr(MlflowClient, "log_batch", lambda *_, **__: 1 / 0)
        with pytest.raises(TrackingError):
            backend.publish(cell, [], {})
    backend.publish(cell, [], {})
    is_shown(local(results), "layers", cell)

    store = Store(local(results))
    run = store.layer(cell, 1)
    store.client.create_logged_model(
        store.experiment.experiment_id,
        source_run_id=run.info.run_id,
        tags={"tracker.run_key": run.data.tags["tracker.run_key"]},
    )
    assert backend.publish(cell, [], {}).updated == 1
    is_shown(local(results), "layers", cell)


def test_the_run_that_is_measured_shows_the_latest(results, turn):
    """Also where what was measured before had come further."""
    cell = cell_record(n=0)
    key = run_key(cell, "cell")

    def shown() -> dict[str, float]:
        return Store(local(results)).cell(cell).data.metrics

    for seconds, documents in ((0.0, (32, 64)), (-BEHIND, (32, 64)), (-2 * BEHIND, (0, 32))):
        turn(seconds)
        picture = MlflowLiveRun("layers", results)
        picture.begin(cell)
        for count in documents:
            figures = {"progress/documents": float(count), "progress/seconds_left": seconds - count}
            picture.update(key, figures, count)
            assert shown()["progress/documents"] == count
            assert shown()["progress/seconds_left"] == seconds - count
        picture.end(key, "finished")
        info = Store(local(results)).cell(cell).info
        assert info.end_time >= info.start_time

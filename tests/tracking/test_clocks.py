"""MLflow believes the clocks of whoever writes, tracker none: what is written last is shown."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import pytest
from mlflow import MlflowClient

from tests.helpers.ablations import with_figures
from tests.helpers.mlflow_store import MlflowStoreReader
from tracker.schema.errors import TrackingError
from tracker.schema.records import CellRecord
from tracker.tracking.figures import CURVES
from tracker.tracking.identity import run_key
from tracker.tracking.mlflow.backend import MlflowBackend
from tracker.tracking.mlflow.live_run import MlflowLiveRun

from .conftest import cell_record, sqlite_uri

SECONDS_BEHIND = 120.0


@pytest.fixture
def set_clock(monkeypatch) -> Callable[[float], None]:
    """Turn this machine's clock by some seconds from what it is."""
    clock = time.time

    def turn_clock(seconds: float) -> None:
        monkeypatch.setattr(time, "time", lambda: clock() + seconds)

    return turn_clock


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


def check_shown(uri: str, project: str, cell: CellRecord) -> None:
    """MLflow shows these figures and no others: of runs, of curves, of the models it ranks."""
    store = MlflowStoreReader(uri, project)
    store.assert_shows(cell)
    assert store.cell(cell).data.metrics["baseline_accuracy"] == cell.baseline.value
    assert all(run.info.end_time >= run.info.start_time for run in store.runs)
    for name in CURVES:
        history = store.client.get_metric_history(store.cell(cell).info.run_id, name)
        newest = {p.step: p.value for p in sorted(history, key=lambda point: point.timestamp)}
        expected = {row.change.layer: row.figure(name) for row in cell.runs}
        assert {position: None if math.isnan(v) else v for position, v in newest.items()} == {
            position: value
            for position, value in expected.items()
            if value is not None or position in newest
        }
    for name in ("accuracy_drop", "accuracy_relevance"):
        defined_runs = [row for row in cell.runs if row.figure(name) is not None]
        expected = [row.ablation for row in sorted(defined_runs, key=lambda row: -row.figure(name))]
        order = [model.params["ablation"] for model in store.ranked_models(name)]
        assert [ablation for ablation in order if ablation != "baseline"] == expected


# Was: 16 documents were shown for ever, where 48 were written by a clock that is 120 s behind.
def test_figures_of_a_slow_clock_are_shown(uri, results, set_clock):
    project = f"behind-{uri.partition(':')[0]}"
    backend = MlflowBackend(project, results, uri)
    cell = cell_record()
    backend.publish(cell, [], {})
    check_shown(uri, project, cell)
    set_clock(-SECONDS_BEHIND)
    backend.publish(other_figures(cell), [], {})
    check_shown(uri, project, other_figures(cell))
    backend.publish(cell, [], {})
    check_shown(uri, project, cell)
    assert backend.publish(cell, [], {}).unchanged == 6


def test_a_wrong_figure_is_an_error(results, monkeypatch):
    backend = MlflowBackend("layers", results)
    cell = cell_record(layers=(0, 1))
    original = MlflowClient.log_batch

    def lose_metric(client: MlflowClient, run_id: str, metrics: list, **kwargs: object) -> None:
        sent = [m for m in metrics if (m.key, m.step) != ("accuracy", 1) or m.model_id is None]
        original(client, run_id, metrics=sent, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "log_batch", lose_metric)
        with pytest.raises(TrackingError) as caught:
            backend.publish(cell, [], {})
    message = str(caught.value)
    assert "'layer 01 · arc_easy · SmolLM2-135M-Instruct'" in message
    assert "the metric accuracy is nan instead of 0.405" in message
    assert f"tracker sync --to mlflow:layers --results {results}" in message
    backend.publish(cell, [], {})
    check_shown(sqlite_uri(results), "layers", cell)


# Was: a program that was killed between the two left a model without figures, and made a second.
def test_the_model_of_a_killed_run_is_completed(results, monkeypatch):
    backend = MlflowBackend("layers", results)
    cell = cell_record(layers=(0, 1))
    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "log_batch", lambda *_, **__: 1 / 0)
        with pytest.raises(TrackingError):
            backend.publish(cell, [], {})
    backend.publish(cell, [], {})
    check_shown(sqlite_uri(results), "layers", cell)

    store = MlflowStoreReader(sqlite_uri(results))
    run = store.layer(cell, 1)
    store.client.create_logged_model(
        store.experiment.experiment_id,
        source_run_id=run.info.run_id,
        tags={"tracker.run_key": run.data.tags["tracker.run_key"]},
    )
    assert backend.publish(cell, [], {}).updated == 1
    check_shown(sqlite_uri(results), "layers", cell)


def test_the_run_that_is_measured_shows_the_latest(results, set_clock):
    """Also where what was measured before had come further."""
    cell = cell_record(n=0)
    key = run_key(cell, "cell")

    def shown_metrics() -> dict[str, float]:
        return MlflowStoreReader(sqlite_uri(results)).cell(cell).data.metrics

    for n_jumps, documents in ((0, (32, 64)), (1, (32, 64)), (2, (0, 32))):
        seconds = -SECONDS_BEHIND * n_jumps
        set_clock(seconds)
        live_run = MlflowLiveRun("layers", results)
        live_run.begin(cell)
        for count in documents:
            figures = {"progress/documents": float(count), "progress/seconds_left": seconds - count}
            live_run.update(key, figures, count)
            assert shown_metrics()["progress/documents"] == count
            assert shown_metrics()["progress/seconds_left"] == seconds - count
        live_run.end(key, "finished")
        info = MlflowStoreReader(sqlite_uri(results)).cell(cell).info
        assert info.end_time >= info.start_time

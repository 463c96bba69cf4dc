"""Show the progress of measurements in MLflow; this code runs in a separate process."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlflow.entities import Metric, Run
from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor
from typing_extensions import override

from tracker.schema.records import CellRecord
from tracker.tracking.base import OpenRuns, RunStatus
from tracker.tracking.figures import tracked_name
from tracker.tracking.identity import run_key
from tracker.tracking.mlflow.backend import MlflowBackend
from tracker.tracking.mlflow.writing import next_timestamp

logging.getLogger("mlflow.system_metrics").setLevel(logging.ERROR)


@dataclass(frozen=True)
class _OpenRun:
    """An open MLflow run, with the last logged metrics by name."""

    run: Run
    monitor: SystemMetricsMonitor
    metrics: dict[str, Any]


class MlflowLiveRun(OpenRuns):
    """Live runs in an MLflow experiment.

    The constructor takes the same arguments as the class `MlflowBackend`.
    """

    def __init__(self, project: str, results: Path, tracking_uri: str | None = None) -> None:
        super().__init__()
        self._backend = MlflowBackend(project, results, tracking_uri)

    @override
    def begin(self, cell: CellRecord) -> None:
        run, uri = self._backend.open(cell)
        monitor = SystemMetricsMonitor(run.info.run_id, resume_logging=True, tracking_uri=uri)
        monitor.start()
        metrics = {metric.key: metric for metric in run.data.to_proto().metrics}
        self._runs[run_key(cell, "cell")] = _OpenRun(run, monitor, metrics)

    @override
    def update(self, key: str, figures: Mapping[str, float], step: int) -> None:
        open_run = self._runs[key]
        newest = open_run.metrics
        timestamp = next_timestamp(max((metric.timestamp for metric in newest.values()), default=0))
        metrics = []
        for name, value in figures.items():
            old_metric = newest.get(tracked_name(name))
            # MLflow shows the latest step, also if an earlier measurement had got further.
            last_step = max(step, old_metric.step) if old_metric else step
            metrics.append(Metric(tracked_name(name), value, timestamp, last_step))
        newest |= {metric.key: metric for metric in metrics}
        with self._backend.connected("does not show the progress of the measurement") as client:
            client.log_batch(open_run.run.info.run_id, metrics=metrics, synchronous=True)

    @override
    def end(self, key: str, status: RunStatus) -> None:
        open_run = self._runs.pop(key)
        open_run.monitor.finish()
        info = open_run.run.info
        with self._backend.connected("does not show the progress of the measurement") as client:
            client.set_terminated(info.run_id, status.upper(), next_timestamp(info.start_time))

"""Show cells in MLflow while they are measured; this code runs in a process of its own."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlflow.entities import Metric, Run
from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor
from typing_extensions import override

from tracker.core.records import CellRecord
from tracker.tracking.base import Ending, OpenRuns
from tracker.tracking.figures import metric_name
from tracker.tracking.identity import run_key
from tracker.tracking.mlflow.backend import MlflowBackend
from tracker.tracking.mlflow.writing import later

logging.getLogger("mlflow.system_metrics").setLevel(logging.ERROR)


@dataclass(frozen=True)
class _Shown:
    """An open run, with the last value of each of its metrics by name."""

    run: Run
    monitor: SystemMetricsMonitor
    last: dict[str, Any]


class MlflowLiveRun(OpenRuns):
    """Shows cells of an experiment; the arguments are those of `MlflowBackend`."""

    def __init__(self, project: str, results: Path, tracking_uri: str | None = None) -> None:
        super().__init__()
        self._backend = MlflowBackend(project, results, tracking_uri)

    @override
    def begin(self, cell: CellRecord) -> None:
        run, uri = self._backend.open(cell)
        monitor = SystemMetricsMonitor(run.info.run_id, resume_logging=True, tracking_uri=uri)
        monitor.start()
        last = {metric.key: metric for metric in run.data.to_proto().metrics}
        self._runs[run_key(cell, "cell")] = _Shown(run, monitor, last)

    @override
    def update(self, key: str, figures: Mapping[str, float], step: int) -> None:
        shown = self._runs[key]
        now = later(max((metric.timestamp for metric in shown.last.values()), default=0))
        for name, value in figures.items():
            before = shown.last.get(metric_name(name))
            # MLflow shows the latest step, also if an earlier measurement had got further.
            at = max(step, before.step) if before else step
            shown.last[metric_name(name)] = Metric(metric_name(name), value, now, at)
        metrics = [shown.last[metric_name(name)] for name in figures]
        with self._backend.connected("does not show what is measured") as client:
            client.log_batch(shown.run.info.run_id, metrics=metrics, synchronous=True)

    @override
    def end(self, key: str, status: Ending) -> None:
        shown = self._runs.pop(key)
        shown.monitor.finish()
        info = shown.run.info
        with self._backend.connected("does not show what is measured") as client:
            client.set_terminated(info.run_id, status.upper(), later(info.start_time))

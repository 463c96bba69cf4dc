"""Cells' runs in MLflow while they are measured; what stands here runs in a process of its own."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from pathlib import Path

from mlflow.entities import Metric
from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor
from typing_extensions import override

from tracker.records import CellRecord
from tracker.tracking.base import Ending, Picture
from tracker.tracking.figures import metric_name
from tracker.tracking.identity import run_key
from tracker.tracking.mlflow.backend import MlflowBackend

logging.getLogger("mlflow.system_metrics").setLevel(logging.ERROR)


class MlflowPicture(Picture):
    """Shows cells of an experiment; the arguments are those of `MlflowBackend`."""

    def __init__(self, project: str, results: Path, tracking_uri: str | None = None) -> None:
        self._backend = MlflowBackend(project, results, tracking_uri)
        self._runs: dict[str, tuple[str, SystemMetricsMonitor]] = {}

    @override
    def begin(self, cell: CellRecord) -> None:
        run_id, uri = self._backend.open(cell)
        monitor = SystemMetricsMonitor(run_id, resume_logging=True, tracking_uri=uri)
        monitor.start()
        self._runs[run_key(cell, "cell")] = run_id, monitor

    @override
    def update(self, key: str, figures: Mapping[str, float], step: int) -> None:
        run_id, _ = self._runs[key]
        now = int(time.time() * 1000)
        metrics = [Metric(metric_name(n), value, now, step) for n, value in figures.items()]
        with self._backend.connected("does not show what is measured") as client:
            client.log_batch(run_id, metrics=metrics, synchronous=True)

    @override
    def end(self, key: str, status: Ending) -> None:
        run_id, monitor = self._runs.pop(key)
        monitor.finish()
        with self._backend.connected("does not show what is measured") as client:
            client.set_terminated(run_id, status.upper())

    def abandon(self) -> None:
        """Show what is still open as killed."""
        for key in list(self._runs):
            self.end(key, "killed")

    @override
    def close(self) -> None:
        self.abandon()

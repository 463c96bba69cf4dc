"""Publish to a store of MLflow and read what it holds."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from mlflow import MlflowClient

from tracker.schema.records import CellRecord
from tracker.tracking.base import Published
from tracker.tracking.figures import run_metrics
from tracker.tracking.identity import run_key
from tracker.tracking.mlflow.backend import MlflowBackend

PROJECT = "layers"


class MlflowStoreReader:
    """Content of an MLflow store, as a reader sees it."""

    def __init__(self, uri: str, project: str = PROJECT) -> None:
        self.uri = uri
        self.client = MlflowClient(tracking_uri=uri)
        experiment = self.client.get_experiment_by_name(project)
        assert experiment is not None
        self.experiment = experiment
        self.runs = list(self.client.search_runs([experiment.experiment_id], max_results=1000))
        self.by_key = {run.data.tags["tracker.run_key"]: run for run in self.runs}
        assert len(self.by_key) == len(self.runs), "a run was created twice"

    def cell(self, cell: CellRecord) -> Any:
        return self.by_key[run_key(cell, "cell")]

    def layer(self, cell: CellRecord, layer: int) -> Any:
        return self.by_key[run_key(cell, f"layer:{layer}")]

    def assert_shows(self, cell: CellRecord) -> None:
        """All runs of the cell have its figures, and no others that are numbers."""
        assert run_key(cell, "baseline") in self.by_key
        assert self.cell(cell).data.metrics["n"] == cell.n
        for row in cell.runs:
            metrics = self.by_key[run_key(cell, row.ablation)].data.metrics
            assert {n: v for n, v in metrics.items() if not math.isnan(v)} == run_metrics(row)

    def curve(self, cell: CellRecord, name: str) -> list[tuple[int, float]]:
        history = self.client.get_metric_history(self.cell(cell).info.run_id, name)
        return sorted((point.step, point.value) for point in history)

    def ranked_models(self, figure: str) -> list[Any]:
        """Return the logged models that have a figure, as MLflow's page of models ranks them."""
        models = self.client.search_logged_models(
            [self.experiment.experiment_id],
            order_by=[{"field_name": f"metrics.{figure}", "ascending": False}],
        )
        assert len(models) == len([r for r in self.runs if "ablation" in r.data.params])
        return [model for model in models if any(point.key == figure for point in model.metrics)]

    def table(self, name: str) -> pd.DataFrame:
        with pytest.MonkeyPatch.context() as environment:
            # The client's load_table looks for runs in the global store, not in its own.
            environment.setenv("MLFLOW_TRACKING_URI", self.uri)
            return self.client.load_table(self.experiment.experiment_id, f"tables/{name}.json")

    def bytes_of(self, run: Any, path: str, folder: Path) -> bytes:
        return Path(self.client.download_artifacts(run.info.run_id, path, str(folder))).read_bytes()


def publish_cell(results: Path, cell: CellRecord, *files: Path) -> Published:
    backend = MlflowBackend(PROJECT, results)
    try:
        return backend.publish(cell, files, {})
    finally:
        backend.close()

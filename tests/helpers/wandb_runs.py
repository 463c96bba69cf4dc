"""Publish to W&B, and read what its runs show."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.wandb_double import Run, WandbDouble
from tests.tracking.wandb_client import Client
from tracker.report.charts.cells import cell_charts
from tracker.schema.errors import TrackingError
from tracker.schema.records import CellRecord
from tracker.tracking import open_backend
from tracker.tracking.base import Backend
from tracker.tracking.figures import LoggedTable, run_metrics
from tracker.tracking.identity import run_key

PublishOutcome = dict[str, Any]


def published(backend: Backend, cell: CellRecord, *files: Path) -> PublishOutcome:
    """Publish a cell, and say what came of it."""
    documents = LoggedTable(("task", "choice"), (("arc_easy", 1), ("arc_easy", None)))
    try:
        return vars(backend.publish(cell, files, cell_charts(cell), {"documents": documents}))
    except TrackingError as error:
        return {"error": str(error)}


IN_A_NOTEBOOK = """
import json, os, sys, wandb
from contextlib import closing
from pathlib import Path
from tests.helpers.wandb_runs import published
from tracker.schema.records import CellRecord
from tracker.tracking import open_backend
quiet = wandb.Settings(x_disable_stats=True, console="off", silent=True)
mine = wandb.init(entity="team", project="mine", id="mine", settings=quiet)
mine.log({"loss": 2})
session = {name: value for name, value in os.environ.items() if name.startswith("WANDB")}
cell = CellRecord.model_validate_json(sys.argv[1])
for project in ("refused", "layers"):
    with closing(open_backend("wandb", f"team/{project}", Path(sys.argv[2]))) as backend:
        print(json.dumps(published(backend, cell, Path(sys.argv[3]))))
    assert wandb.run is mine
now = {name: value for name, value in os.environ.items() if name.startswith("WANDB")}
assert now == session, set(now.items()) ^ set(session.items())
mine.log({"loss": 1})
mine.finish()
"""


class WandbPublisher:
    """Publishes with the SDK in a process of its own, as `tracker` does.

    It stays the same until it is closed, or another environment or folder is requested.
    """

    def __init__(self, client: Client, folder: Path) -> None:
        self.client = client
        self.folder = folder
        self.results = folder / "results"
        self.outcomes = folder / "outcomes.parquet"
        self.outcomes.write_bytes(bytes(range(256)) * 4)
        self.backend: Any = None
        self._publish_key: object = None

    def __call__(self, cell: CellRecord, **environment: str) -> PublishOutcome:
        key = self.results, environment
        if self.backend is None or key != self._publish_key:
            self.close()
            self.backend = open_backend("wandb", "team/layers", self.results)
            self._publish_key = key
        with pytest.MonkeyPatch.context() as patch:
            self.client.lend(patch, **environment)
            return published(self.backend, cell, self.outcomes)

    def close(self) -> None:
        if self.backend is not None:
            self.backend.close()
            self.backend = None

    def publish_in_notebook(self, cell: CellRecord, **environment: str) -> list[PublishOutcome]:
        environment["PYTHONPATH"] = os.pathsep.join(sys.path)
        arguments = cell.model_dump_json(), str(self.results), str(self.outcomes)
        output = self.client.python(IN_A_NOTEBOOK, *arguments, **environment)
        return [json.loads(line) for line in output.splitlines()]


def project_run_list(double: WandbDouble) -> list[Run]:
    return list(double.projects["team", "layers"].runs.values())


def project_runs_by_key(double: WandbDouble) -> dict[str, Run]:
    runs = project_run_list(double)
    by_key = {run.values["tracker"]["run_key"]: run for run in runs}
    assert len(by_key) == len(runs), "a run was created twice"
    return by_key


def assert_shown(double: WandbDouble, cell: CellRecord) -> dict[str, Run]:
    """All runs of the cell have its figures; the project's runs, by key."""
    runs_by_key = project_runs_by_key(double)
    for run in cell.runs:
        assert logged_values(runs_by_key[run_key(cell, run.ablation)].summary) == run_metrics(run)
    return runs_by_key


def change_counts(outcome: PublishOutcome) -> tuple[int, int, int]:
    assert "error" not in outcome, outcome["error"]
    return outcome["created"], outcome["updated"], outcome["unchanged"]


FEW_RETRIES = {
    "WANDB__GRAPHQL_RETRY_MAX": "1",
    "WANDB__FILE_STREAM_RETRY_MAX": "1",
    "WANDB__FILE_TRANSFER_RETRY_MAX": "1",
}


def logged_values(values: dict[str, Any]) -> dict[str, Any]:
    """Return the values that we logged, without the client's own, tables and charts."""
    logged = {name: value for name, value in values.items() if not name.startswith("_")}
    return {name: value for name, value in logged.items() if not isinstance(value, dict)}

"""Writes one run of MLflow: metrics, params, tags, tables, charts, files, and its digest last.

The run of an ablation is a logged model too, with its weights elsewhere: so MLflow ranks ablations.

MLflow never lets a param change, so params hold identity only; whatever may change is a metric or a
tag.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from mlflow.entities import (
    Dataset,
    DatasetInput,
    InputTag,
    Metric,
    Param,
    RunTag,
)
from mlflow.exceptions import MlflowException

from tracker.provenance import file_hash
from tracker.tracking.base import PROGRESS, LoggedTable
from tracker.tracking.figures import is_curve
from tracker.tracking.identity import kept_name
from tracker.tracking.mlflow.runs import KEY_TAG, MlflowRun

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

DIGEST_TAG = "tracker.digest"
MODEL_TAG = "tracker.logged_model"
_OF_MODELS = ("model", "benchmark", "ablation")
"""Params that a logged model has too; its run has them all."""
_NOT_IN_NAMES = r"[/:.%\"']"
_DIGESTS = "digests/files.json"
"""The digests of the attached files, by name: what has not changed is not uploaded again."""


def write(client: Any, experiment: str, run: MlflowRun, existing: dict[str, Any]) -> str:
    """Bring one run to what it should be.

    Args:
        client: MLflow's client.
        experiment: The experiment's id.
        run: What it should be.
        existing: The cell's runs by run key; it learns of a run that is created.

    Returns:
        `created`, `updated` or `unchanged`.
    """
    found = existing.get(run.key)
    if found is None:
        found = client.create_run(experiment, tags=run.tags, run_name=run.name)
        existing[run.key] = found
        known, tags, outcome = {}, {}, "created"
    elif found.data.tags.get(DIGEST_TAG) == run.digest and found.info.status == "FINISHED":
        return "unchanged"
    else:
        known, tags, outcome = _known_points(client, found, run), run.tags, "updated"

    run_id = found.info.run_id
    at_once = not (run.tables or run.charts or run.files or run.data)
    model = None if run.measured_on is None else _model_of(client, experiment, run, found)
    if model is not None:
        tags = {**tags, MODEL_TAG: model}
    if at_once:
        # It counts once the run is finished; a request of its own would be one more for each layer.
        tags = {**tags, DIGEST_TAG: run.digest}
    client.log_batch(
        run_id,
        metrics=_metrics(run, _changes(known, run.points), model),
        params=[
            Param(name, value)
            for name, value in run.params.items()
            if name not in found.data.params
        ],
        tags=[RunTag(name, value) for name, value in tags.items()],
        synchronous=True,
    )
    for tag in found.data.tags:
        if tag.startswith("tracker.") and tag not in {*run.tags, DIGEST_TAG, MODEL_TAG}:
            client.delete_tag(run_id, tag)
    attach(client, run_id, run.tables, run.charts)
    if run.files:
        _attach_files(client, run_id, run.files)
    if run.data:
        # A data set that the run has already is not added again.
        context = [InputTag("mlflow.data.context", "evaluation")]
        client.log_inputs(run_id, [DatasetInput(Dataset(**data), context) for data in run.data])
    if found.info.run_name != run.name:
        client.update_run(run_id, name=run.name)
    if found.info.status != "FINISHED":
        client.set_terminated(run_id, "FINISHED")
    if not at_once:
        client.set_tag(run_id, DIGEST_TAG, run.digest, synchronous=True)
    return outcome


def _model_of(client: Any, experiment: str, run: MlflowRun, found: Any) -> str | None:
    """Find the logged model of a run, or log it; None where the server, of MLflow 2, has none."""
    known: str | None = found.data.tags.get(MODEL_TAG)
    if known is not None:
        return known
    try:
        model = client.create_logged_model(
            experiment,
            name=re.sub(_NOT_IN_NAMES, "-", run.name),
            source_run_id=found.info.run_id,
            tags={"mlflow.model.isExternal": "true", KEY_TAG: run.key},
            params={n: value for n, value in run.params.items() if n in _OF_MODELS},
            model_type="ablation",
        )
    except MlflowException as error:
        if error.error_code != "ENDPOINT_NOT_FOUND":
            raise
        return None
    client.finalize_logged_model(model.model_id, "READY")
    return str(model.model_id)


def _metrics(
    run: MlflowRun, values: Mapping[tuple[str, int], float], model: str | None
) -> list[Metric]:
    """Lay values out as metrics of a run, and of its model where it is one of a model."""
    now = int(time.time() * 1000)
    if model is None or run.measured_on is None:
        return [Metric(name, value, now, step) for (name, step), value in values.items()]
    data, digest = run.measured_on
    return [
        # Of a model, MLflow keeps a value that is no number as zero.
        Metric(name, value, now, step)
        if math.isnan(value)
        else Metric(name, value, now, step, model, data, digest)
        for (name, step), value in values.items()
    ]


def attach(
    client: Any, run_id: str, tables: Mapping[str, LoggedTable], charts: Mapping[str, Figure]
) -> None:
    """Log tables and charts, by name."""
    for name, table in tables.items():
        # Not log_table: it appends to a table that is already there.
        content = {"columns": table.columns, "data": table.rows}
        client.log_text(run_id, json.dumps(content), f"tables/{name}.json")
    for name, figure in charts.items():
        client.log_figure(run_id, figure, f"charts/{name}.html")


def stated_digests(client: Any, run_id: str) -> dict[str, str]:
    """Read which files a run states to have: digests by name, of those that are there.

    A run of an older tracker states none.
    """
    there = {artifact.path for artifact in client.list_artifacts(run_id)}
    if _DIGESTS.split("/")[0] not in there:
        return {}
    with TemporaryDirectory() as folder, suppress(ValueError):
        path = client.download_artifacts(run_id, _DIGESTS, folder)
        stated: dict[str, str] = json.loads(Path(path).read_text(encoding="utf-8"))
        return {name: digest for name, digest in stated.items() if name in there}
    return {}


def _attach_files(client: Any, run_id: str, files: Sequence[Path]) -> None:
    """Upload the files that a run lacks, and state the digests of all."""
    digests = {kept_name(file): file_hash([file]) for file in files}
    stated = stated_digests(client, run_id)
    kept = {name: old for name, old in stated.items() if digests.get(name) == old}
    if kept != stated:
        # First, so that a replacement that breaks off is not taken for the file of before.
        client.log_text(run_id, json.dumps(kept), _DIGESTS)
    with TemporaryDirectory() as folder:
        for file in files:
            name = kept_name(file)
            if name not in kept:
                same = name == file.name
                copy = file if same else Path(shutil.copy(file, Path(folder) / name))
                client.log_artifact(run_id, str(copy))
    client.log_text(run_id, json.dumps(digests), _DIGESTS)


def _known_points(client: Any, found: Any, run: MlflowRun) -> dict[tuple[str, int], float]:
    """Read back the newest value of every metric at every step."""
    known: dict[tuple[str, int], float] = {}
    for name, value in found.data.metrics.items():
        if name.startswith((PROGRESS, "system/")):
            continue  # what the run showed while it was measured is history
        if run.has_curves and is_curve(name):
            history = client.get_metric_history(found.info.run_id, name)
            for point in sorted(history, key=lambda point: point.timestamp):
                known[name, point.step] = point.value
        else:
            known[name, run.step] = value
    return known


def _changes(
    known: Mapping[tuple[str, int], float], wanted: Mapping[tuple[str, int], float]
) -> dict[tuple[str, int], float]:
    """Pick the values that must be logged.

    MLflow cannot take a metric back, so a value that is no longer defined becomes NaN.
    """
    changed = {at: value for at, value in wanted.items() if known.get(at) != value}
    gone = (at for at, old in known.items() if at not in wanted and not math.isnan(old))
    return changed | dict.fromkeys(gone, math.nan)

"""Write one MLflow run: metrics, params, tags, tables, charts, files, and finally the digest.

The run of an ablation also gets an MLflow "logged model" without weights, because MLflow can rank
logged models by their metrics. MLflow cannot remove a metric of a logged model, and stores NaN as
zero. If a metric becomes undefined, the writer therefore creates a new logged model.

MLflow params cannot be changed, so they only identify the run; values that can change are metrics
or tags. MLflow shows the metric value with the latest timestamp. A new metric value therefore gets
a later timestamp than all stored metric values.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, Run, RunTag
from mlflow.exceptions import MlflowException

from tracker.schema.provenance import file_hash
from tracker.tracking.base import PROGRESS
from tracker.tracking.figures import LoggedTable, is_curve
from tracker.tracking.identity import kept_name
from tracker.tracking.mlflow.runs import KEY_TAG, MlflowRun

Points = dict[tuple[str, int], float]
"""Metric values by metric name and step."""
_MODEL_PARAMS = ("model", "benchmark", "ablation")
"""Params of a logged model; its run has all params."""
_INVALID_CHARACTERS = r"[/:.%\"']"
_IDS_PER_QUERY = 50
_NO_MODELS_ERROR = "ENDPOINT_NOT_FOUND"
"""Error code of an MLflow 2 server, which has no logged models."""


@dataclass(frozen=True)
class ShownModel:
    """A logged model as stored in MLflow, with the newest value of each metric."""

    id: str
    figures: Mapping[str, Metric]
    is_ready: bool = True

    def can_become(self, run: MlflowRun) -> bool:
        """Return whether the logged model can be updated to the metrics of `run`.

        The logged model must be ready, and `run` must have all metrics of the logged model.
        """
        return self.is_ready and self.figures.keys() <= _figures(run).keys()

    def differing_figures(self, run: MlflowRun) -> dict[str, float]:
        """Return the metrics of `run` that are missing or different in the logged model."""
        values = {name: metric.value for name, metric in self.figures.items()}
        return {name: value for name, value in _figures(run).items() if values.get(name) != value}


def iterate_pages(search: Callable[..., Any]) -> Iterator[Any]:
    """Yield the results of all pages of an MLflow search."""
    token = None
    while True:
        page = search(page_token=token)
        yield from page
        token = page.token
        if not token:
            return


def _figures(run: MlflowRun) -> dict[str, float]:
    """Return the finite metrics of a run, as name → value."""
    return {name: value for (name, _), value in run.points.items() if math.isfinite(value)}


DIGEST_TAG = "tracker.digest"
MODEL_TAG = "tracker.logged_model"
_DIGESTS_FILE = "digests/files.json"
"""File with the digests of attached files by name; unchanged files are not uploaded again."""


def next_timestamp(last: int) -> int:
    """Return the current time in ms, or `last` + 1 if the clock is not later than `last`."""
    return max(int(time.time() * 1000), last + 1)


@dataclass
class CellWriter:
    """Writer of the MLflow runs of one model and benchmark, which also finds outdated runs.

    Attributes:
        client: The client of MLflow.
        experiment: Id of the MLflow experiment.
        runs: Run key → MLflow run of the cell; `write` adds new runs.
        models: Run id → logged models.
    """

    client: MlflowClient
    experiment: str
    runs: dict[str, Any]
    models: dict[str, list[ShownModel]] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        run_ids = [run.info.run_id for run in self.runs.values()]
        # A server without logged models is asked once, not for each group of runs.
        with _allow_no_models():
            for start in range(0, len(run_ids), _IDS_PER_QUERY):
                ids = ", ".join(f"'{run_id}'" for run_id in run_ids[start : start + _IDS_PER_QUERY])
                experiments, filter_string = [self.experiment], f"source_run_id IN ({ids})"
                search = partial(self.client.search_logged_models, experiments, filter_string)
                for model in iterate_pages(search):
                    if KEY_TAG in model.tags:
                        self.models.setdefault(model.source_run_id, []).append(_shown_model(model))

    def _create_model(self, run: MlflowRun, run_id: str) -> ShownModel | None:
        """Create one of MLflow's "logged models" for a run, still without metrics.

        Returns None on an MLflow 2 server, which has no logged models.
        """
        with _allow_no_models():
            model = self.client.create_logged_model(
                self.experiment,
                name=re.sub(_INVALID_CHARACTERS, "-", run.source.name),
                source_run_id=run_id,
                tags={"mlflow.model.isExternal": "true", KEY_TAG: run.source.key},
                params={n: value for n, value in run.params.items() if n in _MODEL_PARAMS},
                model_type="ablation",
            )
            self.client.finalize_logged_model(model.model_id, "READY")
            return ShownModel(str(model.model_id), {})
        return None

    def write(self, run: MlflowRun) -> str:
        """Write one run to MLflow; return `created`, `updated` or `unchanged`."""
        client, source = self.client, run.source
        shown_run = self.runs.get(source.key)
        points: Points = {}
        if shown_run is None:
            shown_run = client.create_run(self.experiment, tags=run.tags, run_name=source.name)
            self.runs[source.key] = shown_run
            timestamp, tags, outcome = 0, {}, "created"
        elif not self.find_difference(run):
            return "unchanged"
        else:
            points, timestamp = _read_points(client, shown_run, run)
            tags, outcome = run.tags, "updated"

        run_id = shown_run.info.run_id
        is_single_batch = not (source.tables or source.charts or source.files or run.data_sets)
        changes = _changed_points(points, run.points)
        models = self.models.get(run_id, []) if run.data_identity else []
        usable = [model for model in models if model.can_become(run)]
        model = min(usable, key=lambda model: len(model.differing_figures(run)), default=None)
        if run.data_identity and model is None:
            model = self._create_model(run, run_id)
        if model is not None:
            names = model.differing_figures(run)
            changes |= {point: value for point, value in run.points.items() if point[0] in names}
            timestamp = max([timestamp, *(metric.timestamp for metric in model.figures.values())])
            tags = {**tags, MODEL_TAG: model.id}
        if is_single_batch:
            # It is valid once the run is finished; this saves a separate request for each layer.
            tags = {**tags, DIGEST_TAG: run.digest}
        params = [Param(n, v) for n, v in run.params.items() if n not in shown_run.data.params]
        client.log_batch(
            run_id,
            metrics=_metrics(run, changes, model, next_timestamp(timestamp)),
            params=params,
            tags=[RunTag(name, value) for name, value in tags.items()],
            synchronous=True,
        )
        for old_model in models:
            if old_model is not model:
                client.delete_logged_model(old_model.id)
        for tag in shown_run.data.tags:
            if tag.startswith("tracker.") and tag not in {*run.tags, DIGEST_TAG, MODEL_TAG}:
                client.delete_tag(run_id, tag)
        log_attachments(client, run_id, source.tables, source.charts)
        if source.files:
            _attach_files(client, run_id, source.files)
        if run.data_sets:
            # MLflow does not add a data set twice.
            context = [InputTag("mlflow.data.context", "evaluation")]
            inputs = [DatasetInput(Dataset(**data), context) for data in run.data_sets]
            client.log_inputs(run_id, inputs)
        if shown_run.info.run_name != source.name:
            client.update_run(run_id, name=source.name)
        if shown_run.info.status != "FINISHED":
            client.set_terminated(run_id, "FINISHED", next_timestamp(shown_run.info.start_time))
        if not is_single_batch:
            client.set_tag(run_id, DIGEST_TAG, run.digest, synchronous=True)
        return outcome

    def find_difference(self, run: MlflowRun) -> str:
        """Describe how the run stored in MLflow differs from `run`, the run to be stored.

        The text is empty if the stored run is complete and correct.
        """
        shown_run = self.runs.get(run.source.key)
        if shown_run is None:
            return "the run does not exist"
        tags, info = shown_run.data.tags, shown_run.info
        if tags.get(DIGEST_TAG) != run.digest or info.status != "FINISHED":
            return "the run is incomplete"
        metrics = {metric.key: metric for metric in _newest_metrics(shown_run)}
        steps = {name: metric.step for name, metric in metrics.items()}
        for name, step in run.points:
            steps[name] = max(step, steps.get(name, step))
        for name, step in steps.items():
            expected, metric = run.points.get((name, step), math.nan), metrics.get(name)
            value = math.nan if metric is None or metric.step != step else metric.value
            if value != expected and not (math.isnan(value) and math.isnan(expected)):
                return f"the metric {name} is {value:.6g} instead of {expected:.6g}"
        models = self.models.get(info.run_id, [])
        for model in models:
            if len(models) > 1 or not model.can_become(run) or model.differing_figures(run):
                return "the logged model's metrics differ from the metrics of its run"
        return ""


@contextmanager
def _allow_no_models() -> Iterator[None]:
    """Suppress the error of MLflow 2 servers, which do not have logged models."""
    try:
        yield
    except MlflowException as error:
        if error.error_code != _NO_MODELS_ERROR:
            raise


def _shown_model(model: Any) -> ShownModel:
    """Convert MLflow's logged model to a `ShownModel`."""
    points = sorted(model.metrics or (), key=lambda point: (point.timestamp, point.step))
    newest = {point.key: point for point in points}
    return ShownModel(model.model_id, newest, str(model.status) == "READY")


def _newest_metrics(shown_run: Run) -> Iterator[Any]:
    """Yield the newest value of each metric in a run, without progress and system metrics."""
    for metric in shown_run.data.to_proto().metrics:
        # Progress figures of the measurement are not compared.
        if not metric.key.startswith((PROGRESS, "system/")):
            yield metric


def _metrics(run: MlflowRun, points: Points, model: ShownModel | None, time: int) -> list[Metric]:
    """Build the MLflow metrics to log for a run.

    `points` contains the values to log, and `time` is their timestamp. The metrics are also logged
    for `model`, unless `model` is None.
    """
    model_fields = (model.id, *run.data_identity) if model and run.data_identity else ()
    return [
        # MLflow stores NaN of a model as zero.
        Metric(name, value, time, step, *(() if math.isnan(value) else model_fields))
        for (name, step), value in points.items()
    ]


def log_attachments(
    client: MlflowClient, run_id: str, tables: Mapping[str, LoggedTable], charts: Mapping[str, Any]
) -> None:
    """Log the tables and charts of a run as artifacts, under their names."""
    for name, table in tables.items():
        # Not log_table: it appends to a table that is already there.
        content = {"columns": table.columns, "data": table.rows}
        client.log_text(run_id, json.dumps(content), f"tables/{name}.json")
    for name, figure in charts.items():
        client.log_figure(run_id, figure, f"charts/{name}.html")


def read_digests(client: MlflowClient, run_id: str) -> dict[str, str]:
    """Return the stored digest of each file that is attached to a run, by file name."""
    paths = {artifact.path for artifact in client.list_artifacts(run_id)}
    if _DIGESTS_FILE.split("/")[0] not in paths:
        return {}
    with TemporaryDirectory() as folder, suppress(ValueError):
        path = client.download_artifacts(run_id, _DIGESTS_FILE, folder)
        digests: dict[str, str] = json.loads(Path(path).read_text(encoding="utf-8"))
        return {name: digest for name, digest in digests.items() if name in paths}
    return {}


def _attach_files(client: MlflowClient, run_id: str, files: Sequence[Path]) -> None:
    """Upload files that are new or changed, and store the digests of all files."""
    digests = {kept_name(file): file_hash([file]) for file in files}
    old_digests = read_digests(client, run_id)
    unchanged = {name: old for name, old in old_digests.items() if digests.get(name) == old}
    if unchanged != old_digests:
        # Written first, so that an interrupted replacement is not taken for the former file.
        client.log_text(run_id, json.dumps(unchanged), _DIGESTS_FILE)
    with TemporaryDirectory() as folder:
        for file in files:
            name = kept_name(file)
            if name not in unchanged:
                path = file if name == file.name else shutil.copy(file, Path(folder) / name)
                client.log_artifact(run_id, str(path))
    client.log_text(run_id, json.dumps(digests), _DIGESTS_FILE)


def _read_points(client: MlflowClient, shown_run: Run, run: MlflowRun) -> tuple[Points, int]:
    """Read the metric values of `run` that MLflow stores as `shown_run`.

    Returns a dict from (name, step) to value, and the latest timestamp of the values.
    """
    values: Points = {}
    timestamp = 0
    for metric in _newest_metrics(shown_run):
        points = [metric]
        if run.source.kind == "cell" and is_curve(metric.key):
            history = client.get_metric_history(shown_run.info.run_id, metric.key)
            points = sorted(history, key=lambda point: point.timestamp)
        for point in points:
            values[metric.key, point.step] = point.value
            timestamp = max(timestamp, point.timestamp)
    return values, timestamp


def _changed_points(old_points: Points, points: Points) -> Points:
    """Return the metric values to log: those that differ from the stored values `old_points`.

    MLflow cannot remove a metric, so a value that becomes undefined is logged as NaN.
    """
    changes = {point: value for point, value in points.items() if old_points.get(point) != value}
    for point, value in old_points.items():
        if point not in points and not math.isnan(value):
            changes[point] = math.nan
    return changes

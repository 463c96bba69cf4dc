"""Write one run of MLflow: metrics, params, tags, tables, charts, files, and its digest last.

The run of an ablation is also a logged model without weights, by which MLflow ranks ablations.
MLflow cannot remove a model's figure, and stores NaN as zero. So if a figure becomes undefined, the
run's model is logged again.

Params never change in MLflow, so they hold identity only; everything that may change is a metric or
a tag. MLflow shows a metric's value with the latest timestamp, which the writer sets. So new
timestamps always follow the run's last one, independently of the clock.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from mlflow import MlflowClient
from mlflow.entities import (
    Dataset,
    DatasetInput,
    InputTag,
    LoggedModelStatus,
    Metric,
    Param,
    Run,
    RunTag,
)
from mlflow.exceptions import MlflowException

from tracker.core.provenance import file_hash
from tracker.tracking.base import PROGRESS
from tracker.tracking.figures import LoggedTable, is_curve
from tracker.tracking.identity import kept_name
from tracker.tracking.mlflow.runs import KEY_TAG, MlflowRun

if TYPE_CHECKING:
    from plotly.graph_objects import Figure


_OF_MODELS = ("model", "benchmark", "ablation")
"""Params of a logged model; its run has all params."""
_NOT_IN_NAMES = r"[/:.%\"']"
_AT_ONCE = 50
_NO_MODELS = "ENDPOINT_NOT_FOUND"
"""Error code of an MLflow 2 server, which has no logged models."""


@dataclass(frozen=True)
class ShownModel:
    """A logged model in MLflow, with its newest figures by name."""

    id: str
    figures: Mapping[str, Metric]
    is_ready: bool = True

    def fits(self, run: MlflowRun) -> bool:
        """Check whether it can be updated to a run: it has no figures that the run lacks."""
        return self.is_ready and self.figures.keys() <= _figures(run).keys()

    def lacks(self, run: MlflowRun) -> dict[str, float]:
        """Return the run's figures that differ from its newest ones."""
        mine = {name: metric.value for name, metric in self.figures.items()}
        return {name: value for name, value in _figures(run).items() if mine.get(name) != value}


def ranked(
    client: MlflowClient, experiment: str, runs: Iterable[Any]
) -> dict[str, list[ShownModel]]:
    """Return the logged models by run id; there may be several after a killed program."""
    found: dict[str, list[ShownModel]] = {}
    every = [run.info.run_id for run in runs]
    for first in range(0, len(every), _AT_ONCE):
        ids = ", ".join(f"'{run_id}'" for run_id in every[first : first + _AT_ONCE])
        wanted = f"source_run_id IN ({ids})"
        try:
            models = list(every_page(partial(client.search_logged_models, [experiment], wanted)))
        except MlflowException as error:
            if error.error_code != _NO_MODELS:
                raise
            return {}
        for model in (model for model in models if KEY_TAG in model.tags):
            points = sorted(model.metrics or (), key=lambda m: (m.timestamp, m.step))
            newest = {point.key: point for point in points}
            mine = ShownModel(model.model_id, newest, model.status == LoggedModelStatus.READY)
            found.setdefault(model.source_run_id, []).append(mine)
    return found


def every_page(search: Callable[..., Any]) -> Iterator[Any]:
    """Yield all results of a paged search of MLflow."""
    token = None
    while True:
        page = search(page_token=token)
        yield from page
        token = page.token
        if not token:
            return


def log_model(
    client: MlflowClient, experiment: str, run: MlflowRun, run_id: str
) -> ShownModel | None:
    """Log the model of a run, without figures; None if the server (MLflow 2) has no models."""
    try:
        model = client.create_logged_model(
            experiment,
            name=re.sub(_NOT_IN_NAMES, "-", run.of.name),
            source_run_id=run_id,
            tags={"mlflow.model.isExternal": "true", KEY_TAG: run.of.key},
            params={n: value for n, value in run.params.items() if n in _OF_MODELS},
            model_type="ablation",
        )
    except MlflowException as error:
        if error.error_code != _NO_MODELS:
            raise
        return None
    client.finalize_logged_model(model.model_id, "READY")
    return ShownModel(str(model.model_id), {})


def _figures(run: MlflowRun) -> dict[str, float]:
    return {name: value for (name, _), value in run.points.items() if math.isfinite(value)}


DIGEST_TAG = "tracker.digest"
MODEL_TAG = "tracker.logged_model"
_DIGESTS = "digests/files.json"
"""File with the digests of attached files by name; unchanged files are not uploaded again."""


def later(last: int) -> int:
    """Return the current time in milliseconds, but at least one more than `last`."""
    return max(int(time.time() * 1000), last + 1)


def write(
    client: MlflowClient,
    experiment: str,
    run: MlflowRun,
    existing: dict[str, Any],
    models: Mapping[str, Sequence[ShownModel]],
) -> str:
    """Create or update one run.

    Args:
        client: MLflow's client.
        experiment: The experiment's id.
        run: The described run.
        existing: The cell's runs by run key; a new run is added.
        models: The logged models of runs, by the run's id.

    Returns:
        `created`, `updated` or `unchanged`.
    """
    of, found = run.of, existing.get(run.of.key)
    known: dict[tuple[str, int], float] = {}
    if found is None:
        found = client.create_run(experiment, tags=run.tags, run_name=of.name)
        existing[of.key] = found
        last, tags, outcome = 0, {}, "created"
    elif not lacks(found, run, models):
        return "unchanged"
    else:
        known, last = _known_points(client, found, run)
        tags, outcome = run.tags, "updated"

    run_id = found.info.run_id
    at_once = not (of.tables or of.charts or of.files or run.data)
    before = models.get(run_id, ()) if run.measured_on else ()
    fitting = [model for model in before if model.fits(run)]
    model = min(fitting, key=lambda model: len(model.lacks(run)), default=None)
    if run.measured_on and model is None:
        model = log_model(client, experiment, run, run_id)
    changes = _changes(known, run.points)
    if model is not None:
        missing = model.lacks(run)
        changes |= {at: value for at, value in run.points.items() if at[0] in missing}
        last = max([last, *(metric.timestamp for metric in model.figures.values())])
        tags = {**tags, MODEL_TAG: model.id}
    if at_once:
        # It is valid once the run is finished; this saves a separate request for each layer.
        tags = {**tags, DIGEST_TAG: run.digest}
    new = [Param(n, value) for n, value in run.params.items() if n not in found.data.params]
    client.log_batch(
        run_id,
        metrics=_metrics(run, changes, model, later(last)),
        params=new,
        tags=[RunTag(name, value) for name, value in tags.items()],
        synchronous=True,
    )
    for other in before:
        if other is not model:
            client.delete_logged_model(other.id)
    for tag in found.data.tags:
        if tag.startswith("tracker.") and tag not in {*run.tags, DIGEST_TAG, MODEL_TAG}:
            client.delete_tag(run_id, tag)
    attach(client, run_id, of.tables, of.charts)
    if of.files:
        _attach_files(client, run_id, of.files)
    if run.data:
        # MLflow does not add a data set twice.
        context = [InputTag("mlflow.data.context", "evaluation")]
        client.log_inputs(run_id, [DatasetInput(Dataset(**data), context) for data in run.data])
    if found.info.run_name != of.name:
        client.update_run(run_id, name=of.name)
    if found.info.status != "FINISHED":
        client.set_terminated(run_id, "FINISHED", later(found.info.start_time))
    if not at_once:
        client.set_tag(run_id, DIGEST_TAG, run.digest, synchronous=True)
    return outcome


def lacks(found: Run | None, run: MlflowRun, models: Mapping[str, Sequence[ShownModel]]) -> str:
    """Compare a run in MLflow with its description.

    Args:
        found: The run in MLflow; None = there is none.
        run: The described run.
        models: The logged models of runs, by the run's id.

    Returns:
        The first difference in words; empty if there is none.
    """
    if found is None:
        return "there is nothing"
    if found.data.tags.get(DIGEST_TAG) != run.digest or found.info.status != "FINISHED":
        return "it is not written whole"
    shown = {metric.key: metric for metric in _latest(found)}
    steps = {name: metric.step for name, metric in shown.items()}
    for name, step in run.points:
        steps[name] = max(step, steps.get(name, step))
    for name, step in steps.items():
        wanted, metric = run.points.get((name, step), math.nan), shown.get(name)
        value = math.nan if metric is None or metric.step != step else metric.value
        if value != wanted and not (math.isnan(value) and math.isnan(wanted)):
            return f"it shows {name} = {value:.6g} instead of {wanted:.6g}"
    of_run = models.get(found.info.run_id, ())
    for model in of_run:
        if len(of_run) > 1 or not model.fits(run) or model.lacks(run):
            return "its logged model has other figures"
    return ""


def _latest(found: Run) -> Iterator[Any]:
    """Yield the displayed metrics of a run, each with its step and timestamp."""
    for metric in found.data.to_proto().metrics:
        # Progress figures of the measurement are not compared.
        if not metric.key.startswith((PROGRESS, "system/")):
            yield metric


def _metrics(
    run: MlflowRun, values: Mapping[tuple[str, int], float], model: ShownModel | None, now: int
) -> list[Metric]:
    """Build the metrics of a run, which are also its model's if it has one."""
    of_model = () if model is None or run.measured_on is None else (model.id, *run.measured_on)
    return [
        # MLflow stores NaN of a model as zero.
        Metric(name, value, now, step, *(() if math.isnan(value) else of_model))
        for (name, step), value in values.items()
    ]


def attach(
    client: MlflowClient,
    run_id: str,
    tables: Mapping[str, LoggedTable],
    charts: Mapping[str, Figure],
) -> None:
    """Log tables and charts, by name."""
    for name, table in tables.items():
        # Not log_table: it appends to a table that is already there.
        content = {"columns": table.columns, "data": table.rows}
        client.log_text(run_id, json.dumps(content), f"tables/{name}.json")
    for name, figure in charts.items():
        client.log_figure(run_id, figure, f"charts/{name}.html")


def stated_digests(client: MlflowClient, run_id: str) -> dict[str, str]:
    """Read the recorded digests of a run's existing files, by name."""
    there = {artifact.path for artifact in client.list_artifacts(run_id)}
    if _DIGESTS.split("/")[0] not in there:
        return {}
    with TemporaryDirectory() as folder, suppress(ValueError):
        path = client.download_artifacts(run_id, _DIGESTS, folder)
        stated: dict[str, str] = json.loads(Path(path).read_text(encoding="utf-8"))
        return {name: digest for name, digest in stated.items() if name in there}
    return {}


def _attach_files(client: MlflowClient, run_id: str, files: Sequence[Path]) -> None:
    """Upload the files that a run lacks, and record the digests of all."""
    digests = {kept_name(file): file_hash([file]) for file in files}
    stated = stated_digests(client, run_id)
    kept = {name: old for name, old in stated.items() if digests.get(name) == old}
    if kept != stated:
        # Written first, so that an interrupted replacement is not taken for the former file.
        client.log_text(run_id, json.dumps(kept), _DIGESTS)
    with TemporaryDirectory() as folder:
        for file in files:
            name = kept_name(file)
            if name not in kept:
                same = name == file.name
                copy = file if same else Path(shutil.copy(file, Path(folder) / name))
                client.log_artifact(run_id, str(copy))
    client.log_text(run_id, json.dumps(digests), _DIGESTS)


def _known_points(
    client: MlflowClient, found: Run, run: MlflowRun
) -> tuple[dict[tuple[str, int], float], int]:
    """Read the newest value of every metric at every step, and the last timestamp."""
    known: dict[tuple[str, int], float] = {}
    last = 0
    for metric in _latest(found):
        points = [metric]
        if run.of.kind == "cell" and is_curve(metric.key):
            history = client.get_metric_history(found.info.run_id, metric.key)
            points = sorted(history, key=lambda point: point.timestamp)
        for point in points:
            known[metric.key, point.step] = point.value
            last = max(last, point.timestamp)
    return known, last


def _changes(
    known: Mapping[tuple[str, int], float], wanted: Mapping[tuple[str, int], float]
) -> dict[tuple[str, int], float]:
    """Return the values that must be logged.

    MLflow cannot remove a metric, so a value that becomes undefined is logged as NaN.
    """
    changed = {at: value for at, value in wanted.items() if known.get(at) != value}
    gone = (at for at, old in known.items() if at not in wanted and not math.isnan(old))
    return changed | dict.fromkeys(gone, math.nan)

"""Writes one run of MLflow: metrics, params, tags, tables, charts, files, and its digest last.

The run of an ablation is a logged model too, by which MLflow ranks ablations; their weights are
elsewhere. MLflow takes no figure of a model back, and keeps one that is no number as zero: where a
figure is no longer defined, the run's model is logged anew.

MLflow never lets a param change, so params hold identity only; whatever may change is a metric or a
tag. Of a metric it shows the value with the latest timestamp, and those come from whoever writes:
so ours continue after the run's last one, whatever the clock says.
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
"""Params that a logged model has too; its run has them all."""
_NOT_IN_NAMES = r"[/:.%\"']"
_AT_ONCE = 50
_NO_MODELS = "ENDPOINT_NOT_FOUND"
"""What a server of MLflow 2 says."""


@dataclass(frozen=True)
class ShownModel:
    """A logged model as MLflow has it, with the newest of its figures by name."""

    id: str
    figures: Mapping[str, Metric]
    is_ready: bool = True

    def fits(self, run: MlflowRun) -> bool:
        """Say whether it can become its run's: it has no figure that the run has not."""
        return self.is_ready and self.figures.keys() <= _figures(run).keys()

    def lacks(self, run: MlflowRun) -> dict[str, float]:
        """Say which figures of its run are not its newest."""
        mine = {name: metric.value for name, metric in self.figures.items()}
        return {name: value for name, value in _figures(run).items() if mine.get(name) != value}


def ranked(
    client: MlflowClient, experiment: str, runs: Iterable[Any]
) -> dict[str, list[ShownModel]]:
    """Find the logged models of runs, by the run's id; more than one where a program was killed."""
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
    """Give all that a search of MLflow's finds."""
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
    """Log the model of a run, without figures; None where the server, of MLflow 2, has none."""
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
"""The digests of the attached files, by name: what has not changed is not uploaded again."""


def later(last: int) -> int:
    """Give the present as a timestamp, in milliseconds, that is after another one."""
    return max(int(time.time() * 1000), last + 1)


def write(
    client: MlflowClient,
    experiment: str,
    run: MlflowRun,
    existing: dict[str, Any],
    models: Mapping[str, Sequence[ShownModel]],
) -> str:
    """Bring one run to what it should be.

    Args:
        client: MLflow's client.
        experiment: The experiment's id.
        run: What it should be.
        existing: The cell's runs by run key; it learns of a run that is created.
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
        # It counts once the run is finished; a request of its own would be one more for each layer.
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
        # A data set that the run has already is not added again.
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
    """Say what of a run MLflow does not show as it should be.

    Args:
        found: The run as MLflow has it; None = it has none.
        run: What it should be.
        models: The logged models of runs, by the run's id.

    Returns:
        The first thing that was found; empty where there is none.
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
    """Give the metrics of a run as MLflow shows them, each with its step and timestamp."""
    for metric in found.data.to_proto().metrics:
        # What the run showed while it was measured is history.
        if not metric.key.startswith((PROGRESS, "system/")):
            yield metric


def _metrics(
    run: MlflowRun, values: Mapping[tuple[str, int], float], model: ShownModel | None, now: int
) -> list[Metric]:
    """Lay values out as metrics of a run, and of its model where it is one of a model."""
    of_model = () if model is None or run.measured_on is None else (model.id, *run.measured_on)
    return [
        # Of a model, MLflow keeps a value that is no number as zero.
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
    """Read which files a run states to have: digests by name, of those that are there."""
    there = {artifact.path for artifact in client.list_artifacts(run_id)}
    if _DIGESTS.split("/")[0] not in there:
        return {}
    with TemporaryDirectory() as folder, suppress(ValueError):
        path = client.download_artifacts(run_id, _DIGESTS, folder)
        stated: dict[str, str] = json.loads(Path(path).read_text(encoding="utf-8"))
        return {name: digest for name, digest in stated.items() if name in there}
    return {}


def _attach_files(client: MlflowClient, run_id: str, files: Sequence[Path]) -> None:
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


def _known_points(
    client: MlflowClient, found: Run, run: MlflowRun
) -> tuple[dict[tuple[str, int], float], int]:
    """Read back the newest value of every metric at every step, and the last timestamp of all."""
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
    """Pick the values that must be logged.

    MLflow cannot take a metric back, so a value that is no longer defined becomes NaN.
    """
    changed = {at: value for at, value in wanted.items() if known.get(at) != value}
    gone = (at for at, old in known.items() if at not in wanted and not math.isnan(old))
    return changed | dict.fromkeys(gone, math.nan)

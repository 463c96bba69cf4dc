"""The logged models of runs, by which MLflow ranks ablations; their weights are elsewhere.

MLflow takes no figure of a model back, and keeps one that is no number as zero: where a figure is
no longer defined, the run's model is logged anew.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from mlflow.entities import LoggedModelStatus, Metric
from mlflow.exceptions import MlflowException

from tracker.tracking.mlflow.runs import KEY_TAG, MlflowRun

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


def ranked(client: Any, experiment: str, runs: Iterable[Any]) -> dict[str, list[ShownModel]]:
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


def log_model(client: Any, experiment: str, run: MlflowRun, run_id: str) -> ShownModel | None:
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

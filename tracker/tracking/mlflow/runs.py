"""Describes the MLflow runs of a cell as they should be; needs no MLflow."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from tracker.records import BASELINE, WHOLE_LAYER, CellRecord, RunRecord, TaskIdentity
from tracker.tracking.base import LoggedTable
from tracker.tracking.figures import (
    CURVES,
    absent_reasons,
    cell_figures,
    curve_name,
    flat_metrics,
    intact_metrics,
    logged_correlations,
    logged_layers,
    metric_name,
    not_finite,
    only_defined,
)
from tracker.tracking.identity import (
    content_digest,
    files_digest,
    intact_name,
    intact_part,
    run_key,
    run_name,
)

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

FORMAT = "4"
"""Part of every digest: raise it when runs are written differently, and all are updated once."""

KEY_TAG = "tracker.run_key"
KIND_TAG = "tracker.kind"
FILES_TAG = "tracker.files"
_TAG_CHARACTERS = 5000  # what every MLflow server accepts
_PARAM = 500  # MLflow 2 took no longer ones
_DIGEST_CHARACTERS = 36


@dataclass(frozen=True)
class MlflowRun:
    """One MLflow run as it should be."""

    key: str
    name: str
    digest: str
    params: dict[str, str]
    tags: dict[str, str]
    points: dict[tuple[str, int], float]
    """Metric values by name and step."""
    step: int
    """The step of every metric that is not a curve."""
    has_curves: bool = False
    """Whether the metrics that `is_curve` names have a step of their own for every layer."""
    tables: dict[str, LoggedTable] = field(default_factory=dict)
    charts: Mapping[str, Figure] = field(default_factory=dict)
    files: tuple[Path, ...] = ()
    data: tuple[dict[str, str], ...] = ()
    """The data sets that it used, in the fields of MLflow's `Dataset`."""


def cell_run(
    cell: CellRecord,
    artifacts: Sequence[Path],
    charts: Mapping[str, Figure],
    more: Mapping[str, LoggedTable] = {},
) -> MlflowRun:
    """Describe the run of a cell, with the layers' figures as curves over the layers."""
    model, benchmark = cell.model, cell.benchmark
    params = {
        "architecture": model.architecture,
        "layers": model.layers,
        "parameters": model.parameters,
        "apply_chat_template": benchmark.apply_chat_template,
        "seed": benchmark.seed,
        "tasks": len(benchmark.tasks),
        **_identity(cell),
    }
    single = cell_figures(cell)
    points = {(metric_name(name), 0): value for name, value in only_defined(single).items()}
    for layer in cell.runs:
        figures = flat_metrics(layer)
        points |= {
            (curve_name(layer, name), layer.layer): figures[name]
            for name in CURVES
            if name in figures
        }
    tables = {
        "layers": logged_layers(cell),
        "correlations": logged_correlations(cell),
        **more,
    }
    measured, values = "accuracy loses", "Values are fractions"
    if not cell.higher_is_better:
        measured = "loss gains"
        values = "`accuracy` is the loss and `accuracy_drop` its increase, in the metric's own unit"
    files = files_digest(artifacts)
    tags = {
        FILES_TAG: files,
        "tracker.data": benchmark.data,
        "tracker.missing": ", ".join(cell.lacks) or None,
        **{f"tracker.provenance.{name}": value for name, value in cell.provenance.items()},
        "mlflow.loggedArtifacts": tables_tag(tables),
        "mlflow.note.content": (
            f"**{cell.heading}**: what the benchmark's {measured} (`{cell.metric}`, "
            f"{cell.documents}) when {_what_is_removed(cell)}, beside the cheap proxies. The step "
            f"of every curve is the 0-based layer. {values}; `gold_logprob_drop` is in nats."
        ),
    }
    return MlflowRun(
        key=run_key(cell, "cell"),
        name=cell.title,
        digest=content_digest(cell, FORMAT, files),
        params=_texts(params),
        tags=_tags(cell, "cell", tags, {**not_finite(single), **cell.reasons}),
        points=points,
        step=0,
        has_curves=True,
        tables=tables,
        charts=charts,
        files=tuple(artifacts),
        data=tuple(_data_set(task, benchmark.data) for task in benchmark.tasks),
    )


def layer_run(cell: CellRecord, layer: RunRecord, parent_id: str) -> MlflowRun:
    """Describe one run of a cell, nested in the cell's own, which MLflow knows as `parent_id`."""
    name = run_name(cell, layer)
    tags = {"tracker.layer": str(layer.layer), "mlflow.parentRunId": parent_id}
    figures = flat_metrics(layer)
    return MlflowRun(
        key=run_key(cell, layer.ablation),
        name=name,
        digest=content_digest(layer, FORMAT, name, cell.metric, parent_id),
        params=_texts(
            {
                "layer": layer.layer,
                "component": layer.component,
                "span": layer.span,
                "ablation": layer.ablation,
                **_identity(cell),
            }
        ),
        tags=_tags(cell, layer.ablation, tags, absent_reasons(layer)),
        points={(metric_name(name), layer.layer): value for name, value in figures.items()},
        step=layer.layer,
    )


def intact_run(cell: CellRecord, parent_id: str) -> MlflowRun:
    """Describe the run of the intact model, nested beside those that remove something of it."""
    name = intact_name(cell)
    return MlflowRun(
        key=run_key(cell, BASELINE),
        name=name,
        digest=content_digest(intact_part(cell), FORMAT, name, parent_id),
        params=_texts({**_identity(cell), "ablation": BASELINE, "removed": "none"}),
        tags=_tags(cell, BASELINE, {"mlflow.parentRunId": parent_id}, {}),
        points={(metric_name(name), 0): value for name, value in intact_metrics(cell).items()},
        step=0,
    )


def tables_tag(names: Iterable[str]) -> str:
    """Write the tag by which MLflow's page finds tables of these names."""
    return json.dumps([{"path": f"tables/{name}.json", "type": "table"} for name in names])


def _identity(cell: CellRecord) -> dict[str, object]:
    return {
        "model": cell.model.name,
        "model_fingerprint": cell.model.fingerprint,
        "dtype": cell.model.dtype,
        "benchmark": cell.benchmark.name,
        "num_fewshot": cell.benchmark.num_fewshot,
        "removed": ", ".join(map(str, cell.removed)) or "none",
        "sample_seed": cell.sample_seed,
        **{name: value[:_PARAM] for name, value in cell.benchmark.settings.items()},
    }


def _data_set(task: TaskIdentity, data: str) -> dict[str, str]:
    source = {"data": data, "task": task.name, "version": task.version, "split": task.split}
    return {
        "name": task.name,
        "digest": task.fingerprint[:_DIGEST_CHARACTERS],
        "source_type": "tracker",
        "source": json.dumps(source),
        "profile": json.dumps({"num_rows": task.documents}),
    }


def _what_is_removed(cell: CellRecord) -> str:
    """Say it in the words of the note, with the names of the curves where there are several."""
    kinds = dict.fromkeys(run.kind for run in cell.runs)
    if all(kind == WHOLE_LAYER for kind in kinds):
        text = "one layer is removed"
    else:
        text = (
            "one layer is removed, or its attention or MLP alone (curves `attention/…`, `mlp/…`), "
            "or several layers from a first one on (curves `span4/…` for 4 of them)"
        )
    if cell.removed:
        layers = ", ".join(map(str, cell.removed))
        text += f", from a model that lacks {layers} already (drops are from the intact model)"
    return text


def _tags(
    cell: CellRecord,
    ablation: str,
    own: Mapping[str, str | None],
    reasons: Mapping[str, str],
) -> dict[str, str]:
    tags = {
        KEY_TAG: run_key(cell, ablation),
        KIND_TAG: ablation if ablation in ("cell", BASELINE) else "layer",
        "tracker.cell": cell.key,
        "tracker.model": cell.model.name,
        "tracker.model_source": cell.model.source,
        "tracker.model_revision": cell.model.revision,
        "tracker.benchmark": cell.benchmark.name,
        "tracker.metric": cell.metric,
        "tracker.lower_is_better": None if cell.higher_is_better else "true",
        "mlflow.source.name": "tracker",
        **own,
        **{f"tracker.reason.{metric_name(name)}": reason for name, reason in reasons.items()},
    }
    return {name: text[:_TAG_CHARACTERS] for name, text in _texts(tags).items()}


def _texts(values: Mapping[str, object]) -> dict[str, str]:
    return {name: str(value) for name, value in values.items() if value is not None}

"""Describes the MLflow runs of a cell as they should be; needs no MLflow."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from tracker.core.identities import TaskIdentity
from tracker.core.provenance import content_hash
from tracker.core.records import BASELINE, CellRecord, RunRecord
from tracker.core.run_table import reasons_of
from tracker.tracking.base import LoggedTable
from tracker.tracking.figures import (
    CURVES,
    cell_figures,
    curve_name,
    flat_metrics,
    intact_metrics,
    logged_correlations,
    logged_layers,
    metric_name,
    not_finite,
    only_defined,
    until_marks,
)
from tracker.tracking.identity import (
    content_digest,
    files_digest,
    first_label,
    intact_name,
    intact_part,
    run_key,
    run_name,
)
from tracker.tracking.notes import cell_note, intact_note, layer_note

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

FORMAT = "6"
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
    measured_on: tuple[str, str] | None = None
    """Name and digest of the data of a model's figures; None where the run is of no one model."""


def cell_run(
    cell: CellRecord,
    artifacts: Sequence[Path],
    charts: Mapping[str, Figure],
    more: Mapping[str, LoggedTable] = {},
    links: str = "",
) -> MlflowRun:
    """Describe the run of a cell, with the layers' figures as curves over the layers.

    `links` is what its note says of where its runs are.
    """
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
    files = files_digest(artifacts)
    tags = {
        FILES_TAG: files,
        "tracker.data": benchmark.data,
        "tracker.missing": ", ".join(cell.lacks) or None,
        **_until_tags(cell),
        **{f"tracker.core.provenance.{name}": value for name, value in cell.provenance.items()},
        "mlflow.loggedArtifacts": tables_tag(tables),
        "mlflow.note.content": cell_note(cell) + links,
    }
    return MlflowRun(
        key=run_key(cell, "cell"),
        name=cell.title,
        digest=content_digest(cell, FORMAT, files, links),
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
    tags = {
        "tracker.layer": str(layer.layer),
        **_until_tags(cell, layer),
        "mlflow.parentRunId": parent_id,
        "mlflow.note.content": layer_note(cell, layer),
    }
    figures = flat_metrics(layer)
    return MlflowRun(
        key=run_key(cell, layer.ablation),
        name=name,
        digest=content_digest(
            layer, FORMAT, name, cell.metric, parent_id, *until_marks(cell, layer).values()
        ),
        params=_texts(
            {
                "layer": layer.layer,
                "component": layer.component,
                "span": layer.span,
                "intervention": layer.intervention,
                "ablation": layer.ablation,
                **_identity(cell),
            }
        ),
        tags=_tags(cell, layer.ablation, tags, reasons_of(layer)),
        points={(metric_name(name), layer.layer): value for name, value in figures.items()},
        step=layer.layer,
        measured_on=_measured_on(cell),
    )


def intact_run(cell: CellRecord, parent_id: str) -> MlflowRun:
    """Describe the run of the model that a cell's runs begin with, nested beside them."""
    name = intact_name(cell)
    note = {"mlflow.parentRunId": parent_id, "mlflow.note.content": intact_note(cell)}
    tags = {**_until_tags(cell), **note}
    return MlflowRun(
        key=run_key(cell, BASELINE),
        name=name,
        digest=content_digest(intact_part(cell), FORMAT, name, parent_id),
        params=_texts({**_identity(cell), "ablation": BASELINE}),
        tags=_tags(cell, BASELINE, tags, {}),
        points={(metric_name(name), 0): value for name, value in intact_metrics(cell).items()},
        step=0,
        measured_on=_measured_on(cell),
    )


def child_links(cell: CellRecord, experiment: str, ids: Mapping[str, str]) -> str:
    """Link a cell's runs, as many as its note has room for; `ids` are MLflow's, by run key."""
    digits = max(2, len(str(cell.model.layers - 1)))
    labels = {BASELINE: first_label(cell), **{run.ablation: run.label(digits) for run in cell.runs}}
    room = _TAG_CHARACTERS - len(cell_note(cell)) - 100
    text = "\n\nRuns:"
    for ablation, label in labels.items():
        link = f" [{label}](#/experiments/{experiment}/runs/{ids[run_key(cell, ablation)]})"
        if len(text) + len(link) > room:
            return f"{text} … of {len(labels)}"
        text += link
    return text


def made_of_tag(cells: Iterable[CellRecord]) -> str:
    """Write the tag that says which cells' runs, by their run keys, something was made of."""
    return ", ".join(run_key(cell, "cell") for cell in cells)[:_TAG_CHARACTERS]


def _measured_on(cell: CellRecord) -> tuple[str, str]:
    """Name the data of a cell: the task's, or all of a group's together."""
    prints = [_content(task) for task in cell.benchmark.tasks]
    digest = prints[0] if len(prints) == 1 else content_hash(prints)
    return cell.benchmark.title, digest[:_DIGEST_CHARACTERS]


def _content(task: TaskIdentity) -> str:
    """Digest the documents of a task that there are; a half's are not those of the other."""
    if task.half is None:
        return task.fingerprint
    return content_hash([task.fingerprint, task.half.model_dump()])


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


def _until_tags(cell: CellRecord, run: RunRecord | None = None) -> dict[str, str | None]:
    return {f"tracker.{name}": value for name, value in until_marks(cell, run).items()}


def _data_set(task: TaskIdentity, data: str) -> dict[str, str]:
    source = {"data": data, "task": task.name, "version": task.version, "split": task.split}
    return {
        "name": task.name,
        "digest": _content(task)[:_DIGEST_CHARACTERS],
        "source_type": "tracker",
        "source": json.dumps(source),
        "profile": json.dumps({"num_rows": task.documents}),
    }


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

"""Convert descriptions of runs to MLflow's metrics, params and tags, without importing MLflow."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from tracker.schema.changes import BASELINE
from tracker.schema.identities import TaskIdentity
from tracker.schema.provenance import content_hash
from tracker.schema.records import CellRecord
from tracker.schema.text import escape_markdown
from tracker.tracking.identity import run_key, start_label
from tracker.tracking.runs import DescribedRun, cell_note

MLFLOW_FORMAT = "7"
"""Version in every digest; increase it when the form of runs changes, to update all runs once."""

KEY_TAG = "tracker.run_key"
KIND_TAG = "tracker.kind"
FILES_TAG = "tracker.files"
_TAG_CHARACTERS = 5000  # what every MLflow server accepts
PARAM_CHARACTERS = 500  # MLflow 2 took no longer ones
_DIGEST_CHARACTERS = 36


@dataclass(frozen=True)
class MlflowRun:
    """Content of one MLflow run: metrics, params, tags and data sets."""

    source: DescribedRun
    digest: str
    params: dict[str, str]
    tags: dict[str, str]
    points: dict[tuple[str, int], float]
    """Metric values by name and step."""
    data_sets: tuple[dict[str, str], ...] = ()
    """The run's data sets, with the fields of MLflow's `Dataset`."""
    data_identity: tuple[str, str] | None = None
    """Name and digest of the data behind a model's figures; None if the run has no single model."""


def mlflow_run(run: DescribedRun, parent_id: str | None = None, links: str = "") -> MlflowRun:
    """Convert the description of a run to MLflow's metrics, params, tags and data sets.

    Args:
        run: Description of the run, independent of the backend.
        parent_id: Id of the summary run in which this run is nested; None for the summary run.
        links: Links to the nested runs, which are added to the note of the summary run.

    Returns:
        Metrics, params, tags and data sets of the run.
    """
    cell, is_cell = run.cell, run.kind == "cell"
    points = {(name, run.step): value for name, value in run.figures.items()}
    points |= {(name, step): value for step, values in run.curves for name, value in values.items()}
    params: dict[str, object] = {**_run_params(cell), **run.run_fields}
    params |= _cell_params(cell) if is_cell else {"ablation": run.ablation}
    data = [_data_set(task, cell.benchmark.data) for task in cell.benchmark.tasks if is_cell]
    return MlflowRun(
        source=run,
        digest=run.digest(MLFLOW_FORMAT, parent_id or "", links),
        params=_as_texts(params),
        tags=_tags(run, parent_id, links),
        points=points,
        data_sets=tuple(data),
        data_identity=None if is_cell else _data_identity(cell),
    )


def child_links(cell: CellRecord, experiment: str, ids: Mapping[str, str]) -> str:
    """Return Markdown links from a summary run to its nested runs.

    `ids` maps the key of each nested run to its MLflow id. Links that do not fit into a note are
    left out.
    """
    digits = max(2, len(str(cell.model.layers - 1)))
    labels = {run.ablation: run.change.label(digits) for run in cell.runs}
    labels = {BASELINE: start_label(cell), **labels}
    labels = {name: label for name, label in labels.items() if run_key(cell, name) in ids}
    max_length = _TAG_CHARACTERS - len(cell_note(cell)) - 100
    text = "\n\nRuns:"
    for ablation, label in labels.items():
        run_id = ids[run_key(cell, ablation)]
        link = f" [{escape_markdown(label)}](#/experiments/{experiment}/runs/{run_id})"
        if len(text) + len(link) > max_length:
            return f"{text} … of {len(labels)}"
        text += link
    return text


def source_tags(kind: str, cells: Iterable[CellRecord], user: str, note: str) -> dict[str, str]:
    """Return the MLflow tags of the run that holds a report or a pruned model.

    `kind` is `report` or `pruned model`, `cells` are the results behind the report or model, and
    `note` is the note of the run.
    """
    return {
        KIND_TAG: kind,
        "tracker.made_of": ", ".join(run_key(cell, "cell") for cell in cells)[:_TAG_CHARACTERS],
        "mlflow.source.name": "tracker",
        "mlflow.user": user,
        "mlflow.note.content": note,
    }


def _data_identity(cell: CellRecord) -> tuple[str, str]:
    """Return name and digest of the evaluated data set, which is one task or a group of tasks."""
    task_digests = [_task_digest(task) for task in cell.benchmark.tasks]
    digest = task_digests[0] if len(task_digests) == 1 else content_hash(task_digests)
    return cell.benchmark.title, digest[:_DIGEST_CHARACTERS]


def _task_digest(task: TaskIdentity) -> str:
    """Return the digest of a task's documents.

    If only one half of the task's documents is measured, the digest covers only this half.
    """
    if task.half is None:
        return task.fingerprint
    return content_hash([task.fingerprint, task.half.model_dump()])


def tables_tag(names: Iterable[str]) -> str:
    """Return the value of the MLflow tag that lists tables, so that MLflow's UI finds them."""
    return json.dumps([{"path": f"tables/{name}.json", "type": "table"} for name in names])


def _cell_params(cell: CellRecord) -> dict[str, object]:
    """Return the MLflow params that only a summary run has, such as the number of layers."""
    model, benchmark = cell.model, cell.benchmark
    size = {name: getattr(model, name) for name in ("architecture", "layers", "parameters")}
    prompt = {name: getattr(benchmark, name) for name in ("apply_chat_template", "seed")}
    return {**size, **prompt, "tasks": len(benchmark.tasks)}


def _run_params(cell: CellRecord) -> dict[str, object]:
    """Return the MLflow params that all runs of a model and benchmark have."""
    return {
        "model": cell.model.name,
        "model_fingerprint": cell.model.fingerprint,
        "dtype": cell.model.dtype,
        "benchmark": cell.benchmark.name,
        "num_fewshot": cell.benchmark.num_fewshot,
        "removed": ", ".join(map(str, cell.removed)) or "none",
        "sample_seed": cell.sample_seed,
        **{name: value[:PARAM_CHARACTERS] for name, value in cell.benchmark.settings.items()},
    }


def _data_set(task: TaskIdentity, data: str) -> dict[str, str]:
    """Return the fields of MLflow's `Dataset` for a task's documents."""
    source = {"data": data, "task": task.name, "version": task.version, "split": task.split}
    return {
        "name": task.name,
        "digest": _task_digest(task)[:_DIGEST_CHARACTERS],
        "source_type": "tracker",
        "source": json.dumps(source),
        "profile": json.dumps({"num_rows": task.documents}),
    }


def _tags(run: DescribedRun, parent_id: str | None, links: str) -> dict[str, str]:
    """Return the MLflow tags of a run."""
    cell = run.cell
    tags: dict[str, object] = {
        KEY_TAG: run.key,
        KIND_TAG: run.kind,
        "tracker.cell": cell.key,
        "tracker.model": cell.model.name,
        "tracker.model_source": cell.model.source,
        "tracker.model_revision": cell.model.revision,
        "tracker.benchmark": cell.benchmark.name,
        "tracker.metric": cell.metric,
        "tracker.lower_is_better": None if cell.higher_is_better else "true",
        "tracker.layer": run.run_fields.get("layer"),
        **{f"tracker.{name}": value for name, value in run.question_tags.items()},
        "mlflow.source.name": "tracker",
        "mlflow.parentRunId": parent_id,
        "mlflow.note.content": run.note + links,
    }
    if run.kind == "cell":
        tags |= {
            FILES_TAG: run.version,
            "tracker.data": cell.benchmark.data,
            "tracker.missing": ", ".join(cell.missing_labels) or None,
            **{f"tracker.provenance.{name}": value for name, value in cell.provenance.items()},
            "mlflow.loggedArtifacts": tables_tag(run.tables),
        }
    tags |= {f"tracker.reason.{name}": reason for name, reason in run.reasons.items()}
    return {name: text[:_TAG_CHARACTERS] for name, text in _as_texts(tags).items()}


def _as_texts(values: Mapping[str, object]) -> dict[str, str]:
    """Convert all values to strings, and leave out values that are None."""
    return {name: str(value) for name, value in values.items() if value is not None}

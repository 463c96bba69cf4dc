"""Describe the runs of a cell in MLflow's terms, without importing MLflow."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from tracker.core.changes import BASELINE
from tracker.core.identities import TaskIdentity
from tracker.core.provenance import content_hash
from tracker.core.records import CellRecord
from tracker.core.text import as_markdown
from tracker.tracking.identity import first_label, run_key
from tracker.tracking.runs import DescribedRun, cell_note

FORMAT = "7"
"""Part of every digest: raise it when runs are written differently, and all are updated once."""

KEY_TAG = "tracker.run_key"
KIND_TAG = "tracker.kind"
FILES_TAG = "tracker.files"
_TAG_CHARACTERS = 5000  # what every MLflow server accepts
PARAM_CHARACTERS = 500  # MLflow 2 took no longer ones
_DIGEST_CHARACTERS = 36


@dataclass(frozen=True)
class MlflowRun:
    """Description of one MLflow run."""

    of: DescribedRun
    digest: str
    params: dict[str, str]
    tags: dict[str, str]
    points: dict[tuple[str, int], float]
    """Metric values by name and step."""
    data: tuple[dict[str, str], ...] = ()
    """Its data sets, with the fields of MLflow's `Dataset`."""
    measured_on: tuple[str, str] | None = None
    """Name and digest of the data of a model's figures; None if the run is not of one model."""


def mlflow_run(run: DescribedRun, parent_id: str | None = None, links: str = "") -> MlflowRun:
    """Describe a run in MLflow's terms.

    Args:
        run: The run.
        parent_id: The id of the cell's run that contains it; None for the cell's run itself.
        links: Links to the cell's runs, which are added to the note.

    Returns:
        The run in MLflow's terms.
    """
    cell, of_cell = run.cell, run.kind == "cell"
    points = {(name, run.step): value for name, value in run.figures.items()}
    points |= {(name, at): value for at, values in run.curves for name, value in values.items()}
    params: dict[str, object] = {**_identity(cell), **run.which}
    params |= _of_cell(cell) if of_cell else {"ablation": run.ablation}
    data = [_data_set(task, cell.benchmark.data) for task in cell.benchmark.tasks if of_cell]
    return MlflowRun(
        of=run,
        digest=run.digest(FORMAT, parent_id or "", links),
        params=_texts(params),
        tags=_tags(run, parent_id, links),
        points=points,
        data=tuple(data),
        measured_on=None if of_cell else _measured_on(cell),
    )


def child_links(cell: CellRecord, experiment: str, ids: Mapping[str, str]) -> str:
    """Write links to as many of a cell's runs as fit its note; `ids` maps run keys to ids."""
    digits = max(2, len(str(cell.model.layers - 1)))
    labels = {
        BASELINE: first_label(cell),
        **{run.ablation: run.change.label(digits) for run in cell.runs},
    }
    labels = {name: label for name, label in labels.items() if run_key(cell, name) in ids}
    room = _TAG_CHARACTERS - len(cell_note(cell)) - 100
    text = "\n\nRuns:"
    for ablation, label in labels.items():
        run_id = ids[run_key(cell, ablation)]
        link = f" [{as_markdown(label)}](#/experiments/{experiment}/runs/{run_id})"
        if len(text) + len(link) > room:
            return f"{text} … of {len(labels)}"
        text += link
    return text


def tags_of(kind: str, made_of: Iterable[CellRecord], user: str, note: str) -> dict[str, str]:
    """Build the tags of a report or model that was made of cells, with their run keys."""
    return {
        KIND_TAG: kind,
        "tracker.made_of": ", ".join(run_key(cell, "cell") for cell in made_of)[:_TAG_CHARACTERS],
        "mlflow.source.name": "tracker",
        "mlflow.user": user,
        "mlflow.note.content": note,
    }


def _measured_on(cell: CellRecord) -> tuple[str, str]:
    """Return name and digest of a cell's data: a task's, or those of a whole group."""
    prints = [_content(task) for task in cell.benchmark.tasks]
    digest = prints[0] if len(prints) == 1 else content_hash(prints)
    return cell.benchmark.title, digest[:_DIGEST_CHARACTERS]


def _content(task: TaskIdentity) -> str:
    """Return the digest of a task's documents, which differs between its halves."""
    if task.half is None:
        return task.fingerprint
    return content_hash([task.fingerprint, task.half.model_dump()])


def tables_tag(names: Iterable[str]) -> str:
    """Build the tag by which MLflow's page finds tables of these names."""
    return json.dumps([{"path": f"tables/{name}.json", "type": "table"} for name in names])


def _of_cell(cell: CellRecord) -> dict[str, object]:
    model, benchmark = cell.model, cell.benchmark
    size = {name: getattr(model, name) for name in ("architecture", "layers", "parameters")}
    how = {name: getattr(benchmark, name) for name in ("apply_chat_template", "seed")}
    return {**size, **how, "tasks": len(benchmark.tasks)}


def _identity(cell: CellRecord) -> dict[str, object]:
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
    source = {"data": data, "task": task.name, "version": task.version, "split": task.split}
    return {
        "name": task.name,
        "digest": _content(task)[:_DIGEST_CHARACTERS],
        "source_type": "tracker",
        "source": json.dumps(source),
        "profile": json.dumps({"num_rows": task.documents}),
    }


def _tags(run: DescribedRun, parent_id: str | None, links: str) -> dict[str, str]:
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
        "tracker.layer": run.which.get("layer"),
        **{f"tracker.{name}": value for name, value in run.marks.items()},
        "mlflow.source.name": "tracker",
        "mlflow.parentRunId": parent_id,
        "mlflow.note.content": run.note + links,
    }
    if run.kind == "cell":
        tags |= {
            FILES_TAG: run.version,
            "tracker.data": cell.benchmark.data,
            "tracker.missing": ", ".join(cell.lacks) or None,
            **{f"tracker.provenance.{name}": value for name, value in cell.provenance.items()},
            "mlflow.loggedArtifacts": tables_tag(run.tables),
        }
    tags |= {f"tracker.reason.{name}": reason for name, reason in run.reasons.items()}
    return {name: text[:_TAG_CHARACTERS] for name, text in _texts(tags).items()}


def _texts(values: Mapping[str, object]) -> dict[str, str]:
    return {name: str(value) for name, value in values.items() if value is not None}

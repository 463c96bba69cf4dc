"""Says in W&B's words how the runs of a cell should be; needs no wandb."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tracker.core.records import CellRecord
from tracker.tracking.base import LoggedTable
from tracker.tracking.identity import filter_words, group_name
from tracker.tracking.runs import DescribedRun

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

FORMAT = "5"
"""Part of every digest: raise it when runs are written differently, and all are updated once."""

# What W&B takes; counted in bytes, of which there are never fewer than characters.
_GROUP = 128  # the server: "invalid parameters: 128 limit exceeded for GroupName"
_NAME = 128  # a longer name of a run fails: NVIDIA-NeMo/Skills issue 842
_TAG = 64  # wandb/sdk/wandb_settings.py, validate_run_tags
_ARTIFACT_NAME = 128  # wandb/sdk/artifacts/_validators.py, NAME_MAXLEN
_NOT_IN_NAMES = r"[^A-Za-z0-9_.-]+"


@dataclass(frozen=True)
class OutcomesArtifact:
    """The artifact of a cell: everything its figures were computed from."""

    name: str
    aliases: tuple[str, ...]
    metadata: dict[str, Any]
    files: tuple[Path, ...]


@dataclass(frozen=True)
class WandbRun:
    """One W&B run as it should be."""

    key: str
    name: str
    job_type: str
    group: str
    digest: str
    tags: tuple[str, ...]
    config: dict[str, Any]
    note: str
    summary: dict[str, float]
    curves: tuple[dict[str, float], ...] = ()
    """One row of points a layer, each with `layer`."""
    tables: dict[str, LoggedTable] = field(default_factory=dict)
    charts: Mapping[str, Figure] = field(default_factory=dict)
    outcomes: OutcomesArtifact | None = None

    @property
    def labels(self) -> dict[str, Any]:
        """What W&B lists it by, in the words of `wandb.init`."""
        return {n: getattr(self, n) for n in ("name", "group", "job_type", "tags")}

    def id(self, deleted: int = 0) -> str:
        """Name the run alike everywhere: W&B never frees the id of a run that was `deleted`."""
        nth = f"{self.key}#{deleted}" if deleted else self.key
        return hashlib.sha256(nth.encode()).hexdigest()[:16]


def labels_of(cell: CellRecord, name: str, job_type: str) -> dict[str, Any]:
    """Say what W&B lists a run of a cell by, in the words of `wandb.init`."""
    return {
        "name": _fitting(name, _NAME),
        "group": _fitting(group_name(cell), _GROUP),
        "job_type": job_type,
        "tags": tuple(_fitting(word, _TAG) for word in filter_words(cell)),
    }


def wandb_run(run: DescribedRun) -> WandbRun:
    """Say how a run should be."""
    outcomes = _outcomes(run) if run.kind == "cell" else None
    return WandbRun(
        key=run.key,
        **labels_of(run.cell, run.name, run.kind),
        digest=run.digest(FORMAT),
        config={
            **run.settings,
            "tracker": {
                "run_key": run.key,
                "ablation": run.ablation,
                **({"outcomes": outcomes.name} if outcomes else {}),
                **run.facts,
                "provenance": _nested(run.cell.provenance),
                **run.marks,
                "reasons": _nested(run.reasons),
            },
        },
        note=run.note,
        summary=dict(run.figures),
        curves=tuple({"layer": layer, **points} for layer, points in run.curves),
        tables={f"tables/{name}": table for name, table in run.tables.items()},
        charts=run.charts,
        outcomes=outcomes,
    )


def _outcomes(run: DescribedRun) -> OutcomesArtifact:
    cell = run.cell
    aliases = ("stopped",) if cell.is_stopped and not cell.missing else ("incomplete",)
    return OutcomesArtifact(
        name=artifact_name(cell),
        aliases=("complete", f"documents-{cell.n}") if cell.is_complete else aliases,
        metadata={
            "files": run.version,
            "missing": list(cell.lacks),
            "provenance": _nested(cell.provenance),
            **run.facts,
        },
        files=run.files,
    )


def _nested(values: Mapping[str, str]) -> dict[str, str]:
    """Keep W&B from taking a period in a key for nesting."""
    return {name.replace(".", "_"): value for name, value in values.items()}


def artifact_name(cell: CellRecord) -> str:
    """Name the artifact alike on every machine, with the key last, which tells cells apart."""
    key = re.sub(_NOT_IN_NAMES, "-", f"{cell.view}-{cell.key[:12]}")
    name = re.sub(_NOT_IN_NAMES, "-", f"outcomes-{cell.model.name}-{cell.benchmark.name}")
    if len(key) > _ARTIFACT_NAME // 2:
        return _fitting(f"{name}-{key}", _ARTIFACT_NAME)
    return f"{name[: _ARTIFACT_NAME - len(key) - 1]}-{key}"


def model_name(name: str) -> str:
    """Name the artifact of a pruned model."""
    return _fitting(re.sub(_NOT_IN_NAMES, "-", name), _ARTIFACT_NAME)


def _fitting(text: str, limit: int) -> str:
    """Cut what is too long, and end it with a hash of the whole, which tells texts apart."""
    whole = text.encode()
    if len(whole) <= limit:
        return text
    end = f"-{hashlib.sha256(whole).hexdigest()[:12]}"
    return whole[: limit - len(end)].decode(errors="ignore") + end

"""Describes the W&B runs of a cell as they should be; needs no wandb."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
    intact_name,
    intact_part,
    run_key,
    run_name,
)
from tracker.tracking.notes import cell_note, intact_note, layer_note

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

FORMAT = "4"
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


def group_of(cell: CellRecord) -> str:
    """Name the group that holds the runs of a cell, alike on every machine."""
    return _fitting(f"{cell.title} · {cell.key[:8]}", _GROUP)


def labels_of(cell: CellRecord, name: str, job_type: str) -> dict[str, Any]:
    """Say what W&B lists a run of a cell by, in the words of `wandb.init`."""
    words = (cell.model.name, cell.benchmark.name, *(("stopped",) if cell.is_stopped else ()))
    tags = tuple(_fitting(word, _TAG) for word in words)
    labels = {"name": _fitting(name, _NAME), "job_type": job_type, "tags": tags}
    return {**labels, "group": group_of(cell)}


def layer_run(cell: CellRecord, layer: RunRecord) -> WandbRun:
    """Describe one run of a cell."""
    figures = {metric_name(name): value for name, value in flat_metrics(layer).items()}
    return _run(
        cell,
        layer.ablation,
        name=run_name(cell, layer),
        job_type="layer",
        digest=content_digest(
            layer, FORMAT, group_of(cell), cell.metric, *until_marks(cell, layer).values()
        ),
        own={
            "layer": layer.layer,
            "component": layer.component,
            "span": layer.span,
            "intervention": layer.intervention,
        },
        reasons=reasons_of(layer),
        run=layer,
        note=layer_note(cell, layer),
        summary=figures,
    )


def intact_run(cell: CellRecord) -> WandbRun:
    """Describe the run of the model that a cell's runs begin with.

    W&B compares the others of its group with it.
    """
    return _run(
        cell,
        BASELINE,
        name=intact_name(cell),
        job_type=BASELINE,
        digest=content_digest(intact_part(cell), FORMAT, group_of(cell)),
        own={},
        reasons={},
        note=intact_note(cell),
        summary={metric_name(name): value for name, value in intact_metrics(cell).items()},
    )


def cell_run(
    cell: CellRecord,
    artifacts: Sequence[Path],
    charts: Mapping[str, Figure],
    more: Mapping[str, LoggedTable] = {},
) -> WandbRun:
    """Describe the run of a cell, with the figures of its runs as curves over the layers."""
    figures = cell_figures(cell)
    rows = []
    for layer in cell.runs:
        known = flat_metrics(layer)
        points = {curve_name(layer, name): known[name] for name in CURVES if name in known}
        rows.append({"layer": layer.layer, **points})
    artifact, files = artifact_name(cell), files_digest(artifacts)
    return _run(
        cell,
        "cell",
        name=cell.title,
        job_type="cell",
        digest=content_digest(cell, FORMAT, files),
        own={},
        reasons={**not_finite(figures), **cell.reasons},
        note=cell_note(cell),
        summary={metric_name(name): value for name, value in only_defined(figures).items()},
        curves=tuple(rows),
        tables={
            "tables/layers": logged_layers(cell),
            "tables/correlations": logged_correlations(cell),
            **{f"tables/{name}": table for name, table in more.items()},
        },
        charts=charts,
        outcomes=OutcomesArtifact(
            name=artifact,
            aliases=_aliases(cell),
            metadata={
                "files": files,
                "missing": list(cell.lacks),
                "provenance": _nested(cell.provenance),
                **_facts(cell),
            },
            files=tuple(artifacts),
        ),
    )


def _aliases(cell: CellRecord) -> tuple[str, ...]:
    if cell.is_complete:
        return ("complete", f"documents-{cell.n}")
    return ("stopped",) if cell.is_stopped and not cell.missing else ("incomplete",)


def _run(
    cell: CellRecord,
    ablation: str,
    *,
    name: str,
    job_type: str,
    own: Mapping[str, object],
    reasons: Mapping[str, str],
    run: RunRecord | None = None,
    **parts: Any,
) -> WandbRun:
    key = run_key(cell, ablation)
    outcomes: OutcomesArtifact | None = parts.get("outcomes")
    config = {
        # The names that a sweep gives its trials, so that both kinds of run filter alike.
        "model": cell.model.source,
        "benchmark": cell.benchmark.name,
        "num_fewshot": cell.benchmark.num_fewshot,
        **cell.benchmark.settings,
        "dtype": cell.model.dtype,
        "removed": list(cell.removed),
        **own,
        "tracker": {
            "run_key": key,
            "ablation": ablation,
            **({"outcomes": outcomes.name} if outcomes else {}),
            **_facts(cell),
            "provenance": _nested(cell.provenance),
            **until_marks(cell, run),
            "reasons": _nested({metric_name(name): why for name, why in reasons.items()}),
        },
    }
    return WandbRun(
        key=key,
        config=config,
        **labels_of(cell, name, job_type),
        **parts,
    )


def _facts(cell: CellRecord) -> dict[str, Any]:
    """Name what the cell's figures depend on."""
    return {
        "cell": cell.key,
        "metric": cell.metric,
        "lower_is_better": not cell.higher_is_better,
        "documents": cell.n,
        "sample_seed": cell.sample_seed,
        "model": cell.model.model_dump(mode="json"),
        "benchmark": cell.benchmark.model_dump(mode="json", exclude={"tasks"}),
    }


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

"""Describe the runs to publish for a model and benchmark (a cell), for all backends.

Every run gets a note in Markdown, which is the same in all backends.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from tracker.schema.answers import interval_name, statement
from tracker.schema.changes import WHOLE_LAYER, Change
from tracker.schema.config import FILE_KEYS, number_field
from tracker.schema.identities import Record
from tracker.schema.kinds import REPLACEMENT_WORDS
from tracker.schema.records import CellRecord, RunRecord
from tracker.schema.run_table import non_finite_reasons, run_reasons
from tracker.schema.text_templates import TextTemplate
from tracker.stats.support import decide_verdicts, widen
from tracker.tracking.figures import (
    CURVES,
    LoggedTable,
    cell_figures,
    curve_name,
    defined_figures,
    intact_metrics,
    logged_correlations,
    logged_layers,
    question_tags,
    run_metrics,
    tracked_name,
)
from tracker.tracking.identity import (
    baseline_record,
    cell_run_name,
    content_digest,
    files_digest,
    intact_name,
    run_key,
    run_name,
)

if TYPE_CHECKING:
    from plotly.graph_objects import Figure


AVERAGE_NOTE = "an average over several benchmarks gives stronger evidence"
"""Remark on one benchmark that refers to the averages of the report and the leaderboard."""


_NOTES = TextTemplate(
    "tracker.tracking",
    "notes",
    average_note=AVERAGE_NOTE,
    interval_name=interval_name,
    replacements=REPLACEMENT_WORDS,
    statement=statement,
    whole_layer=WHOLE_LAYER,
)


def cell_note(cell: CellRecord, answer: str = "") -> str:
    """Return the note (Markdown) of the summary run of a model and benchmark.

    `answer` is the conclusion from this benchmark alone; empty if there is no conclusion.
    """
    return "\n\n".join(_NOTES.render_all("cell", cell, answer))


def intact_note(cell: CellRecord) -> str:
    """Return the note of the unablated model's run, in Markdown."""
    return _NOTES.render("intact", cell, intact_name(cell))


def layer_note(cell: CellRecord, run: RunRecord) -> str:
    """Return the note of an ablation's run, in Markdown."""
    name = run_name(cell, run.change)
    return _NOTES.render("layer", cell, run, name, _is_significant(cell, run))


def _is_significant(cell: CellRecord, run: RunRecord) -> bool:
    """Return whether the drop of `run` is significant, corrected for the number of ablations."""
    drops = [cell_run.drop for cell_run in cell.runs]
    if not cell.is_raced:
        drops = widen(drops, [cell_run.units for cell_run in cell.runs], len(drops))
    return decide_verdicts(drops)[cell.runs.index(run)] != "open"


RunSelection = Literal["auto", "all", "cells"]
"""Selection of the cell's runs that become separate runs in a backend."""
MAX_OWN_RUNS = 200
"""Maximum number of runs of one kind that become separate runs by default."""
MAX_ARTIFACT_NAME = 128  # wandb/sdk/artifacts/_validators.py, NAME_MAXLEN
INVALID_NAME_PATTERN = r"[^A-Za-z0-9_.-]+"
Value = TypeVar("Value")
Run = TypeVar("Run")


@dataclass(frozen=True)
class OutcomesArtifact:
    """Name, aliases and metadata of an artifact with the outcomes of a model and benchmark."""

    name: str
    aliases: tuple[str, ...]
    metadata: dict[str, Any]


@dataclass(frozen=True)
class DescribedRun:
    """Description of one run to publish, independent of the backend.

    Attributes:
        cell: Record of the cell (model and benchmark) to which the run belongs.
        kind: `cell` for the summary run of the cell, `baseline` for the unablated model, `layer`
            for an ablation.
        name: Display name of the run.
        note: Note of the run in Markdown.
        record: Record from which the digest is computed; a published run is updated if the digest
            changes.
        figures: Name → value of each metric, without undefined metrics.
        reasons: Name of an undefined metric → reason why it is undefined.
        run: Record of the ablation; None for a summary run or the unablated model.
        curves: For each ablation, its layer, and the plotted values by name of the curve.
        tables: Name → table to attach to the run.
        charts: Name → chart to attach to the run.
        files: Files to attach to the run.
    """

    cell: CellRecord
    kind: Literal["cell", "baseline", "layer"]
    name: str
    note: str
    record: Record
    figures: Mapping[str, float]
    reasons: Mapping[str, str] = field(default_factory=dict)
    run: RunRecord | None = None
    curves: tuple[tuple[int, dict[str, float]], ...] = ()
    tables: Mapping[str, LoggedTable] = field(default_factory=dict)
    charts: Mapping[str, Figure] = field(default_factory=dict)
    files: tuple[Path, ...] = ()

    @property
    def ablation(self) -> str:
        """Name of the ablation, or `cell` (summary run) or `baseline` (unablated model)."""
        return self.run.ablation if self.run else self.kind

    @property
    def key(self) -> str:
        """Key that identifies the run, independently of the machine and the time."""
        return run_key(self.cell, self.ablation)

    @property
    def step(self) -> int:
        """Step at which the run's metrics are logged: the first layer that the ablation changes."""
        return self.run.change.layer if self.run else 0

    @property
    def run_fields(self) -> dict[str, str | int]:
        """Fields that identify the ablation, such as `layer`; empty if there is no ablation."""
        if self.run is None:
            return {}
        change, names = self.run.change, ("layer", "component", "span", "intervention")
        fields = {name: getattr(change, name) for name in names[change.is_outer :]}
        if change.members:
            fields["members"] = ",".join(map(str, change.members))
        if change.number is not None:
            fields[FILE_KEYS[number_field(change.component)]] = change.number
        if change.map is not None:
            fields["map"] = change.map
        return fields | ({"repeats": change.repeats} if change.intervention == "repeat" else {})

    @property
    def question_tags(self) -> dict[str, str]:
        """Tags with the `until` setting and its result; empty if `until` is not set."""
        return question_tags(self.cell, self.run.change if self.run else None)

    @cached_property
    def version(self) -> str:
        """The digest of the attached files of a summary run; empty for all other runs."""
        return files_digest(self.files) if self.kind == "cell" else ""

    def digest(self, *additions: str) -> str:
        """Compute a digest of the run's contents, and of additional data of the backend."""
        tag_values, cell = self.question_tags.values(), self.cell
        identity = (self.key, self.name, cell.title, cell.metric, self.version)
        return content_digest(self.record, *identity, *tag_values, *additions)

    @property
    def config(self) -> dict[str, Any]:
        """Settings that identify the run, as a nested dictionary, for the run's config.

        The settings have the same names as in the trials of a sweep. No name contains a period.
        """
        cell, outcomes = self.cell, self.outcomes
        return {
            "model": cell.model.source,
            "benchmark": cell.benchmark.name,
            "num_fewshot": cell.benchmark.num_fewshot,
            **cell.benchmark.settings,
            "dtype": cell.model.dtype,
            "removed": list(cell.removed),
            **self.run_fields,
            "tracker": {
                "run_key": self.key,
                "ablation": self.ablation,
                **({"outcomes": outcomes.name} if outcomes else {}),
                **_measurement_conditions(cell),
                "provenance": _flat_names(cell.provenance),
                **self.question_tags,
                "reasons": _flat_names(self.reasons),
            },
        }

    @cached_property
    def outcomes(self) -> OutcomesArtifact | None:
        """Artifact for the attached files of a summary run; None for all other runs."""
        if self.kind != "cell":
            return None
        cell = self.cell
        aliases = ("stopped",) if cell.is_stopped and not cell.missing else ("incomplete",)
        return OutcomesArtifact(
            name=artifact_name(cell),
            aliases=("complete", f"documents-{cell.n}") if cell.is_complete else aliases,
            metadata={
                "files": self.version,
                "missing": list(cell.missing_labels),
                "provenance": _flat_names(cell.provenance),
                **_measurement_conditions(cell),
            },
        )


def individual_runs(cell: CellRecord, selection: RunSelection) -> list[RunRecord]:
    """List the ablations that get a separate run in the tracking backend.

    `selection` is `all` (every ablation), `cells` (none) or `auto`. With `auto`, a kind of ablation
    with more than `MAX_OWN_RUNS` ablations (e.g. attention heads) gets no separate runs.
    """
    # Whole layers are counted separately from spans.
    count = Counter(map(_run_family, cell.runs))
    max_runs = {"all": math.inf, "cells": 0, "auto": MAX_OWN_RUNS}[selection]
    return [run for run in cell.runs if count[_run_family(run)] <= max_runs]


def _run_family(run: RunRecord) -> tuple[bool, Change]:
    """Return the kind of an ablation, such as the removal of a head."""
    return run.change.kind == WHOLE_LAYER, run.change.kind.family


def describe_runs(
    cell: CellRecord,
    files: Sequence[Path],
    charts: Mapping[str, Figure],
    tables: Mapping[str, LoggedTable] = {},
    selection: RunSelection = "auto",
    answer: str = "",
) -> list[DescribedRun]:
    """Describe all runs to publish for a model and benchmark, in the order of writing.

    The summary run is last, because backends list the newest run first.
    """
    runs = [describe_run(cell, run) for run in reversed(individual_runs(cell, selection))]
    return [*runs, describe_intact(cell), describe_cell(cell, files, charts, tables, answer)]


def move_runs(by_key: dict[str, Run], cell: CellRecord, runs: Iterable[DescribedRun]) -> list[Run]:
    """Give the published runs of a replaced measurement the keys of the larger measurement.

    Args:
        by_key: Key of each published run → the run; changed in place.
        cell: Record of the larger measurement, with the views (selections of runs and documents)
            that it replaces.
        runs: Descriptions of the runs of the larger measurement.

    Returns:
        The published runs to delete. Either another run has their new key, or the larger
        measurement lacks their ablation.
    """
    keys, obsolete_runs = {run.key for run in runs}, []
    for view in cell.supersedes:
        prefix = run_key(cell, "", view)
        for old_key in [key for key in by_key if key.rpartition("/")[0] == prefix[:-1]]:
            run, key = by_key.pop(old_key), run_key(cell, old_key[len(prefix) :])
            if key not in keys or by_key.setdefault(key, run) is not run:
                obsolete_runs.append(run)
    return obsolete_runs


def describe_run(cell: CellRecord, run: RunRecord) -> DescribedRun:
    """Describe the run to publish for one ablation."""
    return DescribedRun(
        cell=cell,
        kind="layer",
        name=run_name(cell, run.change),
        note=layer_note(cell, run),
        record=run,
        figures=_accepted_names(run_metrics(run)),
        reasons=_accepted_names(run_reasons(run)),
        run=run,
    )


def describe_intact(cell: CellRecord) -> DescribedRun:
    """Describe the run to publish for the unablated model."""
    return DescribedRun(
        cell=cell,
        kind="baseline",
        name=intact_name(cell),
        note=intact_note(cell),
        record=baseline_record(cell),
        figures=_accepted_names(intact_metrics(cell)),
    )


def describe_cell(
    cell: CellRecord,
    files: Sequence[Path] = (),
    charts: Mapping[str, Figure] = {},
    tables: Mapping[str, LoggedTable] = {},
    answer: str = "",
) -> DescribedRun:
    """Describe the summary run to publish for a model and benchmark (a cell).

    The description includes curves of the ablations' metrics by layer.
    """
    figures = cell_figures(cell)
    reasons = {**non_finite_reasons(figures), **cell.all_reasons}
    curves = []
    # Very many runs of a kind would give hundreds of curves.
    curve_ablations = {run.ablation for run in individual_runs(cell, "auto")}
    for run in cell.runs:
        if run.change.members:  # several begin at one layer
            continue
        metrics = run_metrics(run)
        names = CURVES if run.ablation in curve_ablations else ("accuracy_drop",)
        points = {curve_name(run.change, name): metrics[name] for name in names if name in metrics}
        curves.append((run.change.layer, points))
    return DescribedRun(
        cell=cell,
        kind="cell",
        name=cell_run_name(cell),
        note=cell_note(cell, answer),
        record=cell,
        figures=_accepted_names(defined_figures(figures)),
        reasons=_accepted_names(reasons),
        curves=tuple(curves),
        tables={"layers": logged_layers(cell), "correlations": logged_correlations(cell), **tables},
        charts=charts,
        files=tuple(files),
    )


def _accepted_names(values: Mapping[str, Value]) -> dict[str, Value]:
    """Replace characters in the names of values that a backend does not accept."""
    return {tracked_name(name): value for name, value in values.items()}


def _measurement_conditions(cell: CellRecord) -> dict[str, Any]:
    """Return what was measured: model, benchmark, metric and number of documents."""
    return {
        "cell": cell.key,
        "metric": cell.metric,
        "lower_is_better": not cell.higher_is_better,
        "documents": cell.n,
        "sample_seed": cell.sample_seed,
        "model": cell.model.model_dump(mode="json"),
        "benchmark": cell.benchmark.model_dump(mode="json", exclude={"tasks"}),
    }


def _flat_names(values: Mapping[str, str]) -> dict[str, str]:
    """Replace periods in names by underscores.

    W&B would split a name at its periods into nested names.
    """
    return {name.replace(".", "_"): value for name, value in values.items()}


def artifact_name(cell: CellRecord) -> str:
    """Return the name of the artifact with the outcomes of a model and benchmark."""
    key = re.sub(INVALID_NAME_PATTERN, "-", f"{cell.view}-{cell.key[:12]}")
    name = re.sub(INVALID_NAME_PATTERN, "-", f"outcomes-{cell.model.name}-{cell.benchmark.name}")
    if len(key) > MAX_ARTIFACT_NAME // 2:
        return cut_text(f"{name}-{key}", MAX_ARTIFACT_NAME)
    return f"{name[: MAX_ARTIFACT_NAME - len(key) - 1]}-{key}"


def cut_text(text: str, limit: int) -> str:
    """Cut a text to at most `limit` bytes.

    A cut text ends with a hash of the whole text.
    """
    encoded = text.encode()
    if len(encoded) <= limit:
        return text
    suffix = f"-{hashlib.sha256(encoded).hexdigest()[:12]}"
    return encoded[: limit - len(suffix)].decode(errors="ignore") + suffix

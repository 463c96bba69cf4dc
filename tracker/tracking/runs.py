"""Describe the runs of a cell for every backend, which writes them in its own terms.

The notes of runs, in Markdown, are the same in every backend.
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

from tracker.core.answers import interval_name, statement
from tracker.core.changes import WHOLE_LAYER, Change
from tracker.core.config import IN_THE_FILE, field_of
from tracker.core.formats import counted, measure_of, named_interval
from tracker.core.identities import Record
from tracker.core.kinds import REPLACED_BY
from tracker.core.records import CellRecord, RunRecord
from tracker.core.run_table import not_finite, reasons_of
from tracker.core.text import as_code, as_markdown
from tracker.stats.support import together, verdicts
from tracker.tracking.figures import (
    CURVES,
    LoggedTable,
    cell_figures,
    curve_name,
    flat_metrics,
    intact_metrics,
    logged_correlations,
    logged_layers,
    metric_name,
    only_defined,
    until_marks,
)
from tracker.tracking.identity import (
    cell_name,
    content_digest,
    files_digest,
    intact_name,
    intact_part,
    run_key,
    run_name,
)

if TYPE_CHECKING:
    from plotly.graph_objects import Figure


AVERAGE = "an average over several benchmarks can say more"
"""The remark that refers from one benchmark to the averages of page and leaderboard."""


def cell_note(cell: CellRecord, answer: str = "") -> str:
    """Write the note of a cell's run.

    Args:
        cell: The cell.
        answer: The benchmark's answer on its own; empty for none.

    Returns:
        A paragraph.
    """
    measured, values = "accuracy loses", "Values are fractions"
    alone = answer and f"\n\n{as_markdown(answer)} This rests on this benchmark alone; {AVERAGE}."
    if not cell.higher_is_better:
        measured = "loss gains"
        values = "`accuracy` is the loss and `accuracy_drop` its increase, in the metric's own unit"
    return (
        f"**{as_markdown(cell.heading)}**: what the benchmark's {measured} "
        f"({as_code(cell.metric)}, {cell.documents}) when {_what_is_removed(cell)}, beside "
        "the cheap proxies. The step of every curve is the 0-based layer. "
        f"{values}; `gold_logprob_drop` is in nats."
        + (f"\n\n{statement(cell.answer)}." if cell.answer else "")
        + alone
    )


def intact_note(cell: CellRecord) -> str:
    """Write the note of the intact model's run.

    Args:
        cell: The cell.

    Returns:
        A paragraph.
    """
    on = cell.documents_of(f"{cell.n:,}")
    if cell.removed:
        return (
            f"**{as_markdown(intact_name(cell))}**: {as_code(cell.metric)} on {on} of the model "
            "that every run of the benchmark takes more of; its drop, as theirs, is from the "
            "intact model."
        )
    return (
        f"**{as_markdown(intact_name(cell))}**: {as_code(cell.metric)} of the whole model on {on}: "
        "what the runs without some of its layers are compared with."
        + _rounding(cell, cell.baseline_rounded, cell.n, cell.baseline_rounding, "it")
    )


def layer_note(cell: CellRecord, run: RunRecord) -> str:
    """Write the note of an ablation's run.

    Args:
        cell: The cell.
        run: One of its runs.

    Returns:
        A paragraph.
    """
    change = run.change
    replacement = REPLACED_BY.get(change.intervention)
    how = f"with the layer replaced by {replacement}" if replacement else "without it"
    if change.map is not None:
        how = f"with {as_markdown(change.map)} in {change.intervention}"
    if change.intervention == "repeat":
        how = f"with it passed {'again' if change.repeats == 2 else change.times}"
    on = cell.documents_of(f"{run.n:,}")
    what = f"**{as_markdown(run_name(cell, change))}**: {as_code(cell.metric)} on {on} {how}"
    if run.drop.value is None:
        return f"{what}; its drop is not defined: {run.drop.reason or 'no reason'}."
    measure, falls = measure_of(cell), (run.drop.value >= 0) == cell.higher_is_better
    size = run.drop if run.drop.value >= 0 else -run.drop
    by = f"{measure.write(abs(run.drop.value))} {measure.unit}"
    between = named_interval(size, measure.write, interval_name(cell))
    among = f"among {counted(len(cell.runs), 'run')} of this benchmark alone"
    chance = f", which may be chance {among}; {AVERAGE}"
    text = f"{what}; it {'falls' if falls else 'rises'} by {by}{between}"
    text += f"{'' if _is_shown(cell, run) else chance}."
    if not cell.higher_is_better:
        return text
    return text + _rounding(cell, run.rounded, run.n, run.drop_rounding, "the fall")


def _is_shown(cell: CellRecord, run: RunRecord) -> bool:
    """Check whether a run's effect is proved, simultaneously over all runs of its cell."""
    drops = [one.drop for one in cell.runs]
    if not cell.is_raced:
        drops = together(drops, [one.n for one in cell.runs], len(drops))
    return verdicts(drops)[cell.runs.index(run)] != "open"


def _rounding(
    cell: CellRecord, count: int | None, documents: int, moved: float | None, what: str
) -> str:
    """Write how many documents half precision decides by rounding; begins with a space."""
    if count is None or moved is None:
        return ""
    return (
        f" {cell.model.dtype} decides up to {count:,} of these {documents:,} documents by "
        f"rounding: another batch size moves {what} by ± {100 * moved:.1f} percentage points."
    )


def _what_is_removed(cell: CellRecord) -> str:
    """Describe the removed parts for the note, with the names of their curves."""
    kinds = dict.fromkeys(run.change.kind for run in cell.runs)
    if all(kind == WHOLE_LAYER for kind in kinds):
        text = "one layer is removed"
    else:
        text = (
            "one layer is removed, or its attention or MLP alone (curves `attention/…`, `mlp/…`), "
            "or several layers from a first one on (curves `span4/…` for 4 of them)"
        )
        if parts := dict.fromkeys(kind.component for kind in kinds if kind.number is not None):
            words = " and ".join(f"`{word}/3/…`" for word in parts)
            text += f", or one of its heads or groups of heads (curves {words} for number 3)"
    done = [word for word in REPLACED_BY if any(kind.intervention == word for kind in kinds)]
    if done:
        text += f", or replaced (curves {', '.join(f'`{word}/…`' for word in done)})"
    if cell.removed:
        layers = ", ".join(map(str, cell.removed))
        text += f", from a model that lacks {layers} already (drops are from the intact model)"
    return text


Which = Literal["auto", "all", "cells"]
"""Selection of a cell's runs that are runs of their own in a backend."""
MANY = 200
"""Maximum number of runs of a kind that are runs of their own by default."""
ARTIFACT_NAME = 128  # wandb/sdk/artifacts/_validators.py, NAME_MAXLEN
NOT_IN_NAMES = r"[^A-Za-z0-9_.-]+"
Value = TypeVar("Value")
Run = TypeVar("Run")


@dataclass(frozen=True)
class OutcomesArtifact:
    """The artifact of a cell: everything its figures were computed from."""

    name: str
    aliases: tuple[str, ...]
    metadata: dict[str, Any]


@dataclass(frozen=True)
class DescribedRun:
    """Description of one run.

    Attributes:
        cell: The cell of the run.
        kind: Its kind: the cell itself, the model that its runs start from, or one of them.
        name: Its name in lists of runs.
        note: Its note in Markdown.
        known: The record that, with name and `files`, determines all its contents.
        figures: Its defined figures, by names that every backend accepts.
        reasons: The reasons of undefined figures.
        run: The cell's run that it shows; None for other kinds.
        curves: The figures of the cell's runs: layers, and curve name → figure of each.
        tables: Its tables by name.
        charts: Its charts by name.
        files: Its attached files.
    """

    cell: CellRecord
    kind: Literal["cell", "baseline", "layer"]
    name: str
    note: str
    known: Record
    figures: Mapping[str, float]
    reasons: Mapping[str, str] = field(default_factory=dict)
    run: RunRecord | None = None
    curves: tuple[tuple[int, dict[str, float]], ...] = ()
    tables: Mapping[str, LoggedTable] = field(default_factory=dict)
    charts: Mapping[str, Figure] = field(default_factory=dict)
    files: tuple[Path, ...] = ()

    @property
    def ablation(self) -> str:
        """The ablation's name; the kind, if it is not one of the cell's runs."""
        return self.run.ablation if self.run else self.kind

    @property
    def key(self) -> str:
        """The run key, equal on every machine and at all times."""
        return run_key(self.cell, self.ablation)

    @property
    def step(self) -> int:
        """The position of its figures on the axis of layers."""
        return self.run.change.layer if self.run else 0

    @property
    def which(self) -> dict[str, str | int]:
        """The fields that identify the run within its cell; empty for other kinds."""
        if self.run is None:
            return {}
        change, names = self.run.change, ("layer", "component", "span", "intervention")
        fields = {name: getattr(change, name) for name in names[change.is_end :]}
        if change.members:
            fields["members"] = ",".join(map(str, change.members))
        if change.number is not None:
            fields[IN_THE_FILE[field_of(change.component)]] = change.number
        if change.map is not None:
            fields["map"] = change.map
        return fields | ({"repeats": change.repeats} if change.intervention == "repeat" else {})

    @property
    def marks(self) -> dict[str, str]:
        """The tags about the cell's question; empty without a question."""
        return until_marks(self.cell, self.run.change if self.run else None)

    @cached_property
    def version(self) -> str:
        """The digest of its files; empty if it has none."""
        return files_digest(self.files) if self.kind == "cell" else ""

    def digest(self, *also: str) -> str:
        """Compute the digest of its contents, and of the backend's additions `also`."""
        marks, cell = self.marks.values(), self.cell
        about = (self.key, self.name, cell.title, cell.metric, self.version)
        return content_digest(self.known, *about, *marks, *also)

    @property
    def config(self) -> dict[str, Any]:
        """The run's identity as a nested dictionary, without periods in names.

        Request fields have the same names as in a sweep's trials, so that both filter alike.
        """
        cell, outcomes = self.cell, self.outcomes
        return {
            "model": cell.model.source,
            "benchmark": cell.benchmark.name,
            "num_fewshot": cell.benchmark.num_fewshot,
            **cell.benchmark.settings,
            "dtype": cell.model.dtype,
            "removed": list(cell.removed),
            **self.which,
            "tracker": {
                "run_key": self.key,
                "ablation": self.ablation,
                **({"outcomes": outcomes.name} if outcomes else {}),
                **_facts(cell),
                "provenance": _nested(cell.provenance),
                **self.marks,
                "reasons": _nested(self.reasons),
            },
        }

    @cached_property
    def outcomes(self) -> OutcomesArtifact | None:
        """The artifact of its files; None for runs other than the cell's own."""
        if self.kind != "cell":
            return None
        cell = self.cell
        aliases = ("stopped",) if cell.is_stopped and not cell.missing else ("incomplete",)
        return OutcomesArtifact(
            name=artifact_name(cell),
            aliases=("complete", f"documents-{cell.n}") if cell.is_complete else aliases,
            metadata={
                "files": self.version,
                "missing": list(cell.lacks),
                "provenance": _nested(cell.provenance),
                **_facts(cell),
            },
        )


def one_by_one(cell: CellRecord, which: Which) -> list[RunRecord]:
    """List the cell's runs that are runs of their own in a backend.

    If there are more than `MANY` of a kind, such as the heads of all layers, only the table and the
    map of the cell's own run show them, unless `which` selects otherwise.
    """
    # Whole layers are counted separately from spans.
    count = Counter(map(_family, cell.runs))
    most = {"all": math.inf, "cells": 0, "auto": MANY}[which]
    return [run for run in cell.runs if count[_family(run)] <= most]


def _family(run: RunRecord) -> tuple[bool, Change]:
    return run.change.kind == WHOLE_LAYER, run.change.kind.family


def described(
    cell: CellRecord,
    files: Sequence[Path],
    charts: Mapping[str, Figure],
    tables: Mapping[str, LoggedTable] = {},
    which: Which = "auto",
    answer: str = "",
) -> list[DescribedRun]:
    """Describe the runs of a cell, in the order in which they are written.

    Backends list the newest run first, so the cell's own run comes last. The model that its runs
    start from comes before it, and before that the runs in reverse order.
    """
    runs = [layer_run(cell, run) for run in reversed(one_by_one(cell, which))]
    return [*runs, intact_run(cell), cell_run(cell, files, charts, tables, answer)]


def take_over(present: dict[str, Run], cell: CellRecord, runs: Iterable[DescribedRun]) -> list[Run]:
    """Transfer the runs of superseded views to the view that replaces them.

    Args:
        present: A backend's runs by run key; those of superseded views get their new keys.
        cell: The record of the view.
        runs: Its described runs.

    Returns:
        The runs to delete: those that exist under both keys, or are no runs of the view.
    """
    keys, superfluous = {run.key for run in runs}, []
    for view in cell.supersedes:
        start = run_key(cell, "", view)
        for former in [key for key in present if key.rpartition("/")[0] == start[:-1]]:
            run, key = present.pop(former), run_key(cell, former[len(start) :])
            if key not in keys or present.setdefault(key, run) is not run:
                superfluous.append(run)
    return superfluous


def layer_run(cell: CellRecord, run: RunRecord) -> DescribedRun:
    """Describe one run of a cell."""
    return DescribedRun(
        cell=cell,
        kind="layer",
        name=run_name(cell, run.change),
        note=layer_note(cell, run),
        known=run,
        figures=_named(flat_metrics(run)),
        reasons=_named(reasons_of(run)),
        run=run,
    )


def intact_run(cell: CellRecord) -> DescribedRun:
    """Describe the run of the model that a cell's runs start from."""
    return DescribedRun(
        cell=cell,
        kind="baseline",
        name=intact_name(cell),
        note=intact_note(cell),
        known=intact_part(cell),
        figures=_named(intact_metrics(cell)),
    )


def cell_run(
    cell: CellRecord,
    files: Sequence[Path] = (),
    charts: Mapping[str, Figure] = {},
    tables: Mapping[str, LoggedTable] = {},
    answer: str = "",
) -> DescribedRun:
    """Describe the run of a cell, with the figures of its runs as curves over the layers."""
    figures = cell_figures(cell)
    reasons = {**not_finite(figures), **cell.all_reasons}
    curves = []
    # Very many runs of a kind would give hundreds of curves.
    alone = {run.ablation for run in one_by_one(cell, "auto")}
    for run in cell.runs:
        if run.change.members:  # several begin at one layer
            continue
        known = flat_metrics(run)
        names = CURVES if run.ablation in alone else ("accuracy_drop",)
        points = {curve_name(run.change, name): known[name] for name in names if name in known}
        curves.append((run.change.layer, points))
    return DescribedRun(
        cell=cell,
        kind="cell",
        name=cell_name(cell),
        note=cell_note(cell, answer),
        known=cell,
        figures=_named(only_defined(figures)),
        reasons=_named(reasons),
        curves=tuple(curves),
        tables={"layers": logged_layers(cell), "correlations": logged_correlations(cell), **tables},
        charts=charts,
        files=tuple(files),
    )


def _named(values: Mapping[str, Value]) -> dict[str, Value]:
    """Rename figures or reasons to names that every backend accepts."""
    return {metric_name(name): value for name, value in values.items()}


def _facts(cell: CellRecord) -> dict[str, Any]:
    """Return the fields that the cell's figures depend on."""
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
    """Replace periods in names, which W&B would read as nesting."""
    return {name.replace(".", "_"): value for name, value in values.items()}


def artifact_name(cell: CellRecord) -> str:
    """Return the artifact's name, equal on every machine, with the cell's key at the end."""
    key = re.sub(NOT_IN_NAMES, "-", f"{cell.view}-{cell.key[:12]}")
    name = re.sub(NOT_IN_NAMES, "-", f"outcomes-{cell.model.name}-{cell.benchmark.name}")
    if len(key) > ARTIFACT_NAME // 2:
        return fitting(f"{name}-{key}", ARTIFACT_NAME)
    return f"{name[: ARTIFACT_NAME - len(key) - 1]}-{key}"


def fitting(text: str, limit: int) -> str:
    """Shorten a text of too many bytes, and end it with a hash of the whole text."""
    whole = text.encode()
    if len(whole) <= limit:
        return text
    end = f"-{hashlib.sha256(whole).hexdigest()[:12]}"
    return whole[: limit - len(end)].decode(errors="ignore") + end

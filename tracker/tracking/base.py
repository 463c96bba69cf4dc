"""The seam between records and tracking backends.

A backend receives frozen records and files, nothing else. What every backend must agree on stands
here as pure functions: a run's identity, whether it changed, its flat metrics and its tables.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from tracker.records import INTACT_VIEW, CellRecord, Record, RunIdentity, RunRecord

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

CURVES = (
    "accuracy",
    "accuracy_drop",
    "accuracy_drop_low",
    "accuracy_drop_high",
    "accuracy_relevance",
    "cosine_score",
    "cosine_similarity",
    "angular_distance",
    "relative_update",
    "gold_logprob_drop",
)
"""Fields of a `RunRecord` that a cell's run shows as curves over the layers."""

DIGITS = 10
"""Significant digits by which a published figure is another one."""
_CURVE = re.compile(rf"(attention/|mlp/)?(span\d+/)?({'|'.join(CURVES)})")

_LAYER_VALUES = (*CURVES, "mcnemar_p")

Value = str | int | float | None


@dataclass(frozen=True)
class Published:
    """What one `publish` did, in runs: the cell's own run and one for each of its runs."""

    created: int
    updated: int
    unchanged: int
    location: str
    """What a person opens: an address, or the command that shows the runs."""
    notes: tuple[str, ...] = ()
    """What else a person should know."""


@dataclass(frozen=True)
class LoggedTable:
    """Rows that a backend shows as a table; a value that is not defined is None."""

    columns: tuple[str, ...]
    rows: tuple[tuple[Value, ...], ...]


@dataclass(frozen=True)
class RemoteCell:
    """A cell that a backend holds, with the files that it was derived from."""

    key: str
    """The run key of the cell's own run."""
    name: str
    version: str
    """Changes when the files do; empty where the backend holds no such files."""
    place: str
    """What the backend finds the files by."""


class Backend(Protocol):
    """Where runs are browsed. It may be unreachable; the ledger never depends on it."""

    name: str

    def publish(
        self, cell: CellRecord, artifacts: Sequence[Path], charts: Mapping[str, Figure]
    ) -> Published:
        """Publish the cell as one run, and one more for each of its runs.

        Publishing the same again creates nothing and logs nothing twice; a changed record updates
        the runs that it has. After a failure anywhere, publishing again repairs what is missing.

        Args:
            cell: The record, complete or still growing.
            artifacts: Files to attach to the cell's run, each under its own file name.
            charts: Plotly figures of the cell's run, by name.

        Returns:
            How many runs were created, updated and left alone, and where to look at them.

        Raises:
            TrackingError: The backend refused or could not be reached.
        """

    def cells(self) -> list[RemoteCell]:
        """List the cells of the project.

        Returns:
            One entry a cell's run that was written whole.

        Raises:
            TrackingError: There is no such project, or the backend could not be reached.
        """

    def fetch(self, cell: RemoteCell, folder: Path) -> None:
        """Download the files that were attached to a cell's run.

        Args:
            cell: One of `cells`.
            folder: An empty folder for them.

        Raises:
            TrackingError: The backend could not be reached, or the files are not what was attached.
        """

    def boards(self) -> list[str]:
        """List the versions of the project's leaderboard, the oldest first.

        Returns:
            What `read_board` takes; empty where there is none yet.
        """

    def read_board(self, version: str) -> str:
        """Read one version of the leaderboard, as it was given to `add_board`."""

    def add_board(self, file: Path, tables: Mapping[str, LoggedTable]) -> str:
        """Add a version of the leaderboard.

        Args:
            file: All of it, named `BOARD_FILE`.
            tables: What people browse.

        Returns:
            What a person opens.
        """

    def add_report(
        self,
        text: str,
        files: Sequence[Path],
        tables: Mapping[str, LoggedTable],
        charts: Mapping[str, Figure],
    ) -> str:
        """Add a report.

        Args:
            text: What it says in a few paragraphs.
            files: The page, and what goes with it, each under its own file name.
            tables: What people browse.
            charts: Plotly figures, by name.

        Returns:
            What a person opens.
        """

    def user(self) -> str:
        """Say as whom the backend knows this user."""

    def close(self) -> None:
        """Release what the backend holds; it never raises."""


BOARD = "layer-leaderboard"
"""The leaderboard's name in every project."""
BOARD_FILE = "leaderboard.json"


def files_digest(files: Iterable[Path]) -> str:
    """Digest files by name and content.

    Args:
        files: The files, in any order.

    Returns:
        SHA-256 in hexadecimal.
    """
    lines = sorted(f"{f.name} {hashlib.sha256(f.read_bytes()).hexdigest()}" for f in files)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def sync_command(results: Path, to: str) -> str:
    """Say what to type when a backend is back.

    Args:
        results: The results folder.
        to: Where the runs go, as `BACKEND` or `BACKEND:PROJECT`.

    Returns:
        The command.
    """
    return f"tracker sync --to {shlex.quote(to)} --results {shlex.quote(str(results))}"


def run_key(cell: CellRecord, ablation: str) -> str:
    """Name a run the same way on every machine and every day.

    Args:
        cell: The cell that the run belongs to.
        ablation: An ablation's name, or `cell` for the cell's own run.

    Returns:
        The cell's key, what tells its view from that of the intact model by the benchmark's own
        metric, and the ablation. Layers 4 and 5 removed together are another run than layer 5
        removed where 4 is gone already, and accuracy is another figure than normalised accuracy.
    """
    key = cell.key if cell.view == INTACT_VIEW else f"{cell.key}/{cell.view}"
    return f"{key}/{ablation}"


def run_name(cell: CellRecord, layer: RunRecord) -> str:
    """Name a run where people read lists of them.

    Args:
        cell: The cell that the run belongs to.
        layer: The run.

    Returns:
        For example `layer 03 · arc_easy · SmolLM2-135M`; the zeros make names sort as numbers do.
    """
    beneath = f" without {', '.join(map(str, cell.removed))}" if cell.removed else ""
    label = layer.label(max(2, len(str(cell.model.layers - 1))))
    parts = (f"{label}{beneath}", cell.benchmark.name, cell.other_metric, cell.model.name)
    return " · ".join(filter(None, parts))


def metric_name(name: str) -> str:
    """Name a metric as every backend takes it.

    Args:
        name: Our name; lm-eval's metrics hold a comma before the filter.

    Returns:
        The name with `/` for commas, and `_` for what MLflow refuses.
    """
    folders = "/".join(part for part in name.split(",") if part)
    return re.sub(r"[^\w./ -]", "_", folders, flags=re.ASCII)


def curve_name(run: RunIdentity, figure: str) -> str:
    """Name the curve that a run's figure is a point of.

    Args:
        run: The run.
        figure: One of `CURVES`.

    Returns:
        The figure's own name for whole single layers; otherwise for example
        `attention/accuracy_drop` or `span4/accuracy_drop`.
    """
    component = "" if run.component == "layer" else f"{run.component}/"
    span = "" if run.span == 1 else f"span{run.span}/"
    return f"{component}{span}{figure}"


def is_curve(name: str) -> bool:
    """Say whether a metric of a cell's run is a curve, of whatever was removed.

    Args:
        name: The metric's name.

    Returns:
        Whether `curve_name` may have made it.
    """
    return _CURVE.fullmatch(name) is not None


def content_digest(record: Record, *also: str) -> str:
    """Digest what would be published, to tell an unchanged run from a changed one.

    Args:
        record: The record.
        *also: Whatever else the published run depends on.

    Returns:
        SHA-256 of the canonical JSON, in hexadecimal; figures count to `DIGITS` digits, since the
        last ones are those of the processor's own arithmetic.
    """
    content = [_rounded(record.model_dump(mode="json")), *also]
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}")
    if isinstance(value, dict):
        return {name: _rounded(item) for name, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list) else value


def defined(values: Mapping[str, float | None]) -> dict[str, float]:
    """Keep the values that are there: missing is not zero, and infinity is not a measurement.

    Args:
        values: Values by name.

    Returns:
        Those that are neither None nor NaN nor infinite.
    """
    return {
        name: float(value)
        for name, value in values.items()
        if value is not None and math.isfinite(value)
    }


def flat_metrics(layer: RunRecord) -> dict[str, float]:
    """Flatten a run's figures; the benchmark's own metrics come as `metric/NAME`.

    Args:
        layer: One run's record.

    Returns:
        Every defined figure by name: fractions, or a loss and its increase in the metric's own
        unit, and nats for `gold_logprob_drop`.
    """
    return {"n": float(layer.n), **defined(_layer_values(layer))}


def cell_figures(cell: CellRecord) -> dict[str, float | None]:
    """Flatten the figures of the cell itself.

    Args:
        cell: The cell.

    Returns:
        Every figure by name, None where it is not defined: fractions, or a loss in the metric's
        own unit; the correlations as `spearman/cosine_score/all`.
    """
    return {
        "n": cell.n,
        "tokens": cell.tokens,
        "compared": cell.compared,
        "compared_difference": cell.compared_difference,
        "removed_accuracy": cell.removed_accuracy,
        "removed_low": cell.removed_low,
        "removed_high": cell.removed_high,
        "baseline_accuracy": cell.baseline_accuracy,
        "baseline_low": cell.baseline_low,
        "baseline_high": cell.baseline_high,
        "chance_accuracy": cell.chance_accuracy,
        **{f"baseline_metric/{name}": value for name, value in cell.baseline_metrics.items()},
        **{f"{c.coefficient}/{c.proxy}/{c.subset}": c.value for c in cell.correlations},
    }


def absent_reasons(layer: RunRecord) -> dict[str, str]:
    """Say why figures are absent from `flat_metrics`.

    Args:
        layer: One run's record.

    Returns:
        The record's own reasons, and one for each value that is NaN or infinite.
    """
    return {**not_finite(_layer_values(layer)), **layer.reasons}


def not_finite(values: Mapping[str, float | None]) -> dict[str, str]:
    """Give a reason for every value that is a number but not a finite one.

    Args:
        values: Values by name.

    Returns:
        A reason for each NaN and each infinite value, by name.
    """
    return {
        name: f"not a finite number: {value}"
        for name, value in values.items()
        if value is not None and not math.isfinite(value)
    }


def layer_table(cell: CellRecord) -> LoggedTable:
    """Lay the runs out as rows.

    Args:
        cell: The cell.

    Returns:
        One row per run; `layer` is its first layer, 0-based, and `reasons` explains what is not
        defined.
    """
    benchmark_metrics = sorted({f"metric/{name}" for row in cell.runs for name in row.metrics})
    names = (*_LAYER_VALUES, *benchmark_metrics)
    rows: list[tuple[Value, ...]] = []
    for layer in cell.runs:
        values = flat_metrics(layer)
        reasons = "; ".join(f"{name}: {why}" for name, why in absent_reasons(layer).items())
        figures = (values.get(name) for name in names)
        which = (layer.layer, layer.component, layer.span, layer.ablation)
        rows.append((*which, layer.n, *figures, reasons or None))
    columns = ("layer", "component", "span", "ablation", "n", *names, "reasons")
    return LoggedTable(columns, tuple(rows))


def correlation_table(cell: CellRecord) -> LoggedTable:
    """Lay the correlations out as rows.

    Args:
        cell: The cell.

    Returns:
        One row per proxy, coefficient and subset of layers.
    """
    rows: list[tuple[Value, ...]] = []
    for c in cell.correlations:
        found = defined({"value": c.value, "low": c.low, "high": c.high, "p": c.p_value})
        figures = (found.get(name) for name in ("value", "low", "high", "p"))
        rows.append((c.proxy, c.coefficient, c.subset, *figures, c.n, c.documents, c.reason))
    columns = ("proxy", "coefficient", "subset", "value", "low", "high", "p_value")
    return LoggedTable((*columns, "n", "documents", "reason"), tuple(rows))


def _layer_values(layer: RunRecord) -> dict[str, float | None]:
    values: dict[str, float | None] = {name: getattr(layer, name) for name in _LAYER_VALUES}
    return values | {f"metric/{name}": value for name, value in layer.metrics.items()}

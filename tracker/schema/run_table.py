"""Define the columns of the tables of ablation runs and of proxy correlations.

Pages, terminal output, data frames and tracking backends show different selections of the columns.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from tracker.schema.answers import interval_name
from tracker.schema.changes import CHANGE_COLUMNS, WHOLE_LAYER, Change
from tracker.schema.estimates import Estimate, FigureUnit
from tracker.schema.formats import ACCURACY_FORMAT, metric_format
from tracker.schema.proxies import OBSERVED, PART_PROXIES, Proxy
from tracker.schema.records import NO_REASON, CellRecord, CorrelationRecord, RunRecord
from tracker.schema.tables import Column, ColumnValue, RowType

CELL_COLUMNS = (
    *("key", "model", "benchmark", "part"),
    *("num_fewshot", "metric", "removed", "sample_seed"),
)
"""Names of the columns that identify a row's cell."""


class CellRun(NamedTuple):
    """Row of a run table; `run` is None if the run is not measured yet."""

    cell: CellRecord
    change: Change
    run: RunRecord | None = None


def measured_runs(cells: Iterable[CellRecord]) -> list[CellRun]:
    """List the measured runs of several records as rows of a table."""
    return [CellRun(cell, run.change, run) for cell in cells for run in cell.runs]


def pick_columns(columns: Mapping[str, Column[RowType]], *names: str) -> list[Column[RowType]]:
    """Return the columns with these names, in the order of the names."""
    return [columns[name] for name in names]


def by_name(*columns: Column[RowType]) -> dict[str, Column[RowType]]:
    """Return a dictionary from column names to columns."""
    return {column.name: column for column in columns}


def cell_columns(find: Callable[[RowType], CellRecord]) -> dict[str, Column[RowType]]:
    """Define the columns for the model, the benchmark and the settings, by column name.

    `find` returns the record that contains the model and the benchmark of a table row.
    """

    values: dict[str, Callable[[CellRecord], ColumnValue]] = {
        "key": lambda cell: cell.key,
        "model": lambda cell: cell.model.name,
        "benchmark": lambda cell: cell.benchmark.name,
        "part": lambda cell: cell.benchmark.settings.get("part", "all"),
        "num_fewshot": lambda cell: cell.benchmark.num_fewshot,
        "metric": lambda cell: cell.metric,
        "removed": lambda cell: ",".join(map(str, cell.removed)),
        "sample_seed": lambda cell: cell.sample_seed,
    }

    def column(name: str) -> Column[RowType]:
        unit: FigureUnit = "count" if name in ("num_fewshot", "sample_seed") else "text"
        return Column(name.replace("_", " "), unit, lambda row: values[name](find(row)), name=name)

    return by_name(*map(column, values))


def has_only_layers(cell: CellRecord) -> bool:
    """Return whether every run of a record removes exactly one whole layer."""
    return set(cell.kinds) <= {WHOLE_LAYER}


def cell_proxies(cell: CellRecord) -> list[Proxy]:
    """List the proxies (e.g. cosine score) that tables show for the runs of a record."""
    figures = {name for run in cell.runs for name in run.proxies}
    parts = [proxy for proxy in PART_PROXIES if proxy.name in figures]
    return [*(OBSERVED if cell.whole_layers or not parts else ()), *parts]


def unobserved_columns(cells: Iterable[CellRecord]) -> set[str]:
    """Return the names of columns that are omitted because no run has a value."""
    return {"kl_divergence"} - {name for cell in cells for run in cell.runs for name in run.proxies}


def distinguishing_columns(cell: CellRecord) -> list[str]:
    """Return the names of the columns that are needed to distinguish the runs of a record.

    The column `layer` is always included. The column `component`, for example, is included if not
    all runs change whole layers.
    """
    return [
        name
        for name in dict.fromkeys(("layer", "component", "number", *CHANGE_COLUMNS))
        if name == "layer"
        or any(getattr(kind, name) != getattr(WHOLE_LAYER, name) for kind in cell.kinds)
    ]


def _members(row: CellRun) -> str | None:
    return None if row.change.members is None else ", ".join(map(str, row.change.members))


def _first_layer(row: CellRun) -> int | None:
    return row.change.first_layer


def _passes(row: CellRun) -> int:
    return row.change.repeats if row.change.intervention == "repeat" else 1


def run_columns(cell: CellRecord | None = None) -> dict[str, Column[CellRun]]:
    """Build all columns of run tables, by name.

    The labels contain the name of the metric of `cell`. If `cell` is None, the metric is the
    accuracy.
    """
    measure = metric_format(cell) if cell else ACCURACY_FORMAT
    head, unit = measure.column_head, measure.form
    without = f"{measure.level} without {'layer' if not cell or has_only_layers(cell) else 'it'}"
    layer_label = "first layer" if cell and any(kind.span != 1 for kind in cell.kinds) else "layer"
    interval = head(interval_name(cell) if cell else "95 % interval")
    return by_name(
        *cell_columns(lambda row: row.cell).values(),
        Column("component", "text", lambda row: row.change.component, name="component"),
        Column(f"{layer_label} (0-based)", "count", _first_layer, "of no layer", "layer"),
        Column("span (layers)", "count", lambda row: row.change.span, name="span"),
        Column("intervention", "text", lambda row: row.change.intervention, name="intervention"),
        Column("number (0-based)", "count", lambda row: row.change.number, name="number"),
        Column("passes", "count", _passes, name="repeats"),
        Column("layers", "text", _members, name="members"),
        Column("drawn", "text", lambda row: "drawn" if row.change.drawn else None, name="drawn"),
        Column("linear map", "text", lambda row: row.change.map, name="map"),
        _run_column("ablation", "ablation", "text", lambda _, run: run.ablation),
        _figure_column("n", "documents", "count"),
        Column("until", "text", _question, name="until"),
        Column("interval", "text", lambda row: interval_name(row.cell), name="interval"),
        _cell_column("baseline_accuracy", "baseline", measure.level_form),
        _cell_column("chance_accuracy", "chance", "percent"),
        _figure_column("accuracy", head(without), measure.level_form),
        _figure_column("accuracy_drop", head(measure.change), unit),
        _figure_column("accuracy_drop_low", head("low"), unit),
        _figure_column("accuracy_drop_high", head("high"), unit),
        _run_column("drop_interval", interval, unit, _drop_interval, interval=True),
        _figure_column("drop_sd", head("standard deviation of a document"), unit),
        _figure_column("mcnemar_p", "McNemar p", "p"),
        _figure_column("accuracy_relevance", "accuracy relevance", "relevance"),
        *(
            _figure_column(name, label, "proxy")
            for proxy in (*OBSERVED, *PART_PROXIES)
            for name, label in proxy.headings.items()
        ),
        _figure_column("rounded", "documents within rounding", "count"),
        _figure_column("drop_rounding", head("± by rounding"), unit),
        _figure_column("choice_probability_drop", "choice probability drop", "points"),
        _figure_column("choice_probability_low", "choice probability drop: low", "points"),
        _figure_column("choice_probability_high", "choice probability drop: high", "points"),
        _figure_column("gold_logprob_drop", "gold log-prob drop", "nats"),
        _figure_column("gold_logprob_low", "gold log-prob drop: low", "nats"),
        _figure_column("gold_logprob_high", "gold log-prob drop: high", "nats"),
        _figure_column("options_logprob_drop", "total log-prob drop of all options", "nats"),
        Column("reasons", "text", lambda row: _reasons_text(row) or None, name="reasons"),
    )


def metric_columns(cells: Iterable[CellRecord], prefix: str = "metric_") -> list[Column[CellRun]]:
    """Build one column for each metric in the records; column names begin with `prefix`."""
    names = {name for cell in cells for run in cell.runs for name in run.metrics}
    names |= {name for cell in cells for name in cell.baseline_metrics}

    def column(name: str) -> Column[CellRun]:
        def value(cell: CellRecord, run: RunRecord) -> Estimate:
            return _estimate(cell, run, name, run.metrics.get(name))

        return _run_column(f"{prefix}{name}", name, "metric", value)

    return [column(name) for name in sorted(names)]


def layer_column() -> Column[int]:
    """Build the column of layer numbers, for a table with one row per layer."""
    return Column("layer (0-based)", "count", lambda layer: layer)


CellCorrelation = tuple[CellRecord, CorrelationRecord]


def correlation_columns() -> dict[str, Column[CellCorrelation]]:
    """Build all columns of the table of correlations between proxies and accuracy drops."""

    def column(name: str, label: str, unit: FigureUnit) -> Column[CellCorrelation]:
        def entry(row: CellCorrelation) -> ColumnValue:
            record = row[1]
            value: ColumnValue = record.figure(name)
            if name == "between" and record.estimate.bounds:
                value = record.estimate
            reason = record.estimate.reason or NO_REASON
            return Estimate(None, reason=reason) if value is None else value

        return Column(label, unit, entry, name=name, interval=name == "between")

    return cell_columns(lambda row: row[0]) | by_name(
        column("proxy", "proxy", "text"),
        column("sample", "parts", "text"),
        column("coefficient", "coefficient", "text"),
        column("subset", "layers used", "text"),
        column("value", "value", "coefficient"),
        column("low", "low", "coefficient"),
        column("high", "high", "coefficient"),
        column("between", "95 % interval over documents", "coefficient"),
        column("p_value", "p over layers", "p"),
        column("n", "layers", "count"),
        column("documents", "documents", "count"),
        Column("reason", "text", lambda row: row[1].estimate.reason, name="reason"),
    )


def run_reasons(run: RunRecord) -> dict[str, str]:
    """Return a dict from the names of a run's undefined or non-finite values to the reasons."""
    figures: dict[str, float | None] = {n: value for n, value in run if isinstance(value, float)}
    figures |= {name: run.figure(name) for name in run.FLAT}
    figures |= {f"metric/{name}": value for name, value in run.metrics.items()}
    return {**non_finite_reasons(figures), **run.all_reasons}


def non_finite_reasons(values: Mapping[str, float | None]) -> dict[str, str]:
    """Return a dict from the names of infinite and NaN values to the reasons."""
    undefined = ((n, v) for n, v in values.items() if v is not None and not math.isfinite(v))
    return {name: f"not a finite number: {value}" for name, value in undefined}


def _run_column(
    name: str,
    label: str,
    unit: FigureUnit,
    value: Callable[[CellRecord, RunRecord], ColumnValue],
    interval: bool = False,
) -> Column[CellRun]:
    """Build a column of a run table; a run that is not measured gets a reason as its entry."""

    def entry(row: CellRun) -> ColumnValue:
        if row.run is None:
            return Estimate(None, reason=row.cell.absence_reason(row.change))
        return value(row.cell, row.run)

    return Column(label, unit, entry, name=name, interval=interval)


def _figure_column(name: str, label: str, unit: FigureUnit) -> Column[CellRun]:
    def value(cell: CellRecord, run: RunRecord) -> ColumnValue:
        return _estimate(cell, run, name, run.figure(name))

    return _run_column(name, label, unit, value)


def _estimate(cell: CellRecord, run: RunRecord, name: str, value: float | None) -> Estimate:
    """Convert a figure of a run to an Estimate, with a reason if the figure is None."""
    return Estimate(value, reason=cell.reason_of(name, run) if value is None else None)


def _drop_interval(cell: CellRecord, run: RunRecord) -> Estimate:
    if run.drop.bounds:
        return run.drop
    reason = run.reasons.get("accuracy_drop_low")
    return Estimate(None, reason=reason or cell.reason_of("accuracy_drop", run))


def _cell_column(name: str, label: str, unit: FigureUnit) -> Column[CellRun]:
    def value(row: CellRun) -> Estimate:
        return Estimate(row.cell.figure(name), reason=row.cell.reason_of(name))

    return Column(label, unit, value, name=name)


def _question(row: CellRun) -> str | None:
    return row.cell.answer.question if row.cell.answer else None


def _reasons_text(row: CellRun) -> str:
    reasons = {} if row.run is None else run_reasons(row.run)
    if row.cell.unfinished is not None:
        reasons = {"n": row.cell.unfinished, **reasons}
    return "; ".join(f"{name}: {reason}" for name, reason in reasons.items())

"""Define the columns of the tables of runs and correlations.

Pages, terminals, data frames and trackers choose from them by name. `core/tables.py` defines what a
column is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from tracker.core.answers import interval_name
from tracker.core.changes import COLUMNS, WHOLE_LAYER, Change
from tracker.core.estimates import Estimate, Unit
from tracker.core.formats import ACCURACY, measure_of
from tracker.core.proxies import OBSERVED, OF_EXPERTS, Proxy
from tracker.core.records import NO_REASON, CellRecord, CorrelationRecord, RunRecord
from tracker.core.tables import Column, Row, Value

CELL = ("key", "model", "benchmark", "part", "num_fewshot", "metric", "removed", "sample_seed")
"""Names of the columns that identify a row's cell."""


class CellRun(NamedTuple):
    """A row: a change of a cell, with its record if it is measured."""

    cell: CellRecord
    change: Change
    run: RunRecord | None = None


def runs_of(cells: Iterable[CellRecord]) -> list[CellRun]:
    """List the measured runs of some cells."""
    return [CellRun(cell, run.change, run) for cell in cells for run in cell.runs]


def pick(columns: Mapping[str, Column[Row]], *names: str) -> list[Column[Row]]:
    """Choose columns by name."""
    return [columns[name] for name in names]


def named(*columns: Column[Row]) -> dict[str, Column[Row]]:
    """Return columns by their names: name → column."""
    return {column.name: column for column in columns}


def cell_columns(find: Callable[[Row], CellRecord]) -> dict[str, Column[Row]]:
    """Return the columns that identify a row's cell."""

    def column(name: str, unit: Unit, value: Callable[[CellRecord], Value]) -> Column[Row]:
        return Column(name.replace("_", " "), unit, lambda row: value(find(row)), name=name)

    return named(
        column("key", "text", lambda cell: cell.key),
        column("model", "text", lambda cell: cell.model.name),
        column("benchmark", "text", lambda cell: cell.benchmark.name),
        column("part", "text", lambda cell: cell.benchmark.settings.get("part", "all")),
        column("num_fewshot", "count", lambda cell: cell.benchmark.num_fewshot),
        column("metric", "text", lambda cell: cell.metric),
        column("removed", "text", lambda cell: ",".join(map(str, cell.removed))),
        column("sample_seed", "count", lambda cell: cell.sample_seed),
    )


def only_layers(cell: CellRecord) -> bool:
    """Check whether every run removes one whole layer."""
    return set(cell.kinds) <= {WHOLE_LAYER}


def proxies_in(cell: CellRecord) -> list[Proxy]:
    """List the proxies of a cell's runs: of experts, of layers, or both."""
    components = {kind.component for kind in cell.kinds}
    experts = OF_EXPERTS if "expert" in components else ()
    return [*(() if components == {"expert"} else OBSERVED), *experts]


def telling_apart(cell: CellRecord) -> list[str]:
    """Choose the fewest columns that distinguish the runs of a cell.

    The layer is always one of them. Component, part, span and intervention are added where some run
    differs in them from the removal of one whole layer.
    """
    return [
        name
        for name in dict.fromkeys(("layer", "component", "number", *COLUMNS))
        if name == "layer"
        or any(getattr(kind, name) != getattr(WHOLE_LAYER, name) for kind in cell.kinds)
    ]


def _members(row: CellRun) -> str | None:
    return None if row.change.members is None else ", ".join(map(str, row.change.members))


def _passes(row: CellRun) -> int:
    return row.change.repeats if row.change.intervention == "repeat" else 1


def run_columns(cell: CellRecord | None = None) -> dict[str, Column[CellRun]]:
    """Return every column of runs, named for one cell's metric, or for accuracy."""
    measure = measure_of(cell) if cell else ACCURACY
    without = "layer" if cell is None or only_layers(cell) else "it"
    first = "first layer" if cell and any(kind.span != 1 for kind in cell.kinds) else "layer"
    between = interval_name(cell) if cell else "95 % interval"
    return named(
        *cell_columns(lambda row: row.cell).values(),
        Column("component", "text", lambda row: row.change.component, name="component"),
        Column(
            *(f"{first} (0-based)", "count", lambda row: row.change.first),
            otherwise="of no layer",
            name="layer",
        ),
        Column("span (layers)", "count", lambda row: row.change.span, name="span"),
        Column("intervention", "text", lambda row: row.change.intervention, name="intervention"),
        Column("number (0-based)", "count", lambda row: row.change.number, name="number"),
        Column("passes", "count", _passes, name="repeats"),
        Column("layers", "text", _members, name="members"),
        Column("drawn", "text", lambda row: "drawn" if row.change.drawn else None, name="drawn"),
        Column("linear map", "text", lambda row: row.change.map, name="map"),
        _measured("ablation", "ablation", "text", lambda _, run: run.ablation),
        _figure("n", "documents", "count"),
        Column("until", "text", _until, name="until"),
        Column("interval", "text", lambda row: interval_name(row.cell), name="interval"),
        _of_cell("baseline_accuracy", "baseline", measure.level_form),
        _of_cell("chance_accuracy", "chance", "percent"),
        _figure("accuracy", measure.head(f"{measure.level} without {without}"), measure.level_form),
        _figure("accuracy_drop", measure.head(measure.change), measure.form),
        _figure("accuracy_drop_low", measure.head("low"), measure.form),
        _figure("accuracy_drop_high", measure.head("high"), measure.form),
        _measured("drop_interval", measure.head(between), measure.form, _between, interval=True),
        _figure("drop_sd", measure.head("standard deviation of a document"), measure.form),
        _figure("mcnemar_p", "McNemar p", "p"),
        _figure("accuracy_relevance", "accuracy relevance", "relevance"),
        *(
            _figure(name, label, "proxy")
            for proxy in (*OBSERVED, *OF_EXPERTS)
            for name, label in proxy.headings.items()
        ),
        _figure("rounded", "documents within rounding", "count"),
        _figure("drop_rounding", measure.head("± by rounding"), measure.form),
        _figure("gold_logprob_drop", "gold log-prob drop", "nats"),
        _figure("gold_logprob_low", "gold log-prob drop: low", "nats"),
        _figure("gold_logprob_high", "gold log-prob drop: high", "nats"),
        _figure("options_logprob_drop", "log-prob drop of all options", "nats"),
        Column("reasons", "text", lambda row: _reasons(row) or None, name="reasons"),
    )


def metric_columns(cells: Iterable[CellRecord], begin: str = "metric_") -> list[Column[CellRun]]:
    """Return a column for each metric of the benchmarks; `begin` is the prefix of its name."""
    names = {name for cell in cells for run in cell.runs for name in run.metrics}
    names |= {name for cell in cells for name in cell.baseline_metrics}

    def column(name: str) -> Column[CellRun]:
        def value(cell: CellRecord, run: RunRecord) -> Estimate:
            return _said(cell, run, name, run.metrics.get(name))

        return _measured(f"{begin}{name}", name, "metric", value)

    return [column(name) for name in sorted(names)]


def layer_column() -> Column[int]:
    """Return the column of a table whose rows are layers."""
    return Column("layer (0-based)", "count", lambda layer: layer)


def correlation_columns() -> dict[str, Column[tuple[CellRecord, CorrelationRecord]]]:
    """Return every column of correlations."""

    def column(name: str, label: str, unit: Unit) -> Column[tuple[CellRecord, CorrelationRecord]]:
        def entry(row: tuple[CellRecord, CorrelationRecord]) -> Value:
            record = row[1]
            found: Value = record.figure(name)
            if name == "between" and record.estimate.between:
                found = record.estimate
            why = record.estimate.reason or NO_REASON
            return Estimate(None, reason=why) if found is None else found

        return Column(label, unit, entry, name=name, interval=name == "between")

    return cell_columns(lambda row: row[0]) | named(
        column("proxy", "proxy", "text"),
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


def reasons_of(run: RunRecord) -> dict[str, str]:
    """Return the reasons of a run's undefined figures by name, including infinite and NaN ones."""
    figures: dict[str, float | None] = {n: value for n, value in run if isinstance(value, float)}
    figures |= {name: run.figure(name) for name in run.FLAT}
    figures |= {f"metric/{name}": value for name, value in run.metrics.items()}
    return {**not_finite(figures), **run.all_reasons}


def not_finite(values: Mapping[str, float | None]) -> dict[str, str]:
    """Return a reason for every value that is infinite or NaN."""
    return {
        name: f"not a finite number: {value}"
        for name, value in values.items()
        if value is not None and not math.isfinite(value)
    }


def _measured(
    name: str,
    label: str,
    unit: Unit,
    value: Callable[[CellRecord, RunRecord], Value],
    interval: bool = False,
) -> Column[CellRun]:
    """Return a column of measured runs, which gives a reason for runs that are not measured."""

    def entry(row: CellRun) -> Value:
        if row.run is None:
            return Estimate(None, reason=row.cell.absence(row.change))
        return value(row.cell, row.run)

    return Column(label, unit, entry, name=name, interval=interval)


def _figure(name: str, label: str, unit: Unit) -> Column[CellRun]:
    def value(cell: CellRecord, run: RunRecord) -> Value:
        return _said(cell, run, name, run.figure(name))

    return _measured(name, label, unit, value)


def _said(cell: CellRecord, run: RunRecord, name: str, value: float | None) -> Estimate:
    """Return a run's figure as an estimate, or the reason why it is undefined."""
    return Estimate(value, reason=cell.reason_of(name, run) if value is None else None)


def _between(cell: CellRecord, run: RunRecord) -> Estimate:
    if run.drop.between:
        return run.drop
    why = run.reasons.get("accuracy_drop_low")
    return Estimate(None, reason=why or cell.reason_of("accuracy_drop", run))


def _of_cell(name: str, label: str, unit: Unit) -> Column[CellRun]:
    def value(row: CellRun) -> Estimate:
        return Estimate(row.cell.figure(name), reason=row.cell.reason_of(name))

    return Column(label, unit, value, name=name)


def _until(row: CellRun) -> str | None:
    return row.cell.answer.question if row.cell.answer else None


def _reasons(row: CellRun) -> str:
    reasons = {} if row.run is None else reasons_of(row.run)
    if row.cell.unfinished is not None:
        reasons = {"n": row.cell.unfinished, **reasons}
    return "; ".join(f"{name}: {why}" for name, why in reasons.items())

"""Turns cell records into sentences, display tables and data frames.

Display tables are for people: percentage points (pp), rounded, with units in the headers. Data
frames are for code: fractions, unrounded, snake_case columns.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeGuard

import pandas as pd

from tracker.records import CellRecord, CorrelationRecord, LayerRecord

DASH = "–"
MINUS = "−"
NO_REASON = "no reason was recorded"
NOT_MEASURED = "asked for, but not measured yet"
PROXIES = {
    "cosine_score": "cosine score (1 − cos)",
    "angular_distance": "angular distance",
    "relative_update": "relative update",
}
COEFFICIENTS = {"spearman": "Spearman", "kendall": "Kendall tau-b", "pearson": "Pearson"}
SUBSETS = {"all": "all layers", "inner": "without the two outer layers at each end"}
LAYER_FIELDS = (
    "accuracy",
    "accuracy_drop",
    "accuracy_drop_low",
    "accuracy_drop_high",
    "mcnemar_p",
    "accuracy_relevance",
    "cosine_similarity",
    "cosine_score",
    "angular_distance",
    "relative_update",
    "gold_logprob_drop",
)


@dataclass(frozen=True)
class Value:
    """One table cell as people read it; a dash carries the reason why it is undefined."""

    text: str
    reason: str = ""


@dataclass(frozen=True)
class Column:
    """One table column: its header with the unit, and whether it holds numbers."""

    label: str
    numeric: bool = True


@dataclass(frozen=True)
class Table:
    """A table ready to be set: caption, columns, rows (the first value heads the row), notes."""

    caption: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Value, ...], ...]
    notes: tuple[str, ...] = ()


# Numbers in front of people


def fixed(value: float, digits: int) -> str:
    """Round to a fixed number of digits, with a true minus sign and no negative zero.

    Args:
        value: The number.
        digits: Digits after the decimal point.

    Returns:
        For example `−0.25`.
    """
    return f"{value:z.{digits}f}".replace("-", MINUS)


def points(fraction: float) -> str:
    """Write a fraction as percentage points or per cent, without the unit.

    Args:
        fraction: For example 0.113.

    Returns:
        For example `11.3`.
    """
    return fixed(100 * fraction, 1)


def p_value(p: float) -> str:
    """Write a p-value for a table: three decimals, or one significant digit below 0.001.

    Args:
        p: The p-value.

    Returns:
        For example `0.012` or `3e−5`.
    """
    if not 0 < p < 0.001:
        return f"{p:.3f}"
    digit, exponent = f"{p:.0e}".split("e")
    return f"{digit}e{MINUS}{abs(int(exponent))}"


def defined(value: float | None) -> TypeGuard[float]:
    """Say whether a value can be shown: there, and finite.

    Args:
        value: The value, or None.

    Returns:
        False for None, NaN and infinities.
    """
    return value is not None and math.isfinite(value)


def interval(low: float | None, high: float | None, write: Callable[[float], str]) -> str:
    """Write an interval.

    Args:
        low: Its lower end, or None.
        high: Its upper end, or None.
        write: How one end is written.

    Returns:
        For example `1.2 to 4.0`, or an empty string when an end is undefined.
    """
    return f"{write(low)} to {write(high)}" if defined(low) and defined(high) else ""


def reason_of(cell: CellRecord, field: str, record: LayerRecord | None = None) -> str:
    """Say why a value is undefined.

    Args:
        cell: The cell.
        field: The field's name, or a metric's.
        record: The layer whose field it is; None for the cell's own fields.

    Returns:
        The reason recorded for the layer, else for the cell, else a text that says that there is
        none.
    """
    for reasons in (record.reasons if record else {}, cell.reasons):
        found = reasons.get(field) or reasons.get(f"metrics.{field}")
        if found:
            return found
    return NO_REASON


def _value(number: float | None, write: Callable[[float], str], reason: str) -> Value:
    if number is None:
        return Value(DASH, reason)
    if not math.isfinite(number):
        return Value(DASH, f"not a finite number ({number})")
    return Value(write(number))


def _text(text: str, reason: str) -> Value:
    return Value(text) if text else Value(DASH, reason)


def _with_interval(
    numbers: tuple[float | None, float | None, float | None],
    write: Callable[[float], str],
    reason: str,
) -> Value:
    number, low, high = numbers
    value = _value(number, write, reason)
    between = interval(low, high, write)
    return Value(f"{value.text} ({between})") if between and not value.reason else value


def _four(number: float) -> str:
    return fixed(number, 4)


def _three(number: float) -> str:
    return fixed(number, 3)


def _two(number: float) -> str:
    return fixed(number, 2)


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def layer_list(layers: Sequence[int], total: int) -> str:
    """Name layers in a sentence.

    Args:
        layers: The layers, 0-based.
        total: How many layers there are to name.

    Returns:
        For example `layer 3`, `layers 3, 5` or `all 30 layers`.
    """
    if len(layers) == total and total > 1:
        return f"all {total} layers"
    return f"layer{'s' if len(layers) != 1 else ''} {', '.join(str(layer) for layer in layers)}"


# Sentences


def correlation(
    cell: CellRecord, proxy: str, coefficient: str, subset: str
) -> CorrelationRecord | None:
    """Find one correlation of a cell.

    Args:
        cell: The cell.
        proxy: For example `cosine_score`.
        coefficient: For example `spearman`.
        subset: `all` or `inner`.

    Returns:
        The record, or None when the cell does not hold it.
    """
    for record in cell.correlations:
        if (record.proxy, record.coefficient, record.subset) == (proxy, coefficient, subset):
            return record
    return None


def correlation_text(record: CorrelationRecord | None) -> str:
    """Write one correlation with its interval, its samples and its p-value.

    Args:
        record: The correlation, or None when the cell does not hold it.

    Returns:
        For example `0.66 (95 % interval 0.41 to 0.80; 30 layers, 100 documents; permutation
        p < 0.001)`, or why it is undefined.
    """
    if record is None:
        return "not computed"
    samples = f"{_count(record.n, 'layer')}, {_count(record.documents, 'document')}"
    if not defined(record.value):
        return f"undefined ({record.reason or NO_REASON}; {samples})"
    between = interval(record.low, record.high, _two)
    parts = [
        f"95 % interval {between}" if between else f"no interval: {record.reason or NO_REASON}",
        samples,
    ]
    if defined(record.p_value):
        p = "< 0.001" if record.p_value < 0.001 else f"= {record.p_value:.3f}"
        parts.append(f"permutation p {p}")
    return f"{_two(record.value)} ({'; '.join(parts)})"


def sentence(cell: CellRecord) -> str:
    """Say in one line how well the cosine score ranks the layers.

    Args:
        cell: The cell.

    Returns:
        The Spearman correlation of cosine score and accuracy drop over all layers and over the
        inner ones, or why it is undefined.
    """
    all_layers = correlation_text(correlation(cell, "cosine_score", "spearman", "all"))
    inner = correlation_text(correlation(cell, "cosine_score", "spearman", "inner"))
    return (
        f"Spearman of cosine score and accuracy drop: {all_layers}; "
        f"without the two outer layers at each end {inner}."
    )


def summary(cells: Sequence[CellRecord]) -> str:
    """Say in a few sentences what these cells show.

    Args:
        cells: The cells of one page.

    Returns:
        A paragraph of plain text.
    """
    if not cells:
        return "No cell is measured yet, so there is nothing to show."
    models = len({model_key(cell) for cell in cells})
    text = (
        f"{_count(models, 'model')}, {_count(len(cells), 'cell')} (one per model and benchmark). "
        "Each layer was removed in turn. Below, the accuracy that was really lost stands beside "
        "the cosine score, the cheap proxy that is commonly used in its place. "
    )
    records = [correlation(cell, "cosine_score", "spearman", "all") for cell in cells]
    values = [r for r in records if r is not None and defined(r.value)]
    if not values:
        return text + "No rank correlation of the two is defined here; each cell says why."
    numbers = sorted(r.value for r in values if defined(r.value))
    above = sum(1 for r in values if r.low is not None and r.low > 0)
    span = (
        f"is {_two(numbers[0])}"
        if len(numbers) == 1
        else f"runs from {_two(numbers[0])} to {_two(numbers[-1])}"
    )
    text += (
        f"Their Spearman correlation over the layers {span} (1 = the same order); in "
        f"{above} of {_count(len(cells), 'cell')} its 95 % interval lies above 0"
    )
    without = len(cells) - len(values)
    return f"{text}, in {without} it is undefined." if without else f"{text}."


def most_critical(cell: CellRecord, count: int = 3) -> list[LayerRecord]:
    """Find the layers whose removal costs most accuracy.

    Args:
        cell: The cell.
        count: How many at most.

    Returns:
        Layers with a positive accuracy drop, the largest first; ties in layer order.
    """
    drops = [(r.accuracy_drop, r) for r in cell.layers if defined(r.accuracy_drop)]
    costly = [(drop, r) for drop, r in drops if drop > 0]
    return [r for _, r in sorted(costly, key=lambda pair: (-pair[0], pair[1].layer))[:count]]


def warnings(cell: CellRecord) -> tuple[str, ...]:
    """Say what a reader must know before trusting the cell's numbers.

    Args:
        cell: The cell.

    Returns:
        One sentence for each: missing layers, undefined values of the cell, a weak baseline.
    """
    found = []
    if cell.missing_layers:
        names = layer_list(cell.missing_layers, 0)
        found.append(f"Incomplete: {names} asked for, but not measured yet.")
    for field, reason in cell.reasons.items():
        found.append(f"{_words(field)} is undefined: {reason}.")
    chance = cell.chance_accuracy
    if defined(cell.baseline_accuracy) and cell.baseline_accuracy <= chance:
        found.append("The intact model is at or below chance: its layers have little to lose.")
    elif defined(cell.baseline_low) and cell.baseline_low <= chance:
        found.append(
            "The 95 % interval of the baseline reaches down to chance: the drops say little."
        )
    return tuple(found)


def _words(field: str) -> str:
    return (field[:1].upper() + field[1:]).replace("_", " ")


# Groups and labels


def model_key(cell: CellRecord) -> tuple[str, str, str]:
    """Say which model a cell belongs to.

    Args:
        cell: The cell.

    Returns:
        Its name, fingerprint and dtype; cells with equal keys share a section of the page.
    """
    return (cell.model.name, cell.model.fingerprint, cell.model.dtype)


def by_model(cells: Sequence[CellRecord]) -> list[list[CellRecord]]:
    """Group cells by model, in order of first appearance.

    Args:
        cells: The cells.

    Returns:
        One list for each model.
    """
    groups: dict[tuple[str, str, str], list[CellRecord]] = {}
    for cell in cells:
        groups.setdefault(model_key(cell), []).append(cell)
    return list(groups.values())


def benchmark_labels(cells: Sequence[CellRecord]) -> list[str]:
    """Name the benchmark of each cell of one model, so that no two names are equal.

    Args:
        cells: Cells of one model.

    Returns:
        For example `arc_easy · 0-shot`, with the cell's key where that alone is ambiguous.
    """
    labels = [
        f"{cell.benchmark.name} · {cell.benchmark.num_fewshot}-shot"
        + (" · chat" if cell.benchmark.apply_chat_template else "")
        for cell in cells
    ]
    return [
        f"{label} · {cell.key[:8]}" if labels.count(label) > 1 else label
        for label, cell in zip(labels, cells, strict=True)
    ]


# Display tables


def overview_table(cells: Sequence[CellRecord]) -> Table:
    """Set one row for each cell.

    Args:
        cells: The cells of one page.

    Returns:
        Model, benchmark, documents, baseline, chance, extreme layers and Spearman.
    """
    columns = (
        Column("model", numeric=False),
        Column("benchmark", numeric=False),
        Column("documents"),
        Column("baseline accuracy (95 % interval), %"),
        Column("chance (%)"),
        Column("most critical layers, 0-based (drop, pp)", numeric=False),
        Column("highest cosine score, layers 0-based (1 − cos)", numeric=False),
        Column("Spearman of cosine score and drop (95 % interval)"),
    )
    rows, notes = [], []
    for cell in cells:
        critical = ", ".join(
            f"{r.layer}\u00a0({points(r.accuracy_drop or 0)})" for r in most_critical(cell)
        )
        scored = [(-r.cosine_score, r.layer) for r in cell.layers if defined(r.cosine_score)]
        record = correlation(cell, "cosine_score", "spearman", "all")
        why = (record.reason or NO_REASON) if record else "not computed"
        if record is None or not defined(record.value):
            notes.append(f"{cell.title}: Spearman is undefined: {why}.")
        if not defined(cell.baseline_accuracy):
            reason = reason_of(cell, "baseline_accuracy")
            notes.append(f"{cell.title}: the baseline accuracy is undefined: {reason}.")
        rows.append(
            (
                Value(cell.model.name),
                Value(f"{cell.benchmark.name} · {cell.benchmark.num_fewshot}-shot · {cell.metric}"),
                Value(f"{cell.n:,}"),
                _with_interval(
                    (cell.baseline_accuracy, cell.baseline_low, cell.baseline_high),
                    points,
                    reason_of(cell, "baseline_accuracy"),
                ),
                Value(points(cell.chance_accuracy)),
                _text(critical, "no layer has a positive accuracy drop"),
                _text(
                    ", ".join(
                        f"{layer}\u00a0({_two(-score)})" for score, layer in sorted(scored)[:3]
                    ),
                    "no layer has a cosine score",
                ),
                _with_interval(
                    (record.value, record.low, record.high) if record else (None, None, None),
                    _two,
                    why,
                ),
            )
        )
    caption = (
        "One row per model and benchmark. Most critical: the layers whose removal costs most "
        "accuracy. The cosine score would name the layers of the next column instead."
    )
    return Table(caption, columns, tuple(rows), tuple(notes))


_LAYER_COLUMNS: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("accuracy", "accuracy without layer (%)", points),
    ("accuracy_drop", "accuracy drop (pp)", points),
    ("interval", "95 % interval (pp)", points),
    ("mcnemar_p", "McNemar p", p_value),
    ("accuracy_relevance", "accuracy relevance", _three),
    ("cosine_score", "cosine score (1 − cos)", _four),
    ("angular_distance", "angular distance (÷ π)", _four),
    ("relative_update", "relative update (ratio of norms)", _four),
    ("gold_logprob_drop", "gold log-prob drop (nats)", _three),
)


def layer_rows(cell: CellRecord) -> list[dict[str, Value]]:
    """Write every layer's numbers as people read them.

    Args:
        cell: The cell.

    Returns:
        One dict for each layer in layer order: `layer`, `documents`, the fields of the layer
        table (`interval` is that of the drop) and `metric:NAME` for each metric. Layers that are
        not measured yet are there too, with dashes.
    """
    names = metric_names(cell)
    rows: dict[int, dict[str, Value]] = {}
    for record in cell.layers:
        row = {"layer": Value(str(record.layer)), "documents": Value(f"{record.n:,}")}
        for field, _, write in _LAYER_COLUMNS:
            if field == "interval":
                why = record.reasons.get("accuracy_drop_low") or reason_of(
                    cell, "accuracy_drop", record
                )
                low, high = record.accuracy_drop_low, record.accuracy_drop_high
                row[field] = _text(interval(low, high, write), why)
            else:
                row[field] = _value(getattr(record, field), write, reason_of(cell, field, record))
        for name in names:
            row[f"metric:{name}"] = _value(
                record.metrics.get(name), _four, reason_of(cell, name, record)
            )
        rows[record.layer] = row
    for layer in cell.missing_layers:
        if layer not in rows:
            fields = ["documents", *(f for f, _, _ in _LAYER_COLUMNS)]
            fields += [f"metric:{name}" for name in names]
            dashes = {field: Value(DASH, NOT_MEASURED) for field in fields}
            rows[layer] = {"layer": Value(str(layer)), **dashes}
    return [rows[layer] for layer in sorted(rows)]


def metric_names(cell: CellRecord) -> list[str]:
    """List the benchmark's metrics.

    Args:
        cell: The cell.

    Returns:
        The names of all metrics that the baseline or any layer reports, sorted.
    """
    names = set(cell.baseline_metrics)
    for record in cell.layers:
        names.update(record.metrics)
    return sorted(names)


def layer_table(cell: CellRecord) -> Table:
    """Set one row for each layer of a cell.

    Args:
        cell: The cell.

    Returns:
        The table, with notes on its p-values and on every undefined value.
    """
    rows = layer_rows(cell)
    counts = sorted({record.n for record in cell.layers})
    labels = {"layer": "layer (0-based)"}
    labels |= {"documents": "documents"} if len(counts) > 1 else {}
    labels |= {field: label for field, label, _ in _LAYER_COLUMNS}
    labels |= {f"metric:{name}": name for name in metric_names(cell)}
    baseline = ", ".join(
        f"{name} {_value(cell.baseline_metrics.get(name), _four, '').text}"
        for name in metric_names(cell)
    )
    notes = []
    tests = sum(1 for record in cell.layers if defined(record.mcnemar_p))
    if tests:
        notes.append(
            f"{_count(tests, 'test')}: unadjusted p-values, about {0.05 * tests:.1f} expected "
            "below 0.05 by chance even if no layer mattered. The largest drop is picked from "
            f"{_count(tests, 'noisy estimate')}, so it tends to be overstated."
        )
    for field, label in labels.items():
        notes += _undefined_notes(label, [(row["layer"].text, row[field]) for row in rows])
    return Table(
        f"{cell.title}: every layer"
        + (f", {_count(counts[0], 'document')} each" if len(counts) == 1 else "")
        + f". Accuracy is {cell.metric}; the metrics at the right are as lm-eval reports them. "
        f"Baseline: {baseline or DASH}.",
        tuple(Column(label) for label in labels.values()),
        tuple(tuple(row[field] for field in labels) for row in rows),
        tuple(notes),
    )


def _undefined_notes(label: str, values: Iterable[tuple[str, Value]]) -> list[str]:
    values = list(values)
    layers: dict[str, list[int]] = {}
    for layer, value in values:
        if value.reason and value.reason != NOT_MEASURED:
            layers.setdefault(value.reason, []).append(int(layer))
    return [
        f"{label}: undefined for {layer_list(found, len(values))}: {reason}."
        for reason, found in layers.items()
    ]


def correlation_table(cell: CellRecord) -> Table:
    """Set one row for each proxy, coefficient and subset of layers.

    Args:
        cell: The cell.

    Returns:
        The table; the notes say why a coefficient is undefined.
    """
    columns = (
        Column("proxy", numeric=False),
        Column("coefficient", numeric=False),
        Column("layers used", numeric=False),
        Column("value"),
        Column("95 % interval"),
        Column("permutation p"),
        Column("layers"),
        Column("documents"),
    )
    rows, notes = [], []
    for record in cell.correlations:
        why = record.reason or NO_REASON
        proxy = PROXIES.get(record.proxy, record.proxy)
        rows.append(
            (
                Value(proxy),
                Value(COEFFICIENTS[record.coefficient]),
                Value(record.subset),
                _value(record.value, _two, why),
                _text(interval(record.low, record.high, _two), why),
                _value(record.p_value, p_value, why),
                Value(f"{record.n:,}"),
                Value(f"{record.documents:,}"),
            )
        )
        if not defined(record.value):
            name = COEFFICIENTS[record.coefficient]
            notes.append(f"{name}, {proxy}, {SUBSETS[record.subset]}: undefined: {why}.")
    caption = (
        f"{cell.title}: how well each proxy ranks the layers by accuracy drop. The sample is the "
        "layers (inner = without the first two and the last two); the interval resamples the "
        "documents."
    )
    return Table(caption, columns, tuple(rows), tuple(notes))


def relevance_table(cells: Sequence[CellRecord]) -> Table:
    """Set the numbers behind a heat map: layers × benchmarks of one model.

    Args:
        cells: Cells of one model.

    Returns:
        The accuracy relevance of every layer on every benchmark.
    """
    layers = sorted({layer for cell in cells for layer in all_layers(cell)})
    by_layer = [{record.layer: record for record in cell.layers} for cell in cells]
    rows = []
    for layer in layers:
        row = [Value(str(layer))]
        for cell, records in zip(cells, by_layer, strict=True):
            number, reason = relevance(cell, records.get(layer))
            row.append(_value(number, _three, reason))
        rows.append(tuple(row))
    columns = (Column("layer (0-based)"), *(Column(label) for label in benchmark_labels(cells)))
    return Table(f"{cells[0].model.name}: accuracy relevance.", columns, tuple(rows))


def all_layers(cell: CellRecord) -> list[int]:
    """List the layers of a cell, measured or missing.

    Args:
        cell: The cell.

    Returns:
        Layer numbers in order.
    """
    return sorted({record.layer for record in cell.layers} | set(cell.missing_layers))


def relevance(cell: CellRecord, record: LayerRecord | None) -> tuple[float | None, str]:
    """Find the accuracy relevance of one layer.

    Args:
        cell: The cell.
        record: The layer's record, or None when the cell does not hold the layer.

    Returns:
        The value, and the reason when it is None.
    """
    if record is None:
        return None, NOT_MEASURED
    value = record.accuracy_relevance
    if defined(value):
        return value, ""
    return None, reason_of(cell, "accuracy_relevance", record)


def provenance_table(cell: CellRecord) -> Table:
    """Set what the cell's numbers depend on.

    Args:
        cell: The cell.

    Returns:
        Two columns: what, and its value.
    """
    model, benchmark = cell.model, cell.benchmark
    template = "yes" if benchmark.apply_chat_template else "no"
    facts = {
        "model source": model.source,
        "model revision": model.revision or "none (files)",
        "model fingerprint": model.fingerprint,
        "architecture": f"{model.architecture}, {model.layers} layers, "
        f"{model.parameters:,} parameters",
        "dtype": model.dtype,
        "benchmark": benchmark.name,
        "data source": benchmark.data,
        "metric": cell.metric,
        "few-shot examples": str(benchmark.num_fewshot),
        "few-shot seed": "none drawn" if benchmark.seed is None else str(benchmark.seed),
        "chat template": template,
        "documents measured": f"{cell.n:,}",
        "tokens behind the proxies": f"{cell.tokens:,}",
    }
    if len(benchmark.tasks) > 1:
        facts["group accuracy"] = (
            "tasks weighted by their documents"
            if benchmark.weight_by_size
            else "every task weighs the same"
        )
    facts["ledger key"] = cell.key
    pairs = [*facts.items(), *cell.provenance.items()]
    rows = [(Value(name), Value(text)) for name, text in pairs]
    columns = (Column("what", numeric=False), Column("value", numeric=False))
    return Table(f"{cell.title}: what the numbers depend on.", columns, tuple(rows))


def task_table(cell: CellRecord) -> Table:
    """Set the lm-eval tasks of a cell.

    Args:
        cell: The cell.

    Returns:
        One row for each task, with its version, split and fingerprint.
    """
    columns = (
        Column("task", numeric=False),
        Column("version", numeric=False),
        Column("split", numeric=False),
        Column("documents in the split"),
        Column("metrics (aggregation)", numeric=False),
        Column("fingerprint", numeric=False),
    )
    rows = tuple(
        (
            Value(task.name),
            Value(task.version),
            Value(task.split),
            Value(f"{task.documents:,}"),
            Value(", ".join(f"{name} ({how})" for name, how in sorted(task.metrics.items()))),
            Value(task.fingerprint),
        )
        for task in cell.benchmark.tasks
    )
    return Table(f"{cell.title}: lm-eval tasks.", columns, rows)


# Data frames

_CELL_COLUMNS = ("key", "model", "benchmark", "num_fewshot", "metric")


def _cell_columns(cell: CellRecord) -> dict[str, object]:
    return {
        "key": cell.key,
        "model": cell.model.name,
        "benchmark": cell.benchmark.name,
        "num_fewshot": cell.benchmark.num_fewshot,
        "metric": cell.metric,
    }


def layer_frame(cells: Sequence[CellRecord]) -> pd.DataFrame:
    """Put every measured layer into a data frame.

    Args:
        cells: The cells.

    Returns:
        One row for each model, benchmark and layer (0-based). Accuracies and drops are
        fractions; an undefined value is NaN and `reasons` says why. lm-eval's own metrics stand
        in columns `metric_NAME`.
    """
    extra = sorted({f"metric_{name}" for cell in cells for name in metric_names(cell)})
    numbers = ["baseline_accuracy", "chance_accuracy", *LAYER_FIELDS, *extra]
    rows = [
        {
            **_cell_columns(cell),
            "layer": record.layer,
            "n": record.n,
            "baseline_accuracy": cell.baseline_accuracy,
            "chance_accuracy": cell.chance_accuracy,
            **{field: getattr(record, field) for field in LAYER_FIELDS},
            **{f"metric_{name}": value for name, value in record.metrics.items()},
            "reasons": "; ".join(f"{name}: {why}" for name, why in record.reasons.items()),
        }
        for cell in cells
        for record in sorted(cell.layers, key=lambda record: record.layer)
    ]
    return _frame(rows, [*_CELL_COLUMNS, "layer", "n", *numbers, "reasons"], numbers)


def correlation_frame(cells: Sequence[CellRecord]) -> pd.DataFrame:
    """Put every correlation into a data frame.

    Args:
        cells: The cells.

    Returns:
        One row for each model, benchmark, proxy, coefficient and subset; `n` counts layers. An
        undefined value is NaN and `reason` says why.
    """
    fields = list(CorrelationRecord.model_fields)
    rows = [
        {**_cell_columns(cell), **record.model_dump()}
        for cell in cells
        for record in cell.correlations
    ]
    return _frame(rows, [*_CELL_COLUMNS, *fields], ["value", "low", "high", "p_value"])


def _frame(
    rows: Sequence[Mapping[str, object]], columns: list[str], numbers: Sequence[str]
) -> pd.DataFrame:
    frame = pd.DataFrame(list(rows), columns=columns)
    # A column that is undefined everywhere would otherwise hold Python objects.
    return frame.astype(dict.fromkeys(numbers, "float64"))

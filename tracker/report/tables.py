"""Display tables for people: percentage points (pp), rounded, with units in the headers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from tracker.core.answers import interval_name
from tracker.core.records import (
    NO_REASON,
    NOT_MEASURED,
    WHOLE_LAYER,
    CellRecord,
    RunIdentity,
    RunRecord,
    layers_of,
)
from tracker.report.caveats import provenance_notes
from tracker.report.formats import (
    DASH,
    counted,
    defined,
    fixed,
    measure_of,
    p_value,
    points,
    two_digits,
)
from tracker.report.sentences import PROXY_NAMES
from tracker.report.table import (
    Column,
    Table,
    Value,
    between,
    numbers,
    shown,
    texts,
    with_interval,
    worded,
)
from tracker.report.wording import (
    benchmark_labels,
    correlation,
    most_critical,
    power_sentence,
    row_labels,
    run_list,
)
from tracker.stats.ratios import RATIO

PROXIES = {**PROXY_NAMES, "cosine_score": "cosine score (1 − cos)"}
COEFFICIENTS = {"spearman": "Spearman", "kendall": "Kendall tau-b", "pearson": "Pearson"}
SUBSETS = {"all": "all layers", "inner": "without the two outer layers at each end"}
COMPONENT = "component"
INTERVENTION = "intervention"
SPAN = "span (layers)"
_three = partial(fixed, digits=3)
_four = partial(fixed, digits=4)


_Show = Callable[[RunRecord], Value]


def overview_table(cells: Sequence[CellRecord]) -> Table:
    """Set one row a cell: documents, baseline, chance, extreme layers and Spearman."""
    baseline_label = "baseline accuracy (95 % interval), %"
    critical_label = "most critical layers, 0-based (drop, pp)"
    drop = "drop"
    if not all(cell.higher_is_better for cell in cells):
        baseline_label = "baseline (95 % interval), accuracy in % or loss"
        critical_label = "most critical layers, 0-based (accuracy drop in pp, or loss increase)"
        drop = "drop or increase"
    columns = (
        *texts("model", "benchmark"),
        *numbers("documents", baseline_label, "chance (%)"),
        *texts(critical_label, "highest cosine score, layers 0-based (1 − cos)"),
        *numbers(f"Spearman of cosine score and {drop} (95 % interval)"),
    )
    labels = row_labels(cells)
    rows, notes = tuple(map(_overview_row, cells, labels)), []
    for cell, (_, extra), row in zip(cells, labels, rows, strict=True):
        *_, baseline, _, _, _, spearman = row
        title = " · ".join(filter(None, (cell.title, extra)))
        if spearman.reason:
            notes.append(f"{title}: Spearman is undefined: {spearman.reason}.")
        if baseline.reason:
            level = measure_of(cell).level
            notes.append(f"{title}: the baseline {level} is undefined: {baseline.reason}.")
    notes += provenance_notes(cells)
    caption = (
        "Most critical: the layers whose removal, each alone, costs most accuracy. The next "
        "column: those that the cosine score would name."
    )
    return Table(caption, columns, rows, tuple(notes))


def _overview_row(cell: CellRecord, label: tuple[str, str]) -> tuple[Value, ...]:
    model, extra = label
    measure = measure_of(cell)
    costly = (
        f"{r.layer}\u00a0({measure.write(r.accuracy_drop or 0)})"
        for r in most_critical(cell.whole_layers)
    )
    scores = sorted(
        (-r.cosine_score, r.layer) for r in cell.whole_layers if defined(r.cosine_score)
    )
    scored = (f"{layer}\u00a0({two_digits(-score)})" for score, layer in scores[:3])
    baseline = shown(
        cell.baseline_accuracy,
        measure.write,
        cell.reason_of("baseline_accuracy"),
        scale=measure.scale,
    )
    rank = Value(DASH, "not computed")
    if found := correlation(cell):
        rank = shown(found.value, two_digits, found.reason or NO_REASON)
        rank = with_interval(rank, found.low, found.high, two_digits)
    metric = cell.metric if cell.higher_is_better else f"{cell.metric} ({measure.unit})"
    shots = f"{cell.benchmark.num_fewshot}-shot"
    which = (cell.benchmark.title, shots, metric, cell.beneath, cell.drawn, extra)
    no_drop = f"no layer has a positive {measure.change}"
    if cell.runs and not cell.whole_layers:
        no_drop = "no whole single layer was removed"
    return (
        Value(model),
        Value(" · ".join(filter(None, which))),
        Value(cell.counted),
        with_interval(
            baseline, cell.baseline_low, cell.baseline_high, measure.write, scale=measure.scale
        ),
        shown(cell.chance_accuracy, points, cell.reason_of("chance_accuracy"), scale=100),
        worded(", ".join(costly), no_drop),
        worded(", ".join(scored), "no layer has a cosine score"),
        rank,
    )


def layer_table(cell: CellRecord) -> Table:
    """Set one row for each run of a cell; runs that are not measured yet hold dashes.

    Its notes say what its p-values mean, and why each undefined value is undefined.
    """
    notes = []
    tests = sum(1 for record in cell.runs if defined(record.mcnemar_p))
    if tests:
        notes.append(
            f"{counted(tests, 'test')}: unadjusted p-values, about {0.05 * tests:.1f} expected "
            "below 0.05 by chance even if nothing mattered. The largest drop is picked from "
            f"{counted(tests, 'noisy estimate')}, so it tends to be overstated."
        )
    if power := power_sentence(cell, cell.runs):
        notes.append(power)
    runs = cell.all_runs
    names = run_columns(cell)
    named = [names.of(run) for run in runs]
    columns = [[Value(name[i]) for name in named] for i in range(len(names.labels))]
    headers = [Column(label, label != COMPONENT) for label in names.labels]
    for label, show in _layer_columns(cell):
        column = [
            show(run) if isinstance(run, RunRecord) else Value(DASH, cell.absence(run))
            for run in runs
        ]
        headers.append(Column(label))
        columns.append(column)
        notes += _undefined_notes(label, cell, runs, column)
    mismatched: dict[str, list[RunIdentity]] = {}
    for record in cell.runs:
        if why := record.reasons.get("provenance"):
            mismatched.setdefault(why, []).append(record)
    notes += [
        f"{run_list(which, cell)[:1].upper()}{run_list(which, cell)[1:]}: {why}."
        for why, which in mismatched.items()
    ]
    counts = {record.n for record in cell.runs}
    each = f", {counted(counts.pop(), 'document')} each" if len(counts) == 1 else ""
    baseline = ", ".join(
        f"{name} {shown(cell.baseline_metrics.get(name), _four, '').text}"
        for name in _metric_names(cell)
    )
    ours = _is_corpus(cell)
    each_one = "layer" if names.only_layers else "run"
    caption = (
        f"{cell.title}: every {each_one}{each}. {measure_of(cell).level.capitalize()} is "
        f"{cell.metric}; the metrics at the right are "
        f"{'over all tokens' if ours else 'as lm-eval reports them'}. "
        f"Baseline: {baseline or DASH}."
    )
    return Table(caption, tuple(headers), tuple(zip(*columns, strict=True)), tuple(notes))


@dataclass(frozen=True)
class RunColumns:
    """The columns that name the runs of a cell: as few as tell them apart.

    `only_layers` says whether every run removes one whole layer.
    """

    labels: tuple[str, ...]
    only_layers: bool

    def of(self, run: RunIdentity) -> tuple[str, ...]:
        """Name one run, a text for each column."""
        names = {COMPONENT: run.component, SPAN: str(run.span), INTERVENTION: run.intervention}
        return (str(run.layer), *(names[label] for label in self.labels[1:]))


def run_columns(cell: CellRecord) -> RunColumns:
    """Choose the columns that name the runs of a cell.

    The layer; the component and the span where something else than one whole layer is removed; the
    intervention where one is replaced.
    """
    found = cell.kinds
    spans = any(kind.span != 1 for kind in found)
    labels = ["first layer (0-based)" if spans else "layer (0-based)"]
    labels += [COMPONENT] if any(kind.component != "layer" for kind in found) else []
    labels += [SPAN] if spans else []
    labels += [INTERVENTION] if any(kind.intervention != "remove" for kind in found) else []
    return RunColumns(tuple(labels), set(found) <= {WHOLE_LAYER})


def _layer_columns(cell: CellRecord) -> list[tuple[str, _Show]]:
    """List the columns of the layer table, each with what it shows of a measured layer."""

    measure = measure_of(cell)
    it = "layer" if run_columns(cell).only_layers else "it"

    def field(name: str, write: Callable[[float], str], scale: float = 1) -> _Show:
        return lambda r: shown(getattr(r, name), write, cell.reason_of(name, r), scale)

    def metric(name: str) -> _Show:
        return lambda r: shown(r.metrics.get(name), _four, cell.reason_of(name, r))

    def ends(r: RunRecord) -> Value:
        reason = r.reasons.get("accuracy_drop_low") or cell.reason_of("accuracy_drop", r)
        low, high = r.accuracy_drop_low, r.accuracy_drop_high
        return between(low, high, measure.write, reason, measure.scale)

    moved = field("drop_rounding", measure.write, measure.scale)
    rounded: list[tuple[str, _Show]] = []
    if any(run.rounded is not None for run in cell.runs):
        rounded = [
            ("documents within rounding", field("rounded", "{:,.0f}".format)),
            (f"± by rounding ({measure.unit})", moved),
        ]
    columns: list[tuple[str, _Show]] = [
        ("documents", lambda r: Value(f"{r.n:,}")),
        (
            f"{measure.level} without {it} ({measure.level_unit})",
            field("accuracy", measure.write, measure.scale),
        ),
        (
            f"{measure.change} ({measure.unit})",
            field("accuracy_drop", measure.write, measure.scale),
        ),
        (f"{interval_name(cell)} ({measure.unit})", ends),
        *rounded,
        ("McNemar p", field("mcnemar_p", p_value)),
        ("accuracy relevance", field("accuracy_relevance", _three)),
        ("cosine score (1 − cos)", field("cosine_score", _four)),
        ("angular distance (÷ π)", field("angular_distance", _four)),
        ("relative update (ratio of norms)", field("relative_update", _four)),
        ("gold log-prob drop (nats)", field("gold_logprob_drop", _three)),
        *((name, metric(name)) for name in _metric_names(cell)),
    ]
    same_documents = len({record.n for record in cell.runs}) <= 1
    return columns[1:] if same_documents else columns


def _metric_names(cell: CellRecord) -> list[str]:
    return sorted(set(cell.baseline_metrics).union(*(record.metrics for record in cell.runs)))


def _undefined_notes(
    label: str, cell: CellRecord, runs: Sequence[RunIdentity], column: Sequence[Value]
) -> list[str]:
    found: dict[str, list[RunIdentity]] = {}
    for run, value in zip(runs, column, strict=True):
        if value.reason not in ("", NOT_MEASURED):
            found.setdefault(value.reason, []).append(run)
    return [
        f"{label}: undefined for {run_list(which, cell)}: {reason}."
        for reason, which in found.items()
    ]


def correlation_table(cell: CellRecord) -> Table:
    """Set one row for each proxy, coefficient and subset of layers, and why one is undefined."""
    columns = (
        *texts("proxy", "coefficient", "layers used"),
        *numbers("value", "95 % interval", "p", "layers", "documents"),
    )
    rows, notes = [], []
    for record in cell.correlations:
        why = record.reason or NO_REASON
        proxy = PROXIES.get(record.proxy, record.proxy)
        coefficient = COEFFICIENTS[record.coefficient]
        rows.append(
            (
                Value(proxy),
                Value(coefficient),
                Value(record.subset),
                shown(record.value, two_digits, why),
                between(record.low, record.high, two_digits, why),
                shown(record.p_value, p_value, why),
                Value(f"{record.n:,}"),
                Value(f"{record.documents:,}"),
            )
        )
        if not defined(record.value):
            notes.append(f"{coefficient}, {proxy}, {SUBSETS[record.subset]}: undefined: {why}.")
    caption = (
        f"{cell.title}: how well each proxy ranks the layers by {measure_of(cell).change}. The "
        "sample is the layers (inner = without the first two and the last two); the interval "
        "resamples the documents; p is against unrelated series that are as smooth over depth."
    )
    return Table(caption, columns, tuple(rows), tuple(notes))


def relevance_table(cells: Sequence[CellRecord]) -> Table:
    """Set the accuracy relevance behind a heat map: layers × benchmarks of one model."""
    layers = layers_of(WHOLE_LAYER, *cells)
    columns = [[Value(str(layer)) for layer in layers]]
    for cell in cells:
        found = (cell.relevance(layer) for layer in layers)
        columns.append([shown(number, _three, reason) for number, reason in found])
    return Table(
        f"{cells[0].model.name}: accuracy relevance.",
        numbers("layer (0-based)", *benchmark_labels(cells)),
        tuple(zip(*columns, strict=True)),
    )


def _is_corpus(cell: CellRecord) -> bool:
    """Whether the metrics are tracker's own and not lm-eval's."""
    return RATIO in cell.benchmark.tasks[0].metrics.values()

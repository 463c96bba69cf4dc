"""Build the tables that people read: their columns, order and notes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from tracker.analysis.agreement import correlation
from tracker.analysis.boards import layer_relevance
from tracker.analysis.claims import shown_runs
from tracker.analysis.comparable import benchmark_labels, row_labels
from tracker.core.changes import WHOLE_LAYER, Change
from tracker.core.estimates import Estimate
from tracker.core.formats import DASH, counted, defined, measure_of, write
from tracker.core.grouping import grouped
from tracker.core.identities import TaskIdentity
from tracker.core.proxies import PROXIES
from tracker.core.records import NO_REASON, NOT_MEASURED, CellRecord, CorrelationRecord, layers_of
from tracker.core.run_table import (
    CellRun,
    correlation_columns,
    layer_column,
    metric_columns,
    only_layers,
    pick,
    proxies_in,
    run_columns,
    telling_apart,
)
from tracker.core.tables import Column, Table, table
from tracker.core.text import capital
from tracker.report.wording import (
    P_OVER,
    power_sentence,
    provenance_notes,
    rule,
    run_list,
    sample_of,
)
from tracker.stats.accuracy import RATIO

COEFFICIENTS = {"spearman": "Spearman", "kendall": "Kendall tau-b", "pearson": "Pearson"}
SUBSETS = {"all": "all layers", "inner": "without the two outer layers at each end"}
_Labelled = tuple[CellRecord, tuple[str, str]]


def overview_table(cells: Sequence[CellRecord]) -> Table:
    """Build a table with a row for each cell: documents, baseline, chance, extremes, Spearman."""
    baseline, critical, drop = "baseline accuracy with 95 % interval", "drop, pp", "drop"
    if losses := not all(cell.higher_is_better for cell in cells):
        baseline = "baseline with 95 % interval, accuracy in % or loss"
        critical, drop = "accuracy drop in pp, or loss increase", "drop or increase"
    columns: tuple[Column[_Labelled], ...] = (
        Column("model", "text", lambda row: row[1][0]),
        Column("benchmark", "text", _which),
        Column("documents", "count", lambda row: row[0].counted),
        Column(baseline, "score" if losses else "percent", _baseline, NO_REASON),
        Column("chance", "percent", _chance),
        Column(f"layers shown to matter, 0-based ({critical})", "text", _costly),
        Column(
            "highest cosine score, layers 0-based (1 − cos)",
            *("text", _scored, "no layer has a cosine score"),
        ),
        Column(
            f"Spearman of cosine score and {drop} (95 % interval over documents)",
            "coefficient",
            _spearman,
        ),
    )
    rows = list(zip(cells, row_labels(cells), strict=True))
    made = table(
        "Layers shown to matter: those whose removal, each alone, costs accuracy, with 95 % "
        "confidence for all layers of the benchmark together. The next column: those that the "
        "cosine score would name.",
        columns,
        rows,
    )
    notes = []
    for (cell, (_, extra)), entries in zip(rows, made.rows, strict=True):
        title = " · ".join(filter(None, (cell.title, extra)))
        said = {"Spearman": entries[-1], f"the baseline {measure_of(cell).level}": entries[3]}
        notes += [
            f"{title}: {what} is undefined: {entry.reason}."
            for what, entry in said.items()
            if isinstance(entry, Estimate) and entry.reason
        ]
    return made.model_copy(update={"notes": (*notes, *provenance_notes(cells))})


def _which(row: _Labelled) -> str:
    cell, (_, extra) = row
    metric = cell.metric if cell.higher_is_better else f"{cell.metric} ({measure_of(cell).unit})"
    shots = f"{cell.benchmark.num_fewshot}-shot"
    which = (cell.benchmark.title, shots, metric, cell.beneath, cell.drawn, extra)
    return " · ".join(filter(None, which))


def _baseline(row: _Labelled) -> Estimate:
    return replace(row[0].baseline, unit=measure_of(row[0]).level_form)


def _chance(row: _Labelled) -> Estimate:
    return Estimate(row[0].chance_accuracy, reason=row[0].reason_of("chance_accuracy"))


def _costly(row: _Labelled) -> Estimate | str:
    cell, measure = row[0], measure_of(row[0])
    if cell.runs and not cell.whole_layers:
        return Estimate(None, reason="no whole single layer was removed")
    shown = shown_runs(cell, cell.whole_layers)
    costly = [run for run in cell.whole_layers if shown[run.change] == "costs"]
    drops = sorted(((run.drop.value or 0.0, run.change.layer) for run in costly), reverse=True)
    named = (f"{layer}\u00a0({measure.write(drop)})" for drop, layer in drops)
    return ", ".join(named) or Estimate(None, reason="none is shown with these documents")


def _scored(row: _Labelled) -> str | None:
    scores = sorted(
        (-run.cosine_score, run.change.layer)
        for run in row[0].whole_layers
        if defined(run.cosine_score)
    )
    return ", ".join(f"{layer}\u00a0({write('proxy', -s)})" for s, layer in scores[:3]) or None


def _spearman(row: _Labelled) -> Estimate:
    record = correlation(row[0])
    if record is None:
        return Estimate(None, reason="not computed")
    if record.estimate.value is None:
        return Estimate(None, reason=record.estimate.reason or NO_REASON)
    return replace(record.estimate, reason=None)


def layer_table(cell: CellRecord) -> Table:
    """Build a table with one row for each run of a cell; unmeasured runs have dashes.

    Notes explain the p-values, and the reason of each undefined value.
    """
    notes = []
    tests = sum(defined(record.drop.p_value) for record in cell.runs)
    if tests:
        notes.append(
            f"{counted(tests, 'test')}: unadjusted p-values, about {0.05 * tests:.1f} expected "
            "below 0.05 by chance even if nothing mattered. The largest drop is picked from "
            f"{counted(tests, 'noisy estimate')}, so it tends to be overstated."
        )
    if power := power_sentence(cell, cell.runs):
        notes.append(power)
    documents = {record.n for record in cell.runs}
    rounded = any(run.rounded is not None for run in cell.runs)
    named, columns, metrics = telling_apart(cell), run_columns(cell), metric_columns([cell])
    figures = pick(
        columns,
        *(["n"] if len(documents) > 1 else []),
        *("accuracy", "accuracy_drop", "drop_interval"),
        *(["rounded", "drop_rounding"] if rounded else []),
        *("mcnemar_p", "accuracy_relevance"),
        *(proxy.name for proxy in proxies_in(cell)),
        *("gold_logprob_drop", "options_logprob_drop"),
    )
    records = {run.change: run for run in cell.runs}
    runs = [CellRun(cell, change, records.get(change)) for change in cell.changes]
    made = table("", [*pick(columns, *named), *figures, *metrics], runs)
    by_column = zip(made.headings, zip(*made.rows, strict=True), strict=bool(runs))
    for heading, entries in list(by_column)[len(named) :]:
        undefined = (
            (change, entry.reason)
            for change, entry in zip(cell.changes, entries, strict=True)
            if isinstance(entry, Estimate) and entry.reason != NOT_MEASURED
        )
        notes += [
            f"{heading.label}: undefined for {which}: {why}."
            for which, why in _by_reason(cell, undefined)
        ]
    mismatched = ((run.change, run.mismatch) for run in cell.runs)
    notes += [f"{capital(which)}: {why}." for which, why in _by_reason(cell, mismatched)]
    each = f", {counted(documents.pop(), 'document')} each" if len(documents) == 1 else ""
    intact = ((column.label, cell.baseline_metrics.get(column.label)) for column in metrics)
    baseline = ", ".join(
        f"{name} {write('metric', value) if defined(value) else DASH}" for name, value in intact
    )
    caption = (
        f"{cell.title}: every {'layer' if only_layers(cell) else 'run'}{each}. "
        f"{measure_of(cell).level.capitalize()} is "
        f"{cell.metric}; the metrics at the right are "
        f"{'over all tokens' if is_corpus(cell) else 'as lm-eval reports them'}. "
        f"Baseline: {baseline or DASH}."
    )
    return made.model_copy(update={"title": caption, "notes": tuple(notes)})


def _by_reason(
    cell: CellRecord, reasons: Iterable[tuple[Change, str | None]]
) -> list[tuple[str, str]]:
    """Group runs by reason: their names → the reason."""
    said = grouped(reasons, lambda each: each[1])
    return [(run_list([run for run, _ in each], cell), why) for why, each in said.items() if why]


def correlation_table(cell: CellRecord) -> Table:
    """Build a table with a row for each proxy, coefficient and subset; reasons are notes."""
    names = ("proxy", "coefficient", "subset", "value", "between", "p_value", "n", "documents")
    columns = correlation_columns()
    samples = list(dict.fromkeys(map(sample_of, cell.correlations))) or ["layer"]
    over = " or ".join(f"{each}s" for each in samples)
    p_over = " or ".join(P_OVER[each] for each in samples)
    columns["n"] = replace(columns["n"], label=over)
    columns["p_value"] = replace(columns["p_value"], label=p_over)
    columns["proxy"] = replace(columns["proxy"], value=lambda row: _proxy(row[1]))
    columns["coefficient"] = replace(
        columns["coefficient"], value=lambda row: COEFFICIENTS[row[1].coefficient]
    )
    undefined = [record for record in cell.correlations if not defined(record.estimate.value)]
    notes = [rule(f"{of}_correlation") for of in ("layer", "expert") if of in samples]
    notes += [
        f"{COEFFICIENTS[record.coefficient]}, {_proxy(record)}, {SUBSETS[record.subset]}: "
        f"undefined: {record.estimate.reason or NO_REASON}."
        for record in undefined
    ]
    return table(
        f"{cell.title}: how well each proxy ranks the {over} by {measure_of(cell).change} (inner: "
        f"without the first two and the last two{' layers' if over != 'layers' else ''}).",
        pick(columns, *names),
        [(cell, record) for record in cell.correlations],
        *notes,
    )


def _proxy(record: CorrelationRecord) -> str:
    return PROXIES[record.proxy].heading if record.proxy in PROXIES else record.proxy


def relevance_table(cells: Sequence[CellRecord]) -> Table:
    """Build the table of a heat map: accuracy relevance, layers × benchmarks of one model."""

    def column(cell: CellRecord, label: str) -> Column[int]:
        def value(layer: int) -> Estimate:
            return replace(layer_relevance(cell, layer), low=None, high=None)

        return Column(label, "relevance", value)

    labelled = zip(cells, benchmark_labels(cells), strict=True)
    return table(
        f"{cells[0].model.name}: accuracy relevance.",
        [layer_column(), *(column(cell, label) for cell, label in labelled)],
        layers_of(WHOLE_LAYER, *cells),
    )


def is_corpus(cell: CellRecord) -> bool:
    """Return whether the metrics are tracker's own and not lm-eval's."""
    return RATIO in cell.benchmark.tasks[0].metrics.values()


def provenance_table(cell: CellRecord) -> Table:
    """Build a table of the facts that a cell's numbers depend on, with two columns."""
    model, benchmark = cell.model, cell.benchmark
    facts = {
        "model source": model.source,
        "model revision": model.revision or "none (files)",
        "model fingerprint": model.fingerprint,
        "architecture": f"{model.architecture}, {model.layers} layers, "
        f"{model.parameters:,} parameters",
        "dtype": model.dtype,
        **model.arguments,
        "benchmark": benchmark.name,
        "data source": benchmark.data,
        "metric": cell.metric,
        "few-shot examples": str(benchmark.num_fewshot),
        "few-shot seed": str(benchmark.seed) if benchmark.num_fewshot else "none drawn",
        "chat template": "yes" if benchmark.apply_chat_template else "no",
        **benchmark.settings,
        "removed beneath every run": cell.beneath.removeprefix("without ") or "nothing",
        "documents measured": " ".join(filter(None, (cell.counted, cell.drawn))),
        **({"measured last (UTC)": cell.measured} if cell.measured else {}),
        "tokens behind the proxies": f"{cell.tokens:,}",
        **({"stand-ins fitted on": cell.fitted_on} if cell.fitted_on else {}),
        "answers checked against a model with the layer deleted": _compared(cell),
    }
    if len(benchmark.tasks) > 1:
        facts["group accuracy"] = (
            "tasks weighted by their documents"
            if benchmark.weight_by_size
            else "every task weighs the same"
        )
    facts["ledger key"] = cell.key
    columns: tuple[Column[tuple[str, str]], ...] = (
        Column("what", "text", lambda fact: fact[0]),
        Column("value", "text", lambda fact: fact[1]),
    )
    pairs = [*facts.items(), *cell.provenance.items()]
    return table(f"{cell.title}: what the numbers depend on.", columns, pairs)


def _compared(cell: CellRecord) -> str:
    """Return the number of compared answers, and their largest difference."""
    if cell.compared_difference is None:
        return "nothing"
    return f"{cell.compared:,} answers, at most {cell.compared_difference:.1e} nats apart"


def _split(task: TaskIdentity) -> str:
    """Return the split that the documents come from."""
    half = task.half
    return task.split if half is None else f"{task.split}, half of {half.of:,} (seed {half.seed})"


def task_table(cell: CellRecord) -> Table:
    """Build a table of a cell's lm-eval tasks, or corpus: version, split and fingerprint."""
    columns: tuple[Column[TaskIdentity], ...] = (
        Column("task", "text", lambda task: task.name),
        Column("version", "text", lambda task: task.version),
        Column("split", "text", _split),
        Column("documents in all", "count", lambda task: task.documents),
        Column("metrics (aggregation)", "text", _aggregated),
        Column("fingerprint", "text", lambda task: task.fingerprint),
    )
    what = "corpus" if is_corpus(cell) else "lm-eval tasks"
    return table(f"{cell.title}: {what}.", columns, cell.benchmark.tasks)


def _aggregated(task: TaskIdentity) -> str:
    return ", ".join(f"{name} ({how})" for name, how in sorted(task.metrics.items()))

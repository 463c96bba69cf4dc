"""Build the tables that people read, with rounded numbers and notes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from tracker.analysis.agreement import find_correlation
from tracker.analysis.boards import layer_relevance
from tracker.analysis.claims import run_verdicts
from tracker.analysis.comparable import benchmark_labels, row_labels
from tracker.report.wording import (
    WORDS,
    p_value_name,
    power_sentence,
    provenance_notes,
    rule,
    run_list,
    sample_noun,
)
from tracker.schema import run_table
from tracker.schema.changes import WHOLE_LAYER, Change
from tracker.schema.estimates import Estimate
from tracker.schema.formats import is_finite, level_estimate, metric_format, write_figure
from tracker.schema.grouping import group_by
from tracker.schema.identities import CHOICE_PROBABILITY, TaskIdentity
from tracker.schema.proxies import PROXIES
from tracker.schema.records import (
    NO_REASON,
    RUN_NOT_MEASURED,
    CellRecord,
    CorrelationRecord,
    first_layers,
)
from tracker.schema.tables import Column, Table, build_table
from tracker.schema.text import capitalise
from tracker.stats.accuracy import RATIO

COEFFICIENT_NAMES = {"spearman": "Spearman", "kendall": "Kendall tau-b", "pearson": "Pearson"}
SUBSET_NAMES = {"all": "all layers", "inner": "without the first two and the last two layers"}
_LabelledCell = tuple[CellRecord, tuple[str, str]]


def overview_table(cells: Sequence[CellRecord]) -> Table:
    """Build a table of all benchmarks: baseline, most important layers, correlation, etc."""
    levels = {metric_format(cell).level for cell in cells}
    baseline = f"baseline {levels.pop() + ' ' if len(levels) == 1 else ''}with 95 % interval"
    drop_in_pp, drop = "drop, pp", "drop"
    if has_losses := not all(cell.higher_is_better for cell in cells):
        baseline = "baseline (accuracy in %, or loss) with 95 % interval"
        drop_in_pp, drop = "accuracy drop in pp, or loss increase", "drop or increase"
    spearman = f"Spearman correlation of cosine score and {drop} (95 % interval over documents)"
    columns: tuple[Column[_LabelledCell], ...] = (
        Column("model", "text", lambda row: row[1][0]),
        Column("benchmark", "text", _benchmark_text),
        Column("documents", "count", lambda row: row[0].counted),
        Column(baseline, "score" if has_losses else "percent", _baseline_estimate, NO_REASON),
        Column("chance", "percent", _chance_estimate),
        Column(f"layers shown to matter, 0-based ({drop_in_pp})", "text", _costly_layers),
        Column(
            "layers (0-based) with the highest cosine score (1 − cos)",
            *("text", _top_scores, "no layer has a cosine score"),
        ),
        Column(spearman, "coefficient", _spearman_estimate),
    )
    rows = list(zip(cells, row_labels(cells), strict=True))
    overview = build_table(WORDS.render("overview_caption"), columns, rows)
    notes = []
    for (cell, (_, details)), entries in zip(rows, overview.rows, strict=True):
        title = " · ".join(filter(None, (cell.title, details)))
        baseline = f"the baseline {metric_format(cell).level}"
        notes += [
            f"{title}: {name} is undefined: {entry.reason}."
            for name, entry in (("Spearman", entries[-1]), (baseline, entries[3]))
            if isinstance(entry, Estimate) and entry.reason
        ]
    return overview.model_copy(update={"notes": (*notes, *provenance_notes(cells))})


def _benchmark_text(row: _LabelledCell) -> str:
    cell, (_, details) = row
    metric = cell.metric if cell.higher_is_better else f"{cell.metric} ({metric_format(cell).unit})"
    shots = f"{cell.benchmark.num_fewshot}-shot"
    parts = (cell.benchmark.title, shots, metric, cell.removed_text, cell.sampling_text, details)
    return " · ".join(filter(None, parts))


def _baseline_estimate(row: _LabelledCell) -> Estimate:
    return level_estimate(row[0], row[0].baseline)


def _chance_estimate(row: _LabelledCell) -> Estimate:
    return Estimate(row[0].chance_accuracy, reason=row[0].reason_of("chance_accuracy"))


def _costly_layers(row: _LabelledCell) -> Estimate | str:
    cell, measure = row[0], metric_format(row[0])
    if cell.runs and not cell.whole_layers:
        return Estimate(None, reason="the removal of a single layer is not measured")
    verdicts = run_verdicts(cell, cell.whole_layers)
    drop_in_pp = [run for run in cell.whole_layers if verdicts[run.change] == "costs"]
    drops = sorted(((run.drop.value or 0.0, run.change.layer) for run in drop_in_pp), reverse=True)
    texts = (f"{layer}\u00a0({measure.write(drop)})" for drop, layer in drops)
    return ", ".join(texts) or Estimate(None, reason="no layer is shown to matter yet")


def _top_scores(row: _LabelledCell) -> str | None:
    scores = sorted(
        (-run.cosine_score, run.change.layer)
        for run in row[0].whole_layers
        if is_finite(run.cosine_score)
    )
    texts = (f"{layer}\u00a0({write_figure('proxy', -score)})" for score, layer in scores[:3])
    return ", ".join(texts) or None


def _spearman_estimate(row: _LabelledCell) -> Estimate:
    record = find_correlation(row[0])
    if record is None:
        return Estimate(None, reason="not computed")
    if record.estimate.value is None:
        return Estimate(None, reason=record.estimate.reason or NO_REASON)
    return replace(record.estimate, reason=None)


def layer_table(cell: CellRecord) -> Table:
    """Build the table of a benchmark's runs, with one row per run.

    The rows of unmeasured runs contain dashes. Notes explain the p-values, and give the reason for
    each undefined value.
    """
    n_tests = sum(is_finite(record.drop.p_value) for record in cell.runs)
    notes = WORDS.render_all("tests", n_tests, power_sentence(cell, cell.runs))
    sizes = {record.n for record in cell.runs}
    has_rounding = any(run.rounded is not None for run in cell.runs)
    has_choices = any(run.choice_drop.value is not None for run in cell.runs)
    names, columns = run_table.distinguishing_columns(cell), run_table.run_columns(cell)
    metrics = run_table.metric_columns([cell])
    figures = run_table.pick_columns(
        columns,
        *(["n"] if len(sizes) > 1 else []),
        *("accuracy", "accuracy_drop", "drop_interval"),
        *(["rounded", "drop_rounding"] if has_rounding else []),
        *("mcnemar_p", "accuracy_relevance"),
        *(proxy.name for proxy in run_table.cell_proxies(cell)),
        *(["choice_probability_drop"] if has_choices and cell.metric != CHOICE_PROBABILITY else []),
        *("gold_logprob_drop", "options_logprob_drop"),
    )
    records = {run.change: run for run in cell.runs}
    rows = [run_table.CellRun(cell, change, records.get(change)) for change in cell.changes]
    table = build_table("", [*run_table.pick_columns(columns, *names), *figures, *metrics], rows)
    by_column = zip(table.headings, zip(*table.rows, strict=True), strict=bool(rows))
    for heading, entries in list(by_column)[len(names) :]:
        undefined = (
            (change, entry.reason)
            for change, entry in zip(cell.changes, entries, strict=True)
            if isinstance(entry, Estimate) and entry.reason != RUN_NOT_MEASURED
        )
        for runs, reason in _group_by_reason(cell, undefined):
            notes.append(f"{heading.label}: undefined for {runs}: {reason}.")
    mismatches = _group_by_reason(cell, ((run.change, run.mismatch) for run in cell.runs))
    notes += [f"{capitalise(runs)}: {reason}." for runs, reason in mismatches]
    noun = "layer" if run_table.has_only_layers(cell) else "run"
    intact = {column.label: cell.baseline_metrics.get(column.label) for column in metrics}
    facts = [*sizes], intact, is_corpus(cell), has_choices
    caption = WORDS.render("runs_caption", cell, noun, *facts)
    return table.model_copy(update={"title": caption, "notes": tuple(notes)})


def _group_by_reason(
    cell: CellRecord, reasons: Iterable[tuple[Change, str | None]]
) -> list[tuple[str, str]]:
    """Group runs by the reason why a value is undefined.

    `reasons` contains pairs (run, reason). Runs without a reason are left out. The result has one
    pair for each reason: the names of all its runs, and the reason.
    """
    groups = group_by(reasons, lambda pair: pair[1])
    return [(run_list([run for run, _ in runs], cell), why) for why, runs in groups.items() if why]


def correlation_table(cell: CellRecord) -> Table:
    """Build the table of the correlations between proxies and drops."""
    names = ["proxy", "coefficient", "subset", "value", "between", "p_value", "n", "documents"]
    columns, records = run_table.correlation_columns(), cell.correlations
    if len({record.sample for record in records}) > 1:
        names.insert(1, "sample")
    samples = " or ".join(dict.fromkeys(f"{sample_noun(r)}s" for r in records)) or "layers"
    p_names = dict.fromkeys(map(p_value_name, records)) or {"p over layers": None}
    p_value = " or ".join(p_names)
    columns["n"] = replace(columns["n"], label=samples)
    columns["p_value"] = replace(columns["p_value"], label=p_value)
    columns["proxy"] = replace(columns["proxy"], value=lambda row: _proxy_heading(row[1]))
    columns["coefficient"] = replace(
        columns["coefficient"], value=lambda row: COEFFICIENT_NAMES[row[1].coefficient]
    )
    columns["sample"] = replace(columns["sample"], value=lambda row: sample_noun(row[1]))
    is_part = {record.within_layers for record in records} or {False}
    notes = [rule(f"{'part' if part else 'layer'}_correlation") for part in sorted(is_part)]
    for record in records:
        if not is_finite(record.estimate.value):
            coefficient, subset = COEFFICIENT_NAMES[record.coefficient], SUBSET_NAMES[record.subset]
            parts = [f"{sample_noun(record)}s"] * (record.sample != "layer")
            subject = ", ".join([coefficient, _proxy_heading(record), *parts, subset])
            notes.append(f"{subject}: undefined: {record.estimate.reason or NO_REASON}.")
    return build_table(
        WORDS.render("correlations_caption", cell, samples),
        run_table.pick_columns(columns, *names),
        [(cell, record) for record in records],
        *notes,
    )


def _proxy_heading(record: CorrelationRecord) -> str:
    return PROXIES[record.proxy].heading if record.proxy in PROXIES else record.proxy


def relevance_table(cells: Sequence[CellRecord]) -> Table:
    """Build a model's table of accuracy relevance (share lost) per layer and benchmark."""

    def column(cell: CellRecord, label: str) -> Column[int]:
        def value(layer: int) -> Estimate:
            return replace(layer_relevance(cell, layer), low=None, high=None)

        return Column(label, "relevance", value)

    labelled = zip(cells, benchmark_labels(cells), strict=True)
    return build_table(
        f"{cells[0].model.name}: accuracy relevance.",
        [run_table.layer_column(), *(column(cell, label) for cell, label in labelled)],
        first_layers(WHOLE_LAYER, *cells),
    )


def is_corpus(cell: CellRecord) -> bool:
    """Return whether a cell measures a text corpus instead of tasks of lm-eval."""
    return RATIO in cell.benchmark.tasks[0].metrics.values()


def provenance_table(cell: CellRecord) -> Table:
    """Build a table of the model, data, settings and versions of a measurement."""
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
        "removed in every run": cell.removed_text.removeprefix("without ") or "nothing",
        "documents measured": " ".join(filter(None, (cell.counted, cell.sampling_text))),
        **({"measured last (UTC)": cell.measured} if cell.measured else {}),
        "tokens behind the proxies": f"{cell.tokens:,}",
        **({"replacements fitted on": cell.fitted_on} if cell.fitted_on else {}),
        "answers compared with those of a pruned model": _comparison_text(cell),
    }
    if len(benchmark.tasks) > 1:
        weights = "tasks weighted by their documents", "every task weighs the same"
        facts["group accuracy"] = weights[not benchmark.weight_by_size]
    facts["ledger key"] = cell.key
    columns: tuple[Column[tuple[str, str]], ...] = (
        Column("what", "text", lambda fact: fact[0]),
        Column("value", "text", lambda fact: fact[1]),
    )
    pairs = [*facts.items(), *cell.provenance.items()]
    title = f"{cell.title}: origin of the results (model, data, settings and versions)."
    return build_table(title, columns, pairs)


def _comparison_text(cell: CellRecord) -> str:
    """Describe how many answers were checked on a pruned model, and the largest difference."""
    if cell.compared_difference is None:
        return "nothing"
    n, largest = cell.compared, cell.compared_difference
    return f"{n:,} answers; the largest difference from a pruned model is {largest:.1e} nats"


def _split_text(task: TaskIdentity) -> str:
    """Return the name of a task's split, with size and seed if only a random half is used."""
    half = task.half
    if half is None:
        return task.split
    return f"{task.split}: a random half of {half.of:,} documents (seed {half.seed})"


def task_table(cell: CellRecord) -> Table:
    """Build a table of a benchmark's tasks or corpus, with version, split and fingerprint."""
    columns: tuple[Column[TaskIdentity], ...] = (
        Column("task", "text", lambda task: task.name),
        Column("version", "text", lambda task: task.version),
        Column("split", "text", _split_text),
        Column("documents in all", "count", lambda task: task.documents),
        Column("metrics (aggregation)", "text", _metrics_text),
        Column("fingerprint", "text", lambda task: task.fingerprint),
    )
    noun = "corpus" if is_corpus(cell) else "lm-eval tasks"
    return build_table(f"{cell.title}: {noun}.", columns, cell.benchmark.tasks)


def _metrics_text(task: TaskIdentity) -> str:
    return ", ".join(
        f"{name} ({aggregation})" for name, aggregation in sorted(task.metrics.items())
    )

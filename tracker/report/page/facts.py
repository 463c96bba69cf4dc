"""Tables of what a cell's numbers depend on."""

from __future__ import annotations

from tracker.core.identities import TaskIdentity
from tracker.core.records import CellRecord
from tracker.report.table import Table, Value, numbers, texts
from tracker.report.tables import _is_corpus


def provenance_table(cell: CellRecord) -> Table:
    """Set what the cell's numbers depend on: two columns, what, and its value."""
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
        "answered again on a really pruned model": _compared(cell),
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
    return Table(f"{cell.title}: what the numbers depend on.", texts("what", "value"), tuple(rows))


def _compared(cell: CellRecord) -> str:
    """Say how many answers were compared, and how far they differ."""
    if cell.compared_difference is None:
        return "nothing (an older tracker)"
    return f"{cell.compared:,} answers, at most {cell.compared_difference:.1e} nats apart"


def _split(task: TaskIdentity) -> str:
    """Say which documents there are."""
    half = task.half
    return task.split if half is None else f"{task.split}, half of {half.of:,} (seed {half.seed})"


def task_table(cell: CellRecord) -> Table:
    """Set the lm-eval tasks of a cell, or its corpus, with version, split and fingerprint."""
    columns = (
        *texts("task", "version", "split"),
        *numbers("documents in all"),
        *texts("metrics (aggregation)", "fingerprint"),
    )
    rows = tuple(
        (
            Value(task.name),
            Value(task.version),
            Value(_split(task)),
            Value(f"{task.documents:,}"),
            Value(", ".join(f"{name} ({how})" for name, how in sorted(task.metrics.items()))),
            Value(task.fingerprint),
        )
        for task in cell.benchmark.tasks
    )
    ours = _is_corpus(cell)
    return Table(f"{cell.title}: {'corpus' if ours else 'lm-eval tasks'}.", columns, rows)

"""Tables of what a cell's numbers depend on."""

from __future__ import annotations

from tracker.core.identities import TaskIdentity
from tracker.core.records import CellRecord
from tracker.core.tables import Column, Table, table
from tracker.report.tables import is_corpus


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
    columns: tuple[Column[tuple[str, str]], ...] = (
        Column("what", "text", lambda fact: fact[0]),
        Column("value", "text", lambda fact: fact[1]),
    )
    pairs = [*facts.items(), *cell.provenance.items()]
    return table(f"{cell.title}: what the numbers depend on.", columns, pairs)


def _compared(cell: CellRecord) -> str:
    """Say how many answers were compared, and how far they differ."""
    if cell.compared_difference is None:
        return "nothing"
    return f"{cell.compared:,} answers, at most {cell.compared_difference:.1e} nats apart"


def _split(task: TaskIdentity) -> str:
    """Say which documents there are."""
    half = task.half
    return task.split if half is None else f"{task.split}, half of {half.of:,} (seed {half.seed})"


def task_table(cell: CellRecord) -> Table:
    """Set the lm-eval tasks of a cell, or its corpus, with version, split and fingerprint."""
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

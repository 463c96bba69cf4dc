"""Read a run of a results folder as a model's answers to documents."""

from __future__ import annotations

from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from tracker.analysis.metrics import DocumentMetric, TextReader
from tracker.comparison import answers
from tracker.ledger.cells import CellStore
from tracker.ledger.store import Ledger
from tracker.schema.changes import INTACT, Ablation
from tracker.schema.documents import DocumentText
from tracker.schema.errors import RequestError
from tracker.schema.extent import ALL_DOCUMENTS
from tracker.stats.decisions import choose_options

INTACT_WORD = "intact"
"""Word for the intact model in the name of a run."""


class RunName(NamedTuple):
    """Name of a run, typed as `FOLDER:CELL:CHANGE`."""

    folder: Path
    cell: str
    change: str


def parse_run_name(source: str) -> RunName | None:
    """Split the name of a run of an existing results folder; return None for other texts."""
    folder, _, rest = source.partition(":")
    cell, _, change = rest.partition(":")
    is_run = change and (Path(folder) / "tracker.json").is_file()
    return RunName(Path(folder), cell, change) if is_run else None


def read_run(source: str, name: RunName) -> answers.ModelAnswers:
    """Read the answers of a model under one change.

    Args:
        source: The argument that names the run.
        name: Results folder, cell and change. The cell is its folder's name, with or without the
            key, or the name of a model for all its cells. The change `intact` is the intact model.

    Returns:
        The answers to the benchmarks of the cells.

    Raises:
        RequestError: The cell or the run does not exist, or the name fits several cells.
        ResultsError: The results folder cannot be used.
    """
    try:
        ablation = INTACT if name.change == INTACT_WORD else Ablation.parse(name.change)
    except ValueError as error:
        raise RequestError(f"{source}: {error}, or {INTACT_WORD}") from None
    stores = Ledger.open_existing(name.folder).cells()
    chosen = [store for store in stores if name.cell in _names(store)]
    benchmarks = {s.identity.benchmark.name: _read_cell(source, s, ablation) for s in chosen}
    if not chosen or len(benchmarks) < len(chosen):
        problem = "fits several cells" if chosen else "fits no cell"
        names = ", ".join(store.folder.name for store in (chosen or stores)[:5])
        raise RequestError(f"{source} {problem}; write one of {names}")
    title = f"{chosen[0].identity.model.name} {name.change}"
    return answers.ModelAnswers(title, source, benchmarks)


def _names(store: CellStore) -> set[str]:
    """Return the names that select a cell."""
    name = store.folder.name
    return {name, name.rpartition("--")[0], store.identity.model.name}


def _read_cell(source: str, store: CellStore, ablation: Ablation) -> answers.BenchmarkAnswers:
    """Read the outcomes of a cell under one ablation."""
    frame = store.read_documents(ALL_DOCUMENTS)
    rows = frame[frame["ablation"] == ablation.name].sort_values(["task", "doc"])
    if rows.empty:
        names = [INTACT_WORD, *sorted({*frame["ablation"]} - {INTACT.name})[:5]]
        raise RequestError(f"{source}: {store.folder.name} has no such run; try {', '.join(names)}")
    benchmark = store.identity.benchmark
    task = benchmark.tasks[0]
    rows = rows.set_index(["task", "doc"], drop=False).rename_axis([None, None])
    table, left_out = rows[["task", "doc"]].assign(key="", prompt=""), {}
    for metric, aggregation in task.all_metrics.items():
        if aggregation in ("mean", "nanmean"):
            table[metric] = DocumentMetric(store, metric).values(rows)
        else:
            left_out[metric] = f"it is no mean over documents, but their {aggregation}"
    metrics = map(str, table.columns[4:])
    higher = {metric: task.higher_is_better.get(metric, True) for metric in metrics}
    views = (requested.view for requested in store.views.read_requested({}))
    if clusters := next((view.clusters for view in views if view.clusters), None):
        table[answers.CLUSTER] = table.index.map(clusters.by_document(benchmark.numbers))
    settings = {
        "version": ", ".join(dict.fromkeys(task.version for task in benchmark.tasks)),
        "num_fewshot": answers.setting_text(benchmark.num_fewshot),
    }
    if not benchmark.apply_chat_template:  # the digest of a template is unknown
        settings["chat_template"] = answers.setting_text(None)
    read_text = partial(_read_text, cache(store.texts.read), rows)
    by_size = benchmark.weight_by_size
    return answers.BenchmarkAnswers(table, higher, settings, left_out, by_size, read_text)


def _read_text(read: TextReader, rows: pd.DataFrame, task: str, doc: int) -> answers.AnswerText:
    """Return the texts of a document and of the model's answer."""
    row: Any = rows.loc[(task, doc)]
    stored = read().get((task, doc))
    text = stored.text if stored else DocumentText("")
    if not text.choices:
        return answers.AnswerText(text.question, str(row.get("text") or ""), text.answer or "")
    (choice,) = choose_options(np.array([row["loglikelihoods"][: len(text.choices)]]))
    target = "" if pd.isna(row["gold"]) else text.choices[int(row["gold"])]
    return answers.AnswerText(text.question, text.choices[int(choice)].strip(), target.strip())

"""Read a run of a results folder or data set as a model's answers to documents."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from tracker.analysis.metrics import DocumentMetric, TextReader
from tracker.comparison import answers
from tracker.ledger.cells import CellStore
from tracker.ledger.store import Ledger
from tracker.ledger.views import folder_name
from tracker.report.dataset import RECORDS_FILE, read_dataset, read_document_frame
from tracker.schema.changes import INTACT, Ablation
from tracker.schema.documents import DocumentText
from tracker.schema.errors import RequestError
from tracker.schema.extent import ALL_DOCUMENTS
from tracker.schema.grouping import group_by
from tracker.schema.identities import BenchmarkIdentity
from tracker.schema.records import CellRecord
from tracker.stats.decisions import choose_options

INTACT_WORD = "intact"
"""Word for the intact model in the name of a run."""


class RunName(NamedTuple):
    """Name of a run, typed as `FOLDER:CELL:CHANGE`."""

    folder: Path
    cell: str
    change: str


def parse_run_name(source: str) -> RunName | None:
    """Split the name of a run of an existing folder; return None for other texts."""
    folder, _, rest = source.partition(":")
    cell, _, change = rest.partition(":")
    markers = ("tracker.json", RECORDS_FILE) if change else ()
    is_run = any((Path(folder) / marker).is_file() for marker in markers)
    return RunName(Path(folder), cell, change) if is_run else None


@dataclass(frozen=True)
class StoredCell:
    """One model on one benchmark in a results folder or data set.

    Attributes:
        name: Name of the cell's folder in a results folder.
        model: Name of the model.
        benchmark: Name of the benchmark.
        read: Function that reads the answers under an ablation; its first argument is the source.
    """

    name: str
    model: str
    benchmark: str
    read: Callable[[str, Ablation], answers.BenchmarkAnswers]

    @property
    def names(self) -> set[str]:
        """The names that select the cell."""
        return {self.name, self.name.rpartition("--")[0], self.model}


def _list_cells(folder: Path) -> list[StoredCell]:
    """List the cells of a results folder or data set."""
    if not (folder / RECORDS_FILE).is_file():
        stores = Ledger.open_existing(folder).cells()
        parts = [(s.folder.name, s.identity, partial(_read_cell, s)) for s in stores]
        return [StoredCell(name, i.model.name, i.benchmark.name, read) for name, i, read in parts]
    cells, read_frame = [], cache(partial(read_document_frame, folder))
    for key, records in group_by(read_dataset(folder), lambda record: record.key).items():
        model, benchmark = records[0].model.name, records[0].benchmark.name
        read = partial(_read_records, records, read_frame)
        cells.append(StoredCell(folder_name(model, benchmark, key), model, benchmark, read))
    return cells


def read_run(source: str, name: RunName) -> answers.ModelAnswers:
    """Read the answers of a model under one change.

    Args:
        source: The argument that names the run.
        name: Folder of results or of a data set, cell and change. The cell is its folder's name,
            with or without the key, or the name of a model for all its cells. The change `intact`
            is the intact model.

    Returns:
        The answers to the benchmarks of the cells.

    Raises:
        RequestError: The cell or the run does not exist, or the name fits several cells.
        ResultsError: The folder cannot be used.
    """
    try:
        ablation = INTACT if name.change == INTACT_WORD else Ablation.parse(name.change)
    except ValueError as error:
        raise RequestError(f"{source}: {error}, or {INTACT_WORD}") from None
    cells = _list_cells(name.folder)
    chosen = [cell for cell in cells if name.cell in cell.names]
    benchmarks = {cell.benchmark: cell.read(source, ablation) for cell in chosen}
    if not chosen or len(benchmarks) < len(chosen):
        problem = "fits several cells" if chosen else "fits no cell"
        names = ", ".join(cell.name for cell in (chosen or cells)[:5])
        raise RequestError(f"{source} {problem}; write one of {names}")
    return answers.ModelAnswers(f"{chosen[0].model} {name.change}", source, benchmarks)


def _read_cell(store: CellStore, source: str, ablation: Ablation) -> answers.BenchmarkAnswers:
    """Read the outcomes of a cell under one ablation."""
    frame = store.read_documents(ALL_DOCUMENTS)
    rows = frame[frame["ablation"] == ablation.name].sort_values(["task", "doc"])
    if rows.empty:
        raise _no_such_run(source, store.folder.name, frame)
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
    read_text = partial(_read_text, cache(store.texts.read), rows)
    settings, by_size = _settings(benchmark), benchmark.weight_by_size
    return answers.BenchmarkAnswers(table, higher, settings, left_out, by_size, read_text)


def _no_such_run(source: str, cell: str, frame: pd.DataFrame) -> RequestError:
    names = [INTACT_WORD, *sorted({*frame["ablation"]} - {INTACT.name})[:5]]
    return RequestError(f"{source}: {cell} has no such run; try {', '.join(names)}")


def _settings(benchmark: BenchmarkIdentity) -> dict[str, str]:
    """Return the settings of a benchmark that change answers, as text."""
    settings = {
        "version": ", ".join(dict.fromkeys(task.version for task in benchmark.tasks)),
        "num_fewshot": answers.setting_text(benchmark.num_fewshot),
    }
    if not benchmark.apply_chat_template:  # the digest of a template is unknown
        settings["chat_template"] = answers.setting_text(None)
    return settings


def _read_records(
    records: Sequence[CellRecord],
    read_frame: Callable[[], pd.DataFrame],
    source: str,
    ablation: Ablation,
) -> answers.BenchmarkAnswers:
    """Read the outcomes of one cell of a data set under one ablation.

    Raises RequestError for clusters, because a data set holds no documents' clusters.
    """
    benchmark, key = records[0].benchmark, records[0].key
    if cluster := next((record.cluster for record in records if record.cluster), None):
        raise RequestError(
            f"{source}: the documents are clustered by {cluster}, and a data set does not hold the "
            "clusters; name the results folder instead"
        )
    frame = read_frame().astype({"task": object, "doc": "int64"})
    frame = frame[(frame["key"] == key) & (frame["change"] != "missing")]
    rows = frame if ablation == INTACT else frame[frame["ablation"] == ablation.name]
    if rows.empty:
        raise _no_such_run(source, folder_name(records[0].model.name, benchmark.name, key), frame)
    suffix = "_intact" if ablation == INTACT else ""
    rows = rows.drop_duplicates(["task", "doc", "metric"])
    scores = rows.pivot(index=["task", "doc"], columns="metric", values=f"score{suffix}")
    higher = {record.metric: record.higher_is_better for record in records}
    table = scores.index.to_frame().assign(key="", prompt="")
    for metric in scores.columns:  # the score of a loss is negative
        table[metric] = scores[metric] if higher[metric] else -scores[metric]
    texts = rows.drop_duplicates(["task", "doc"]).set_index(["task", "doc"])
    return answers.BenchmarkAnswers(
        table.rename_axis([None, None]),
        {metric: higher[metric] for metric in scores.columns},
        _settings(benchmark),
        {},
        benchmark.weight_by_size,
        partial(_read_row_text, texts, suffix),
    )


def _read_row_text(rows: pd.DataFrame, suffix: str, task: str, doc: int) -> answers.AnswerText:
    """Return the texts of a document of a data set; private texts are empty."""
    (row,) = rows.loc[[(task, doc)]].astype(object).fillna("").to_dict("records")
    if not row["choices"]:
        return answers.AnswerText(row["question"], row[f"text{suffix}"], row["answer"])
    choices = json.loads(row["choices"])
    numbers = (row[f"choice{suffix}"], row["gold"])
    answer, target = ("" if n == "" else choices[int(n)].strip() for n in numbers)
    return answers.AnswerText(row["question"], answer, target)


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

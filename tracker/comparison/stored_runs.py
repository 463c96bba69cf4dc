"""Read a run of a results folder or data set as a model's answers to documents."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from tracker.analysis.metrics import DocumentMetric
from tracker.comparison.answers import CLUSTER, BenchmarkAnswers, ModelAnswers, setting_text
from tracker.ledger.cells import CellStore
from tracker.ledger.store import Ledger
from tracker.ledger.texts import StoredText
from tracker.ledger.views import folder_name
from tracker.report.dataset import RECORDS_FILE, read_dataset, read_document_frame
from tracker.schema.changes import INTACT, Ablation
from tracker.schema.documents import DocumentText
from tracker.schema.errors import RequestError
from tracker.schema.extent import ALL_DOCUMENTS
from tracker.schema.grouping import group_by
from tracker.schema.identities import BenchmarkIdentity
from tracker.schema.records import CellRecord

_DOCUMENT = ["task", "doc"]
_TEXTS = ["question", "choices", "gold", "answer", "choice", "text"]
INTACT_WORD = "intact"
"""Word for the intact model in the name of a run."""


class RunName(NamedTuple):
    """Name of one stored ablation run, typed as `FOLDER:CELL:CHANGE`."""

    folder: Path
    cell: str
    change: str


def parse_run_name(source: str) -> RunName | None:
    """Parse the name FOLDER:CELL:CHANGE of a run.

    The result is None if the text has another form, or if the folder has no results.
    """
    folder, _, rest = source.partition(":")
    cell, _, change = rest.partition(":")
    markers = ("tracker.json", RECORDS_FILE) if change else ()
    is_run = any((Path(folder) / marker).is_file() for marker in markers)
    return RunName(Path(folder), cell, change) if is_run else None


class StoredCell(NamedTuple):
    """Stored results of one model on one benchmark.

    Attributes:
        name: Name of the folder with these results, within a results folder.
        model: Name of the model.
        benchmark: Name of the benchmark.
        read: Function (source, ablation) that reads the model's answers under the ablation.
            `source` is the user's argument, for error messages.
    """

    name: str
    model: str
    benchmark: str
    read: Callable[[str, Ablation], BenchmarkAnswers]


def _list_cells(folder: Path) -> list[StoredCell]:
    """List the pairs of model and benchmark in a results folder or data set."""
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


def read_run(source: str, name: RunName) -> ModelAnswers:
    """Read the answers of a model with one change, such as the removal of a layer.

    Args:
        source: The argument FOLDER:CELL:CHANGE as typed, for error messages.
        name: The parts of `source`. CELL is the folder name of one model and benchmark; the key at
            the end can be left out. A model's name selects all its benchmarks. CHANGE is `intact`
            for the unchanged model.

    Returns:
        The answers to the benchmarks of the cells.

    Raises:
        RequestError: Nothing is stored under the name, or CELL fits several folders.
        ResultsError: The folder cannot be used.
    """
    try:
        ablation = INTACT if name.change == INTACT_WORD else Ablation.parse(name.change)
    except ValueError as error:
        raise RequestError(f"{source}: {error}, or {INTACT_WORD}") from None
    cells = _list_cells(name.folder)
    chosen = [c for c in cells if name.cell in (c.name, c.name.rpartition("--")[0], c.model)]
    benchmarks = {cell.benchmark: cell.read(source, ablation) for cell in chosen}
    if not chosen or len(benchmarks) < len(chosen):
        problem = "fits several cells" if chosen else "fits no cell"
        names = ", ".join(cell.name for cell in (chosen or cells)[:5])
        raise RequestError(f"{source}: the cell's name {problem}; write one of {names}")
    return ModelAnswers(f"{chosen[0].model} {name.change}", source, benchmarks)


def _read_cell(store: CellStore, source: str, ablation: Ablation) -> BenchmarkAnswers:
    """Read one ablated model's answers to one benchmark (a cell) from a results folder."""
    frame = store.read_documents(ALL_DOCUMENTS)
    rows = frame[frame["ablation"] == ablation.name].sort_values(_DOCUMENT, ignore_index=True)
    if rows.empty:
        raise _no_such_run(f"{source}: {store.folder.name}", ablation, frame)
    benchmark = store.identity.benchmark
    task = benchmark.tasks[0]
    documents = pd.MultiIndex.from_frame(rows[_DOCUMENT])
    stored, unknown = store.texts.read(), StoredText(DocumentText(""), public=False)
    texts = [vars(stored.get(document, unknown).text) for document in documents]
    options = zip(rows["loglikelihoods"], rows["choices"], strict=True)
    choices = [np.argmax(scores[:count]) if count else np.nan for scores, count in options]
    table = rows[[*_DOCUMENT, "gold"]].assign(key="", prompt="", choice=choices, text="")
    table = table.join(pd.DataFrame(texts))
    if "text" in rows:
        table["text"] = rows["text"]
    higher, left_out = {}, {}
    for metric, aggregation in task.all_metrics.items():
        if aggregation in ("mean", "nanmean"):
            table[metric] = DocumentMetric(store, metric).values(rows)
            higher[metric] = task.higher_is_better.get(metric, True)
        else:
            left_out[metric] = (
                f"the metric is not a mean over documents; its aggregation is {aggregation}"
            )
    views = (requested.view for requested in store.views.read_requested({}))
    if clusters := next((view.clusters for view in views if view.clusters), None):
        table[CLUSTER] = documents.map(clusters.by_document(benchmark.numbers))
    settings = _answer_settings(benchmark)
    return BenchmarkAnswers(table, higher, settings, benchmark.weight_by_size, left_out)


def _read_records(
    records: Sequence[CellRecord],
    read_frame: Callable[[], pd.DataFrame],
    source: str,
    ablation: Ablation,
) -> BenchmarkAnswers:
    """Read one ablated model's answers to one benchmark from the records of a data set.

    Raises RequestError if the documents are clustered, because a data set does not store clusters.
    """
    benchmark, key = records[0].benchmark, records[0].key
    if cluster := next((record.cluster for record in records if record.cluster), None):
        raise RequestError(
            f"{source}: the documents are clustered by {cluster}, but a data set does not store "
            "clusters; name the results folder instead of the data set"
        )
    frame = read_frame().astype({"task": object, "doc": "int64"})
    frame = frame[(frame["key"] == key) & (frame["change"] != "missing")]
    rows = frame if ablation == INTACT else frame[frame["ablation"] == ablation.name]
    if rows.empty:
        cell = folder_name(records[0].model.name, benchmark.name, key)
        raise _no_such_run(f"{source}: {cell}", ablation, frame)
    if ablation == INTACT:
        rows = rows.assign(**{name: rows[f"{name}_intact"] for name in ("choice", "text", "score")})
    rows = rows.drop_duplicates([*_DOCUMENT, "metric"]).astype({"gold": float, "choice": float})
    scores = rows.pivot(index=_DOCUMENT, columns="metric", values="score")
    table = rows.drop_duplicates(_DOCUMENT)[[*_DOCUMENT, *_TEXTS]].assign(key="", prompt="")
    table["question"] = table["question"].fillna("")
    table["choices"] = table["choices"].fillna("[]").map(json.loads)
    higher = {record.metric: record.higher_is_better for record in records}
    higher = {metric: higher[metric] for metric in map(str, scores)}
    for metric, is_better in higher.items():  # the score of a loss is negative
        scores[metric] *= 1 if is_better else -1
    table, settings = table.join(scores, on=_DOCUMENT), _answer_settings(benchmark)
    return BenchmarkAnswers(table, higher, settings, benchmark.weight_by_size)


def _no_such_run(cell: str, ablation: Ablation, frame: pd.DataFrame) -> RequestError:
    ablations = ", ".join([INTACT_WORD, *sorted({*frame["ablation"]} - {INTACT.name})[:5]])
    return RequestError(f"{cell} has no results for {ablation.name}; write e.g. {ablations}")


def _answer_settings(benchmark: BenchmarkIdentity) -> dict[str, str]:
    """Return the settings that change a model's answers, such as `num_fewshot`, as texts."""
    settings = {
        "version": ", ".join(dict.fromkeys(task.version for task in benchmark.tasks)),
        "num_fewshot": setting_text(benchmark.num_fewshot),
    }
    if not benchmark.apply_chat_template:  # the digest of a template is unknown
        settings["chat_template"] = setting_text(None)
    return settings

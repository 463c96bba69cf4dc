"""Read a run of a results folder as a model's answers to documents."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from tracker.analysis.metrics import DocumentMetric
from tracker.comparison.answers import (
    ENDING_LENGTH,
    AnswerText,
    ModelAnswers,
    TaskAnswers,
    TaskGroup,
)
from tracker.comparison.lm_eval_files import setting_text
from tracker.ledger.cells import CellStore
from tracker.ledger.store import Ledger
from tracker.ledger.texts import StoredText
from tracker.schema.changes import INTACT, Ablation
from tracker.schema.documents import DocumentText
from tracker.schema.errors import RequestError
from tracker.schema.extent import ALL_DOCUMENTS
from tracker.schema.identities import TaskIdentity
from tracker.stats.decisions import choose_options

INTACT_WORD = "intact"
"""Word for the intact model in the name of a run."""


def find_run(source: str) -> tuple[Path, str, str] | None:
    """Split `FOLDER:CELL:CHANGE` into its parts; return None if `source` names no run."""
    folder, _, rest = source.partition(":")
    cell, _, change = rest.partition(":")
    is_run = bool(change) and (Path(folder) / "tracker.json").is_file()
    return (Path(folder), cell, change) if is_run else None


def read_run(source: str, folder: Path, cell: str, change: str) -> ModelAnswers:
    """Read the answers of a model under one change.

    Args:
        source: The argument that names the run.
        folder: The results folder.
        cell: Folder of the cell, with or without its key, or the name of a model for all its cells.
        change: The change, e.g. `layer:3`, or `intact`.

    Raises:
        RequestError: The cell or the run does not exist, or the name fits several cells.
        ResultsError: The results folder cannot be used.
    """
    try:
        ablation = INTACT if change == INTACT_WORD else Ablation.parse(change)
    except ValueError as error:
        raise RequestError(f"{source}: {error}, or {INTACT_WORD}") from None
    all_stores = Ledger.open_existing(folder).cells()
    stores = [store for store in all_stores if cell in _names(store)]
    if not stores:
        names = ", ".join(store.folder.name for store in all_stores[:5])
        raise RequestError(f"{source}: there is no cell {cell!r}; known are {names}")
    tasks: dict[str, TaskAnswers] = {}
    for store in stores:
        for name, answers in _read_tasks(source, store, ablation):
            if name in tasks:
                names = ", ".join(store.folder.name for store in stores)
                raise RequestError(f"{source} fits several cells; name one of {names}")
            tasks[name] = answers
    groups = {
        benchmark.name: TaskGroup([t.name for t in benchmark.tasks], benchmark.weight_by_size)
        for benchmark in (store.identity.benchmark for store in stores)
        if len(benchmark.tasks) > 1
    }
    return ModelAnswers(f"{stores[0].identity.model.name} {change}", source, tasks, groups)


def _names(store: CellStore) -> set[str]:
    """Return the names that select a cell."""
    name = store.folder.name
    return {name, name.rpartition("--")[0], store.identity.model.name}


def _read_tasks(
    source: str, store: CellStore, ablation: Ablation
) -> Iterator[tuple[str, TaskAnswers]]:
    """Yield the name and the answers of each task of a cell."""
    frame = store.read_documents(ALL_DOCUMENTS)
    rows = frame[frame["ablation"] == ablation.name].set_index(["task", "doc"]).sort_index()
    if rows.empty:
        names = islice(sorted(set(frame["ablation"]) - {INTACT.name}), 5)
        known = ", ".join((INTACT_WORD, *names))
        raise RequestError(f"{source}: {store.folder.name} has no such run; it has {known}, …")
    texts = store.texts.read()
    for task in store.identity.benchmark.tasks:
        if task.name in rows.index.get_level_values("task"):
            yield task.name, _task_answers(store, task, rows.loc[[task.name]].reset_index(), texts)


def _task_answers(
    store: CellStore,
    task: TaskIdentity,
    rows: pd.DataFrame,
    texts: dict[tuple[str, int], StoredText],
) -> TaskAnswers:
    """Convert the outcomes of a task."""
    unknown = StoredText(DocumentText(""), public=False)
    questions = [texts.get((task.name, doc), unknown).text.question for doc in rows["doc"]]
    documents = pd.DataFrame({"key": "", "prompt": "", "ending": questions}, index=rows["doc"])
    documents["ending"] = documents["ending"].str.strip().str[-ENDING_LENGTH:]
    means, left_out = {}, {}
    for name, aggregation in task.all_metrics.items():
        if aggregation in ("mean", "nanmean"):
            means[name] = DocumentMetric(store, name).values(rows)
        else:
            left_out[name] = f"it is no mean over documents, but their {aggregation}"
    higher = {name: task.higher_is_better.get(name, True) for name in means}
    read_text = partial(_read_text, task.name, rows.set_index("doc"), texts)
    return TaskAnswers(documents, means, higher, _settings(store, task), left_out, read_text)


def _settings(store: CellStore, task: TaskIdentity) -> dict[str, str]:
    """Return the settings that lm-eval's files state, too."""
    benchmark = store.identity.benchmark
    settings = {"version": task.version, "num_fewshot": setting_text(benchmark.num_fewshot)}
    if not benchmark.apply_chat_template:
        settings["chat_template"] = setting_text(None)
    if "system_instruction" not in benchmark.settings:
        settings["system_instruction"] = setting_text(None)
    return settings


def _read_text(
    task: str, rows: pd.DataFrame, texts: dict[tuple[str, int], StoredText], doc: int
) -> AnswerText:
    """Return the text of a document and of the model's answer."""
    row: Any = rows.loc[doc]
    text = texts[task, doc].text if (task, doc) in texts else DocumentText("")
    if not text.choices:
        return AnswerText(text.question, str(row.get("text") or ""), text.answer or "")
    (choice,) = choose_options(np.array([row["loglikelihoods"][: len(text.choices)]]))
    target = "" if pd.isna(row["gold"]) else text.choices[int(row["gold"])]
    return AnswerText(text.question, text.choices[int(choice)].strip(), target.strip())

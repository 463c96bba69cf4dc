"""Build data frames for programs: unrounded fractions in columns with snake_case names."""

from __future__ import annotations

import base64
import gzip
import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import IO, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from tracker.analysis.claims import verdict_words
from tracker.analysis.decisions import Decisions, ModelDecisions
from tracker.schema.changes import CHANGE_COLUMNS, Ablation
from tracker.schema.records import CellRecord
from tracker.schema.run_table import (
    CELL_COLUMNS,
    CellRun,
    cell_columns,
    correlation_columns,
    measured_runs,
    metric_columns,
    pick_columns,
    run_columns,
    unobserved_columns,
)
from tracker.schema.tables import Column, Table, build_table
from tracker.schema.text import escape_cell

_OPTION_COLUMNS = ("gold", "choice_intact", "choice")
_NUMBER_COLUMNS = ("num_fewshot", "sample_seed", "layer", "span", "number", "repeats", "doc")
_MARGIN_COLUMNS = ("margin_intact", "margin")
_SCORE_COLUMNS = ("score_intact", "score")
_DOCUMENT_COLUMNS = (
    *("task", "doc", "change", "question", "choices", "gold", "answer", "choice_intact"),
    *("margin_intact", "text_intact", "choice", "margin", "text"),
)
_CELL_COLUMNS: dict[str, Column[CellRecord]] = cell_columns(lambda cell: cell)


def table_frame(data_table: Table) -> pd.DataFrame:
    """Convert a table to a data frame with the columns and rows of `Table.plain`."""
    names, rows = data_table.plain()
    frame = pd.DataFrame(rows, columns=list(names))
    # A column without any defined value would otherwise contain Python objects.
    dtypes = {
        heading.name: "Int64" if heading.unit == "count" else "float64"
        for heading in data_table.headings
        if heading.name and heading.unit != "text"
    }
    return frame.astype(dtypes)


def layer_frame(cells: Sequence[CellRecord]) -> pd.DataFrame:
    """Return a data frame with one row for each measured run.

    Accuracies and drops are fractions. The column `reasons` explains undefined values (NaN).

    - `layer`, `span`: first changed layer (0-based), and number of changed layers.
    - `component`, `intervention`: changed part of each layer, and kind of change.
    - `removed`: layers that are removed in every run, such as `3,17`.
    - `part`: measured part of the benchmark: `calibration`, `test` or `all`.
    - `sample_seed`: seed of the random sample; missing without sampling.
    - `until`: stopping rule of the measurement.
    - `interval`: kind of the drop's confidence interval.
    - `shown`: verdict on the run: `matters`, `better without`, `below 5 pp` or `open` (undecided).
    - `metric_NAME`: a metric of lm-eval.
    """
    words = {id(cell): verdict_words(cell) for cell in cells}
    verdict: Column[CellRun] = Column(
        "shown", "text", lambda row: words[id(row.cell)].get(row.change), name="shown"
    )
    columns = run_columns()
    left_out = {"ablation", "drop_interval", "reasons"} | unobserved_columns(cells)
    names = [name for name in columns if name not in left_out]
    picked = [*pick_columns(columns, *names), *metric_columns(cells), columns["reasons"]]
    picked.insert(names.index("drop_sd"), verdict)
    return table_frame(build_table("", picked, measured_runs(cells)))


def correlation_frame(cells: Sequence[CellRecord]) -> pd.DataFrame:
    """Return a data frame with one row for each correlation.

    `n` is the number of layers or experts. An undefined value is NaN, and `reason` gives the
    reason.
    """
    rows = [(cell, record) for cell in cells for record in cell.correlations]
    columns = [column for column in correlation_columns().values() if column.name != "between"]
    return table_frame(build_table("", columns, rows))


def document_frame(
    cell_decisions: Iterable[tuple[CellRecord, Decisions]],
    with_private: bool = True,
    only_changed: bool = True,
) -> pd.DataFrame:
    """Return a data frame that shows how ablations change the documents' scores.

    Args:
        cell_decisions: Pairs: a model's results on a benchmark, and the model's answers under each
            ablation.
        with_private: Whether to include private texts, which are not from the hub or a package.
        only_changed: Whether to include only documents with a changed score. If false, all
            documents are included, with scores (larger is better) and names of ablations.

    Returns:
        One row for each model, benchmark, run and document. `change` compares the changed model
        with the intact model: `lost` (worse), `won` (better), `same`, or `missing` if the document
        is not measured. `choices` is a JSON list of the answer options. `gold`, `choice_intact` and
        `choice` are 0-based numbers of options. Margins are in nats, or in nats per character or
        byte if the metric divides by length. For documents without answer options, margins are
        log-probabilities.
    """
    return pd.concat(document_frames(cell_decisions, with_private, only_changed), ignore_index=True)


def document_frames(
    cell_decisions: Iterable[tuple[CellRecord, Decisions]],
    with_private: bool = True,
    only_changed: bool = True,
) -> Iterator[pd.DataFrame]:
    """Yield the rows of `document_frame` as several data frames.

    The first data frame only defines the columns of all data frames, and has no rows.
    """
    scores = () if only_changed else _SCORE_COLUMNS
    names = () if only_changed else ("ablation",)
    columns = [*CELL_COLUMNS, *names, *CHANGE_COLUMNS, *_DOCUMENT_COLUMNS, *scores]
    dtypes = dict.fromkeys((*_OPTION_COLUMNS, *_NUMBER_COLUMNS), "Int64")
    dtypes |= dict.fromkeys((*_MARGIN_COLUMNS, *scores), "float64")
    yield pd.DataFrame(columns=columns).astype(dtypes)
    for cell, decisions in cell_decisions:
        entries = {name: column.value(cell) for name, column in _CELL_COLUMNS.items()}
        missing = [
            {**entries, "task": task, "doc": doc, "change": "missing"}
            for task, doc in decisions.missing
        ]
        for rows in (_run_rows(cell, decisions, with_private, only_changed), missing):
            if rows:
                yield pd.DataFrame(rows, columns=columns, dtype="object").astype(dtypes)


def _run_rows(
    cell: CellRecord, decisions: Decisions, with_private: bool, only_changed: bool
) -> dict[str, NDArray[Any]]:
    """Return the columns of a table with one row for each run and document."""
    visible = [with_private or text is None or text.public for text in decisions.texts]
    texts = [
        text.text if text and is_visible else None
        for text, is_visible in zip(decisions.texts, visible, strict=True)
    ]

    def answer_columns(answers: ModelDecisions, suffix: str) -> dict[str, NDArray[Any]]:
        pairs = zip(answers.text, visible, strict=True)
        columns = {"choice": answers.choice, "margin": answers.margin, "score": answers.score}
        columns["text"] = _object_array(text if is_visible else None for text, is_visible in pairs)
        return {f"{name}{suffix}": values for name, values in columns.items()}

    dump = partial(json.dumps, ensure_ascii=False)
    documents: dict[str, Iterable[object]] = {
        "task": [task for task, _ in decisions.documents],
        "doc": [doc for _, doc in decisions.documents],
        "question": [text.question if text else None for text in texts],
        "choices": [dump(text.choices) if text and text.choices else None for text in texts],
        "gold": decisions.gold,
        "answer": [text.answer if text else None for text in texts],
        **answer_columns(decisions.baseline, "_intact"),
    }
    numbers, parts = [], []
    for _, answers in decisions.runs:
        outcomes = [decisions.lost_documents(answers), decisions.won_documents(answers)]
        change = np.select(outcomes, ["lost", "won"], "same")
        (rows,) = np.nonzero((change != "same") | (not only_changed))
        numbers.append(rows)
        columns = {"change": change, **answer_columns(answers, "")}
        parts.append({name: values[rows] for name, values in columns.items()})
    if not parts:
        return {}
    selected, counts = np.concatenate(numbers), [*map(len, numbers)]
    entries: dict[str, NDArray[Any]] = {}
    ablations = [Ablation.from_changes(c, removed=cell.removed).name for c, _ in decisions.runs]
    entries["ablation"] = np.repeat(_object_array(ablations), counts)
    for column in pick_columns(run_columns(), *CELL_COLUMNS, *CHANGE_COLUMNS):
        values = _object_array(column.value(CellRun(cell, run)) for run, _ in decisions.runs)
        entries[column.name] = np.repeat(values, counts)
    entries |= {name: _object_array(values)[selected] for name, values in documents.items()}
    return entries | {name: np.concatenate([p[name] for p in parts]) for name in parts[0]}


def _object_array(values: Iterable[object]) -> NDArray[Any]:
    return np.fromiter(values, dtype="object")


def write_csv(frames: Iterable[pd.DataFrame], file: IO[str]) -> None:
    """Write data frames to one CSV file; escape texts that spreadsheets read as formulas."""
    for number, frame in enumerate(frames):
        for name in frame.select_dtypes(exclude=["number", "bool"]):
            texts = [text for text in frame[name].unique() if isinstance(text, str)]
            formulas = {text: escape_cell(text) for text in texts if escape_cell(text) != text}
            if formulas:
                frame = frame.copy(deep=False)
                frame[name] = [formulas.get(value, value) for value in frame[name]]
        frame.rename(columns=escape_cell).to_csv(file, index=False, header=not number)


def pack_text(text: str) -> str:
    """Compress a text to base64, for a page that decompresses it."""
    # The time is left out, so that the same text gives the same bytes.
    return base64.b64encode(gzip.compress(text.encode(), mtime=0)).decode()


def pack_json(value: Mapping[str, Any]) -> str:
    """Compress a JSON object to base64; raise ValueError for NaN."""
    return pack_text(json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False))


def pack_run_frame(cells: Sequence[CellRecord]) -> tuple[str, str]:
    """Return all runs as compressed CSV and as Parquet, both encoded in base64."""
    frame = layer_frame(cells)
    parquet = frame.to_parquet(index=False, compression="zstd")
    text = io.StringIO()
    write_csv([frame], text)
    return pack_text(text.getvalue()), base64.b64encode(parquet).decode()

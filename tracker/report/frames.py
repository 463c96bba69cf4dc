"""Data frames for code: fractions, unrounded, in snake_case columns.

A page carries them within itself, as text in base64.
"""

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

from tracker.analysis.claims import shown_words
from tracker.analysis.decisions import Decided, Decisions
from tracker.core.changes import COLUMNS
from tracker.core.records import CellRecord
from tracker.core.run_table import (
    CELL,
    CellRun,
    cell_columns,
    correlation_columns,
    metric_columns,
    pick,
    run_columns,
    runs_of,
)
from tracker.core.tables import Column, Table, table
from tracker.core.text import as_cell

_OPTION_COLUMNS = ("gold", "choice_intact", "choice")
_NUMBERS = ("num_fewshot", "sample_seed", "layer", "span", "number", "repeats", "doc")
_MARGINS = ("margin_intact", "margin")
_SCORES = ("score_intact", "score")
_DOCUMENT_COLUMNS = (
    *("task", "doc", "change", "question", "choices", "gold", "answer", "choice_intact"),
    *("margin_intact", "text_intact", "choice", "margin", "text"),
)
_CELL: dict[str, Column[CellRecord]] = cell_columns(lambda cell: cell)


def frame_of(made: Table) -> pd.DataFrame:
    """Return a table as a data frame, in the layout of `Table.plain`."""
    names, rows = made.plain()
    frame = pd.DataFrame(rows, columns=list(names))
    # A column that is undefined everywhere would otherwise hold Python objects.
    kinds = {
        heading.name: "Int64" if heading.unit == "count" else "float64"
        for heading in made.headings
        if heading.name and heading.unit != "text"
    }
    return frame.astype(kinds)


def layer_frame(cells: Sequence[CellRecord]) -> pd.DataFrame:
    """Return every measured run as a row of a data frame.

    One row for each model, benchmark and run: `span` layers from `layer` (0-based) on, or their
    `component`, are changed as `intervention` says. `removed` lists the layers that all runs lack
    (such as `3,17`; empty for the intact model). `part` is `calibration` or `test` if the documents
    are that part of the benchmark, else `all`. `sample_seed` is the seed of the sample; it is
    missing for the first documents, or all. `until` is the question that the cell was measured for,
    `interval` the kind of the drop's interval. `shown` is the verdict on the run among all of its
    kind: `matters`, `better without`, `below 5 pp` or `open`. Accuracies and drops are fractions.
    An undefined value is NaN and `reasons` has the reason; the reason of `n` explains why documents
    are missing. lm-eval's own metrics have columns `metric_NAME`.
    """
    words = {id(cell): shown_words(cell) for cell in cells}
    shown: Column[CellRun] = Column(
        "shown", "text", lambda row: words[id(row.cell)].get(row.change), name="shown"
    )
    columns = run_columns()
    names = [name for name in columns if name not in ("ablation", "drop_interval", "reasons")]
    after = names.index("drop_sd")
    picked = [*pick(columns, *names), *metric_columns(cells), columns["reasons"]]
    return frame_of(table("", [*picked[:after], shown, *picked[after:]], runs_of(cells)))


def correlation_frame(cells: Sequence[CellRecord]) -> pd.DataFrame:
    """Return every correlation as a row of a data frame.

    One row for each model, benchmark, proxy, coefficient and subset; `n` counts layers. An
    undefined value is NaN and `reason` has the reason.
    """
    rows = [(cell, record) for cell in cells for record in cell.correlations]
    columns = [each for each in correlation_columns().values() if each.name != "between"]
    return frame_of(table("", columns, rows))


def document_frame(
    found: Iterable[tuple[CellRecord, Decisions]], private: bool = True, changed: bool = True
) -> pd.DataFrame:
    """Return every document that a run loses or wins as a row of a data frame.

    Args:
        found: Cells, each with the decisions of its runs.
        private: Whether to include texts that are not from the hub or a package.
        changed: Whether to include only documents that are lost or won. Otherwise all are included,
            with scores of which larger is better.

    Returns:
        One row for each model, benchmark, run and document. `change` is `lost`, `won` or `same`; it
        is `missing`, without a run, for a requested document that is not measured. `choices` is a
        JSON list. `gold`, `choice_intact` and `choice` are options, 0-based. Margins are in nats,
        or in nats per character or byte if the metric divides by length. Without options, margins
        are log-probabilities of the answer.
    """
    return pd.concat(document_frames(found, private, changed), ignore_index=True)


def document_frames(
    found: Iterable[tuple[CellRecord, Decisions]], private: bool = True, changed: bool = True
) -> Iterator[pd.DataFrame]:
    """Yield the same cell by cell, after a frame without rows."""
    columns = [*CELL, *COLUMNS, *_DOCUMENT_COLUMNS, *(() if changed else _SCORES)]
    numbers = _MARGINS if changed else (*_MARGINS, *_SCORES)
    types = dict.fromkeys((*_OPTION_COLUMNS, *_NUMBERS), "Int64")
    types |= dict.fromkeys(numbers, "float64")
    yield pd.DataFrame(columns=columns).astype(types)
    for cell, decided in found:
        about = {name: column.value(cell) for name, column in _CELL.items()}
        missing = [
            {**about, "task": task, "doc": doc, "change": "missing"}
            for task, doc in decided.missing
        ]
        for rows in (_rows_of_runs(cell, decided, private, changed), missing):
            if rows:
                yield pd.DataFrame(rows, columns=columns, dtype="object").astype(types)


def _rows_of_runs(
    cell: CellRecord, decided: Decisions, private: bool, changed: bool
) -> dict[str, NDArray[Any]]:
    """Return the documents that each run loses and wins, or all: column → its entries."""
    texts = [each.text if each and (private or each.public) else None for each in decided.texts]
    is_shown = [private or each is None or each.public for each in decided.texts]

    def answers(model: Decided, end: str) -> dict[str, NDArray[Any]]:
        pairs = zip(model.text, is_shown, strict=True)
        text = _objects(text if shown else None for text, shown in pairs)
        figures = {"choice": model.choice, "margin": model.margin, "score": model.score}
        return {f"{name}{end}": values for name, values in {**figures, "text": text}.items()}

    dump = partial(json.dumps, ensure_ascii=False)
    choices = [dump(text.choices) if text and text.choices else None for text in texts]
    of_documents: dict[str, Iterable[object]] = {
        "task": [task for task, _ in decided.documents],
        "doc": [doc for _, doc in decided.documents],
        "question": [text.question if text else None for text in texts],
        "choices": choices,
        "gold": decided.gold,
        "answer": [text.answer if text else None for text in texts],
        **answers(decided.baseline, "_intact"),
    }
    documents, of_runs = [], []
    for _, model in decided.runs:
        change = np.select([decided.lost(model), decided.won(model)], ["lost", "won"], "same")
        (rows,) = np.nonzero((change != "same") | (not changed))
        documents.append(rows)
        columns = {"change": change, **answers(model, "")}
        of_runs.append({name: values[rows] for name, values in columns.items()})
    if not documents:
        return {}
    numbers, counts = np.concatenate(documents), [*map(len, documents)]
    about = {
        column.name: [column.value(CellRun(cell, run)) for run, _ in decided.runs]
        for column in pick(run_columns(), *CELL, *COLUMNS)
    }
    return {
        **{name: np.repeat(_objects(values), counts) for name, values in about.items()},
        **{name: _objects(values)[numbers] for name, values in of_documents.items()},
        **{name: np.concatenate([each[name] for each in of_runs]) for name in of_runs[0]},
    }


def _objects(values: Iterable[object]) -> NDArray[Any]:
    return np.fromiter(values, dtype="object")


def write_csv(frames: Iterable[pd.DataFrame], file: IO[str]) -> None:
    """Write data frames with the same columns below each other, no text as a formula."""
    for number, frame in enumerate(frames):
        for name in frame.select_dtypes(exclude=["number", "bool"]):
            texts = [text for text in frame[name].unique() if isinstance(text, str)]
            formulas = {text: as_cell(text) for text in texts if as_cell(text) != text}
            if formulas:
                frame = frame.copy(deep=False)
                frame[name] = [formulas.get(value, value) for value in frame[name]]
        frame.rename(columns=as_cell).to_csv(file, index=False, header=not number)


def packed(text: str) -> str:
    """Compress a text with gzip and base64, without HTML markup; the browser decompresses it."""
    # Without the time, the same text gives the same bytes.
    return base64.b64encode(gzip.compress(text.encode(), mtime=0)).decode()


def packed_json(value: Mapping[str, Any]) -> str:
    """Compress a JSON object for a script; NaN raises ValueError."""
    return packed(json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False))


def layer_files(cells: Sequence[CellRecord]) -> tuple[str, str]:
    """Write every run as CSV, packed, and as Parquet in base64; both unrounded, fractions."""
    frame = layer_frame(cells)
    parquet = frame.to_parquet(index=False, compression="zstd")
    text = io.StringIO()
    write_csv([frame], text)
    return packed(text.getvalue()), base64.b64encode(parquet).decode()

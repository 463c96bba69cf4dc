"""Data frames for code: fractions, unrounded, in snake_case columns.

A page carries them within itself, as text in base64.
"""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from tracker.core.records import CellRecord
from tracker.core.run_table import (
    CELL,
    WHICH_RUN,
    CellRun,
    cell_columns,
    correlation_columns,
    metric_columns,
    pick,
    run_columns,
    runs_of,
)
from tracker.core.tables import Column, Table, table
from tracker.ledger.decisions import Decided, Decisions
from tracker.report.leaderboard.claims import shown_words

_OPTION_COLUMNS = ("gold", "choice_intact", "choice")
_NUMBERS = ("num_fewshot", "sample_seed", "layer", "span", "doc")
_MARGINS = ("margin_intact", "margin")
_SCORES = ("score_intact", "score")
_TEXT_COLUMNS = ("question", "choices", "answer", "text_intact", "text")
_DOCUMENT_COLUMNS = (
    *("task", "doc", "change", "question", "choices", "gold", "answer", "choice_intact"),
    *("margin_intact", "text_intact", "choice", "margin", "text"),
)
_CELL: dict[str, Column[CellRecord]] = cell_columns(lambda cell: cell)


def frame_of(made: Table) -> pd.DataFrame:
    """Put a table into a data frame, as `Table.plain` lays it out."""
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
    """Put every measured run into a data frame.

    One row for each model, benchmark and run: `span` layers from `layer` (0-based) on, or their
    `component`, are removed besides `removed` (such as `3,17`; empty for the intact model), or what
    `intervention` says is done to the layer.
    `part` is `calibration` or `test` where the documents are that part of the benchmark, else
    `all`.
    `sample_seed` drew the documents; it is missing for the first ones, or all. `until` is the
    question that the cell was measured for, `interval` what the ends of the drop are.
    `shown` is what the page shows of the run among all of its kind: `matters`, `better without`,
    `below 5 pp` or `open`.
    Accuracies and drops are fractions; an undefined value is NaN and `reasons` says why, and of `n`
    why there are fewer documents than were asked for. lm-eval's own metrics stand in columns
    `metric_NAME`.
    """
    words = {id(cell): shown_words(cell) for cell in cells}
    shown: Column[CellRun] = Column(
        "shown", "text", lambda row: words[id(row.cell)].get(row.run.order), name="shown"
    )
    columns = run_columns()
    names = [name for name in columns if name not in ("ablation", "drop_interval", "reasons")]
    after = names.index("drop_sd")
    picked = [*pick(columns, *names), *metric_columns(cells), columns["reasons"]]
    return frame_of(table("", [*picked[:after], shown, *picked[after:]], runs_of(cells)))


def correlation_frame(cells: Sequence[CellRecord]) -> pd.DataFrame:
    """Put every correlation into a data frame.

    One row for each model, benchmark, proxy, coefficient and subset; `n` counts layers. An
    undefined value is NaN and `reason` says why.
    """
    rows = [(cell, record) for cell in cells for record in cell.correlations]
    columns = [each for each in correlation_columns().values() if each.name != "between"]
    return frame_of(table("", columns, rows))


def document_frame(
    found: Iterable[tuple[CellRecord, Decisions]], private: bool = True, changed: bool = True
) -> pd.DataFrame:
    """Put every document that a run loses or wins into a data frame.

    Args:
        found: Cells, each with what its runs decide.
        private: Whether texts that are not of the hub or a package are among them.
        changed: Whether only those are in it; otherwise all are, with scores of which more is
            better.

    Returns:
        One row for each model, benchmark, run and document: `change` is `lost`, `won` or `same`,
        and `missing`, without a run, of a document that was asked for and is not measured;
        `choices` is a JSON list; `gold`, `choice_intact` and `choice` are options, 0-based; margins
        are in nats, for a metric that is divided by lengths in nats a character or byte, and
        without options the log-probability of the answer.
    """
    frames = [
        frame for cell, decided in found for frame in _frames(cell, decided, private, changed)
    ]
    columns = [*CELL, *WHICH_RUN, *_DOCUMENT_COLUMNS, *(() if changed else _SCORES)]
    frame = pd.concat(frames)[columns] if frames else pd.DataFrame(columns=columns)
    whole = dict.fromkeys((*_OPTION_COLUMNS, *_NUMBERS), "Int64")
    numbers = _MARGINS if changed else (*_MARGINS, *_SCORES)
    return frame.reset_index(drop=True).astype(whole | dict.fromkeys(numbers, "float64"))


def _frames(
    cell: CellRecord, decided: Decisions, private: bool, changed: bool
) -> Iterator[pd.DataFrame]:
    """Lay out the documents that each run loses and wins, or all."""
    texts = [each.text if each and (private or each.public) else None for each in decided.texts]
    shared = pd.DataFrame(
        {
            "task": [task for task, _ in decided.documents],
            "doc": [doc for _, doc in decided.documents],
            "change": "",
            "question": [each.question if each else None for each in texts],
            "choices": [
                json.dumps(each.choices, ensure_ascii=False) if each and each.choices else None
                for each in texts
            ],
            "gold": decided.gold,
            "answer": [each.answer if each else None for each in texts],
        }
    )
    known = np.array([private or each is None or each.public for each in decided.texts])

    def answers(one: Decided, end: str) -> dict[str, Any]:
        said = [text if shown else None for text, shown in zip(one.text, known, strict=True)]
        return {f"choice{end}": one.choice, f"margin{end}": one.margin, f"text{end}": said}

    columns = pick(run_columns(), *CELL, *WHICH_RUN)
    for run, one in decided.runs:
        lost, won = decided.lost(one), decided.won(one)
        frame = shared.assign(**answers(decided.baseline, "_intact"), **answers(one, ""))
        frame["change"] = np.select([lost, won], ["lost", "won"], "same")
        frame["score_intact"], frame["score"] = decided.baseline.score, one.score
        about = {column.name: column.value(CellRun(cell, run)) for column in columns}
        # An object column keeps its type, also where it holds nothing.
        rows = lost | won | (not changed)
        yield frame[rows].assign(**about).astype(dict.fromkeys(_TEXT_COLUMNS, "object"))
    if decided.missing:
        which = {name: column.value(cell) for name, column in _CELL.items()}
        rows = [
            {**which, "task": task, "doc": doc, "change": "missing"}
            for task, doc in decided.missing
        ]
        yield pd.DataFrame(rows, dtype="object")


def packed(text: str) -> str:
    """Compress a text into base64 of its gzip, free of HTML's markup; the browser unpacks it."""
    # Without the time, the same text gives the same bytes.
    return base64.b64encode(gzip.compress(text.encode(), mtime=0)).decode()


def packed_json(value: Mapping[str, Any]) -> str:
    """Compress what a script reads, without spaces; NaN is refused."""
    return packed(json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False))


def layer_files(cells: Sequence[CellRecord]) -> tuple[str, str]:
    """Write every run as CSV, packed, and as Parquet in base64; both unrounded, fractions."""
    frame = layer_frame(cells)
    parquet = frame.to_parquet(index=False, compression="zstd")
    return packed(frame.to_csv(index=False)), base64.b64encode(parquet).decode()

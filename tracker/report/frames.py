"""Data frames for code: fractions, unrounded, in snake_case columns."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from tracker.core.answers import interval_name
from tracker.core.records import CellRecord, CorrelationRecord, RunRecord
from tracker.ledger.decisions import Decided, Decisions
from tracker.report.leaderboard.layers import LayerBoard
from tracker.report.leaderboard.models import ModelBoard
from tracker.report.wording import model_labels
from tracker.stats.accuracy import Estimate

_CELL_COLUMNS = ("key", "model", "benchmark", "num_fewshot", "metric", "removed", "sample_seed")
_RUN_COLUMNS = ("component", "layer", "span", "intervention")
_NOT_FIGURES = {*_RUN_COLUMNS, "ablation", "n", "metrics", "reasons"}
_OPTION_COLUMNS = ("gold", "choice_intact", "choice")
_NUMBERS = ("num_fewshot", "sample_seed", "layer", "span", "doc")
_MARGINS = ("margin_intact", "margin")
_TEXT_COLUMNS = ("question", "choices", "answer", "text_intact", "text")
_DOCUMENT_COLUMNS = (
    *("task", "doc", "change", "question", "choices", "gold", "answer", "choice_intact"),
    *("margin_intact", "text_intact", "choice", "margin", "text"),
)
_FIGURES = tuple(name for name in RunRecord.model_fields if name not in _NOT_FIGURES)


def layer_frame(cells: Sequence[CellRecord]) -> pd.DataFrame:
    """Put every measured run into a data frame.

    One row for each model, benchmark and run: `span` layers from `layer` (0-based) on, or their
    `component`, are removed besides `removed` (such as `3,17`; empty for the intact model), or what
    `intervention` says is done to the layer.
    `sample_seed` drew the documents; it is missing for the first ones, or all. `until` is the
    question that the cell was measured for, `interval` what the ends of the drop are.
    Accuracies and drops are fractions; an undefined value is NaN and `reasons` says why, and of `n`
    why there are fewer documents than were asked for. lm-eval's own metrics stand in columns
    `metric_NAME`.
    """
    reported = [
        m for cell in cells for m in (cell.baseline_metrics, *(r.metrics for r in cell.runs))
    ]
    extra = sorted({f"metric_{name}" for metrics in reported for name in metrics})
    numbers = ["baseline_accuracy", "chance_accuracy", *_FIGURES, *extra]
    rows = [
        {
            **_cell_columns(cell),
            **{field: getattr(record, field) for field in _RUN_COLUMNS},
            "n": record.n,
            "until": cell.answer.question if cell.answer else None,
            "interval": interval_name(cell),
            "baseline_accuracy": cell.baseline_accuracy,
            "chance_accuracy": cell.chance_accuracy,
            **{field: getattr(record, field) for field in _FIGURES},
            **{f"metric_{name}": value for name, value in record.metrics.items()},
            "reasons": "; ".join(f"{name}: {why}" for name, why in _reasons(cell, record)),
        }
        for cell in cells
        for record in cell.runs
    ]
    columns = [*_CELL_COLUMNS, *_RUN_COLUMNS, "n", "until", "interval", *numbers, "reasons"]
    return _counts(_frame(rows, columns, numbers), "sample_seed")


def _reasons(cell: CellRecord, record: RunRecord) -> Iterator[tuple[str, str]]:
    if "n" in cell.reasons and "n" not in record.reasons:
        yield "n", cell.reasons["n"]
    yield from record.reasons.items()


def correlation_frame(cells: Sequence[CellRecord]) -> pd.DataFrame:
    """Put every correlation into a data frame.

    One row for each model, benchmark, proxy, coefficient and subset; `n` counts layers. An
    undefined value is NaN and `reason` says why.
    """
    fields = list(CorrelationRecord.model_fields)
    rows = [
        {**_cell_columns(cell), **record.model_dump()}
        for cell in cells
        for record in cell.correlations
    ]
    frame = _frame(rows, [*_CELL_COLUMNS, *fields], ["value", "low", "high", "p_value"])
    return _counts(frame, "sample_seed")


def document_frame(
    found: Iterable[tuple[CellRecord, Decisions]], private: bool = True
) -> pd.DataFrame:
    """Put every document that a run loses or wins into a data frame.

    Args:
        found: Cells, each with what its runs decide.
        private: Whether texts that are not of the hub or a package are among them.

    Returns:
        One row for each model, benchmark, run and document: `change` is `lost` or `won`, and
        `missing`, without a run, of a document that was asked for and is not measured; `choices`
        is a JSON list; `gold`, `choice_intact` and `choice` are options, 0-based; margins are in
        nats, for a metric that is divided by lengths in nats a character or byte, and without
        options the log-probability of the answer.
    """
    frames = [frame for cell, decided in found for frame in _changed(cell, decided, private)]
    columns = [*_CELL_COLUMNS, *_RUN_COLUMNS, *_DOCUMENT_COLUMNS]
    frame = pd.concat(frames)[columns] if frames else pd.DataFrame(columns=columns)
    whole = dict.fromkeys((*_OPTION_COLUMNS, *_NUMBERS), "Int64")
    return frame.reset_index(drop=True).astype(whole | dict.fromkeys(_MARGINS, "float64"))


def _changed(cell: CellRecord, decided: Decisions, private: bool) -> Iterator[pd.DataFrame]:
    """Lay out the documents that each run loses and wins."""
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

    def columns(one: Decided, end: str) -> dict[str, Any]:
        said = [text if shown else None for text, shown in zip(one.text, known, strict=True)]
        return {f"choice{end}": one.choice, f"margin{end}": one.margin, f"text{end}": said}

    for run, one in decided.runs:
        lost, won = decided.lost(one), decided.won(one)
        frame = shared.assign(**columns(decided.baseline, "_intact"), **columns(one, ""))
        frame["change"] = np.where(lost, "lost", "won")
        frame = frame[lost | won]
        about = {**_cell_columns(cell), **{name: getattr(run, name) for name in _RUN_COLUMNS}}
        for place, (name, value) in enumerate(about.items()):
            frame.insert(place, name, value)
        # An object column keeps its type, also where it holds nothing.
        yield frame.astype(dict.fromkeys(_TEXT_COLUMNS, "object"))
    if decided.missing:
        rows = [
            {**_cell_columns(cell), "task": task, "doc": doc, "change": "missing"}
            for task, doc in decided.missing
        ]
        yield pd.DataFrame(rows, dtype="object")


def _cell_columns(cell: CellRecord) -> dict[str, object]:
    benchmark = cell.benchmark
    shown = (cell.key, cell.model.name, benchmark.name, benchmark.num_fewshot, cell.metric)
    removed = ",".join(map(str, cell.removed))
    return dict(zip(_CELL_COLUMNS, (*shown, removed, cell.sample_seed), strict=True))


def _frame(
    rows: Sequence[Mapping[str, object]], columns: list[str], numbers: Sequence[str]
) -> pd.DataFrame:
    frame = pd.DataFrame(list(rows), columns=columns)
    # A column that is undefined everywhere would otherwise hold Python objects.
    return frame.astype(dict.fromkeys(numbers, "float64"))


def layer_board_frame(boards: Sequence[LayerBoard]) -> pd.DataFrame:
    """Put the leaderboards of layers, one a model, into a data frame.

    One row for each model and layer (0-based), the most relevant first: means over `benchmarks`
    benchmarks, fractions; `rank` is missing where a benchmark is lacking.
    """
    names = model_labels([board.model for board in boards])
    rows = [
        {
            "model": name,
            "rank": standing.rank,
            "layer": standing.layer,
            **_estimate("accuracy_relevance", standing.relevance),
            **_estimate("accuracy_drop", standing.drop),
            "cosine_score": standing.cosine_score,
            "best_rank": standing.best_rank,
            "worst_rank": standing.worst_rank,
            "benchmarks": standing.benchmarks,
        }
        for name, board in zip(names, boards, strict=True)
        for standing in board.layers
    ]
    numbers = [*_estimates("accuracy_relevance", "accuracy_drop"), "cosine_score"]
    columns = ["model", "rank", "layer", *numbers, "best_rank", "worst_rank", "benchmarks"]
    return _counts(_frame(rows, columns, numbers), "rank", "best_rank", "worst_rank")


def model_board_frame(board: ModelBoard) -> pd.DataFrame:
    """Put the leaderboard of models into a data frame.

    One row a model, the most robust first: means over `layers` layers and the `benchmarks` that the
    ranked models share, fractions; `rank` is missing where a model lacks them.
    """
    names = model_labels([standing.model for standing in board.models])
    rows = [
        {
            "model": name,
            "rank": standing.rank,
            **_estimate("accuracy_relevance", standing.relevance),
            **_estimate("accuracy_drop", standing.drop),
            "worst_layer": standing.worst_layer,
            "costly_layers": standing.costly,
            "layers": standing.layers,
            "benchmarks": len(board.benchmarks),
        }
        for name, standing in zip(names, board.models, strict=True)
    ]
    numbers = _estimates("accuracy_relevance", "accuracy_drop")
    counts = ["worst_layer", "costly_layers", "layers", "benchmarks"]
    return _counts(_frame(rows, ["model", "rank", *numbers, *counts], numbers), "rank", *counts)


def _estimates(*names: str) -> list[str]:
    return [f"{name}{end}" for name in names for end in ("", "_low", "_high")]


def _estimate(name: str, found: Estimate) -> dict[str, float | None]:
    return dict(zip(_estimates(name), (found.value, found.low, found.high), strict=True))


def _counts(frame: pd.DataFrame, *columns: str) -> pd.DataFrame:
    return frame.astype(dict.fromkeys(columns, "Int64"))

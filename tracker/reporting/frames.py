"""Data frames for code: fractions, unrounded, in snake_case columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd

from tracker.metrics.accuracy import Estimate
from tracker.records import CellRecord, CorrelationRecord, RunRecord
from tracker.reporting.leaderboard.layers import LayerBoard
from tracker.reporting.leaderboard.models import ModelBoard
from tracker.reporting.wording import model_labels

_CELL_COLUMNS = ("key", "model", "benchmark", "num_fewshot", "metric", "removed", "sample_seed")
_RUN_COLUMNS = ("component", "layer", "span")
_NOT_FIGURES = {*_RUN_COLUMNS, "ablation", "n", "metrics", "reasons"}
_FIGURES = tuple(name for name in RunRecord.model_fields if name not in _NOT_FIGURES)


def layer_frame(cells: Sequence[CellRecord]) -> pd.DataFrame:
    """Put every measured run into a data frame.

    One row for each model, benchmark and run: `span` layers from `layer` (0-based) on, or their
    `component`, are removed besides `removed` (such as `3,17`; empty for the intact model).
    `sample_seed` drew the documents; it is missing for the first ones, or all.
    Accuracies and drops are fractions; an undefined value is NaN and `reasons` says why. lm-eval's
    own metrics stand in columns `metric_NAME`.
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
            "baseline_accuracy": cell.baseline_accuracy,
            "chance_accuracy": cell.chance_accuracy,
            **{field: getattr(record, field) for field in _FIGURES},
            **{f"metric_{name}": value for name, value in record.metrics.items()},
            "reasons": "; ".join(f"{name}: {why}" for name, why in record.reasons.items()),
        }
        for cell in cells
        for record in cell.runs
    ]
    columns = [*_CELL_COLUMNS, *_RUN_COLUMNS, "n", *numbers, "reasons"]
    return _counts(_frame(rows, columns, numbers), "sample_seed")


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

"""Build the tables of leaderboards for layers, other parts, models, and pairs of models.

Functions such as `layer_board_columns` define all columns of the exported data. The tables in
reports show only some of these columns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from operator import attrgetter
from typing import Any, Generic, NamedTuple, TypeVar

from tracker.analysis.agreement import MisjudgedLayer, ModelPair, cosine_ranks, find_misjudged
from tracker.analysis.boards import (
    LayerBoard,
    ModelBoard,
    ModelStanding,
    PartBoard,
    PartStanding,
    layer_relevance,
    relative_depth,
    undefined_reason,
)
from tracker.analysis.comparable import benchmark_labels, model_labels
from tracker.report.wording import open_models_sentence, provenance_notes
from tracker.schema.changes import WHOLE_LAYER
from tracker.schema.estimates import Estimate, FigureUnit
from tracker.schema.formats import ACCURACY_FORMAT, count_text, layer_list, metric_format
from tracker.schema.proxies import OBSERVED, PROXIES, Proxy
from tracker.schema.records import NO_REASON, CellRecord, first_layers
from tracker.schema.run_table import by_name, layer_column, pick_columns
from tracker.schema.tables import Column, Table, build_table

_MAX_MISJUDGED = 10
"""Maximum number of misjudged layers that the table lists."""
_PARTS_PER_END = 10
"""Number of parts that a table shows from each end of a ranking of one kind of parts."""
_NO_RANK = "not defined on every benchmark"
_NO_OTHER_MODEL = "there is no other model to compare with"
_NO_SCORE = "this value is computed from cosine scores, and one of them is undefined"
_RELEVANCE_LABEL = "mean accuracy relevance (95 % interval of each table row)"
_DROP_LABEL = "mean accuracy drop with 95 % interval"
_SCORE_LABEL = f"mean {PROXIES['cosine_score'].heading}"
Standing = TypeVar("Standing")


class RankedRow(NamedTuple, Generic[Standing]):
    """Row of a leaderboard: a model's name, ranked figures, and the number of benchmarks.

    The field `standing` contains the figures of a layer, a part or the whole model.
    """

    model: str
    standing: Standing
    benchmarks: int


PartColumns = tuple[Column[RankedRow[PartStanding]], ...]


def _standing_column(
    name: str, label: str, unit: FigureUnit, no_value: str = "", field: str = ""
) -> Column[Any]:
    """Define a leaderboard column that shows one figure of `RankedRow.standing`.

    `field` is the attribute with the figure; the default is `name`.
    """
    return Column(label, unit, attrgetter(f"standing.{field or name}"), no_value, name)


def _relevance_and_drop_columns(relevance: str, drop: str, drop_field: str) -> list[Column[Any]]:
    """Define columns of the relevance (share of accuracy lost), the drop, and both intervals.

    `relevance` and `drop` are the column headings. `drop_field` is the attribute of
    `RankedRow.standing` that contains the drop.
    """
    read = attrgetter(f"standing.{drop_field}")
    columns: tuple[Column[Any], ...] = (
        _standing_column("accuracy_relevance", relevance, "relevance", field="relevance"),
        Column(drop, "points", lambda row: read(row).clip(-1.0, 1.0), name="accuracy_drop"),
    )
    return [column for figure in columns for column in (figure, *figure.bound_columns())]


def _deciding_label(cells: Sequence[CellRecord]) -> str:
    """Return the column heading for the mean drop over cells with the same metric."""
    change = metric_format(cells[0]).change if cells else ACCURACY_FORMAT.change
    return f"mean {change} (simultaneous 95 % intervals of all rows)"


def _rank_columns(no_value: str) -> tuple[Column[Any], ...]:
    """Define the columns `rank`, `best_rank`, `worst_rank`.

    `no_value` is the displayed reason for a missing rank.
    """

    def column(name: str, attribute: str) -> Column[Any]:
        def value(row: Any) -> Estimate:
            return Estimate(getattr(row.standing.rank, attribute), reason=row.standing.rank.reason)

        return Column(name.replace("_", " "), "count", value, no_value, name)

    return column("rank", "value"), column("best_rank", "low"), column("worst_rank", "high")


def _rank_interval(no_value: str = "", label: str = "rank") -> Column[Any]:
    """Define a column that shows the confidence interval of each rank."""
    label = f"{label}, 95 % confidence for all"
    return Column(label, "count", lambda row: row.standing.rank, no_value, interval=True)


def _choose_rank_column(
    rows: Sequence[RankedRow[Any]], no_value: str
) -> tuple[list[Column[Any]], list[str]]:
    """Return the column of ranks, or a note if the ranks cannot be distinguished.

    Both are lists, of which at least one is empty. `no_value` is the reason for a missing rank.
    """
    ranks = [row.standing.rank for row in rows if row.standing.rank.value is not None]
    if any(rank.bounds != (1, len(ranks)) for rank in ranks):
        return [_rank_interval(no_value)], []
    note = "The relevance ranks cannot be distinguished yet: every interval covers all ranks."
    return [], [note] * (len(ranks) > 1)


def layer_board_columns(cells: Sequence[CellRecord] = ()) -> PartColumns:
    """Define all columns of a leaderboard of layers.

    The heading of the drop names the metric that `cells` report.
    """
    return (
        Column("model", "text", lambda row: row.model, name="model"),
        *_rank_columns(_NO_RANK),
        _standing_column("layer", "layer (0-based)", "count"),
        *_relevance_and_drop_columns(_RELEVANCE_LABEL, _deciding_label(cells), "deciding"),
        _standing_column("cosine_score", _SCORE_LABEL, "proxy", _NO_SCORE),
        _standing_column("benchmarks", "benchmarks", "count"),
        _standing_column("shown", "shown", "text"),
    )


def _board_rows(board: PartBoard, label: str) -> list[RankedRow[PartStanding]]:
    return [RankedRow(label, standing, len(board.cells)) for standing in board.parts]


def layer_board_data(boards: Sequence[LayerBoard]) -> Table:
    """Build one table of the layers of all models; the values are not rounded.

    There is one row for each layer (0-based) of each model. The layers of a model are sorted by the
    lower bound of the drop, in descending order. Relevance and drop are fractions, averaged over
    benchmarks. `rank` is missing if the relevance is not defined on every benchmark.
    """
    labelled = zip(boards, model_labels([board.model for board in boards]), strict=True)
    rows = [row for board, label in labelled for row in _board_rows(board, label)]
    return build_table("", layer_board_columns(), rows)


def layer_board_table(board: LayerBoard, label: str) -> Table:
    """Build the leaderboard of the layers of one model."""
    columns, ranks_by_cosine = by_name(*layer_board_columns(board.cells)), cosine_ranks(board)
    rows = _board_rows(board, label)
    rank_columns, notes = _choose_rank_column(rows, _NO_RANK)
    cosine_column: Column[RankedRow[PartStanding]] = Column(
        "rank by cosine score",
        "count",
        lambda row: ranks_by_cosine.get(row.standing.layer),
        _NO_SCORE,
    )
    return build_table(
        f"{label}: layers, averaged over {count_text(len(board.cells), 'benchmark')}, sorted by "
        "the lower bound of the drop (largest first).",
        [
            *rank_columns,
            *pick_columns(
                columns, "layer", "shown", "accuracy_drop", "accuracy_relevance", "cosine_score"
            ),
            cosine_column,
            columns["benchmarks"],
        ],
        rows,
        *notes,
        *_board_notes(board),
        header=len(rank_columns),
    )


def _board_notes(board: LayerBoard) -> list[str]:
    """Return the notes below a leaderboard of layers, such as reasons for missing ranks."""
    has_no_ranks = bool(board.ranked) and not cosine_ranks(board)
    reasons: dict[str, Callable[[PartStanding], bool]] = {
        "no rank, because the relevance is not defined on every benchmark": lambda row: (
            row.rank.value is None
        ),
        "no mean cosine score, because the score is undefined on a benchmark": lambda row: (
            row.cosine_score is None
        ),
        "no rank by cosine score, because a layer has no cosine score": lambda row: has_no_ranks,
        (
            "the drop is not significant by McNemar’s exact test (Holm), although its interval is "
            "above 0"
        ): lambda row: row.shown == "open" and (row.deciding.low or 0.0) > 0,
    }
    notes = []
    for reason, applies in reasons.items():
        if layers := [row.layer for row in board.by_depth if applies(row)]:
            notes.append(f"{layer_list(layers, len(board.parts)).capitalize()}: {reason}.")
    return notes + provenance_notes(board.cells)


def part_board_columns(cells: Sequence[CellRecord] = ()) -> PartColumns:
    """Define all columns of a leaderboard of parts, such as heads.

    The heading of the drop names the metric that `cells` report.
    """
    return (
        Column("model", "text", lambda row: row.model, name="model"),
        Column("kind", "text", lambda row: row.standing.change.kind.family.plural, name="kind"),
        Column("part", "text", lambda row: row.standing.change.label(), name="part"),
        *_rank_columns(_NO_RANK),
        _standing_column("layer", "layer (0-based)", "count", field="change.first_layer"),
        _standing_column("span", "layers", "count", field="change.span"),
        _standing_column("number", "number in the layer (0-based)", "count", field="change.number"),
        *_relevance_and_drop_columns(_RELEVANCE_LABEL, _deciding_label(cells), "deciding"),
        Column("benchmarks", "count", lambda row: row.benchmarks, name="benchmarks"),
        _standing_column("shown", "shown", "text"),
    )


def part_board_data(boards: Sequence[tuple[str, PartBoard]]) -> Table:
    """Build an unrounded table with the leaderboards of heads, experts and ranges of layers.

    Each row is one part (e.g. a head) of a model. Parts of one kind are sorted by the lower bound
    of the drop, in descending order.
    """
    rows = [row for label, board in boards for row in _board_rows(board, label)]
    return build_table("", part_board_columns(), rows)


def part_board_table(board: PartBoard, label: str) -> Table:
    """Build the leaderboard of one kind of parts, such as heads.

    A long table contains only its first and its last `_PARTS_PER_END` rows.
    """
    rows = _board_rows(board, label)
    title = (
        f"{label}: {board.kind.plural}, averaged over {count_text(len(board.cells), 'benchmark')}, "
        "sorted by the lower bound of the drop (largest first)"
    )
    rank_columns, notes = _choose_rank_column(rows, _NO_RANK)
    if len(rows) > 2 * _PARTS_PER_END:
        title += f"; only the first and the last {_PARTS_PER_END} of {len(rows):,} rows are shown"
        rows = rows[:_PARTS_PER_END] + rows[-_PARTS_PER_END:]
    columns = by_name(*part_board_columns(board.cells))
    return build_table(
        f"{title}.",
        [
            *rank_columns,
            *pick_columns(columns, "part", "shown", "accuracy_drop", "accuracy_relevance"),
        ],
        rows,
        *notes,
        header=len(rank_columns),
    )


def misjudged_table(board: LayerBoard, label: str) -> Table:
    """Build the table of layers that cosine scores rank significantly too high or too low."""
    columns: tuple[Column[MisjudgedLayer], ...] = (
        Column("layer (0-based)", "count", lambda row: row.standing.layer),
        _rank_interval(label="rank by relevance"),
        Column("rank by cosine score", "count", lambda row: row.cosine_rank),
        Column("places outside", "count", lambda row: row.off),
        Column(_RELEVANCE_LABEL, "relevance", lambda row: row.standing.relevance),
        Column(_DROP_LABEL, "points", lambda row: row.standing.drop),
        Column(_SCORE_LABEL, "proxy", lambda row: row.standing.cosine_score, _NO_SCORE),
    )
    return build_table(
        f"{label}: layers whose rank by cosine score is outside the interval of the rank by "
        f"relevance (averages over {count_text(len(board.cells), 'benchmark')}).",
        columns,
        find_misjudged(board)[:_MAX_MISJUDGED],
    )


def relevance_interval_table(board: LayerBoard, label: str) -> Table:
    """Build the table of each layer's relevance (accuracy lost) per benchmark and on average."""
    means = {standing.layer: standing.relevance for standing in board.by_depth}
    columns = [
        Column(name, "relevance", partial(layer_relevance, cell))
        for cell, name in zip(board.cells, benchmark_labels(board.cells), strict=True)
    ]
    return build_table(
        f"{label}: accuracy relevance with 95 % intervals.",
        [layer_column(), *columns, Column("mean", "relevance", means.__getitem__)],
        means,
    )


def proxy_table(cells: Sequence[CellRecord], label: str) -> Table:
    """Build the table of all proxies (e.g. cosine score) of each layer on each benchmark."""

    def column(cell: CellRecord, name: str, proxy: Proxy) -> Column[int]:
        runs = cell.runs_of_kind()

        def value(layer: int) -> Estimate:
            figure = runs[layer].figure(proxy.name) if layer in runs else None
            return Estimate(figure, reason=undefined_reason(cell, layer, proxy.name))

        return Column(f"{proxy.heading}: {name}", "proxy", value)

    labelled = list(zip(cells, benchmark_labels(cells), strict=True))
    return build_table(
        f"{label}: values of the proxies by layer.",
        [
            layer_column(),
            *(column(cell, name, proxy) for proxy in OBSERVED for cell, name in labelled),
        ],
        first_layers(WHOLE_LAYER, *cells),
    )


def model_board_columns() -> tuple[Column[RankedRow[ModelStanding]], ...]:
    """Define all columns of the leaderboard of models."""

    def costly_layers(row: RankedRow[ModelStanding]) -> Estimate:
        return Estimate(row.standing.costly, reason=row.standing.relevance.reason or NO_REASON)

    relevance = "mean relevance of a layer with 95 % interval"
    no_worst = "the most important layer is not known"
    return (
        Column("model", "text", lambda row: row.model, name="model"),
        *_rank_columns(_NO_OTHER_MODEL),
        *_relevance_and_drop_columns(relevance, _DROP_LABEL, "drop"),
        _standing_column("worst_layer", "most critical layer (0-based)", "count", no_worst),
        Column(
            "number of layers that are shown to matter",
            "count",
            costly_layers,
            name="costly_layers",
        ),
        _standing_column("layers", "layers counted", "count"),
        Column("benchmarks", "count", lambda row: row.benchmarks, name="benchmarks"),
    )


def _model_rows(board: ModelBoard, labels: Sequence[str]) -> list[RankedRow[ModelStanding]]:
    pairs = zip(labels, board.models, strict=True)
    return [RankedRow(label, standing, len(board.benchmarks)) for label, standing in pairs]


def model_board_data(board: ModelBoard) -> Table:
    """Build the leaderboard of models; the values are not rounded.

    The first model loses the least accuracy when a layer is removed. Relevance and drop are
    fractions, averaged over layers and over the benchmarks on which all ranked models were
    measured. `rank` is missing for a model without results on at least one of these benchmarks.
    """
    labels = model_labels([standing.model for standing in board.models])
    return build_table("", model_board_columns(), _model_rows(board, labels))


def model_board_table(board: ModelBoard, labels: Sequence[str]) -> Table:
    """Build the leaderboard of models; `labels` name the models in the order of the board."""
    names = ("model", "accuracy_relevance", "accuracy_drop", "worst_layer", "costly_layers")
    rows = _model_rows(board, labels)
    rank_columns, _ = _choose_rank_column(rows, _NO_OTHER_MODEL)
    return build_table(
        "Models, sorted by the mean relevance of their layers over "
        f"{count_text(len(board.benchmarks), 'common benchmark')}, lowest first.",
        [*rank_columns, *pick_columns(by_name(*model_board_columns()), *names, "layers")],
        rows,
        *filter(None, [open_models_sentence(board)]),
        header=len(rank_columns),
    )


def depth_table(boards: Sequence[LayerBoard], labels: Sequence[str]) -> Table:
    """Build a table with the relevance and relative depth (0 to 1) of each model's layers."""
    columns: tuple[Column[tuple[str, int, PartStanding]], ...] = (
        Column("model", "text", lambda row: row[0]),
        Column("layer (0-based)", "count", lambda row: row[2].layer),
        Column("relative depth", "metric", lambda row: relative_depth(row[2].layer, row[1])),
        Column(_RELEVANCE_LABEL, "relevance", lambda row: row[2].relevance),
        Column("benchmarks", "count", lambda row: row[2].benchmarks),
    )
    rows = [
        (label, board.model.layers, standing)
        for board, label in zip(boards, labels, strict=True)
        for standing in board.by_depth
    ]
    return build_table("Mean accuracy relevance of every layer over benchmarks.", columns, rows)


def difference_table(pair: ModelPair) -> Table:
    """Build the table that compares two models: the difference of their drops for each layer."""
    measure = pair.measure
    columns = [
        Column(measure.column_head(comparison.benchmark), measure.form, comparison.difference)
        for comparison in pair.comparisons
    ]
    return build_table(
        f"{pair.first} minus {pair.second}: difference of {measure.change}s with 95 % intervals.",
        [layer_column(), *columns],
        pair.layers,
    )

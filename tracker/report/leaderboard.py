"""Build the tables of the leaderboards: layers of a model, misjudged layers, models, and pairs.

The columns of both leaderboards are defined once, for programs; people see some of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Generic, NamedTuple, TypeVar

from tracker.analysis.agreement import Misjudged, Pair, cosine_ranks, misjudged
from tracker.analysis.boards import (
    LayerBoard,
    ModelBoard,
    ModelStanding,
    PartBoard,
    PartStanding,
    layer_relevance,
    relative_depth,
    why_undefined,
)
from tracker.analysis.comparable import benchmark_labels, model_labels
from tracker.core.changes import WHOLE_LAYER
from tracker.core.estimates import Estimate, Unit
from tracker.core.formats import counted, layer_list
from tracker.core.proxies import OBSERVED, PROXIES, Proxy
from tracker.core.records import NO_REASON, CellRecord, layers_of
from tracker.core.run_table import layer_column, named, pick
from tracker.core.tables import Column, Table, table
from tracker.report.wording import models_open, provenance_notes

_MOST = 10
"""Maximum number of misjudged layers that are listed."""
_ENDS = 10
"""Number of parts of a kind that are shown from either end of their ranking."""
_NO_RANK = "not defined on every benchmark"
_ALONE = "there is no other model to compare with"
_NO_SCORE = "undefined on a benchmark, or in a layer that has a rank"
_RELEVANCE = "mean relevance with 95 % interval for each alone"
_DROP = "mean accuracy drop with 95 % interval"
_DECIDING = f"{_DROP} for all together"
_SCORE = f"mean {PROXIES['cosine_score'].heading}"
Ranked = TypeVar("Ranked")


class RankedRow(NamedTuple, Generic[Ranked]):
    """A row of a leaderboard whose model is ranked on `benchmarks` benchmarks."""

    model: str
    standing: Ranked
    benchmarks: int


def _standing(
    name: str, label: str, unit: Unit, otherwise: str = "", field: str = ""
) -> Column[Any]:
    """State the column of a field of the rows' standings; the field is `name` where empty."""
    return Column(label, unit, lambda row: getattr(row.standing, field or name), otherwise, name)


def _with_ends(column: Column[Any]) -> tuple[Column[Any], ...]:
    return (column, *column.ends())


def _ranks(otherwise: str) -> tuple[Column[Any], ...]:
    """Return the columns of ranks for programs."""

    def column(name: str, end: str) -> Column[Any]:
        def value(row: Any) -> Estimate:
            return Estimate(getattr(row.standing.rank, end), reason=row.standing.rank.reason)

        return Column(name.replace("_", " "), "count", value, otherwise, name)

    return column("rank", "value"), column("best_rank", "low"), column("worst_rank", "high")


def _between(otherwise: str = "", label: str = "rank") -> Column[Any]:
    """Return the column of ranks for people, as the best and the worst possible rank."""
    label = f"{label}, 95 % confidence for all"
    return Column(label, "count", lambda row: row.standing.rank, otherwise, interval=True)


def _rank_column(
    rows: Sequence[RankedRow[Any]], otherwise: str
) -> tuple[list[Column[Any]], list[str]]:
    """Return the column of ranks; a note replaces it if all ranks are possible for every row."""
    ranks = [row.standing.rank for row in rows if row.standing.rank.value is not None]
    if any(rank.between != (1, len(ranks)) for rank in ranks):
        return [_between(otherwise)], []
    return [], ["No rank by relevance is told from another yet."] * (len(ranks) > 1)


def layer_board_columns() -> tuple[Column[RankedRow[PartStanding]], ...]:
    """State the columns of a leaderboard of layers that code gets."""
    return (
        Column("model", "text", lambda row: row.model, name="model"),
        *_ranks(_NO_RANK),
        _standing("layer", "layer (0-based)", "count"),
        *_with_ends(_standing("accuracy_relevance", _RELEVANCE, "relevance", field="relevance")),
        *_with_ends(_standing("accuracy_drop", _DECIDING, "points", field="deciding")),
        _standing("cosine_score", _SCORE, "proxy", _NO_SCORE),
        _standing("benchmarks", "benchmarks", "count"),
        _standing("shown", "shown", "text"),
    )


def _rows(board: PartBoard, label: str) -> list[RankedRow[PartStanding]]:
    return [RankedRow(label, standing, len(board.cells)) for standing in board.parts]


def layer_board_data(boards: Sequence[LayerBoard]) -> Table:
    """Build the leaderboards of layers for programs, one for each model.

    One row for each model and layer (0-based), the largest lower end of a drop first: means over
    `benchmarks` benchmarks, fractions; `rank` is missing where a benchmark is lacking.
    """
    labelled = zip(boards, model_labels([board.model for board in boards]), strict=True)
    rows = [row for board, label in labelled for row in _rows(board, label)]
    return table("", layer_board_columns(), rows)


def layer_board_table(board: LayerBoard, label: str) -> Table:
    """Build the leaderboard of one model's layers, sorted by the lower bound of the drop."""
    columns, ranks = named(*layer_board_columns()), cosine_ranks(board)
    rows = _rows(board, label)
    rank, notes = _rank_column(rows, _NO_RANK)
    by_cosine: Column[RankedRow[PartStanding]] = Column(
        "rank by cosine score", "count", lambda row: ranks.get(row.standing.layer), _NO_SCORE
    )
    return table(
        f"{label}: its layers over {counted(len(board.cells), 'benchmark')}, the largest lower end "
        "of a drop first.",
        [
            *rank,
            *pick(columns, "layer", "shown", "accuracy_drop", "accuracy_relevance", "cosine_score"),
            by_cosine,
            columns["benchmarks"],
        ],
        rows,
        *notes,
        *_notes(board),
        header=len(rank),
    )


def _notes(board: LayerBoard) -> list[str]:
    """Explain dashes, and verdicts that stay open although their interval excludes 0."""
    no_cosine_ranks = bool(board.ranked) and not cosine_ranks(board)
    reasons: dict[str, Callable[[PartStanding], bool]] = {
        f"no rank: {_NO_RANK}": lambda row: row.rank.value is None,
        "no mean cosine score: undefined on a benchmark": lambda row: row.cosine_score is None,
        f"no rank by cosine score: {_NO_SCORE}": lambda row: no_cosine_ranks,
        "open by McNemar’s exact test (Holm), though the interval is above 0": lambda row: (
            row.shown == "open" and (row.deciding.low or 0.0) > 0
        ),
    }
    notes = []
    for why, holds in reasons.items():
        if rows := [row.layer for row in board.by_depth if holds(row)]:
            notes.append(f"{layer_list(rows, len(board.parts)).capitalize()}: {why}.")
    return notes + provenance_notes(board.cells)


def part_board_columns() -> tuple[Column[RankedRow[PartStanding]], ...]:
    """State the columns of a leaderboard of parts that code gets."""

    def of_run(field: str, label: str, name: str = "") -> Column[RankedRow[PartStanding]]:
        return Column(
            label, "count", lambda row: getattr(row.standing.change, field), "", name or field
        )

    return (
        Column("model", "text", lambda row: row.model, name="model"),
        Column("kind", "text", lambda row: row.standing.change.kind.family.many, name="kind"),
        Column("part", "text", lambda row: row.standing.change.label(), name="part"),
        *_ranks(_NO_RANK),
        of_run("first", "layer (0-based)", "layer"),
        of_run("span", "layers"),
        of_run("number", "number in the layer (0-based)"),
        *_with_ends(_standing("accuracy_relevance", _RELEVANCE, "relevance", field="relevance")),
        *_with_ends(_standing("accuracy_drop", _DECIDING, "points", field="deciding")),
        Column("benchmarks", "count", lambda row: row.benchmarks, name="benchmarks"),
        _standing("shown", "shown", "text"),
    )


def part_board_data(boards: Sequence[tuple[str, PartBoard]]) -> Table:
    """Build the leaderboards of heads, experts and spans for programs, each with its model.

    One row for each model and part, kind by kind, the largest lower end of a drop first.
    """
    rows = [row for label, board in boards for row in _rows(board, label)]
    return table("", part_board_columns(), rows)


def part_board_table(board: PartBoard, label: str) -> Table:
    """Build the leaderboard of one kind of a model's parts; only both ends if it is long."""
    rows = _rows(board, label)
    between = len(rows) - 2 * _ENDS
    title = (
        f"{label}: its {board.kind.many} over {counted(len(board.cells), 'benchmark')}, the "
        "largest lower end of a drop first"
    )
    rank, notes = _rank_column(rows, _NO_RANK)
    if between > 0:
        rows = rows[:_ENDS] + rows[-_ENDS:]
        title += f"; {between:,} more are between the first {_ENDS} and the last {_ENDS}"
    columns = named(*part_board_columns())
    return table(
        f"{title}.",
        [*rank, *pick(columns, "part", "shown", "accuracy_drop", "accuracy_relevance")],
        rows,
        *notes,
        header=len(rank),
    )


def misjudged_table(board: LayerBoard, label: str) -> Table:
    """Build the table of layers that the cosine score is shown to misjudge, worst first."""
    columns: tuple[Column[Misjudged], ...] = (
        Column("layer (0-based)", "count", lambda row: row.standing.layer),
        _between(label="rank by relevance"),
        Column("rank by cosine score", "count", lambda row: row.cosine_rank),
        Column("places outside", "count", lambda row: row.off),
        Column(_RELEVANCE, "relevance", lambda row: row.standing.relevance),
        Column(_DROP, "points", lambda row: row.standing.drop),
        Column(_SCORE, "proxy", lambda row: row.standing.cosine_score, _NO_SCORE),
    )
    return table(
        f"{label}: the layers whose rank by cosine score lies outside of where their rank by mean "
        f"relevance over {counted(len(board.cells), 'benchmark')} is shown to be.",
        columns,
        misjudged(board)[:_MOST],
    )


def relevance_interval_table(board: LayerBoard, label: str) -> Table:
    """Build the table of the relevance curves: benchmarks and mean, with intervals."""
    means = {standing.layer: standing.relevance for standing in board.by_depth}
    columns = [
        Column(name, "relevance", partial(layer_relevance, cell))
        for cell, name in zip(board.cells, benchmark_labels(board.cells), strict=True)
    ]
    return table(
        f"{label}: accuracy relevance with 95 % intervals.",
        [layer_column(), *columns, Column("mean", "relevance", means.__getitem__)],
        means,
    )


def proxy_table(cells: Sequence[CellRecord], label: str) -> Table:
    """Build the table of the proxy curves: every proxy of each layer on each benchmark."""

    def column(cell: CellRecord, name: str, proxy: Proxy) -> Column[int]:
        runs = cell.runs_of()

        def value(layer: int) -> Estimate:
            figure = runs[layer].figure(proxy.name) if layer in runs else None
            return Estimate(figure, reason=why_undefined(cell, layer, proxy.name))

        return Column(f"{proxy.heading}: {name}", "proxy", value)

    labelled = list(zip(cells, benchmark_labels(cells), strict=True))
    return table(
        f"{label}: the proxies of every layer.",
        [
            layer_column(),
            *(column(cell, name, proxy) for proxy in OBSERVED for cell, name in labelled),
        ],
        layers_of(WHOLE_LAYER, *cells),
    )


def model_board_columns() -> tuple[Column[RankedRow[ModelStanding]], ...]:
    """State the columns of the leaderboard of models that code gets."""

    def costly(row: RankedRow[ModelStanding]) -> Estimate:
        return Estimate(row.standing.costly, reason=row.standing.relevance.reason or NO_REASON)

    relevance = "mean relevance of a layer with 95 % interval"
    worst, surely = ("most critical layer (0-based)", "layers that are shown to matter")
    return (
        Column("model", "text", lambda row: row.model, name="model"),
        *_ranks(_ALONE),
        *_with_ends(_standing("accuracy_relevance", relevance, "relevance", field="relevance")),
        *_with_ends(_standing("accuracy_drop", _DROP, "points", field="drop")),
        _standing("worst_layer", worst, "count", "it is open which layer matters most"),
        Column(surely, "count", costly, name="costly_layers"),
        _standing("layers", "layers counted", "count"),
        Column("benchmarks", "count", lambda row: row.benchmarks, name="benchmarks"),
    )


def _model_rows(board: ModelBoard, labels: Sequence[str]) -> list[RankedRow[ModelStanding]]:
    count = len(board.benchmarks)
    return [RankedRow(*each, count) for each in zip(labels, board.models, strict=True)]


def model_board_data(board: ModelBoard) -> Table:
    """Build the leaderboard of models for programs.

    One row a model, the least hurt first: means over `layers` layers and the `benchmarks` that the
    ranked models share, fractions; `rank` is missing where a model lacks them.
    """
    labels = model_labels([standing.model for standing in board.models])
    return table("", model_board_columns(), _model_rows(board, labels))


def model_board_table(board: ModelBoard, labels: Sequence[str]) -> Table:
    """Build the leaderboard of models, the least hurt first; `labels` are in its order."""
    names = ("model", "accuracy_relevance", "accuracy_drop", "worst_layer", "costly_layers")
    rows = _model_rows(board, labels)
    rank, _ = _rank_column(rows, _ALONE)
    return table(
        "Models: how much the removal of one layer hurts, the least first, over "
        f"{counted(len(board.benchmarks), 'common benchmark')}.",
        [*rank, *pick(named(*model_board_columns()), *names, "layers")],
        rows,
        *filter(None, [models_open(board)]),
        header=len(rank),
    )


def depth_table(boards: Sequence[LayerBoard], labels: Sequence[str]) -> Table:
    """Build the table of the curves over relative depth, a row for each model and layer."""
    columns: tuple[Column[tuple[str, int, PartStanding]], ...] = (
        Column("model", "text", lambda row: row[0]),
        Column("layer (0-based)", "count", lambda row: row[2].layer),
        Column("relative depth", "metric", lambda row: relative_depth(row[2].layer, row[1])),
        Column(_RELEVANCE, "relevance", lambda row: row[2].relevance),
        Column("benchmarks", "count", lambda row: row[2].benchmarks),
    )
    rows = [
        (label, board.model.layers, standing)
        for board, label in zip(boards, labels, strict=True)
        for standing in board.by_depth
    ]
    return table("Mean accuracy relevance of every layer.", columns, rows)


def difference_table(pair: Pair) -> Table:
    """Build the table of differences of two models: rows are layers, columns benchmarks."""
    measure = pair.measure
    columns = [
        Column(measure.head(shared.benchmark), measure.form, shared.difference)
        for shared in pair.comparisons
    ]
    return table(
        f"{pair.one} minus {pair.other}: difference of {measure.change}s with 95 % intervals.",
        [layer_column(), *columns],
        pair.layers,
    )

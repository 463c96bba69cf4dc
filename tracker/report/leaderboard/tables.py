"""Tables of the leaderboards: layers within a model, layers misjudged, models, and pairs.

The columns of both leaderboards are stated once; data frames and trackers pick from them by name.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from tracker.core.estimates import Estimate
from tracker.core.formats import counted, layer_list
from tracker.core.proxies import OBSERVED, PROXIES, Proxy
from tracker.core.records import NO_REASON, WHOLE_LAYER, CellRecord, layers_of
from tracker.core.run_table import layer_column, named, pick
from tracker.core.tables import Column, Table, table
from tracker.report.caveats import provenance_notes
from tracker.report.layer_figures import layer_relevance, relative_depth, why_undefined
from tracker.report.leaderboard.layers import LayerBoard, LayerStanding
from tracker.report.leaderboard.models import ModelBoard, ModelStanding
from tracker.report.leaderboard.pairs import Pair, SharedBenchmark
from tracker.report.leaderboard.proxies import Misjudged, cosine_ranks, misjudged, rankings
from tracker.report.wording import benchmark_labels

_NO_RANK = "not defined on every benchmark"
_NO_SCORE = "undefined on a benchmark, or in a layer that has a rank"
_RELEVANCE = "mean relevance with 95 % interval"
_DROP = "mean accuracy drop with 95 % interval"
_SCORE = f"mean {PROXIES['cosine_score'].heading}"
LAYER_BOARD = (
    *("model", "rank", "layer"),
    *("accuracy_relevance", "accuracy_relevance_low", "accuracy_relevance_high"),
    *("accuracy_drop", "accuracy_drop_low", "accuracy_drop_high", "cosine_score"),
    *("best_rank", "worst_rank", "benchmarks"),
)
"""Names of the columns that code gets of a leaderboard of layers."""
MODEL_BOARD = (
    *("model", "rank"),
    *("accuracy_relevance", "accuracy_relevance_low", "accuracy_relevance_high"),
    *("accuracy_drop", "accuracy_drop_low", "accuracy_drop_high"),
    *("worst_layer", "costly_layers", "layers", "benchmarks"),
)
"""Names of the columns that code gets of the leaderboard of models."""


class RankedLayer(NamedTuple):
    """A row of a leaderboard of layers; `by_cosine` is its rank by cosine score."""

    model: str
    standing: LayerStanding
    by_cosine: int | None


class RankedModel(NamedTuple):
    """A row of the leaderboard of models."""

    model: str
    standing: ModelStanding
    board: ModelBoard


def layer_board_rows(board: LayerBoard, label: str) -> list[RankedLayer]:
    """List the layers of a model, the most relevant first."""
    ranks = cosine_ranks(board)
    return [RankedLayer(label, one, ranks.get(one.layer)) for one in board.layers]


def layer_board_columns() -> dict[str, Column[RankedLayer]]:
    """State every column of a leaderboard of layers."""
    relevance: Column[RankedLayer] = Column(
        _RELEVANCE, "relevance", lambda row: row.standing.relevance, name="accuracy_relevance"
    )
    drop: Column[RankedLayer] = Column(
        _DROP, "points", lambda row: row.standing.drop, name="accuracy_drop"
    )
    return named(
        (
            Column("model", "text", lambda row: row.model, name="model"),
            Column("rank", "count", lambda row: row.standing.rank, _NO_RANK, "rank"),
            Column("layer (0-based)", "count", lambda row: row.standing.layer, name="layer"),
            *(relevance, *relevance.ends(), drop, *drop.ends()),
            Column(
                _SCORE, "proxy", lambda row: row.standing.cosine_score, _NO_SCORE, "cosine_score"
            ),
            Column(
                "rank by cosine score", "count", lambda row: row.by_cosine, _NO_SCORE, "by_cosine"
            ),
            Column("best rank", "count", lambda row: row.standing.best_rank, name="best_rank"),
            Column("worst rank", "count", lambda row: row.standing.worst_rank, name="worst_rank"),
            Column(
                *("rank on single benchmarks, best to worst", "count", _best_to_worst, _NO_RANK),
                name="ranks",
                interval=True,
            ),
            Column("benchmarks", "count", lambda row: row.standing.benchmarks, name="benchmarks"),
        )
    )


def _best_to_worst(row: RankedLayer) -> Estimate:
    best, worst = row.standing.best_rank, row.standing.worst_rank
    return Estimate(best, best, worst)


def layer_board_table(board: LayerBoard, label: str) -> Table:
    """Set the leaderboard of one model's layers, the most relevant first."""
    rows = layer_board_rows(board, label)
    return table(
        f"{label}: its layers, ranked by mean accuracy relevance over "
        f"{counted(len(board.cells), 'benchmark')}.",
        pick(
            layer_board_columns(),
            *("rank", "layer", "accuracy_relevance", "accuracy_drop", "cosine_score"),
            *("by_cosine", "ranks", "benchmarks"),
        ),
        rows,
        _notes(board, any(row.by_cosine is not None for row in rows)),
        header=1,
        sorted_by=0,
    )


def _notes(board: LayerBoard, has_ranks: bool) -> tuple[str, ...]:
    """Say why there are dashes."""
    lacking = [one.layer for one in board.layers if one.rank is None]
    total = len(board.layers)
    found = [
        (lacking, f"no rank: {_NO_RANK}"),
        (
            [one.layer for one in board.layers if one.cosine_score is None],
            "no mean cosine score: undefined on a benchmark",
        ),
    ]
    if not has_ranks and len(lacking) < total:
        found.append(([one.layer for one in board.layers], f"no rank by cosine score: {_NO_SCORE}"))
    return (
        *(
            f"{layer_list(sorted(which), total).capitalize()}: {why}."
            for which, why in found
            if which
        ),
        *provenance_notes(board.cells),
    )


def misjudged_table(board: LayerBoard, label: str) -> Table:
    """Set the layers that the cosine score gets most wrong, the worst first."""
    columns: tuple[Column[Misjudged], ...] = (
        Column("layer (0-based)", "count", lambda row: row.standing.layer),
        Column("rank by relevance", "count", lambda row: row.standing.rank),
        Column("rank by cosine score", "count", lambda row: row.cosine_rank),
        Column("places apart", "count", lambda row: row.off),
        Column(_RELEVANCE, "relevance", lambda row: row.standing.relevance),
        Column(_DROP, "points", lambda row: row.standing.drop),
        Column(_SCORE, "proxy", lambda row: row.standing.cosine_score, _NO_SCORE),
    )
    return table(
        f"{label}: the layers that the cosine score gets most wrong, by mean ranks over "
        f"{counted(len(board.cells), 'benchmark')}.",
        columns,
        misjudged(board),
    )


def relevance_interval_table(board: LayerBoard, label: str) -> Table:
    """Set the numbers behind the relevance curves: benchmarks and mean, with intervals."""

    def column(cell: CellRecord, label: str) -> Column[LayerStanding]:
        return Column(label, "relevance", lambda row: layer_relevance(cell, row.layer))

    labelled = zip(board.cells, benchmark_labels(board.cells), strict=True)
    return table(
        f"{label}: accuracy relevance with 95 % intervals.",
        [
            layer_column().of(_layer),
            *(column(cell, name) for cell, name in labelled),
            Column("mean", "relevance", lambda row: row.relevance),
        ],
        sorted(board.layers, key=_layer),
    )


def _layer(standing: LayerStanding) -> int:
    return standing.layer


def proxy_table(cells: Sequence[CellRecord], label: str) -> Table:
    """Set the numbers behind the proxy curves: every proxy of each layer on each benchmark."""

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


def rank_table(cells: Sequence[CellRecord], label: str) -> Table:
    """Set the numbers behind the map of rank against rank: both ranks on each benchmark."""

    def column(ranks: dict[int, float], head: str) -> Column[int]:
        return Column(head, "rank", ranks.get, "the drop or the cosine score is undefined")

    columns: list[Column[int]] = []
    for ranking in rankings(cells):
        by_drop = {layer: rank for layer, rank, _ in ranking.rows}
        by_cosine = {layer: rank for layer, _, rank in ranking.rows}
        columns.append(column(by_drop, f"{ranking.benchmark}: rank by drop"))
        columns.append(column(by_cosine, f"{ranking.benchmark}: rank by cosine score"))
    layers = sorted({layer for ranking in rankings(cells) for layer, _, _ in ranking.rows})
    title = f"{label}: ranks of every layer (1 = largest)."
    return table(title, [layer_column(), *columns], layers)


def model_board_rows(board: ModelBoard, labels: Sequence[str]) -> list[RankedModel]:
    """List the models, the most robust first; `labels` are in this order."""
    return [RankedModel(n, one, board) for n, one in zip(labels, board.models, strict=True)]


def model_board_columns() -> dict[str, Column[RankedModel]]:
    """State every column of the leaderboard of models."""

    def rank(row: RankedModel) -> Estimate:
        why = row.standing.relevance.reason or "there is no other model to compare with"
        return Estimate(row.standing.rank, reason=why)

    def costly(row: RankedModel) -> Estimate:
        return Estimate(row.standing.costly, reason=row.standing.relevance.reason or NO_REASON)

    relevance: Column[RankedModel] = Column(
        "mean relevance of a layer with 95 % interval",
        *("relevance", lambda row: row.standing.relevance),
        name="accuracy_relevance",
    )
    drop: Column[RankedModel] = Column(
        _DROP, "points", lambda row: row.standing.drop, name="accuracy_drop"
    )
    return named(
        (
            Column("rank", "count", rank, name="rank"),
            Column("model", "text", lambda row: row.model, name="model"),
            *(relevance, *relevance.ends(), drop, *drop.ends()),
            Column(
                "most critical layer (0-based)",
                *("count", lambda row: row.standing.worst_layer, "no layer has a rank"),
                name="worst_layer",
            ),
            Column(
                "layers whose drop is surely positive somewhere",
                *("count", costly),
                name="costly_layers",
            ),
            Column("layers counted", "count", lambda row: row.standing.layers, name="layers"),
            Column("benchmarks", "count", lambda row: len(row.board.benchmarks), name="benchmarks"),
        )
    )


def model_board_table(board: ModelBoard, labels: Sequence[str]) -> Table:
    """Set the leaderboard of models, the most robust first; `labels` are in its order."""
    return table(
        "Models, the most robust first: how much the removal of one layer hurts, over "
        f"{counted(len(board.benchmarks), 'common benchmark')}.",
        pick(
            model_board_columns(),
            *("rank", "model", "accuracy_relevance", "accuracy_drop"),
            *("worst_layer", "costly_layers", "layers"),
        ),
        model_board_rows(board, labels),
        header=1,
        sorted_by=0,
    )


def depth_table(boards: Sequence[LayerBoard], labels: Sequence[str]) -> Table:
    """Set the numbers behind the curves over relative depth, a row a model and layer."""
    columns: tuple[Column[tuple[str, int, LayerStanding]], ...] = (
        Column("model", "text", lambda row: row[0]),
        Column("layer (0-based)", "count", lambda row: row[2].layer),
        Column("relative depth", "metric", lambda row: relative_depth(row[2].layer, row[1])),
        Column(_RELEVANCE, "relevance", lambda row: row[2].relevance),
        Column("benchmarks", "count", lambda row: row[2].benchmarks),
    )
    rows = [
        (label, board.model.layers, standing)
        for board, label in zip(boards, labels, strict=True)
        for standing in sorted(board.layers, key=_layer)
    ]
    return table("Mean accuracy relevance of every layer.", columns, rows)


def difference_table(pair: Pair) -> Table:
    """Set the numbers behind the differences of two models: a row a layer, a column a benchmark."""
    measure = pair.measure
    missing = Estimate(None, reason="not measured in both models")

    def column(one: SharedBenchmark) -> Column[int]:
        head = measure.head(one.benchmark)
        return Column(head, measure.form, lambda layer: one.differences.get(layer, missing))

    return table(
        f"{pair.one} minus {pair.other}: difference of {measure.change}s with 95 % intervals.",
        [layer_column(), *map(column, pair.comparisons)],
        sorted({layer for one in pair.comparisons for layer in one.differences}),
    )

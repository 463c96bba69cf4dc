"""Tables of the leaderboards: layers within a model, layers misjudged, models, and pairs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

from tracker.core.records import NO_REASON, WHOLE_LAYER, CellRecord, layers_of
from tracker.report.caveats import provenance_notes
from tracker.report.formats import DASH, counted, fixed, layer_list, points, two_digits
from tracker.report.layer_figures import PANELS, layer_relevance, relative_depth, why_undefined
from tracker.report.leaderboard.layers import LayerBoard
from tracker.report.leaderboard.models import ModelBoard
from tracker.report.leaderboard.pairs import Pair
from tracker.report.leaderboard.proxies import cosine_ranks, misjudged, rankings
from tracker.report.table import Table, Value, estimated, numbers, shown, texts
from tracker.report.wording import benchmark_labels
from tracker.stats.accuracy import Estimate
from tracker.stats.proxies import PROXIES

_four = partial(fixed, digits=4)
_NO_RANK = "not defined on every benchmark"
_NO_SCORE = "undefined on a benchmark, or in a layer that has a rank"


def layer_board_table(board: LayerBoard, label: str) -> Table:
    """Set the leaderboard of one model's layers, the most relevant first."""
    ranks = cosine_ranks(board)
    rows = tuple(
        (
            _rank(one.rank),
            Value(str(one.layer)),
            estimated(one.relevance, two_digits),
            estimated(one.drop, points, 100),
            shown(one.cosine_score, _four, _NO_SCORE),
            _rank(ranks.get(one.layer), _NO_SCORE),
            Value(f"{one.best_rank} to {one.worst_rank}", ends=(one.best_rank, one.worst_rank))
            if one.best_rank is not None and one.worst_rank is not None
            else Value(DASH, _NO_RANK),
            Value(str(one.benchmarks)),
        )
        for one in board.layers
    )
    return Table(
        f"{label}: its layers, ranked by mean accuracy relevance over "
        f"{counted(len(board.cells), 'benchmark')}.",
        numbers(
            "rank",
            "layer (0-based)",
            "mean relevance (95 % interval)",
            "mean accuracy drop (95 % interval), pp",
            "mean cosine score (1 − cos)",
            "rank by cosine score",
            "rank on single benchmarks, best to worst",
            "benchmarks",
        ),
        rows,
        _notes(board, ranks),
        header=1,
        sorted_by=0,
    )


def _notes(board: LayerBoard, ranks: Mapping[int, int]) -> tuple[str, ...]:
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
    if not ranks and len(lacking) < total:
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
    rows = tuple(
        (
            Value(str(one.standing.layer)),
            Value(str(one.standing.rank)),
            Value(str(one.cosine_rank)),
            Value(str(one.off)),
            estimated(one.standing.relevance, two_digits),
            estimated(one.standing.drop, points, 100),
            shown(one.standing.cosine_score, _four, _NO_SCORE),
        )
        for one in misjudged(board)
    )
    return Table(
        f"{label}: the layers that the cosine score gets most wrong, by mean ranks over "
        f"{counted(len(board.cells), 'benchmark')}.",
        numbers(
            "layer (0-based)",
            "rank by relevance",
            "rank by cosine score",
            "places apart",
            "mean relevance (95 % interval)",
            "mean accuracy drop (95 % interval), pp",
            "mean cosine score (1 − cos)",
        ),
        rows,
    )


def relevance_interval_table(board: LayerBoard, label: str) -> Table:
    """Set the numbers behind the relevance curves: benchmarks and mean, with intervals."""
    standings = sorted(board.layers, key=lambda one: one.layer)
    columns = [[Value(str(one.layer)) for one in standings]]
    for cell in board.cells:
        found = (layer_relevance(cell, one.layer) for one in standings)
        columns.append([estimated(estimate, two_digits) for estimate in found])
    columns.append([estimated(one.relevance, two_digits) for one in standings])
    return Table(
        f"{label}: accuracy relevance with 95 % intervals.",
        numbers("layer (0-based)", *benchmark_labels(board.cells), "mean"),
        tuple(zip(*columns, strict=True)),
    )


def proxy_table(cells: Sequence[CellRecord], label: str) -> Table:
    """Set the numbers behind the proxy curves: every proxy of each layer on each benchmark."""
    layers = layers_of(WHOLE_LAYER, *cells)
    columns = [[Value(str(layer)) for layer in layers]]
    labels = []
    for proxy in PROXIES:
        for cell, name in zip(cells, benchmark_labels(cells), strict=True):
            labels.append(f"{PANELS[proxy]}: {name}")
            records = cell.runs_of()
            columns.append(
                [
                    shown(
                        getattr(records[layer], proxy) if layer in records else None,
                        _four,
                        why_undefined(cell, layer, proxy),
                    )
                    for layer in layers
                ]
            )
    return Table(
        f"{label}: the proxies of every layer.",
        numbers("layer (0-based)", *labels),
        tuple(zip(*columns, strict=True)),
    )


def rank_table(cells: Sequence[CellRecord], label: str) -> Table:
    """Set the numbers behind the map of rank against rank: both ranks on each benchmark."""
    found = rankings(cells)
    ranks = [{layer: pair for layer, *pair in ranking.rows} for ranking in found]
    layers = sorted({layer for known in ranks for layer in known})
    heads = [
        f"{ranking.benchmark}: rank by {what}"
        for ranking in found
        for what in ("drop", "cosine score")
    ]
    nothing = Value(DASH, "the drop or the cosine score is undefined")
    rows = tuple(
        (
            Value(str(layer)),
            *(
                Value(str(known[layer][place])) if layer in known else nothing
                for known in ranks
                for place in (0, 1)
            ),
        )
        for layer in layers
    )
    return Table(
        f"{label}: ranks of every layer (1 = largest).", numbers("layer (0-based)", *heads), rows
    )


def model_board_table(board: ModelBoard, labels: Sequence[str]) -> Table:
    """Set the leaderboard of models, the most robust first; `labels` are in its order."""
    rows = tuple(
        (
            _rank(one.rank, one.relevance.reason or "there is no other model to compare with"),
            Value(label),
            estimated(one.relevance, two_digits),
            estimated(one.drop, points, 100),
            Value(DASH, "no layer has a rank")
            if one.worst_layer is None
            else Value(str(one.worst_layer)),
            Value(DASH, one.relevance.reason or NO_REASON)
            if one.costly is None
            else Value(str(one.costly)),
            Value(str(one.layers)),
        )
        for one, label in zip(board.models, labels, strict=True)
    )
    return Table(
        "Models, the most robust first: how much the removal of one layer hurts, over "
        f"{counted(len(board.benchmarks), 'common benchmark')}.",
        (
            *numbers("rank"),
            *texts("model"),
            *numbers(
                "mean relevance of a layer (95 % interval)",
                "mean accuracy drop (95 % interval), pp",
                "most critical layer (0-based)",
                "layers whose drop is surely positive somewhere",
                "layers counted",
            ),
        ),
        rows,
        header=1,
        sorted_by=0,
    )


def depth_table(boards: Sequence[LayerBoard], labels: Sequence[str]) -> Table:
    """Set the numbers behind the curves over relative depth, a row a model and layer."""
    rows = tuple(
        (
            Value(label),
            Value(str(one.layer)),
            shown(relative_depth(one.layer, board.model.layers), _four, NO_REASON),
            estimated(one.relevance, two_digits),
            Value(str(one.benchmarks)),
        )
        for board, label in zip(boards, labels, strict=True)
        for one in sorted(board.layers, key=lambda standing: standing.layer)
    )
    columns = numbers(
        "layer (0-based)", "relative depth", "mean relevance (95 % interval)", "benchmarks"
    )
    return Table("Mean accuracy relevance of every layer.", (*texts("model"), *columns), rows)


def difference_table(pair: Pair) -> Table:
    """Set the numbers behind the differences of two models: a row a layer, a column a benchmark."""
    measure = pair.measure
    layers = sorted({layer for one in pair.comparisons for layer in one.differences})
    missing = Estimate(None, reason="not measured in both models")
    rows = tuple(
        (
            Value(str(layer)),
            *(
                estimated(one.differences.get(layer, missing), measure.write, measure.scale)
                for one in pair.comparisons
            ),
        )
        for layer in layers
    )
    heads = (f"{one.benchmark} ({measure.unit})" for one in pair.comparisons)
    return Table(
        f"{pair.one} minus {pair.other}: difference of {measure.change}s with 95 % intervals.",
        numbers("layer (0-based)", *heads),
        rows,
    )


def _rank(rank: int | None, reason: str = _NO_RANK) -> Value:
    return Value(DASH, reason) if rank is None else Value(str(rank))

"""The chart of rank against rank: where the cosine score puts a layer, and where it may stand."""

from __future__ import annotations

from tracker.core.estimates import Estimate
from tracker.core.formats import counted
from tracker.report.charts import style
from tracker.report.charts.hover import estimate_hover
from tracker.report.leaderboard.layers import LayerBoard
from tracker.report.leaderboard.proxies import cosine_ranks, misjudged


def rank_chart(board: LayerBoard, label: str) -> style.Chart | None:
    """Draw between which ranks each layer lies against its rank by cosine score.

    One labelled point for each layer (trace `layers`) with its interval, 1 = matters most on both
    axes; strong where that misses the diagonal (trace `equal ranks`), on which the cosine score is
    right. None where no layer has both ranks.
    """
    proxy = cosine_ranks(board)
    standings = [standing for standing in board.ranked if standing.layer in proxy]
    if not standings:
        return None
    wrong = {found.standing.layer for found in misjudged(board)}
    ranks = [Estimate(one.rank, one.best_rank, one.worst_rank) for one in standings]
    ends = [0.5, len(board.ranked) + 0.5]
    hovers = [
        estimate_hover(
            f"layer {one.layer}",
            "rank by mean relevance",
            rank,
            "{:.0f}".format,
            f"rank by cosine score {proxy[one.layer]}",
        )
        for one, rank in zip(standings, ranks, strict=True)
    ]
    strength = [1.0 if one.layer in wrong else style.OPEN for one in standings]
    data = [
        {"type": "scatter", "name": "equal ranks", "x": ends, "y": ends, "mode": "lines"}
        | {"line": {"color": style.GREY, "width": 1, "dash": "dot"}}
        | {"hoverinfo": "skip", "showlegend": False},
        style.trace(
            "scatter",
            "layers",
            [proxy[one.layer] for one in standings],
            [one.rank for one in standings],
            hovers,
            error_y=style.errors(ranks, color=style.FAINT),
            mode="markers+text",
            text=[str(one.layer) for one in standings],
            textposition="middle right",
            textfont={"size": 10, "color": style.GREY},
            marker={"size": 8, "color": style.MATTERS, "opacity": strength},
            showlegend=False,
        ),
    ]
    axis = {"showgrid": False, "zeroline": False, "tickangle": 0}
    axis |= {"tick0": 1, "dtick": 1} if len(standings) <= 12 else {"tick0": 0, "dtick": 5}
    return style.chart(
        _title(label, len(wrong), len(standings)),
        data,
        460,
        xaxis=axis
        | {"range": [0.5, ends[1] + 1], "title": {"text": "rank by cosine score (1 = highest)"}},
        yaxis=axis | {"range": ends[::-1], "title": {"text": "rank by relevance (1 = largest)"}},
    )


def _title(label: str, wrong: int, total: int) -> str:
    are, them = ("are", "them") if wrong > 1 else ("is", "it")
    return (
        f"{label}: {wrong or 'none'} of {counted(total, 'layer')} {are} shown to stand elsewhere "
        f"than the cosine score puts {them}"
    )

"""The chart of rank against rank: where the cosine score puts a layer, and where it may stand."""

from __future__ import annotations

from typing import Any

from tracker.core.estimates import Estimate
from tracker.core.formats import counted
from tracker.report.charts import style
from tracker.report.charts.hover import estimate_hover
from tracker.report.leaderboard.layers import LayerBoard
from tracker.report.leaderboard.proxies import cosine_ranks, misjudged


def rank_chart(board: LayerBoard, label: str) -> style.Chart | None:
    """Draw between which ranks each layer lies against its rank by cosine score.

    One labelled point for each layer with its interval, 1 = matters most on both axes. Strong are
    those (trace `stands elsewhere`) whose interval misses the diagonal (trace `equal ranks`), on
    which the cosine score is right; all others (trace `open`) are faint. None where no layer has
    both ranks.
    """
    proxy = cosine_ranks(board)
    standings = [standing for standing in board.ranked if standing.layer in proxy]
    if not standings:
        return None
    wrong = {found.standing.layer for found in misjudged(board)}
    ends = [0.5, len(board.ranked) + 0.5]
    data: list[dict[str, Any]] = [
        {"type": "scatter", "name": "equal ranks", "x": ends, "y": ends, "mode": "lines"}
        | {"line": {"color": style.GREY, "width": 1, "dash": "dot"}}
        | {"hoverinfo": "skip", "showlegend": False}
    ]
    for name, opacity, colour in (
        ("open", style.OPEN, style.FAINT),
        ("stands elsewhere", 1.0, style.GREY),
    ):
        mine = [one for one in standings if (one.layer in wrong) == (opacity == 1)]
        ranks = [Estimate(one.rank, one.best_rank, one.worst_rank) for one in mine]
        hovers = [
            estimate_hover(
                f"layer {one.layer}",
                "rank by mean relevance",
                rank,
                "{:.0f}".format,
                f"rank by cosine score {proxy[one.layer]}",
            )
            for one, rank in zip(mine, ranks, strict=True)
        ]
        data.append(
            style.trace(
                "scatter",
                name,
                [proxy[one.layer] for one in mine],
                [one.rank for one in mine],
                hovers,
                error_y=style.errors(ranks, color=colour),
                mode="markers+text",
                text=[str(one.layer) for one in mine],
                textposition="middle right",
                textfont={"size": 10, "color": style.GREY},
                marker={"size": 8, "color": style.MATTERS, "opacity": opacity},
                cliponaxis=False,
                showlegend=False,
            )
        )
    axis: dict[str, Any] = {"showgrid": False, "zeroline": False, "tickangle": 0}
    few = len(board.ranked) <= 12
    axis["tickvals"] = [1, *range(2 if few else 5, len(board.ranked) + 1, 1 if few else 5)]
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

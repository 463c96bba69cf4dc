"""The map of rank against rank: where the cosine score puts a layer, and where it belongs."""

from __future__ import annotations

import html
from collections.abc import Sequence

from tracker.core.records import CellRecord
from tracker.report.charts.maps import COLOUR_BAR
from tracker.report.charts.style import GREY, Chart, chart, trace
from tracker.report.leaderboard.proxies import rankings
from tracker.report.sentences import ranks_differ

_COUNTS = [[0.0, "rgba(61,116,168,0.25)"], [1.0, "rgba(61,116,168,1)"]]
_NAMED = 6
"""So many layers are named in one hover box."""


def rank_map(cells: Sequence[CellRecord], label: str) -> Chart:
    """Draw each layer's rank by cosine score against its true rank, over the benchmarks.

    How many benchmarks put a layer at each place (trace `layers`), 1 = matters most on both axes;
    on the diagonal (trace `equal ranks`) the cosine score is right.
    """
    found = rankings(cells)
    count = max((len(ranking.rows) for ranking in found), default=0)
    there: dict[tuple[float, float], list[str]] = {}
    for ranking in found:
        for layer, true, proxy in ranking.rows:
            there.setdefault((true, proxy), []).append(f"layer {layer} · {ranking.benchmark}")
    # Layers that tie share the mean of their ranks, which may be half a rank.
    step = 1 if all(rank % 1 == 0 for both in there for rank in both) else 2
    places = [rank / step for rank in range(step, step * count + 1)]
    most = max(map(len, there.values()), default=1)
    bar = {"title": {"text": "benchmarks", "side": "top"}, "dtick": 1 if most <= 10 else None}
    ends = [0.5, count + 0.5]
    data = [
        trace(
            "heatmap",
            "layers",
            places,
            places,
            [[_rank_hover(y, x, there.get((y, x), [])) for x in places] for y in places],
            z=[[len(there.get((y, x), ())) or None for x in places] for y in places],
            zmin=0,
            zmax=most,
            colorscale=_COUNTS,
            showscale=len(found) > 1,
            colorbar=COLOUR_BAR | bar,
            hoverongaps=False,
        ),
        {"type": "scatter", "name": "equal ranks", "x": ends, "y": ends, "mode": "lines"}
        | {"line": {"color": GREY, "width": 1, "dash": "dot"}}
        | {"hoverinfo": "skip", "showlegend": False},
    ]
    axis = {"showgrid": False, "zeroline": False, "constrain": "domain", "tickangle": 0}
    axis |= {"tick0": 1, "dtick": 1} if count <= 12 else {"tick0": 0, "dtick": 5}
    return chart(
        f"{label}: {ranks_differ(cells)}",
        data,
        520,
        margin={"b": 105 if len(found) > 1 else 50},
        xaxis=axis | {"range": ends, "title": {"text": "rank by cosine score (1 = highest)"}},
        yaxis=axis
        | {"range": ends[::-1], "title": {"text": "rank by accuracy drop (1 = largest)"}}
        | {"scaleanchor": "x", "constraintoward": "top"},
    )


def _rank_hover(true: float, proxy: float, who: Sequence[str]) -> str:
    if not who:
        return ""
    lines = [f"<b>rank {true:g} by accuracy drop, {proxy:g} by cosine score</b>"]
    lines += [html.escape(layer) for layer in who[:_NAMED]]
    lines += [f"and {len(who) - _NAMED} more"] if len(who) > _NAMED else []
    return "<br>".join(lines)

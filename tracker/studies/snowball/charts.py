"""The charts of the study `snowball`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from tracker.core.estimates import Estimate
from tracker.core.findings import FoundChart, Line, LineChart, MapChart, gaps
from tracker.studies.snowball.figures import ALL, Figures, Tokens, underrated

SHOWN = 6
"""Layers whose paths are drawn, half of them underrated by cosine, half overrated."""


def _line(name: str, totals: Sequence[Estimate]) -> Line:
    # The last layer has none, and no place on these charts.
    return Line.of(name, totals[:-1])


def beside_each_other(cells: Sequence[Figures]) -> LineChart:
    """Draw the growth of each layer on all benchmarks of a model."""
    return LineChart(
        title=f"{cells[0].cell.model.name}: growth after each layer's removal, by benchmark",
        x="removed layer (0-based)",
        y="before the head ÷ behind the layer",
        unit="times",
        places=tuple(range(cells[0].layers - 1)),
        lines=tuple(
            _line(each.cell.benchmark.title, each.tokens[ALL].removed.total) for each in cells
        ),
        log_y=True,
    )


def charts_of(each: Figures) -> Iterator[FoundChart]:
    """Draw growth beside chance, some paths, and how often each difference doubles."""
    tokens: Tokens = each.tokens[ALL]
    total = each.layers
    yield LineChart(
        title=f"{each.cell.heading}: growth of a removal and of random directions",
        x="perturbed layer (0-based)",
        y="before the head ÷ behind the layer",
        unit="times",
        places=tuple(range(total - 1)),
        lines=(
            _line("removed", tokens.removed.total),
            _line("random directions", tokens.random.total),
            _line("other tokens' updates", tokens.shuffled.total),
        ),
        log_y=True,
    )
    paths = tokens.removed.paths
    yield LineChart(
        title=f"{each.cell.heading}: paths of the layers that cosine misjudges most",
        x="behind layer (0-based)",
        y="relative difference to the intact stream",
        unit="percent",
        places=tuple(range(total)),
        lines=tuple(Line(name=name, values=gaps(paths[layer])) for layer, name in _drawn(each)),
        log_y=True,
    )
    with np.errstate(divide="ignore", invalid="ignore"):
        doublings = np.log2(paths / np.diagonal(paths)[:, None])
    yield MapChart(
        title=f"{each.cell.heading}: how often the relative difference has doubled",
        x="behind layer (0-based)",
        y="removed layer (0-based)",
        name="doublings",
        unit="coefficient",
        columns=tuple(range(total)),
        rows=tuple(map(str, range(total))),
        values=tuple(map(gaps, doublings)),
    )


def _drawn(each: Figures) -> Iterator[tuple[int, str]]:
    """Choose layers, each with its name in the legend."""
    explained = each.explained
    if explained is None:
        yield from (
            (int(i), f"layer {int(i)}")
            for i in np.unique(np.linspace(0, each.layers - 1, SHOWN).round())
        )
        return
    by_cosine, by_drop = explained.ranks(explained.cosine), explained.ranks(explained.drops)
    for layer in underrated(explained, SHOWN):
        yield layer, f"layer {layer}: rank {by_cosine[layer]} by cosine, {by_drop[layer]} by drop"

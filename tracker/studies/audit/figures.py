"""What the audit finds of one model: its proxies and their drops, over all of its benchmarks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from tracker.core.estimates import Estimate
from tracker.core.formats import counted
from tracker.core.proxies import PROXIES, passes
from tracker.stats.budgets import at_equal_cost
from tracker.stats.multiple import holm
from tracker.stats.rank_agreement import (
    Disagreement,
    disagreement,
    mean_spearman_p,
    overlap,
    row_coefficients,
)
from tracker.stats.resampling import bias_corrected_interval
from tracker.stats.task_dependence import (
    Paired,
    Sample,
    clean_difference,
    compared,
    reliability,
    sampling_noise,
    variance_across,
)
from tracker.studies.audit.measures import DROP, Audited
from tracker.studies.base import FEWEST

Array = NDArray[np.float64]
TOP = 5
"""Layers that are called the most, or the least, relevant ones."""
MAJOR = 1 / 4
"""Ranks that differ by more than this share of the layers differ majorly."""
RELIABLE = 0.5
"""The figures of a benchmark must be as much signal as noise before their noise is taken off."""


@dataclass(frozen=True)
class Summary:
    """How well one proxy orders the layers, over all benchmarks where it can be said.

    Attributes:
        proxy: Its name in `PROXIES`.
        cells: The benchmarks.
        spearman: Mean coefficient.
        low: Lower end of its interval from the documents; None where there is none.
        high: Upper end.
        inner: Mean without the outer layers.
        kendall: Mean tau-b.
        p_value: Of the mean, not adjusted.
        resampled: The mean in each resample of the documents.
    """

    proxy: str
    cells: tuple[Audited, ...]
    spearman: float
    low: float | None
    high: float | None
    inner: float | None
    kendall: float
    p_value: float
    resampled: Array

    @cached_property
    def worst(self) -> Audited:
        """The benchmark in which it orders the layers worst."""
        return min(self.cells, key=lambda cell: cell.found[self.proxy].spearman.value or 0.0)


@dataclass(frozen=True)
class Spreads:
    """How much layers' relevance varies over benchmarks, of one measure.

    Attributes:
        raw: Mean over layers of the variance of z-scores.
        test: The accuracy drop's variance against this one, layer by layer.
        noisy: The same as `raw`, over the benchmarks that `clean` is over.
        clean: The same with the documents' noise taken off.
        excess: By how much the accuracy drop's `clean` exceeds this one.
        reason: Why `clean` is None.
    """

    raw: float
    test: Paired | None = None
    noisy: float | None = None
    clean: float | None = None
    excess: Estimate | None = None
    reason: str = ""


class ModelAudit:
    """One model, audited."""

    def __init__(self, name: str, cells: Sequence[Audited]) -> None:
        self.name = name
        self.cells = cells
        self.total = cells[0].record.model.layers

    @property
    def on(self) -> str:
        """What it rests on."""
        documents = sum(cell.record.n for cell in self.lined_up)
        return f"{counted(len(self.lined_up), 'benchmark')}, {counted(documents, 'document')}"

    @property
    def drop(self) -> str:
        """What removing a layer costs here: accuracy, or loss, or either."""
        kinds = sorted({cell.record.higher_is_better for cell in self.cells}, reverse=True)
        return " or ".join(DROP if accuracy else "loss increase" for accuracy in kinds)

    @cached_property
    def lined_up(self) -> list[Audited]:
        """What a mean over benchmarks is of: one cell of each, all with the same layers."""
        return alike(apart(self.cells))

    @property
    def left_out(self) -> list[str]:
        """Say which cells no mean over benchmarks holds, and why."""
        kept, said = apart(self.cells), []
        for cell in self.cells:
            if cell not in kept:
                same = next(each for each in kept if set(each.tasks) & set(cell.tasks))
                said.append(f"{cell.label} has documents of {same.label}")
            elif cell not in self.lined_up:
                others = self.lined_up[0]
                said.append(
                    f"{cell.label} removes {counted(len(cell.layers), 'layer')}, not the "
                    f"{len(others.layers)} that {others.label} does"
                )
        return said

    @cached_property
    def summaries(self) -> list[Summary]:
        """The proxies that can be compared, the best one first."""
        found = [s for s in map(self._summary, PROXIES) if s is not None]
        return sorted(found, key=lambda each: -each.spearman)

    def _summary(self, proxy: str) -> Summary | None:
        cells = [c for c in self.lined_up if c.found[proxy].spearman.value is not None]
        if not cells:
            return None
        found = [cell.found[proxy] for cell in cells]
        value = float(np.mean([each.spearman.value for each in found]))
        resampled = np.mean([each.resampled for each in found], axis=0)
        low, high = bias_corrected_interval(value, resampled, -1, 1)
        inner = [each.inner for each in found if each.inner is not None]
        return Summary(
            proxy,
            tuple(cells),
            value,
            low,
            high,
            float(np.mean(inner)) if inner else None,
            float(np.mean([each.kendall for each in found if each.kendall is not None])),
            mean_spearman_p(means(proxy, cells), means(DROP, cells)),
            resampled,
        )

    @cached_property
    def adjusted(self) -> dict[str, float]:
        """P-values of the means, adjusted by Holm for the number of proxies."""
        adjusted = holm([each.p_value for each in self.summaries])
        by_proxy = zip([each.proxy for each in self.summaries], adjusted, strict=True)
        return {proxy: p for proxy, p in by_proxy if p is not None}

    @cached_property
    def orders(self) -> dict[str, tuple[Disagreement, Disagreement]]:
        """Proxy → in how many layers its ranks differ from those of the drop: at all, majorly."""
        found = {}
        for each in self.summaries:
            x, y = means(each.proxy, each.cells), means(DROP, each.cells)
            major = MAJOR * x.shape[1]
            found[each.proxy] = (disagreement(x, y, 0), disagreement(x, y, major))
        return found

    @cached_property
    def above_chance(self) -> list[Audited]:
        """Benchmarks in which relevance is defined: the intact model is above chance."""
        cells = [
            cell
            for cell in self.lined_up
            if all(run.accuracy_relevance is not None for run in cell.record.whole_layers)
            and np.ptp(cell.drop.means()) > 0
        ]
        return cells if len(cells) > 1 else []

    @cached_property
    def reliabilities(self) -> dict[str, float]:
        """Benchmark → which share of the spread of its drops is no noise of the documents."""
        return {
            cell.label: reliability(
                *sampling_noise(cell.drop.values, cell.drop.weights, cell.strata)
            )
            for cell in self.cells
        }

    @cached_property
    def reliable(self) -> list[Audited]:
        """The benchmarks above chance of which noise can be taken off."""
        return [c for c in self.above_chance if self.reliabilities[c.label] >= RELIABLE]

    @cached_property
    def spreads(self) -> dict[str, Spreads]:
        """Measure → how much it varies over benchmarks; empty where it cannot be said."""
        cells = self.above_chance
        if not cells:
            return {}
        raw_drop = variance_across(means(DROP, cells))
        relevance = np.array(
            [[run.accuracy_relevance for run in c.record.whole_layers] for c in cells], float
        )
        found = {}
        if all(np.ptp(row) > 0 for row in relevance):
            raw = float(variance_across(relevance).mean())
            found["relevance"] = Spreads(raw, reason="its noise is that of the drop")
        found[DROP] = self._spread(DROP, raw_drop, None)
        for proxy in PROXIES:
            if any(cell.found[proxy].spearman.value is None for cell in cells):
                continue
            raw_proxy = variance_across(means(proxy, cells))
            found[proxy] = self._spread(proxy, raw_proxy, compared(raw_drop, raw_proxy))
        return found

    def _spread(self, name: str, raw: Array, test: Paired | None) -> Spreads:
        mean, cells = float(raw.mean()), self.reliable
        if len(cells) < 2:
            return Spreads(mean, test, reason=self.noisy)
        samples = [_sample(name, cell) for cell in cells]
        pairs = [sampling_noise(*each) for each in samples]
        for cell, pair in zip(cells, pairs, strict=True):
            if not reliability(*pair) >= RELIABLE:
                why = f"on {cell.label} it is more noise of the documents than signal"
                return Spreads(mean, test, reason=why)
        profiles, noise = (np.array(each) for each in zip(*pairs, strict=True))
        drops = [_sample(DROP, cell) for cell in cells]
        return Spreads(
            mean,
            test,
            float(variance_across(profiles).mean()),
            float(variance_across(profiles, noise).mean()),
            None if name == DROP else clean_difference(drops, samples),
        )

    @cached_property
    def at_cost(self) -> tuple[list[float], dict[str, list[float | None]], float | None]:
        """What a measure predicts of other documents, for what it costs.

        Budgets in forward passes a benchmark; measure → mean Spearman for each of them; and that
        of the drop of half of the documents, whatever it costs.
        """
        dearest = passes(DROP, self.total, shared=True)
        most = max(len(cell.tasks) for cell in self.lined_up) // 2 * dearest
        budgets = [float(2**i) for i in range(int(np.log2(max(most, 1))) + 1)]
        by_cell, halves = [], []
        for cell in self.lined_up:
            if len(cell.tasks) < 4 or np.ptp(cell.drop.means()) == 0:
                continue
            usable = {
                name: each
                for name, each in cell.measures.items()
                if cell.found[name].spearman.value is not None
            }
            half = len(cell.tasks) // 2 * dearest
            rows = at_equal_cost(usable | {DROP: cell.drop}, cell.drop, [*budgets, half])
            halves.append(rows[DROP][-1])
            by_cell.append({name: row[:-1] for name, row in rows.items()})
        found: dict[str, list[float | None]] = {}
        for name in (*PROXIES, DROP):
            mine = [each.get(name, [np.nan] * len(budgets)) for each in by_cell]
            if mine:
                found[name] = [_finite(value) for value in np.mean(mine, axis=0)]
        return budgets, found, _finite(float(np.mean(halves))) if halves else None

    @property
    def noisy(self) -> str:
        """Say which benchmarks are too noisy, and how many documents they need."""
        said = []
        for cell in self.above_chance:
            share = self.reliabilities[cell.label]
            if not share >= RELIABLE:
                need = (
                    f"about {int(np.ceil(cell.record.n * (1 - share) / share)):,} documents"
                    if share > 0
                    else "many more documents"
                )
                said.append(f"{cell.label} needs {need}, and has {cell.record.n:,}")
        return "; ".join(said)


def apart(cells: Sequence[Audited]) -> list[Audited]:
    """One cell a benchmark, none with a task of another: accuracies, layers, documents first."""
    best = sorted(cells, key=lambda c: (-c.record.higher_is_better, -len(c.layers), -c.record.n))
    kept: list[Audited] = []
    for cell in best:
        if not any(set(cell.tasks) & set(each.tasks) for each in kept):
            kept.append(cell)
    return [cell for cell in cells if cell in kept]


def alike(cells: Sequence[Audited]) -> list[Audited]:
    """Those with the layers that most of them have; of equally many, with the most layers."""
    of_each = [tuple(cell.layers) for cell in cells]
    most = max(of_each, key=lambda layers: (of_each.count(layers), len(layers)), default=())
    return [cell for cell, layers in zip(cells, of_each, strict=True) if layers == most]


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def means(name: str, cells: Sequence[Audited]) -> Array:
    """Profiles of a measure [cells, layers]."""
    return np.array([(c.drop if name == DROP else c.measures[name]).means() for c in cells])


def _sample(name: str, cell: Audited) -> Sample:
    measure = cell.drop if name == DROP else cell.measures[name]
    return np.nan_to_num(measure.values), measure.weights, cell.strata


def pooled(cells: Sequence[Audited]) -> tuple[float, float, float] | None:
    """Pearson over inner layers × benchmarks of cosine score and accuracy drop, with its interval.

    Losses have units of their own, and no place among accuracies.
    """
    inner = [cell for cell in cells if cell.inner and cell.record.higher_is_better]
    if not inner or sum(len(cell.inner) for cell in inner) < FEWEST:
        return None
    x = np.concatenate([c.measures["cosine_score"].means()[c.inner] for c in inner])
    y = np.concatenate([c.drop.means()[c.inner] for c in inner])
    drawn_x = np.concatenate([c.drawn("cosine_score")[:, c.inner] for c in inner], axis=1)
    drawn_y = np.concatenate([c.drawn_drop[:, c.inner] for c in inner], axis=1)
    value = float(row_coefficients(x[None], y[None], "pearson")[0])
    drawn = row_coefficients(drawn_x, drawn_y, "pearson")
    low, high = bias_corrected_interval(value, drawn, -1, 1)
    return None if low is None or high is None else (value, low, high)


def overlaps(summary: Summary) -> tuple[float, float, float]:
    """Mean overlap of the most relevant layers, of the least relevant ones, and by chance."""
    found = []
    for cell in summary.cells:
        count = min(TOP, len(cell.layers))
        x, y = cell.measures[summary.proxy].means()[None], cell.drop.means()[None]
        top, bottom = (float(overlap(sign * x, sign * y, count)[0]) for sign in (1, -1))
        found.append((top, bottom, count / len(cell.layers)))
    top, bottom, chance = np.mean(found, axis=0).tolist()
    return top, bottom, chance

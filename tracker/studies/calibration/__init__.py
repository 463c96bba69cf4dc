"""How many documents until the ranking of layers is stable?"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from tracker.core.config import CellRequest
from tracker.core.errors import RequestError
from tracker.core.formats import DASH, interval, two_digits
from tracker.core.grouping import grouped
from tracker.core.records import CellRecord
from tracker.report.wording import capital
from tracker.studies.base import FEWEST, Study, StudyContext, StudyResult, Subject, whole_layers
from tracker.studies.calibration.figures import SHOWN, Curve, curve_of, joined, judged, measures
from tracker.studies.calibration.layout import (
    agreement_chart,
    agreement_table,
    needed_table,
    overlap_chart,
)
from tracker.studies.registry import RELIABILITY

_ASSUMED = (
    "Two samples share no document, and each holds every task by its share. A sample beside all "
    "documents, of which it is a part, agrees better than two samples do (part-whole).",
    "Spreads are the middle 95 % of random draws from the documents at hand: no confidence "
    "intervals, since draws overlap and other documents were never seen. The mean over draws is "
    "unbiased, but near half of the documents it is one more figure of this one set of documents: "
    "it may fall below chance by accident.",
    "Beyond half of the documents nothing is measured: what is said there is extrapolated from "
    "two halves by the formula of Spearman and Brown (1910), as if all documents were drawn alike. "
    "It is exact for a ratio of variances, and approximate for a mean of rank correlations.",
    "A number of documents is named where two halves agree surer than by chance, and the layers' "
    "means differ by a test that flips the signs of documents' deviations from their own mean over "
    "layers, adjusted over all rows of the table by Holm (1979).",
    "The interval of the number of documents is a jackknife over ten groups of documents, on the "
    "logarithm (Quenouille 1956); that the formula is approximate is not in it.",
    "Rank correlations are Spearman's with midranks and Kendall's tau-b. The overlap of the top k "
    "layers breaks ties at random, in each ranking for itself, and is the expected one; by chance "
    "it is k / layers.",
)


class Calibration(Study):
    """Ranks layers by parts of the documents, again and again; `reliability` is what is wanted."""

    question = "How many documents until the ranking of layers is stable?"

    def __init__(self, reliability: float = RELIABILITY) -> None:
        if not 0 < reliability < 1:
            raise RequestError(
                f"--reliability {reliability:g} is no rank correlation between 0 and 1; try 0.9"
            )
        self._wanted = reliability

    def requests(self, asked: StudyContext) -> list[CellRequest]:
        """Take the file's cells; RequestError where they rank fewer than three whole layers."""
        cells = asked.experiment.cells()
        for cell in cells:
            layers = whole_layers(cell)
            if not layers:
                raise RequestError(
                    f"{cell.title}: whole single layers are ranked, and the file removes none; "
                    "leave 'component', 'span' and 'intervention' out, or add 'layer', 1 and "
                    "'remove' to them"
                )
            if len(set(layers) - set(cell.removed)) < FEWEST:
                raise RequestError(
                    f"{cell.title}: a ranking needs {FEWEST} layers; write layer: "
                    "{value: all} for all of them"
                )
        return cells

    def say(self, asked: StudyContext, subjects: list[Subject]) -> StudyResult:
        """Say how well samples agree, by the drop and by what could stand in for it."""
        measured = [measures(subject) for subject in subjects]
        alone = [(subject.record.title, [n]) for n, subject in enumerate(subjects)]
        result, found = StudyResult(_ASSUMED), []
        for title, members in [*_together(subjects), *alone]:
            rankings = [
                joined(parts) for parts in zip(*(measured[n] for n in members), strict=True)
            ]
            result.lacking += [f"{title}, by {r.name}: {r.reason}" for r in rankings if r.reason]
            curves = [curve_of(r, self._wanted) for r in rankings if not r.reason]
            found.append((title, members, not rankings[0].reason, curves))
        every = iter(judged([curve for *_, curves in found for curve in curves]))
        rows = []
        for title, members, ranked, some in found:
            curves = [next(every) for _ in some]
            rows += [(title, curve) for curve in curves]
            if ranked:
                cells = [subjects[n].record for n in members]
                result.answers.append(self._answer(cells, curves[0], curves[1:]))
                result.tables.append(agreement_table(title, curves[0]))
                result.charts += [agreement_chart(title, curves), overlap_chart(title, curves[0])]
        result.answers = result.answers or ["Nothing could be ranked."]
        if rows:
            result.tables.insert(0, needed_table(rows, self._wanted))
        return result

    def _answer(self, cells: Sequence[CellRecord], drop: Curve, others: Sequence[Curve]) -> str:
        n = max((n for n in SHOWN if n in drop.sizes and n <= drop.half), default=drop.half)
        names = [cell.benchmark.title for cell in cells]
        what = names[0] if len(names) == 1 else f"{len(names)} benchmarks together"
        agreed = drop.agreement(n)
        answer = (
            f"With n = {n:,} documents of {what}, two samples that share none rank the "
            f"{drop.layers} layers of {cells[0].model.name} by {drop.name} with "
        )
        if agreed.value is None:
            answer += f"no rank correlation: {agreed.reason}."
        else:
            # How many layers the smallest top and the largest bottom have.
            top = min(k for _, end, k in drop.tops if end == "top")
            bottom = max(k for _, end, k in drop.tops if end == "bottom")
            answer += (
                f"rank correlation {two_digits(agreed.value)} (middle 95 % of draws "
                f"{interval(agreed.low, agreed.high, two_digits)}). "
                f"{capital(self._until(drop, cells))}. Of the {top} layers with the largest "
                f"{drop.name} they share {_percent(drop, n, f'top {top}')} (by chance "
                f"{_share(top, drop)}), and of the {bottom} with the smallest "
                f"{_percent(drop, n, f'bottom {bottom}')} ({_share(bottom, drop)})."
            )
        needed = [(curve.name, curve.needed.value) for curve in others]
        quick = [f"{name} {_rounded(value):,}" for name, value in needed if value is not None]
        if quick:
            answer += f" Documents for {self._wanted:g} by other figures: {', '.join(quick)}."
        return answer

    def _until(self, drop: Curve, cells: Sequence[CellRecord]) -> str:
        """Say how many documents are needed."""
        needed = drop.needed
        if needed.value is None:
            return f"how many reach {self._wanted:g} is unknown: {needed.reason}"
        how = "extrapolated by Spearman-Brown" if drop.extrapolated else "measured"
        if needed.low is not None and needed.high is not None:
            how += f", 95 % interval {_rounded(needed.low):,} to {_rounded(needed.high):,}"
        there = sum(task.documents for cell in cells for task in cell.benchmark.tasks)
        more = f", more than the {there:,} that there are" if needed.value > there else ""
        return f"{self._wanted:g} needs about {_rounded(needed.value):,} ({how}){more}"


def _together(subjects: Sequence[Subject]) -> Iterator[tuple[str, list[int]]]:
    """Group the benchmarks of each model on which its accuracy ranks the same layers."""

    def alike(n: int) -> object:
        record = subjects[n].record
        return (
            record.model.key,
            record.removed,
            tuple(run.change.layer for run in record.whole_layers),
        )

    accuracies = [n for n, subject in enumerate(subjects) if subject.record.higher_is_better]
    for members in grouped(accuracies, alike).values():
        cells = [subjects[n].record for n in members]
        # A benchmark that stands there twice would be its own second sample.
        if 1 < len(cells) == len({cell.benchmark.title for cell in cells}):
            yield f"{cells[0].model.name} · mean of {len(cells)} benchmarks", members


def _share(some: int, of: Curve) -> str:
    return f"{100 * some / of.layers:.0f} %"


def _percent(curve: Curve, n: int, statistic: str) -> str:
    value = curve.agreement(n, statistic).value
    return DASH if value is None else f"{100 * value:.0f} %"


def _rounded(value: float) -> int:
    """Keep two significant digits; a document is never half."""
    return math.ceil(value - 1e-9) if value < 10 else int(float(f"{value:.1e}"))

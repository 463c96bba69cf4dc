"""How many documents until the ranking of layers is stable?"""

from __future__ import annotations

import math
from collections.abc import Sequence

from tracker.core.config import CellRequest
from tracker.core.errors import RequestError
from tracker.core.formats import interval, two_digits
from tracker.studies.base import (
    FEWEST,
    Study,
    StudyContext,
    StudyResult,
    StudySetting,
    Subject,
    grouped,
    whole_layers,
)
from tracker.studies.calibration.charts import agreement_chart, overlap_chart
from tracker.studies.calibration.figures import SHOWN, Curve, curve_of, joined, measures
from tracker.studies.calibration.tables import agreement_table, needed_table

RELIABILITY = 0.9
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
    "The interval of the number of documents is a jackknife over ten groups of documents, on the "
    "logarithm (Quenouille 1956); that the formula is approximate is not in it.",
    "Rank correlations are Spearman's with midranks and Kendall's tau-b. The overlap of the top k "
    "layers breaks ties at random, in each ranking for itself, and is the expected one; by chance "
    "it is k / layers.",
)


class Calibration(Study):
    """Ranks layers by parts of the documents, again and again; `reliability` is what is wanted."""

    name = "calibration"
    question = "How many documents until the ranking of layers is stable?"
    about = """
    Random samples are drawn from the measured documents, and two of them that share none are asked
    for the order of the layers: how well they agree is how far a ranking by so many documents can
    be trusted. This is said of the accuracy drop and of the proxies, with the number of documents
    that it takes. Nothing is measured but the runs in EXPERIMENT; the more documents, the better
    the answer.

    \b
    Examples:
      tracker study calibration experiments/demo.yaml
      tracker study calibration experiments/demo.yaml --reliability 0.8
    """
    settings = (
        StudySetting(
            "reliability", float, "The rank correlation of two samples that is wanted.", default=0.9
        ),
    )

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
                    "{min: 0, max: 29} for all layers of a model that has 30"
                )
        return cells

    def say(self, asked: StudyContext, subjects: list[Subject]) -> StudyResult:
        """Say how well samples agree, by the drop and by what could stand in for it."""
        measured = [measures(subject) for subject in subjects]
        alone = [(subject.record.title, [n]) for n, subject in enumerate(subjects)]
        groups = [*_together(subjects), *alone]
        answers, tables, charts, lacking, rows = [], [], [], [], []
        for title, members in groups:
            rankings = [joined(each) for each in zip(*(measured[n] for n in members), strict=True)]
            lacking += [f"{title}, by {one.name}: {one.reason}" for one in rankings if one.reason]
            curves = [curve_of(one, self._wanted) for one in rankings if not one.reason]
            rows += [(title, curve) for curve in curves]
            if not rankings[0].reason:
                cells = [subjects[n] for n in members]
                answers.append(self._answer(cells, curves[0], curves[1:]))
                tables.append(agreement_table(title, curves[0]))
                charts += [agreement_chart(title, curves), overlap_chart(title, curves[0])]
        if not answers:
            answers = ["Nothing could be ranked."]
        if rows:
            tables.insert(0, needed_table(rows, self._wanted))
        return StudyResult(answers, tables, charts, lacking, _ASSUMED)

    def _answer(self, cells: Sequence[Subject], drop: Curve, others: Sequence[Curve]) -> str:
        n = max((n for n in SHOWN if n in drop.sizes and n <= drop.half), default=drop.half)
        names = [cell.record.benchmark.title for cell in cells]
        what = names[0] if len(names) == 1 else f"{len(names)} benchmarks together"
        agreed, (top, bottom) = drop.agreement(n), _ends(drop)
        said = (
            f"With n = {n:,} documents of {what}, two samples that share none rank the "
            f"{drop.layers} layers of {cells[0].record.model.name} by {drop.name} with "
        )
        if isinstance(agreed.value, float):
            said += (
                f"rank correlation {two_digits(agreed.value)} (middle 95 % of draws "
                f"{interval(agreed.low, agreed.high, two_digits)}); {self._until(drop, cells)}. "
                "They share "
                f"{_percent(drop, n, f'top {top}')} of the {top} that matter most (by chance "
                f"{top / drop.layers:.0%}), and {_percent(drop, n, f'bottom {bottom}')} of the "
                f"{bottom} that matter least "
                f"({bottom / drop.layers:.0%})."
            )
        else:
            said += f"no rank correlation: {agreed.reason}."
        quick = [
            f"{one.name} {_rounded(one.needed.value):,}"
            for one in others
            if one.needed.value is not None
        ]
        if quick:
            said += f" Documents for {self._wanted:g} by other figures: {', '.join(quick)}."
        return said

    def _until(self, drop: Curve, cells: Sequence[Subject]) -> str:
        """Say how many documents are needed."""
        found = drop.needed
        if found.value is None:
            return f"how many reach {self._wanted:g} is unknown: {found.reason}"
        said = f"{self._wanted:g} needs about {_rounded(found.value):,}"
        how = "extrapolated by Spearman-Brown" if drop.extrapolated else "measured"
        if found.low is not None and found.high is not None:
            how += f", 95 % interval {_rounded(found.low):,} to {_rounded(found.high):,}"
        there = sum(t.documents for c in cells for t in c.record.benchmark.tasks)
        more = f", more than the {there:,} that there are" if found.value > there else ""
        return f"{said} ({how}){more}"


def _together(subjects: Sequence[Subject]) -> list[tuple[str, list[int]]]:
    """Group the benchmarks of each model on which its accuracy ranks the same layers."""

    def alike(n: int) -> object:
        record = subjects[n].record
        return record.model.key, record.removed, tuple(run.layer for run in record.whole_layers)

    accuracies = [n for n, one in enumerate(subjects) if one.record.higher_is_better]
    found = []
    for members in grouped(accuracies, alike):
        cells = [subjects[n].record for n in members]
        # A benchmark that stands there twice would be its own second sample.
        if 1 < len(cells) == len({cell.benchmark.title for cell in cells}):
            found.append((f"{cells[0].model.name} · mean of {len(cells)} benchmarks", members))
    return found


def _ends(curve: Curve) -> tuple[int, int]:
    """How many layers the smallest top and the largest bottom have."""
    return (
        min(k for _, end, k in curve.tops if end == "top"),
        max(k for _, end, k in curve.tops if end == "bottom"),
    )


def _percent(curve: Curve, n: int, statistic: str) -> str:
    value = curve.agreement(n, statistic).value
    return f"{value:.0%}" if isinstance(value, float) else "–"


def _rounded(value: float) -> int:
    """Keep two significant digits; a document is never half."""
    return math.ceil(value - 1e-9) if value < 10 else int(float(f"{value:.1e}"))

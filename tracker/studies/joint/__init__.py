"""What do two layers cost together, beside the sum of what each costs alone?"""

from __future__ import annotations

from tracker.core.config import CellRequest
from tracker.core.errors import RequestError
from tracker.core.findings import FoundChart
from tracker.core.formats import with_interval
from tracker.core.records import CellRecord
from tracker.core.tables import Table
from tracker.studies.base import (
    SIGNIFICANT,
    Study,
    StudyContext,
    StudyResult,
    Subject,
    refuse_removed,
    removing_whole_layers,
    whole_layers,
)
from tracker.studies.joint.charts import distance_chart, interaction_map
from tracker.studies.joint.figures import Pairs, measured
from tracker.studies.joint.tables import strongest, summary

_ASSUMED = (
    "Interaction of i and j: drop(i, j) − drop(i) − drop(j), from the same documents. Above 0 the "
    "two are called redundant: together they cost more than the sum, because each alone was stood "
    "in for. Below 0 they are called sub-additive: the second costs less once the first is gone.",
    "A pair is at the floor where a drop, or the sum of both, is more than the baseline has above "
    "chance: two layers that each destroy a model cannot add up. Such pairs are left out of maps "
    "of accuracy, summaries and tests. The gold answer's log-probability has no floor.",
    "Intervals: of a pair from paired documents, for outcomes that are right or wrong with one "
    "document of +1 and one of −1 added (after Bonett and Price 2012), otherwise Student's t; of "
    "summaries Student's t over documents' own means; of coefficients from resampled documents. "
    "They hold the layers, and which pairs are at the floor, as they are.",
    "Tests: sign flips of the documents' interactions (exact where they are whole numbers), as if "
    "each were as likely to be x as −x; over all pairs of a benchmark that are not at the floor, "
    f"Benjamini-Hochberg at a false discovery rate of {SIGNIFICANT:.0%}.",
    "R² is that of the sum itself as the prediction of the joint drop; no line is fitted.",
)


class Joint(Study):
    """Removes every two layers of a file together."""

    name = "joint"
    question = "Do the drops of two layers add up when both are removed?"
    about = """
    Every two of the layers in EXPERIMENT are removed together, and what both cost is set beside the
    sum of what each costs alone: more is called redundant, less sub-additive. 30 layers have 435
    pairs, about ten times the work of the file itself. Name fewer layers or documents for a
    first look.

    \b
    Examples:
      tracker study joint experiments/demo.yaml
      tracker study joint experiments/demo.yaml --track none
    """
    settings = ()

    def requests(self, asked: StudyContext) -> list[CellRequest]:
        """Ask for the file's cells, and for each layer with all later ones.

        RequestError where the file has fewer than two whole layers, or layers that are removed.
        """
        found = []
        for cell in asked.experiment.cells():
            refuse_removed(cell, "pairs are compared with the intact model", asked)
            layers = whole_layers(cell)
            if len(layers) < 2:
                raise RequestError(
                    f"{cell.title}: the file removes {len(layers)} whole single layers, and a pair "
                    "needs two; write layer: {min: 0, max: 29} for all of a model that has 30"
                )
            found.append(removing_whole_layers(cell, layers=layers))
            found += [
                removing_whole_layers(cell, removed=(i,), layers=layers[n + 1 :])
                for n, i in enumerate(layers[:-1])
            ]
        return found

    def say(self, asked: StudyContext, subjects: list[Subject]) -> StudyResult:
        """Set the joint drops of each cell beside the sums."""
        answers: list[str] = []
        lacking: list[str] = []
        tables: list[Table] = []
        charts: list[FoundChart] = []
        rows: list[tuple[CellRecord, Pairs]] = []
        for subject in subjects:
            record = subject.record
            if record.removed:
                continue
            measures, why = measured(subject)
            lacking += [f"{record.title}: {each}" for each in why]
            for one in measures:
                rows.append((record, one))
                charts += [interaction_map(record, one), distance_chart(record, one)]
                tables += [strongest(record, one, sign) for sign in (1, -1)]
                answers.append(_answer(record, one))
        if not subjects or not answers:
            answers = ["No pair could be compared with the sum of its layers."]
        if rows:
            tables.insert(0, summary(rows))
        return StudyResult(answers, tables, charts, lacking, _ASSUMED)


def _answer(record: CellRecord, one: Pairs) -> str:
    """Say whether sums predict joint drops, and what interacts most."""
    inside = [n for n in range(len(one.pairs)) if not one.floor[n]]
    said = f"{record.model.name}, {record.benchmark.title}, n = {record.n:,}, {one.measure}: "
    if not inside:
        return said + f"all {len(one.pairs):,} pairs are at the floor, so no sum can be reached."
    if one.rank.value is not None and one.explained.value is not None:
        said += (
            f"the sum of single drops ranks the joint drops of {len(inside):,} pairs with Spearman "
            f"{with_interval(one.rank)}, and as a prediction has R² "
            f"{with_interval(one.explained)}. "
        )
    if one.mean.value is not None:
        more = "more" if one.mean.value >= 0 else "less"
        said += (
            f"On average two layers cost {one.said(abs(one.mean.value))} {more} together than the "
            f"sum (interaction {one.said(one.mean)}). "
        )
    said += (
        f"Significant after Benjamini-Hochberg: {len(one.significant(1))} redundant and "
        f"{len(one.significant(-1))} sub-additive pairs"
    )
    for word, sign in (("redundant", 1), ("sub-additive", -1)):
        if few := one.significant(sign):
            place = max(few, key=lambda n: abs(one.value(n) or 0))
            i, j = one.pairs[place]
            said += f"; the most {word} is {i} with {j}, by {one.said(one.found[place])}"
    if at_floor := len(one.pairs) - len(inside):
        said += f". {at_floor:,} of {len(one.pairs):,} pairs are at the floor and left out"
    return said + "."

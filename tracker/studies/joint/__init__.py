"""What do two layers cost together, beside the sum of what each costs alone?"""

from __future__ import annotations

from tracker.core.config import CellRequest
from tracker.core.errors import RequestError
from tracker.core.formats import with_interval
from tracker.core.records import CellRecord
from tracker.studies.base import (
    SIGNIFICANT,
    Study,
    StudyContext,
    StudyResult,
    Subject,
    refuse_removed,
    removing_whole_layers,
    side,
    whole_layers,
)
from tracker.studies.joint.figures import Pairs, adjusted, measured
from tracker.studies.joint.layout import distance_chart, interaction_map, strongest, summary

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
    "They hold the layers, and which pairs are at the floor, as they are. Of the strongest pairs "
    "they hold for all pairs at once (Bonferroni); a pair is called the most redundant where that "
    "is shown in comparison with every other one.",
    "Tests: sign flips of the documents' interactions (exact where they are whole numbers), as if "
    "each were as likely to be x as −x; over all pairs off the floor, of all benchmarks and "
    f"measures, Benjamini-Hochberg at a false discovery rate of {100 * SIGNIFICANT:.0f} %.",
    "R² is that of the sum itself as the prediction of the joint drop; no line is fitted.",
)


class Joint(Study):
    """Removes every two layers of a file together."""

    question = "Do the drops of two layers add up when both are removed?"

    def requests(self, asked: StudyContext) -> list[CellRequest]:
        """Ask for the file's cells, and for each layer with all later ones.

        RequestError where the file has fewer than two whole layers, or layers that are removed.
        """
        requests = []
        for cell in asked.experiment.cells():
            refuse_removed(cell, "pairs are compared with the intact model", asked)
            layers = whole_layers(cell)
            if len(layers) < 2:
                raise RequestError(
                    f"{cell.title}: the file removes {len(layers)} whole single layers, and a pair "
                    "needs two; write layer: {value: all} for all of them"
                )
            requests.append(removing_whole_layers(cell, layers=layers))
            requests += [
                removing_whole_layers(cell, removed=(i,), layers=layers[n + 1 :])
                for n, i in enumerate(layers[:-1])
            ]
        return requests

    def say(self, asked: StudyContext, subjects: list[Subject]) -> StudyResult:
        """Set the joint drops of each cell beside the sums."""
        result = StudyResult(_ASSUMED)
        found: list[tuple[CellRecord, Pairs]] = []
        for subject in subjects:
            record = subject.record
            if record.removed:
                continue
            measures, why = measured(subject)
            result.lacking += [f"{record.title}: {reason}" for reason in why]
            found += [(record, pairs) for pairs in measures]
        records = [record for record, _ in found]
        rows = list(zip(records, adjusted([pairs for _, pairs in found]), strict=True))
        for record, pairs in rows:
            result.charts += [interaction_map(record, pairs), distance_chart(record, pairs)]
            tables = (strongest(record, pairs, sign) for sign in (1, -1))
            result.tables += [each for each in tables if each.rows]
            result.answers.append(_answer(record, pairs))
        if rows:
            result.tables.insert(0, summary(rows))
        else:
            result.answers = ["No pair could be compared with the sum of its layers."]
        return result


def _answer(record: CellRecord, pairs: Pairs) -> str:
    """Say whether sums predict joint drops, and what interacts most."""
    at_floor, of = int(pairs.floor.sum()), len(pairs.pairs)
    answer = f"{record.model.name}, {record.benchmark.title}, n = {record.n:,}, {pairs.measure}: "
    if at_floor == of:
        return answer + f"all {of:,} pairs are at the floor, so no sum can be reached."
    if pairs.rank.value is not None and pairs.explained.value is not None:
        answer += (
            f"the sum of single drops ranks the joint drops of {of - at_floor:,} pairs with "
            f"Spearman {with_interval(pairs.rank)}. As a prediction it has R² "
            f"{with_interval(pairs.explained)}. "
        )
    if (mean := pairs.mean.value) is not None:
        more = {1: "more", -1: "less", 0: "neither surely more nor surely less"}[side(pairs.mean)]
        by = f"{pairs.write(abs(mean))} " if side(pairs.mean) else ""
        answer += (
            f"On average two layers cost {by}{more} together than the sum (interaction "
            f"{pairs.write(pairs.mean)}). "
        )
    redundant, sub_additive = pairs.significant(1), pairs.significant(-1)
    answer += (
        f"At a false discovery rate of {100 * SIGNIFICANT:.0f} %: {len(redundant)} redundant and "
        f"{len(sub_additive)} sub-additive pairs"
    )
    for word, sign, places in (("redundant", 1, redundant), ("sub-additive", -1, sub_additive)):
        if (place := pairs.strongest(sign)) is not None:
            i, j = pairs.pairs[place]
            by = pairs.write(pairs.at_once[place])
            answer += f". The most {word} are layers {i} and {j}, by {by}"
        elif places:
            answer += f". Which are the most {word} is open"
    if at_floor:
        answer += f". {at_floor:,} of {of:,} pairs are at the floor and left out"
    return answer + "."

"""Which weights may have fewer bits within a budget, chosen by what they cost?

Calibration documents say what each linear map costs in each format, alone. The formats whose losses
add up to the least within the budget are one choice; what swaps make of it that are measured as a
whole is another, and choices by the errors of weights and outputs, all maps alike, and the ends
kept in more bits are others. Each is measured as a whole on the same documents, which recommend
one; test documents, which none of them met, say what each is worth.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tracker.core import kinds
from tracker.core.config import CellRequest
from tracker.core.errors import RequestError, did_you_mean
from tracker.core.estimates import Estimate
from tracker.core.formats import counted, listed, measure_of, three_digits, with_interval
from tracker.core.provenance import content_hash
from tracker.core.records import CellRecord
from tracker.core.tables import Column, Table, table
from tracker.core.weight_formats import FORMATS
from tracker.ledger.files import write_note
from tracker.models.load import hollow
from tracker.models.offloaded import weight_bytes
from tracker.models.parts.anatomy import linear_map_shapes
from tracker.models.parts.linear_maps import embedding_shapes
from tracker.models.sources import find_model
from tracker.search.cells import Lender, OpenCell
from tracker.search.formats import BitBudget, Unit, budget, each_layer, each_map, units_of
from tracker.stats.support import together
from tracker.studies.base import (
    Study,
    StudyContext,
    StudyResult,
    Subject,
    amount,
    name_of,
    second_roundings,
    side,
)
from tracker.studies.layout import figure_table, labelled
from tracker.studies.quantise.figures import (
    ALIKE,
    MEASURED,
    ChosenFormats,
    FormatChooser,
    Sums,
    TestedChoice,
    least,
    losses_of,
    tested_choices,
)
from tracker.studies.registry import QuantiseSettings


class Quantise(Study[QuantiseSettings]):
    """See the module."""

    name = "quantise"
    question = "Which weights may have fewer bits, and is the choice better than all alike?"
    intact = True
    assumptions = (
        "What chooses and what tests are different documents. Losses are falls of the right "
        "answer's log-probability, added up over maps: that they add up is an assumption, which "
        "the whole choice and drawn pairs are held against.",
        "A swap gives one unit more bits and others fewer within the budget. The best swap of a "
        "round is kept where it is shown to cost less on the documents that choose, for all swaps "
        "of its round at once (95 %).",
        "Bits are those of the linear maps of layers, scales with them{also}; {rest} stay as they "
        "are, and count in the size.",
        "Recommended is the choice that costs least on the calibration documents. Differences of "
        "two choices: paired test documents, 95 % intervals (accuracy: Bonett and Price 2012).",
    )

    def __init__(self, settings: QuantiseSettings) -> None:
        super().__init__(settings)
        self.formats = tuple(dict.fromkeys(map(str.strip, settings.format.split(","))))
        for name in self.formats:
            if name not in FORMATS:
                near = did_you_mean(name, FORMATS)
                raise RequestError(
                    f"there is no format {name!r}.{near} Known: {', '.join(FORMATS)}"
                )
        if len(self.formats) < 2:
            raise RequestError("--format: there is nothing to choose; name two formats or more")

    @property
    def words(self) -> dict[str, str]:
        """The parts that have bits besides linear maps, and those that stay as they are."""
        if self.settings.embeddings:
            return {"also": ", of the embedding and of the head", "rest": "norms and biases"}
        return {"also": "", "rest": "embeddings, the head, norms and biases"}

    def expand(self, cell: CellRequest, context: StudyContext) -> Iterator[CellRequest]:
        """Yield each unit in each format, alone, on the calibration documents."""
        trust = context.options.trust_remote_code
        chosen = replace(cell, until=None).on("calibration")
        chosen = chosen.with_changes(layers=cell.changes.layers)
        units, _ = self._budget(chosen, trust)
        ends = [unit.which for unit in units if unit.is_end]
        if self.settings.by == "layer":
            yield each_layer(chosen, self.formats, ends)
        else:
            yield each_map(chosen, self.formats, trust, ends)

    def _budget(self, request: CellRequest, trust: bool) -> tuple[list[Unit], BitBudget]:
        """Return the units of a request's layers, and how many bits there are."""
        source = find_model(request.model)
        model = hollow(source, request.model.dtype, trust)
        ends = embedding_shapes(model) if self.settings.embeddings else {}
        by_map = self.settings.by == "map"
        units = units_of(linear_map_shapes(source, trust), request.changes.layers, by_map, ends)
        whole, size = weight_bytes(model), int(model.dtype.itemsize)
        rest = whole - size * sum(unit.weights for unit in units)
        return units, budget(self.settings.budget, units, rest, whole, self.formats)

    def answer(self, context: StudyContext, subjects: list[Subject]) -> StudyResult:
        """Choose, measure the choices, test them."""
        # Another budget, or other formats, are another question about the same file.
        ends = ["embeddings"] if self.settings.embeddings else []
        words = [self.settings.budget, self.settings.by, *ends, *self.formats]
        result = StudyResult(beside=re.sub(r"[^\w.]+", "-", " ".join(words)))
        for subject in subjects:
            self._choose(subject, context, result)
        result.add(*second_roundings(subjects))
        return result

    def _choose(self, subject: Subject, context: StudyContext, result: StudyResult) -> None:
        record, settings = subject.record, self.settings
        units, within = self._budget(subject.request, context.options.trust_remote_code)
        losses = losses_of(record, units, self.formats)
        if losses is None:
            result.lack(record.title, "some map has no defined loss, so that nothing adds up")
            return
        lender = Lender(context.ledger, context.options, context.progress)
        sample = settings.test_sample or subject.request.documents.sample
        test = subject.request.on("test", sample=sample)
        chose, tests = OpenCell(subject.request, lender), OpenCell(test, lender)
        choosing = FormatChooser(context, subject, chose, units, self.formats, within, losses)
        chosen = choosing.chosen(settings.by == "map", settings.refine, settings.pairs)
        choices = tested_choices(chosen.candidates, chose, tests, within)
        for cell in (chose, tests):
            cell.end()
        tested = tests.store
        count = sum(tested.counts(tests.request.extent).values())
        view = tested.views.name_of(tests.view)
        result.rests_on.append((tested.identity.key, view, count))
        best = choices[least([choice.chosen_on for choice in choices])]
        for sentence in (answer_of(record, choices, best), *_answers_of_sets(chosen)):
            result.add(f"{subject.name}, {within.text}: {sentence}")
        result.add(choices_table(record, choices, best), sums_table(record, chosen.sums))
        result.add(formats_table(record, best))
        result.files.append(_write_choice(context, record, tests.request, best))


def _write_choice(
    context: StudyContext, record: CellRecord, tests: CellRequest, best: TestedChoice
) -> Path:
    """Write which map has which format to the results folder; return the file."""
    experiment = context.input.name
    stem = f"{record.model.name}-{record.benchmark.name}-{best.candidate.by}-{experiment}"
    chosen = {unit.place: form for unit, form in best.candidate.choice.items()}
    readable = re.sub(r"[^A-Za-z0-9_]+", "-", stem).strip("-")
    path = context.ledger.root / "formats" / f"{readable}-{content_hash(chosen)[:8]}.json"
    write_note(path, {"tested_on": tests.settings.model_dump(mode="json"), "formats": chosen})
    return path


# Sentences


def answer_of(record: CellRecord, choices: Sequence[TestedChoice], best: TestedChoice) -> str:
    """Return whether the choice beats all alike, and what it costs; what does not hold first."""
    alike = next(choice for choice in choices if choice.beside is None)
    forms = ", ".join(dict.fromkeys(alike.candidate.choice.values()))
    measure = measure_of(record)
    cost = f"{amount(best.drop, measure)} of {measure.level}"
    cost += f" and {_nats(best.gold)} of the right answer's log-probability on test documents"
    if best.beside is None or best.gold_beside is None:
        return (
            f"no choice cost less on the calibration documents than {forms} everywhere, "
            f"{best.bits:.3g} bits a weight, which costs {cost}."
        )
    # Two statements, which hold together.
    wide = together([best.beside, best.gold_beside], [best.n] * 2)
    sides = dict(zip((measure.level, "log-probability"), map(side, wide), strict=True))
    everywhere = f"{forms} everywhere ({alike.bits:.3g} bits)"
    clauses = [
        f"is shown to {verb} {everywhere} in {listed(measures)}"
        for verb, sign in (("beat", 1), ("lose to", -1))
        if (measures := [measure for measure, end in sides.items() if end == sign])
    ] or [f"is not shown to beat {everywhere}"]
    return (
        f"the choice by {best.candidate.by} ({best.bits:.3g} bits a weight) "
        f"{', and '.join(clauses)}: it keeps {amount(best.beside, measure)} more {measure.level} "
        f"and {_nats(best.gold_beside)} more log-probability. It costs {cost}."
    )


def _answers_of_sets(chosen: ChosenFormats) -> Iterator[str]:
    """Yield whether losses add up, and what measuring whole choices added."""
    sums, open_ = chosen.sums, "whether losses add up is open"
    text = (
        f"{'losses do not add up' if side(sums.more) else open_}: the choice by {MEASURED} costs "
        f"{three_digits(sums.whole)} nats on the calibration documents as a whole, and its "
        f"{counted(sums.units, 'unit')} alone {three_digits(sums.expected)} in sum (whole less sum "
        f"{_nats(sums.more)})"
    )
    if (pairs := sums.pairs) is not None:
        signs = Counter(side(pair) for pair in pairs.at_once.values())
        text += (
            f". Of {counted(len(pairs.pairs), 'drawn pair')} {signs[1]} are shown to cost more "
            f"than the sum of the two, and {signs[-1]} less; on average they cost "
            f"{_nats(pairs.mean)} more{'' if side(pairs.mean) else ', which is open'}"
        )
    yield f"{text}."
    for start, end in chosen.swapped.items():
        if end.tried:
            kept = "none is shown to cost less on the calibration documents"
            if end.gains:
                kept = f"{len(end.gains)} {'are' if len(end.gains) > 1 else 'is'} kept, shown to "
                kept += "cost less on the calibration documents: by "
                kept += listed([_nats(gain) for gain in end.gains])
            yield (
                f"of {counted(end.tried, 'swap')} of formats, each measured as a whole beside the "
                f"choice by {start}, {kept}."
            )


def _nats(figure: Estimate) -> str:
    return with_interval(figure, three_digits, " nats")


# Tables


def choices_table(record: CellRecord, choices: Sequence[TestedChoice], best: TestedChoice) -> Table:
    """Make the table of choices beside each other: what each takes, and what it costs."""
    measure, same = measure_of(record), "it is that itself"

    def by(row: TestedChoice) -> str:
        return f"{row.candidate.by} (recommended)" if row is best else row.candidate.by

    return table(
        f"{name_of(record)}: choices within the budget.",
        [
            Column("chosen by", "text", by),
            Column("bits a weight", "proxy", lambda row: row.bits),
            Column("model (MB)", "proxy", lambda row: row.size / 1e6),
            Column("sum of losses where it was chosen", "nats", lambda row: row.candidate.expected),
            Column("loss of the whole there", "nats", lambda row: row.chosen_on),
            Column(f"{measure.level} on test documents", measure.level_form, lambda row: row.level),
            Column(measure.change, measure.form, lambda row: row.drop),
            Column("loss of gold log-probability", "nats", lambda row: row.gold),
            Column(f"{measure.level} kept beside {ALIKE}", measure.form, lambda r: r.beside, same),
            Column(f"log-probability kept beside {ALIKE}", "nats", lambda r: r.gold_beside, same),
        ],
        choices,
        f"Chosen on {record.counted} documents. 95 % intervals, each for itself.",
    )


def formats_table(record: CellRecord, best: TestedChoice) -> Table:
    """Make the table of how many layers give a map which format in what is recommended."""
    counts = Counter((unit.which or "layer", form) for unit, form in best.candidate.choice.items())
    rows = [
        FormatCount(name, form, None if name in kinds.ENDS else count)
        for (name, form), count in sorted(counts.items())
    ]
    return figure_table(FormatCount, f"{name_of(record)}: what is recommended.", rows)


@dataclass(frozen=True)
class FormatCount:
    """In how many layers a map has a format."""

    name: str = labelled("what")
    format: str = labelled("format")
    layers: int | None = labelled("layers", "count", "of no layer")


@dataclass(frozen=True)
class SumRow:
    """Some units together, beside the sum of what they cost alone."""

    units: str = labelled("units together")
    measured: float = labelled("loss measured", "nats")
    summed: float = labelled("sum of losses alone", "nats")
    more: Estimate = labelled("more than the sum", "nats")


def sums_table(record: CellRecord, sums: Sums) -> Table:
    """Make the table of what units cost together beside the sum of what they cost alone."""
    rows = [SumRow(f"all {sums.units:,}", sums.whole, sums.expected, sums.more)]
    if (pairs := sums.pairs) is not None:
        both = float(pairs.together.mean())
        summed = [pairs.alone[i] + pairs.alone[j] for i, j in pairs.pairs]
        drawn = f"two, the mean of {counted(len(pairs.pairs), 'drawn pair')}"
        rows.append(SumRow(drawn, both, sum(summed) / len(summed), pairs.mean))
    return figure_table(
        SumRow,
        f"{name_of(record)}: do losses add up? Units of the choice by {MEASURED}, on the documents "
        "that choose.",
        rows,
        "95 % intervals over documents, each for itself, of these units.",
    )

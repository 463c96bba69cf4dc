"""Study: choose the formats of weights within a budget by their measured cost.

Calibration documents measure the cost of each linear map in each format, alone. One choice takes
the formats whose losses have the smallest sum within the budget. Another improves it by swaps that
are measured as a whole. Others use the errors of weights and outputs, one format for all maps, or
more bits for the first and last layers. Each choice is measured as a whole on the same documents,
which recommend one. Disjoint test documents then measure each choice.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tracker.analysis.paired import PairedOutcomes
from tracker.core import kinds
from tracker.core.changes import Ablation
from tracker.core.config import CellRequest
from tracker.core.errors import RequestError, did_you_mean
from tracker.core.estimates import Estimate
from tracker.core.formats import counted, measure_of
from tracker.core.provenance import content_hash
from tracker.core.records import CellRecord
from tracker.core.tables import Table
from tracker.core.weight_formats import FORMATS
from tracker.models.load import hollow
from tracker.models.offloaded import weight_bytes
from tracker.models.parts.anatomy import linear_map_shapes
from tracker.models.parts.linear_maps import embedding_shapes
from tracker.models.sources import find_model
from tracker.search.cells import Lender, OpenCell
from tracker.search.formats import (
    END_LAYERS,
    BitBudget,
    Choice,
    Refined,
    Unit,
    ablation_of,
    alike,
    apart,
    bits_of,
    budget,
    each_layer,
    each_map,
    ends_kept,
    errors_of,
    least_loss,
    refined,
    units_of,
)
from tracker.stats.arrays import Array
from tracker.stats.effects import interactions
from tracker.stats.support import together
from tracker.studies.base import (
    Study,
    StudyContext,
    StudyResult,
    Subject,
    name_of,
    observe,
    second_roundings,
    study_texts,
)
from tracker.studies.joint import Pairs, pairs_of
from tracker.studies.layout import figure_table, labelled
from tracker.studies.registry import QuantiseSettings

MEASURED, ALIKE = "measured log-probability", "all alike"
"""Choice that the study is about, and its reference."""
SETS = "measured sets"
"""Choice improved by swaps that are measured as a whole."""
TEXTS = study_texts("quantise", measured=MEASURED)


class Candidate(NamedTuple):
    """Choice of formats: its criterion, and its expected cost in nats."""

    by: str
    choice: Choice
    expected: float | None


_SAME = "it is that itself"


@dataclass(frozen=True)
class TestedChoice:
    """Choice with its measurements, on calibration and on test documents.

    Attributes:
        candidate: Choice of formats.
        n: Number of test documents.
        size: Size of the whole model in megabytes.
        chosen_on: Fall of the gold log-probability on the calibration documents.
        beside: Accuracy that it keeps more than one format for all; None for that choice itself.
        gold_beside: The same difference of the gold log-probability.
    """

    candidate: Candidate
    n: int
    by: str = labelled("chosen by")
    bits: float = labelled("bits a weight", "proxy")
    size: float = labelled("model (MB)", "proxy")
    expected: float | None = labelled("sum of losses where it was chosen", "nats")
    chosen_on: float = labelled("loss of the whole there", "nats")
    level: Estimate = labelled("{level} on test documents", "level")
    drop: Estimate = labelled("{change}", "change")
    gold: Estimate = labelled("loss of gold log-probability", "nats")
    beside: Estimate | None = labelled(f"{{level}} kept beside {ALIKE}", "change", _SAME)
    gold_beside: Estimate | None = labelled(f"log-probability kept beside {ALIKE}", "nats", _SAME)


@dataclass(frozen=True)
class Sums:
    """Loss of a choice compared with the sum of its units' losses, on calibration documents.

    Attributes:
        units: Number of its units.
        expected: Sum of the units' costs alone.
        whole: Cost of the choice.
        more: Difference of both.
        pairs: Sampled pairs of its units, compared with their sums; None if none are requested.
    """

    units: int
    expected: float
    whole: float
    more: Estimate
    pairs: Pairs | None


@dataclass(frozen=True)
class ChosenFormats:
    """Choices of one cell before test documents are used.

    Attributes:
        candidates: Choices of formats.
        swapped: Criterion of the choice that swaps started from → the improved choice.
        sums: Comparison of the loss of the choice by sums with its sum.
    """

    candidates: list[Candidate]
    swapped: dict[str, Refined]
    sums: Sums


@dataclass(frozen=True)
class FormatChooser:
    """Chooser of formats for the units of one cell, on its calibration documents.

    Attributes:
        context: Context of the study.
        subject: Cell that measures each unit in each format, alone.
        cell: The same documents, open for further ablations.
        units: Units that get a format each.
        formats: Formats to choose from.
        within: Budget of bits.
        losses: `[units, formats]`, cost of each alone, in nats.
    """

    context: StudyContext
    subject: Subject
    cell: OpenCell
    units: Sequence[Unit]
    formats: Sequence[str]
    within: BitBudget
    losses: Array

    def chosen(self, each_map: bool, rounds: int, pairs: int) -> ChosenFormats:
        """Choose formats by sums, by errors, by hand, and by swaps that are measured as a whole.

        Args:
            each_map: Whether the units are linear maps, whose errors are known.
            rounds: Maximum number of rounds of swaps.
            pairs: Number of sampled pairs.

        Returns:
            The choices.
        """
        candidates = self._candidates(each_map)
        self._say(f"{counted(len(candidates), 'choice')}, whole")
        best = candidates[least(self._costs([each.choice for each in candidates]))]
        swapped = {}
        if rounds:
            # A choice that two ways lead to is one start.
            starts = {ablation_of(each.choice): each for each in (best, candidates[0])}
            swapped = {each.by: self._swapped(each, rounds) for each in starts.values()}
        if ends := [end.choice for end in swapped.values() if end.gains]:
            candidates.insert(1, self._candidate(SETS, ends[least(self._costs(ends))]))
        return ChosenFormats(candidates, swapped, self._sums(candidates[0], pairs))

    def _say(self, message: str) -> None:
        self.context.progress.say(f"{self.cell.request.title}: {message}")

    def _costs(self, choices: Sequence[Choice]) -> Array:
        ablations = [ablation_of(choice) for choice in choices]
        return self.cell.paired(ablations, "gold_logprob").mean_drops

    def _candidate(self, by: str, choice: Choice) -> Candidate:
        places = [self.formats.index(choice[unit]) for unit in self.units]
        return Candidate(by, choice, float(self.losses[np.arange(len(self.units)), places].sum()))

    def _candidates(self, each_map: bool) -> list[Candidate]:
        units, formats, within = self.units, self.formats, self.within
        made = {MEASURED: least_loss(units, formats, self.losses, within)}
        if each_map:
            for name, errors in self._errors().items():
                made[name] = least_loss(units, formats, errors, within)
        if kept := ends_kept(units, formats, within):
            made[f"first and last {END_LAYERS} layers in more bits"] = kept
        made[ALIKE] = alike(units, formats, within)
        return [self._candidate(name, choice) for name, choice in made.items()]

    def _errors(self) -> dict[str, Array]:
        """Observe the errors of weights and outputs [units, formats], by their labels."""
        maps = [unit.change(form) for unit in self.units for form in self.formats]
        kind = f"rounding-{content_hash([*map(str, maps)])[:8]}"
        seen = observe(self.subject, kind, self.context, partial(errors_of, maps=maps))
        figures = seen.of(self.subject.outcomes().documents)
        shape = (len(self.units), len(self.formats))
        outputs = figures["output_error"].sum(axis=0) / figures["output_size"].sum(axis=0)
        return {
            "error of weights": figures["weight_error"][0].reshape(shape),
            "error of outputs": outputs.reshape(shape),
        }

    def _swapped(self, start: Candidate, rounds: int) -> Refined:
        """Swap formats of a choice while that is shown to cost less."""
        number = 0

        def measure(choices: Sequence[Choice]) -> PairedOutcomes:
            nonlocal number
            number += 1
            self._say(
                f"{counted(len(choices) - 1, 'swap')} of formats beside the choice by {start.by}, "
                f"round {number} of at most {rounds}"
            )
            ablations = [ablation_of(choice) for choice in choices]
            self.cell.measure(ablations, candidates=True)
            return self.cell.paired(ablations, "gold_logprob")

        return refined(start.choice, self.formats, self.losses, self.within, rounds, measure)

    def _sums(self, candidate: Candidate, most: int) -> Sums:
        """Compare a choice, and sampled pairs of its units, with the sums of their costs alone.

        Pairs are sampled without replacement with the seed of the cell.
        """
        choice, count = candidate.choice, len(self.units)
        every = list(combinations(range(count), 2))
        draw = random.Random(f"pairs/{self.cell.request.documents.seed}")
        pairs = sorted(draw.sample(every, min(most, len(every))))
        alone = [_of([unit], choice) for unit in self.units]
        both = [_of([self.units[i], self.units[j]], choice) for i, j in pairs]
        whole = ablation_of(choice)
        if pairs:
            self._say(f"{counted(len(pairs), 'pair')} of units, drawn")
            self.cell.measure(both, candidates=True)
        outcomes = self.subject.outcomes(besides=[whole, *both])
        paired = outcomes.by_gold_logprob([whole, *alone])
        values = paired.drops[:, 0] - paired.drops[:, 1:].sum(axis=1)
        (more,) = interactions(values[:, None], paired.weights)
        found = None
        if pairs:
            places = sorted({place for pair in pairs for place in pair})
            paired_drops = outcomes.by_gold_logprob([*(alone[n] for n in places), *both])
            drops = (paired_drops, places, pairs, outcomes.strata, None)
            found = pairs_of(self.subject.record, "gold log-prob drop", "nats", *drops)
        drop = float(paired.mean_drops[0])
        return Sums(count, candidate.expected or 0.0, drop, more, found)


def _of(units: Sequence[Unit], choice: Choice) -> Ablation:
    """Return the ablation in which some units alone have their formats."""
    return ablation_of({unit: choice[unit] for unit in units})


def least(costs: Sequence[float] | Array) -> int:
    """Return the index of the smallest cost; undefined costs are infinite."""
    return int(np.nan_to_num(costs, nan=np.inf).argmin())


def losses_of(record: CellRecord, units: Sequence[Unit], formats: Sequence[str]) -> Array | None:
    """Return the cost of each unit in each format, alone.

    Args:
        record: The cell.
        units: The units.
        formats: The formats.

    Returns:
        `[units, formats]` in nats; None if one is undefined.
    """
    found = {
        (run.change.layer, run.change.map or "", str(run.change.intervention)): run.gold_drop.value
        for run in record.runs
    }
    losses = [[found.get((unit.layer, unit.which, form)) for form in formats] for unit in units]
    if any(loss is None for row in losses for loss in row):
        return None
    return np.array(losses, dtype=np.float64)


def tested_choices(
    candidates: Sequence[Candidate], chose: OpenCell, tests: OpenCell, within: BitBudget
) -> list[TestedChoice]:
    """Measure choices on the calibration and the test documents.

    Args:
        candidates: Choices; one of them uses one format for all units.
        chose: Calibration documents.
        tests: Test documents.
        within: Budget of bits.

    Returns:
        The measured choices.
    """
    ablations = [ablation_of(each.choice) for each in candidates]
    tests.progress.say(f"{tests.request.title}: {counted(len(ablations), 'choice')}, whole")
    on_calibration = chose.paired(ablations, "gold_logprob").mean_drops
    metric, gold = (tests.paired(ablations, by) for by in ("accuracy", "gold_logprob"))
    other = [each.by for each in candidates].index(ALIKE)

    def one(place: int, candidate: Candidate) -> TestedChoice:
        bits, is_other = bits_of(candidate.choice), place == other
        return TestedChoice(
            candidate,
            n=len(gold.weights),
            by=candidate.by,
            bits=bits,
            size=within.bytes_of(bits) / 1e6,
            expected=candidate.expected,
            chosen_on=float(on_calibration[place]),
            level=metric.level(place),
            drop=metric.drop(place),
            gold=gold.drop(place),
            beside=None if is_other else apart(metric, place, other),
            gold_beside=None if is_other else apart(gold, place, other),
        )

    return [one(place, candidate) for place, candidate in enumerate(candidates)]


class Quantise(Study[QuantiseSettings]):
    """See the module."""

    name = "quantise"
    question = "Which weights may have fewer bits, and is the choice better than all alike?"
    intact = True
    texts = TEXTS

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
        source = find_model(request.model, trust)
        model = hollow(source, request.model.dtype)
        ends = embedding_shapes(model) if self.settings.embeddings else {}
        by_map = self.settings.by == "map"
        units = units_of(linear_map_shapes(source), request.changes.layers, by_map, ends)
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
    note = {"tested_on": tests.settings.model_dump(mode="json"), "formats": chosen}
    context.ledger.keep_notes({path: note})
    return path


# Sentences


def answer_of(record: CellRecord, choices: Sequence[TestedChoice], best: TestedChoice) -> str:
    """Describe whether the choice beats one format for all, and what it costs."""
    alike = next(choice for choice in choices if choice.beside is None)
    measure, won, lost = measure_of(record), [], []
    if best.beside is not None and best.gold_beside is not None:
        # Two statements need simultaneous intervals.
        wide = together([best.beside, best.gold_beside], [best.n] * 2)
        sides = {measure.level: wide[0].side(), "log-probability": wide[1].side()}
        won, lost = ([name for name, end in sides.items() if end == sign] for sign in (1, -1))
    return TEXTS.one("answer", alike, best, measure, won, lost)


def _answers_of_sets(chosen: ChosenFormats) -> list[str]:
    """Describe whether losses add up, and the gain from measuring whole choices."""
    pairs = chosen.sums.pairs
    signs = Counter(pair.side() for pair in pairs.at_once.values()) if pairs else Counter()
    return TEXTS.all("sets", chosen, chosen.sums, pairs, signs)


# Tables


def choices_table(record: CellRecord, choices: Sequence[TestedChoice], best: TestedChoice) -> Table:
    """Build the table that compares choices: the size of each, and its cost."""
    rows = [replace(row, by=f"{row.by} (recommended)") if row is best else row for row in choices]
    return figure_table(
        TestedChoice,
        f"{name_of(record)}: choices within the budget.",
        rows,
        f"Chosen on {record.counted} documents. 95 % intervals, each for itself.",
        measure=measure_of(record),
    )


def formats_table(record: CellRecord, best: TestedChoice) -> Table:
    """Build the table of the recommended formats: layers for each map and format."""
    counts = Counter((unit.which or "layer", form) for unit, form in best.candidate.choice.items())
    rows = [
        FormatCount(name, form, None if name in kinds.ENDS else count)
        for (name, form), count in sorted(counts.items())
    ]
    return figure_table(FormatCount, f"{name_of(record)}: what is recommended.", rows)


@dataclass(frozen=True)
class FormatCount:
    """Number of layers in which a map has a format."""

    name: str = labelled("what")
    format: str = labelled("format")
    layers: int | None = labelled("layers", "count", "of no layer")


@dataclass(frozen=True)
class SumRow:
    """Joint cost of units, and the sum of their costs alone."""

    units: str = labelled("units together")
    measured: float = labelled("loss measured", "nats")
    summed: float = labelled("sum of losses alone", "nats")
    more: Estimate = labelled("more than the sum", "nats")


def sums_table(record: CellRecord, sums: Sums) -> Table:
    """Build the table of joint costs of units, and the sums of their costs alone."""
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

"""Figures of the study `quantise` of one cell: whole choices, better ones, drawn pairs."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from typing import NamedTuple

import numpy as np

from tracker.analysis.paired import PairedOutcomes
from tracker.core.changes import Ablation
from tracker.core.estimates import Estimate
from tracker.core.formats import counted
from tracker.core.provenance import content_hash
from tracker.core.records import CellRecord
from tracker.search.cells import OpenCell
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
    ends_kept,
    errors_of,
    least_loss,
    refined,
)
from tracker.stats.arrays import Array
from tracker.stats.interaction import interactions
from tracker.studies.base import StudyContext, Subject, lined_up, observe
from tracker.studies.joint import Pairs, pairs_of

MEASURED, ALIKE = "measured log-probability", "all alike"
"""What the study is about, and what it is held against."""
SETS = "measured sets"
"""What is made of a choice by swaps that are measured as a whole."""


class Candidate(NamedTuple):
    """One choice of formats: by what it was chosen, and what it is expected to cost, in nats."""

    by: str
    choice: Choice
    expected: float | None


@dataclass(frozen=True)
class TestedChoice:
    """A choice, measured.

    Attributes:
        candidate: The choice.
        n: Test documents.
        bits: Bits of a weight.
        size: Bytes of the whole model.
        chosen_on: Its fall of the gold log-probability on the documents that chose.
        gold: The same on test documents.
        drop: Its accuracy drop there.
        level: Its accuracy there.
        beside: By how much more accuracy it keeps than all alike; None for that itself.
        gold_beside: The same of the gold log-probability.
    """

    candidate: Candidate
    n: int
    bits: float
    size: float
    chosen_on: float
    gold: Estimate
    drop: Estimate
    level: Estimate
    beside: Estimate | None
    gold_beside: Estimate | None


@dataclass(frozen=True)
class Sums:
    """Whether losses add up in one choice, on the documents that choose.

    Attributes:
        units: How many units it has.
        expected: The sum of what they cost alone.
        whole: What the choice costs.
        more: By how much more that is.
        pairs: Drawn pairs of its units beside their own sums; None where none are asked for.
    """

    units: int
    expected: float
    whole: float
    more: Estimate
    pairs: Pairs | None


@dataclass(frozen=True)
class ChosenFormats:
    """All that is found of one cell before test documents are asked.

    Attributes:
        candidates: The choices.
        swapped: By what a choice was made with which swaps began → what they made of it.
        sums: Whether losses add up in the choice that takes them for sums.
    """

    candidates: list[Candidate]
    swapped: dict[str, Refined]
    sums: Sums


@dataclass(frozen=True)
class FormatChooser:
    """What chooses formats for the units of one cell, on its calibration documents.

    Attributes:
        context: The context of the study.
        subject: The cell: each unit in each format, alone.
        cell: The same documents, under whatever is asked for.
        units: What gets a format each.
        formats: The formats.
        within: The bits.
        losses: `[units, formats]`, what each costs alone, in nats.
    """

    context: StudyContext
    subject: Subject
    cell: OpenCell
    units: Sequence[Unit]
    formats: Sequence[str]
    within: BitBudget
    losses: Array

    def chosen(self, each_map: bool, rounds: int, pairs: int) -> ChosenFormats:
        """Choose by sums, by errors, by hand, and by swaps that are measured as a whole.

        Args:
            each_map: Whether the units are linear maps, whose errors are known.
            rounds: How many rounds of swaps there are at most.
            pairs: How many pairs are drawn.

        Returns:
            What was found.
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
        """Observe the errors of weights and outputs [units, formats], by what people call them."""
        maps = [unit.change(form) for unit in self.units for form in self.formats]
        kind = f"rounding-{content_hash([*map(str, maps)])[:8]}"
        seen = observe(self.subject, kind, self.context, partial(errors_of, maps=maps))
        figures = lined_up(seen, self.subject.outcomes())
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
        """Hold a choice, and drawn pairs of its units, against the sums of what units cost alone.

        Pairs are drawn by the seed of the cell, each once.
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
    """What a model is of which some units alone have their formats."""
    return ablation_of({unit: choice[unit] for unit in units})


def least(costs: Sequence[float] | Array) -> int:
    """Return the place of the least cost; what is undefined is not."""
    return int(np.nan_to_num(costs, nan=np.inf).argmin())


def losses_of(record: CellRecord, units: Sequence[Unit], formats: Sequence[str]) -> Array | None:
    """Read what each unit costs in each format, alone.

    Args:
        record: The cell.
        units: The units.
        formats: The formats.

    Returns:
        `[units, formats]` in nats; None where one is undefined.
    """
    found = {
        (
            run.change.layer,
            run.change.map or "",
            str(run.change.intervention),
        ): run.gold_drop.value
        for run in record.runs
    }
    losses = [[found.get((unit.layer, unit.which, form)) for form in formats] for unit in units]
    if any(loss is None for row in losses for loss in row):
        return None
    return np.array(losses, dtype=np.float64)


def tested_choices(
    candidates: Sequence[Candidate], chose: OpenCell, tests: OpenCell, within: BitBudget
) -> list[TestedChoice]:
    """Measure what choices are worth.

    Args:
        candidates: The choices; one of them treats all units alike.
        chose: The documents that choose.
        tests: Those that test.
        within: The bits.

    Returns:
        One each.
    """
    ablations = [ablation_of(each.choice) for each in candidates]
    tests.progress.say(f"{tests.request.title}: {counted(len(ablations), 'choice')}, whole")
    on_calibration = chose.paired(ablations, "gold_logprob").mean_drops
    metric, gold = (tests.paired(ablations, by) for by in ("accuracy", "gold_logprob"))
    other = [each.by for each in candidates].index(ALIKE)

    def one(place: int, candidate: Candidate) -> TestedChoice:
        bits = bits_of(candidate.choice)
        return TestedChoice(
            candidate=candidate,
            n=len(gold.weights),
            bits=bits,
            size=within.bytes_of(bits),
            chosen_on=float(on_calibration[place]),
            gold=gold.drop(place),
            drop=metric.drop(place),
            level=metric.level(place),
            beside=None if place == other else apart(metric, place, other),
            gold_beside=None if place == other else apart(gold, place, other),
        )

    return [one(place, candidate) for place, candidate in enumerate(candidates)]

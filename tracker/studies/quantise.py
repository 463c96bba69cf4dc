"""Study: choose a number format for each weight matrix within a budget of bits.

First, the study rounds each linear map alone to each format, and measures the cost on calibration
documents. The study then builds several assignments of a format to every map, each within the
budget. One assignment minimizes the sum of the measured costs. Another assignment is improved by
swaps: one map gets more bits, and other maps get fewer. Further assignments minimize the errors of
weights or of outputs, use one format for all maps, or give more bits to the first and last layers.
The study measures the model with each assignment on the calibration documents, and recommends the
best. Finally, the study measures all assignments on disjoint test documents.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, combinations, count
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tracker.analysis.paired import PairedOutcomes
from tracker.models.load import build_hollow
from tracker.models.offloaded import weight_bytes
from tracker.models.sources import find_model
from tracker.schema import kinds
from tracker.schema.changes import Ablation
from tracker.schema.config import CellRequest
from tracker.schema.errors import RequestError, did_you_mean
from tracker.schema.estimates import Estimate
from tracker.schema.findings import LineChart, line_chart
from tracker.schema.formats import count_text, metric_format
from tracker.schema.provenance import content_hash
from tracker.schema.records import CellRecord
from tracker.schema.tables import Table
from tracker.schema.weight_formats import FORMATS
from tracker.search.accuracy_budget import AccuracyBudget, refuse_untestable
from tracker.search.cells import ModelCache, OpenCell
from tracker.search.formats import (
    EDGE_LAYERS,
    BitBudget,
    FormatChoice,
    FormatProblem,
    FormatUnit,
    Refinement,
    bits_per_weight,
    build_error_observer,
    choice_ablation,
    choice_changes,
    find_units,
    layer_formats_request,
    map_formats_request,
    paired_gain,
    parse_budget,
)
from tracker.stats.arrays import Array
from tracker.stats.effects import interactions
from tracker.stats.support import widen
from tracker.studies.base import (
    Study,
    StudyContext,
    StudyResult,
    Subject,
    cell_label,
    observe_subject,
    second_rounding_notes,
    study_texts,
)
from tracker.studies.joint import PairInteractions
from tracker.studies.layout import figure_table, labelled
from tracker.studies.registry import QuantiseSettings

MEASURED_CHOICE, UNIFORM_CHOICE = "measured log-probability", "all alike"
"""Names of the choice that the study is about, and of its reference."""
SWAPPED_CHOICE = "measured sets"
"""Name of the choice improved by swaps that are measured as a whole."""
QUANTISE_TEXTS = study_texts("quantise", measured=MEASURED_CHOICE)
_GAIN = "gain over a single format"
_IS_REFERENCE = "this row is the model with one format for all layers or linear maps"


class Candidate(NamedTuple):
    """Assignment of a format to each layer or map; `expected` is its predicted cost (nats)."""

    by: str
    choice: FormatChoice
    expected: float


@dataclass(frozen=True)
class TestedChoice:
    """Table row: assignment of a format to each layer or map, with its measured costs.

    Attributes:
        choice: Format of each unit; a unit is a layer or a linear map.
        n: Number of test documents.
        size: Size of the whole model in megabytes.
        chosen_on: Decrease of the gold log-probability on the calibration documents when all units
            are rounded.
        gain: Test accuracy minus the test accuracy with one format for all units. None for the
            assignment with one format for all units.
        gold_gain: Same as `gain`, but for the gold log-probability, in nats.
    """

    choice: FormatChoice
    n: int
    by: str = labelled("chosen by")
    bits: float = labelled("bits a weight", "proxy")
    size: float = labelled("model (MB)", "proxy")
    expected: float = labelled("sum of single losses, calibration", "nats")
    chosen_on: float = labelled("joint loss, calibration", "nats")
    level: Estimate = labelled("{level} on test documents", "level")
    drop: Estimate = labelled("{change}", "change")
    gold: Estimate = labelled("loss of gold log-probability", "nats")
    gain: Estimate | None = labelled(f"{{level}} {_GAIN}", "change", _IS_REFERENCE)
    gold_gain: Estimate | None = labelled(f"log-probability {_GAIN}", "nats", _IS_REFERENCE)


@dataclass(frozen=True)
class SumComparison:
    """Cost of rounding all units together, compared with the sum of their single costs.

    Attributes:
        units: Number of units (layers or linear maps) that are rounded.
        expected: Sum of the costs of rounding each unit alone.
        whole: Measured cost of rounding all units together.
        more: Measured cost minus the sum of the single costs, with a confidence interval.
        pairs: Joint costs of random pairs of units, compared with sums of single costs; None if no
            pairs were requested.
    """

    units: int
    expected: float
    whole: float
    more: Estimate
    pairs: PairInteractions | None


@dataclass(frozen=True)
class FormatChooser:
    """Chooser of a number format for each layer or map, by costs on calibration documents.

    Attributes:
        context: Context of the study.
        subject: Measured results of rounding each unit alone to each format.
        cell: The loaded model with the calibration documents.
        problem: Units, formats, budget and losses. A loss is the decrease of the gold
            log-probability, in nats, when one unit is rounded to one format.
    """

    context: StudyContext
    subject: Subject
    cell: OpenCell
    problem: FormatProblem

    def candidates(self, by_map: bool) -> list[Candidate]:
        """Build an assignment of formats for each criterion, such as errors of weights.

        `by_map` is true if formats are chosen for linear maps instead of layers. Errors of weights
        and outputs are criteria for linear maps only.
        """
        problem = self.problem
        choices = {MEASURED_CHOICE: problem.minimize_loss()}
        for name, errors in self._errors().items() if by_map else ():
            choices[name] = problem.minimize_loss(errors)
        if choice := problem.edge_choice():
            choices[f"more bits for the first and last {EDGE_LAYERS} layers"] = choice
        choice = problem.uniform_choice()
        is_mixed = len(set(choice.values())) > 1  # no single format is within the budget
        choices[f"{UNIFORM_CHOICE}, fewest bits" if is_mixed else UNIFORM_CHOICE] = choice
        return [self.candidate(name, choice) for name, choice in choices.items()]

    def candidates_by_size(self) -> list[Candidate]:
        """Choose formats for several sizes of the model.

        The first candidate gives the largest format to all units.
        """
        uniform, *others = self.problem.ladder()
        names = [f"{MEASURED_CHOICE}, {bits_per_weight(choice):.3g} bits" for choice in others]
        choices = {UNIFORM_CHOICE: uniform} | dict(zip(names, others, strict=True))
        return [self.candidate(name, choice) for name, choice in choices.items()]

    def candidate(self, by: str, choice: FormatChoice) -> Candidate:
        """Build a candidate: formats that the criterion `by` chose, with their predicted cost.

        The predicted cost is the sum of the costs of rounding each unit alone.
        """
        units, formats = self.problem.units, self.problem.formats
        columns = [formats.index(choice[unit]) for unit in units]
        expected = self.problem.losses[np.arange(len(units)), columns].sum()
        return Candidate(by, choice, float(expected))

    def best(self, choices: Sequence[FormatChoice]) -> int:
        """Measure the model with each assignment of formats; return the index of the best."""
        ablations = [choice_ablation(choice) for choice in choices]
        return smallest_index(self.cell.outcomes(ablations, "gold_logprob").mean_drops)

    def improve(self, candidates: Sequence[Candidate], rounds: int) -> dict[str, Refinement]:
        """Improve two assignments by swaps of formats that significantly lower the loss.

        The two start assignments are the candidate with the lowest measured loss, and the first
        candidate.

        Args:
            candidates: Assignments of formats to units.
            rounds: Maximum number of rounds of swaps.

        Returns:
            Criterion that chose the start assignment → the improved assignment, with the number of
            tried swaps.
        """
        self.say(f"measuring the model with {count_text(len(candidates), 'choice')} of formats")
        best = candidates[self.best([candidate.choice for candidate in candidates])]
        if not rounds:
            return {}
        # A choice that two criteria lead to is one start.
        starts = {choice_ablation(start.choice): start for start in (best, candidates[0])}
        return {start.by: self._swap(start, rounds) for start in starts.values()}

    def say(self, message: str) -> None:
        """Report a progress message about the model and benchmark."""
        self.context.progress.say(f"{self.cell.request.title}: {message}")

    def _errors(self) -> dict[str, Array]:
        """Compute the rounding errors of each unit in each format.

        Returns a dict from the kind of error, such as `error of weights`, to an array
        `[units, formats]`.
        """
        units, formats = self.problem.units, self.problem.formats
        by_unit = [zip(*map(unit.changes, formats), strict=True) for unit in units]
        maps = [*chain.from_iterable(chain.from_iterable(by_unit))]
        kind = f"rounding-{content_hash([*map(str, maps)])[:8]}"
        begin = partial(build_error_observer, maps=maps)
        observed = observe_subject(self.subject, kind, self.context, begin)
        figures = observed.select(self.subject.outcomes().documents)
        outputs = figures["output_error"].sum(axis=0) / figures["output_size"].sum(axis=0)
        errors = {"error of weights": figures["weight_error"][0], "error of outputs": outputs}
        starts = np.cumsum([0, *(len(unit.paths) for unit in units[:-1])])
        return {
            name: np.add.reduceat(array.reshape(-1, len(formats)), starts)
            for name, array in errors.items()
        }

    def _swap(self, start: Candidate, rounds: int) -> Refinement:
        """Improve an assignment by at most `rounds` swaps that significantly lower the loss."""
        numbers, criterion = count(1), start.by

        def measure(choices: Sequence[FormatChoice]) -> PairedOutcomes:
            turn, swaps = next(numbers), count_text(len(choices) - 1, "swap")
            self.say(
                f"round {turn} (limit {rounds}): trying {swaps} of formats chosen by {criterion}"
            )
            ablations = [choice_ablation(choice) for choice in choices]
            self.cell.measure(ablations, are_candidates=True)
            return self.cell.outcomes(ablations, "gold_logprob")

        return self.problem.refine(start.choice, rounds, measure)

    def compare_sums(self, candidate: Candidate, max_pairs: int) -> SumComparison:
        """Compare the cost of rounding units together with the sum of their single costs.

        The method rounds all units together, and at most `max_pairs` random pairs of units. A unit
        is a layer or a linear map, and its single cost is the cost of rounding only this unit.
        """
        changes = choice_changes(candidate.choice)
        n_units = len(changes)
        pairs = list(combinations(range(n_units), 2))
        generator = random.Random(f"pairs/{self.cell.request.documents.seed}")
        pairs = sorted(generator.sample(pairs, min(max_pairs, len(pairs))))

        def ablation(*units: int) -> Ablation:
            return Ablation.from_changes(*(changes[n] for n in units))

        single, joint = [ablation(n) for n in range(n_units)], [ablation(*pair) for pair in pairs]
        whole = choice_ablation(candidate.choice)
        if pairs:
            self.say(f"measuring {count_text(len(pairs), 'random pair')} of linear maps or layers")
        self.cell.measure([whole, *joint], are_candidates=True)
        outcomes = self.subject.outcomes([whole, *joint])
        paired = outcomes.gold_outcomes([whole, *single])
        values = paired.drops[:, 0] - paired.drops[:, 1:].sum(axis=1)
        (excess,) = interactions(values[:, None], paired.weights)
        compared = None
        if pairs:
            units = sorted({*chain.from_iterable(pairs)})
            drops = outcomes.gold_outcomes([*(single[n] for n in units), *joint])
            figures = (drops, units, pairs, outcomes.strata, None)
            record = self.subject.record
            compared = PairInteractions(record, "gold log-prob drop", "nats", *figures)
        loss = float(paired.mean_drops[0])
        return SumComparison(n_units, candidate.expected, loss, excess, compared)


def smallest_index(costs: Sequence[float] | Array) -> int:
    """Return the index of the smallest cost; an undefined cost (NaN) is never chosen."""
    return int(np.nan_to_num(costs, nan=np.inf).argmin())


def unit_losses(
    record: CellRecord, units: Sequence[FormatUnit], formats: Sequence[str]
) -> Array | None:
    """Return the measured cost of rounding each unit alone to each format.

    Args:
        record: Record of the runs that round each unit alone.
        units: Layers, linear maps or groups of linear maps. The cost of a group is the sum of the
            costs of its maps.
        formats: Names of the formats.

    Returns:
        The costs `[units, formats]` in nats, or None if any cost is undefined.
    """
    pairs = ((str(run.change), run.gold_drop.value) for run in record.runs)
    drops = {change: value for change, value in pairs if value is not None}
    changes = [[[*map(str, unit.changes(name))] for name in formats] for unit in units]
    if not drops.keys() >= {*chain(*chain(*changes))}:
        return None
    return np.array([[sum(drops[change] for change in group) for group in row] for row in changes])


def measure_choices(
    candidates: Sequence[Candidate], calibration: OpenCell, tests: OpenCell, limit: BitBudget
) -> list[TestedChoice]:
    """Measure the model with each assignment of formats, on calibration and test documents.

    Args:
        candidates: Assignments of formats. One candidate uses one format for all units, and its
            name starts with `UNIFORM_CHOICE`; the other candidates are compared with this
            candidate.
        calibration: The model with the calibration documents.
        tests: The model with the test documents.
        limit: Budget of bits.

    Returns:
        The assignments with their measured costs, in the order of `candidates`.
    """
    ablations = [choice_ablation(candidate.choice) for candidate in candidates]
    n_choices = count_text(len(ablations), "choice")
    tests.progress.say(f"{tests.request.title}: measuring the model with {n_choices} of formats")
    losses = calibration.outcomes(ablations, "gold_logprob").mean_drops
    metric, gold = (tests.outcomes(ablations, name) for name in ("accuracy", "gold_logprob"))
    reference = [c.by.startswith(UNIFORM_CHOICE) for c in candidates].index(True)
    tested = []
    for n, (by, choice, expected) in enumerate(candidates):
        bits = bits_per_weight(choice)
        gains = [None if n == reference else paired_gain(p, n, reference) for p in (metric, gold)]
        sizes = bits, limit.model_bytes(bits) / 1e6, expected, float(losses[n])
        figures = metric.level(n), metric.drop(n), gold.drop(n)
        tested.append(TestedChoice(choice, len(gold.weights), by, *sizes, *figures, *gains))
    return tested


class Quantise(Study[QuantiseSettings]):
    """Study that chooses a number format for each weight matrix, within a budget of bits."""

    name = "quantise"
    question = "Which weights can have fewer bits, and are mixed formats better than one format?"
    intact = True
    texts = QUANTISE_TEXTS

    def __init__(self, settings: QuantiseSettings) -> None:
        super().__init__(settings)
        self.formats = tuple(dict.fromkeys(map(str.strip, settings.format.split(","))))
        for name in self.formats:
            if name not in FORMATS:
                guess, formats = did_you_mean(name, FORMATS), ", ".join(FORMATS)
                raise RequestError(f"there is no format {name!r}.{guess} Use one of: {formats}")
        if settings.max_drop is not None and settings.keep_accuracy is not None:
            raise RequestError("set either --max-drop or --keep-accuracy, not both")
        self.accuracy_budget = AccuracyBudget.parse(settings.max_drop, settings.keep_accuracy)
        if settings.budget is None and self.accuracy_budget is None:
            raise RequestError(
                "set a budget: --budget 4.5bpw for the size, or --max-drop 2pp or "
                "--keep-accuracy 95% for the accuracy"
            )
        if len(self.formats) < 2:
            raise RequestError("--format: one format leaves no choice; name at least two formats")
        if (settings.by, settings.tie) == ("layer", "none"):
            raise RequestError(
                "--tie none has no effect, because --by layer gives all maps of a layer one "
                "format; leave --tie or --by out"
            )
        self._is_tied = (settings.by, settings.tie) == ("map", "fused")

    def expand(self, cell: CellRequest, context: StudyContext) -> Iterator[CellRequest]:
        """Yield the request to round each layer or linear map alone, on calibration documents."""
        trust = context.options.trust_remote_code
        request = replace(cell, until=None).on_part("calibration")
        request = request.with_changes(layers=cell.changes.layers)
        if self.accuracy_budget is not None:
            cache = ModelCache(context.ledger, context.options, context.progress)
            refuse_untestable(cache.cell(request), request.title)
        units, _ = self._units_and_budget(request, trust)
        ends = [path for unit in units if unit.is_embedding for path in unit.paths]
        if self.settings.by == "layer":
            yield layer_formats_request(request, self.formats, ends)
        else:
            yield map_formats_request(request, self.formats, trust, ends)

    def _units_and_budget(
        self, request: CellRequest, trust_remote_code: bool
    ) -> tuple[list[FormatUnit], BitBudget]:
        """Return the layers or linear maps that get formats, and the budget of bits for them.

        `trust_remote_code` allows code from the model's repository.
        """
        source = find_model(request.model, trust_remote_code)
        model = build_hollow(source, request.model.dtype)
        ends, by_map = self.settings.embeddings, self.settings.by == "map"
        units = find_units(source, model, request.changes.layers, by_map, ends, self._is_tied)
        total = weight_bytes(model)
        fixed = total - int(model.dtype.itemsize) * sum(unit.n_weights for unit in units)
        return units, parse_budget(self.settings.budget, units, fixed, total, self.formats)

    def answer(self, context: StudyContext, subjects: list[Subject]) -> StudyResult:
        """Assign formats within the budget, and measure the assignments on test documents."""
        # Another budget, or other formats, are another question about the same file.
        ends = ["embeddings"] if self.settings.embeddings else []
        tie = [self.settings.tie] if self._is_tied else []
        budgets = self.settings.budget, self.settings.max_drop, self.settings.keep_accuracy
        words = [*filter(None, budgets), self.settings.by, *tie, *ends, *self.formats]
        result = StudyResult(suffix=re.sub(r"[^\w.]+", "-", " ".join(words)))
        for subject in subjects:
            self._choose(subject, context, result)
        result.add(*second_rounding_notes(subjects))
        return result

    def _choose(self, subject: Subject, context: StudyContext, result: StudyResult) -> None:
        record, settings, request = subject.record, self.settings, subject.request
        units, limit = self._units_and_budget(request, context.options.trust_remote_code)
        losses = unit_losses(record, units, self.formats)
        if losses is None:
            reason = "formats cannot be chosen: a layer or linear map has an undefined loss"
            result.lack(record.title, reason)
            return
        lender = ModelCache(context.ledger, context.options, context.progress)
        sample = settings.test_sample or request.documents.sample
        cells = OpenCell(request, lender), OpenCell(request.on_part("test", sample=sample), lender)
        calibration, tests = cells
        problem = FormatProblem(units, self.formats, limit, losses)
        chooser = FormatChooser(context, subject, calibration, problem)
        if self.accuracy_budget is None:
            candidates = chooser.candidates(settings.by == "map")
            swapped = chooser.improve(candidates, settings.refine)
            if improved := [end.choice for end in swapped.values() if end.gains]:
                best_end = improved[chooser.best(improved)]
                candidates.insert(1, chooser.candidate(SWAPPED_CHOICE, best_end))
            sums = chooser.compare_sums(candidates[0], settings.pairs)
        else:
            candidates, swapped = chooser.candidates_by_size(), {}
            sums = chooser.compare_sums(candidates[-1], settings.pairs)
        choices = measure_choices(candidates, calibration, tests, limit)
        best, answers = self._recommend(record, choices, tests)
        for cell in cells:
            cell.end()
        store = tests.store
        n_tests = sum(store.counts(tests.request.extent).values())
        result.rests_on.append((store.identity.key, store.views.view_name(tests.view), n_tests))
        title = ", ".join(filter(None, (subject.name, limit.text)))
        for sentence in (*answers, *_write_set_answers(swapped, sums)):
            result.add(f"{title}: {sentence}")
        kind = "choices within the budget" if self.accuracy_budget is None else "choices by size"
        result.add(_choices_table(record, choices, best, kind), _sums_table(record, sums))
        if self.accuracy_budget is not None:
            result.add(_draw_sizes(record, choices))
        if best is not None:
            result.add(_formats_table(record, best))
            result.files.append(_write_choice(context, record, tests.request, best))

    def _recommend(
        self, record: CellRecord, choices: list[TestedChoice], tests: OpenCell
    ) -> tuple[TestedChoice | None, list[str]]:
        """Return the recommended assignment of formats, and sentences that explain it.

        With an accuracy budget, the assignment is None if no assignment passes the test.
        """
        if self.accuracy_budget is None:
            best = choices[smallest_index([choice.chosen_on for choice in choices])]
            return best, [_write_answer(record, choices, best)]
        budget, benchmark = self.accuracy_budget, tests.store.identity.benchmark
        paired = tests.outcomes([choice_ablation(c.choice) for c in choices], "accuracy")
        if not paired.weights @ paired.baseline:
            return None, [QUANTISE_TEXTS.render("no_accuracy", tests.n)]
        verdict = budget.judge(paired, range(len(choices)), tests.n)
        shown, estimated = (None if i is None else choices[i] for i in verdict[:2])
        nearest = ""
        if estimated is None and verdict.smallest_excess is not None:
            nearest = budget.larger_option(verdict.smallest_excess, paired)
        rows = shown, estimated, verdict.needed, nearest, tests.n, benchmark, metric_format(record)
        return shown, [QUANTISE_TEXTS.render("within", budget, *rows)]


def _write_choice(
    context: StudyContext, record: CellRecord, tests: CellRequest, best: TestedChoice
) -> Path:
    """Write the best assignment of formats to a file in the results folder; return its path."""
    stem = f"{record.model.name}-{record.benchmark.name}-{best.by}-{context.input.name}"
    formats = {key: name for unit, name in best.choice.items() for key in unit.keys}
    readable = re.sub(r"[^A-Za-z0-9_]+", "-", stem).strip("-")
    path = context.ledger.root / "formats" / f"{readable}-{content_hash(formats)[:8]}.json"
    content = {"tested_on": tests.settings.model_dump(mode="json"), "formats": formats}
    context.ledger.write_notes({path: content})
    return path


# Sentences


def _write_answer(record: CellRecord, choices: Sequence[TestedChoice], best: TestedChoice) -> str:
    """Write what the best assignment costs, and compare it with one format for all units."""
    uniform = next(choice for choice in choices if choice.gain is None)
    measure, won, lost = metric_format(record), [], []
    if best.gain is not None and best.gold_gain is not None:
        # Two statements need simultaneous intervals.
        estimates = widen([best.gain, best.gold_gain], [best.n] * 2)
        sides = {measure.level: estimates[0].side(), "log-probability": estimates[1].side()}
        won, lost = ([name for name, side in sides.items() if side == sign] for sign in (1, -1))
    return QUANTISE_TEXTS.render("answer", uniform, best, measure, won, lost)


def _write_set_answers(swapped: dict[str, Refinement], sums: SumComparison) -> list[str]:
    """Write how much swaps of formats helped, and how well single costs predict joint costs."""
    interactions = sums.pairs.at_once.values() if sums.pairs else ()
    signs = Counter(interaction.side() for interaction in interactions)
    return QUANTISE_TEXTS.render_all("sets", swapped, sums, sums.pairs, signs)


# Tables


def _draw_sizes(record: CellRecord, choices: Sequence[TestedChoice]) -> LineChart:
    """Draw the test accuracy against the size of the model."""
    by_size = sorted(choices, key=lambda choice: choice.size)
    sizes, levels = [choice.size for choice in by_size], [choice.level for choice in by_size]
    axes, title = ("model (MB)", f"test {metric_format(record).level}"), cell_label(record)
    return line_chart(f"{title}: accuracy by size", axes, "percent", sizes, {axes[1]: levels})


def _choices_table(
    record: CellRecord, rows: list[TestedChoice], best: TestedChoice | None, kind: str
) -> Table:
    """Build the table of all assignments of formats, with model size and measured cost."""
    rows = [replace(row, by=f"{row.by} (recommended)") if row is best else row for row in rows]
    title = f"{cell_label(record)}: {kind}."
    note = (
        f"Formats are chosen on {record.counted} documents. The 95 % intervals are not adjusted "
        "for multiple comparisons."
    )
    return figure_table(TestedChoice, title, rows, note, measure=metric_format(record))


@dataclass(frozen=True)
class FormatCount:
    """Table row: number of layers in which a linear map is rounded to a format."""

    name: str = labelled("weights")
    format: str = labelled("format")
    layers: int | None = labelled("layers", "count", "of no layer")


def _formats_table(record: CellRecord, best: TestedChoice) -> Table:
    """Build the table of recommended formats, with the number of layers for each map and format."""
    units = best.choice.items()
    counts = Counter((path or "layer", name) for unit, name in units for path in unit.paths)
    rows = [
        FormatCount(name, form, None if name in kinds.OUTER_MATRICES else n)
        for (name, form), n in sorted(counts.items())
    ]
    return figure_table(FormatCount, f"{cell_label(record)}: recommended formats.", rows)


@dataclass(frozen=True)
class SumRow:
    """Table row: cost of rounding several units together, and the sum of their single costs."""

    units: str = labelled("units rounded together")
    measured: float = labelled("measured loss", "nats")
    summed: float = labelled("sum of single losses", "nats")
    more: Estimate = labelled("more than the sum", "nats")


def _sums_table(record: CellRecord, sums: SumComparison) -> Table:
    """Build the table that compares joint rounding costs with sums of single costs."""
    rows = [SumRow(f"all {sums.units:,}", sums.whole, sums.expected, sums.more)]
    if (pairs := sums.pairs) is not None:
        single = float(np.mean([pairs.alone[i] + pairs.alone[j] for i, j in pairs.pairs]))
        label = f"two, the mean of {count_text(len(pairs.pairs), 'drawn pair')}"
        rows.append(SumRow(label, float(pairs.together.mean()), single, pairs.mean))
    title = (
        f"{cell_label(record)}: joint loss of rounded layers or linear maps, compared with the sum "
        "of their single losses, on calibration documents."
    )
    note = (
        f"The formats were chosen by {MEASURED_CHOICE}. The 95 % intervals reflect the sampling of "
        "documents, not of layers or linear maps. They are not adjusted for multiple comparisons."
    )
    return figure_table(SumRow, title, rows, note)

"""Which weights may have fewer bits within a budget, chosen by what they cost?

Calibration documents say what each linear map costs in each format, alone. The formats whose losses
add up to the least within the budget are one choice; choices by the errors of weights and outputs,
all maps alike, and the ends kept in more bits are others. Each is measured as a whole on the same
documents, which recommend one; test documents, which none of them met, say what each is worth.
"""

from __future__ import annotations

import re
import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import numpy as np

from tracker.core import kinds
from tracker.core.ablations import Rounded
from tracker.core.config import CellRequest
from tracker.core.errors import RequestError, did_you_mean
from tracker.core.estimates import Estimate
from tracker.core.formats import counted, ends, measure_of, three_digits, with_interval
from tracker.core.provenance import content_hash
from tracker.core.records import CellRecord
from tracker.core.tables import Column, Table, table
from tracker.core.weight_formats import FORMATS
from tracker.ledger.files import write_note
from tracker.ledger.paired import PairedOutcomes
from tracker.models.ends import shapes_of_ends
from tracker.models.load import hollow
from tracker.models.maps import maps_of
from tracker.models.placement import weight_bytes
from tracker.models.sources import find_model
from tracker.precision.asked import each_layer, each_map
from tracker.precision.budget import BitBudget, Choice, Unit, ablation_of, bits_of, budget, units_of
from tracker.precision.choose import ENDS, alike, ends_kept, least_loss
from tracker.precision.observed import errors_of
from tracker.pruning.search.cells import Lender, OpenCell
from tracker.pruning.search.request import calibration_of
from tracker.report.wording import listed
from tracker.stats.arrays import Array
from tracker.stats.support import together
from tracker.studies.base import (
    Study,
    StudyContext,
    StudyResult,
    Subject,
    lined_up,
    observe,
    refuse_removed,
    side,
)

By = Literal["map", "layer"]
DEFAULT = ("q3_k", "q4_k", "q6_k")
"""Formats where none is named: those that llama.cpp's own mixtures choose among."""
MEASURED, ALIKE = "measured log-probability", "all alike"
"""What the study is about, and what it is held against."""
_ASSUMED = (
    "What chooses and what tests are different documents. Losses are falls of the right answer's "
    "log-probability, added up over maps: that they add up is an assumption, and the sum stands "
    "beside what the whole choice was measured to cost.",
    "Bits are those of the linear maps of layers, scales with them{also}; {rest} stay as they are, "
    "and count in the size.",
    "Recommended is the choice that costs least on the calibration documents. Differences of two "
    "choices: paired test documents, 95 % intervals (accuracy: Bonett and Price 2012).",
)


class Candidate(NamedTuple):
    """One choice of formats: by what it was chosen, and what it is expected to cost, in nats."""

    by: str
    choice: Choice
    expected: float | None


@dataclass(frozen=True)
class Tried:
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


class Quantise(Study):
    """See the module.

    `budget` is how many bits there are (4.5bpw, 80 MB, 25 % bytes), `format` the formats that may
    be taken, `by` what gets one each (map or layer), `test_sample` how many test documents of each
    task (None = as many as choose), `embeddings` whether the embedding and the head get formats
    too.
    """

    name = "quantise"
    question = "Which weights may have fewer bits, and is the choice better than all alike?"

    def __init__(
        self,
        budget: str,
        format: str | Sequence[str] = DEFAULT,
        by: By = "map",
        test_sample: int | None = None,
        embeddings: bool = False,
    ) -> None:
        names = format.split(",") if isinstance(format, str) else format
        self.formats = tuple(dict.fromkeys(name.strip() for name in names))
        for name in self.formats:
            if name not in FORMATS:
                near = did_you_mean(name, FORMATS)
                raise RequestError(
                    f"there is no format {name!r}.{near} Known: {', '.join(FORMATS)}"
                )
        if len(self.formats) < 2:
            raise RequestError("--format: there is nothing to choose; name two formats or more")
        if by not in get_args(By):
            raise RequestError(f"--by is {' or '.join(get_args(By))}; not {by!r}")
        self.budget, self.by, self.test_sample = budget, by, test_sample
        self.embeddings = embeddings

    def requests(self, asked: StudyContext) -> list[CellRequest]:
        """Ask for each unit in each format on the calibration documents.

        RequestError where layers are removed, or the budget is none.
        """
        return [self._request(cell, asked) for cell in asked.experiment.cells()]

    def _request(self, cell: CellRequest, asked: StudyContext) -> CellRequest:
        refuse_removed(cell, "weights of the intact model are rounded", asked)
        trust = asked.options.trust_remote_code
        chosen = calibration_of(cell.model_copy(update={"maps": (), "until": None}))
        units, _ = self._budget(chosen, trust)
        ends = [unit.which for unit in units if unit.is_end]
        if self.by == "layer":
            return each_layer(chosen, self.formats, ends)
        return each_map(chosen, self.formats, trust, ends)

    def _budget(self, request: CellRequest, trust: bool) -> tuple[list[Unit], BitBudget]:
        """Find the units of a request's layers, and how many bits there are."""
        source = find_model(request.model, request.revision, request.model_args)
        model = hollow(source, request.dtype, trust)
        ends = shapes_of_ends(model) if self.embeddings else {}
        units = units_of(maps_of(source, trust), request.layers, self.by == "map", ends)
        whole, size = weight_bytes(model), int(model.dtype.itemsize)
        rest = whole - size * sum(unit.weights for unit in units)
        return units, budget(self.budget, units, rest, whole, self.formats)

    def say(self, asked: StudyContext, subjects: list[Subject]) -> StudyResult:
        """Choose, measure the choices, test them."""
        # Another budget, or other formats, are another question about the same file.
        told = f"--budget {shlex.quote(self.budget)} --format {','.join(self.formats)}"
        told += f" --by {self.by}" if self.by != "map" else ""
        told += " --embeddings" if self.embeddings else ""
        words = [self.budget, self.by, *(["embeddings"] if self.embeddings else []), *self.formats]
        beside = re.sub(r"[^\w.]+", "-", " ".join(words))
        also, rest = ", of the embedding and of the head", "norms and biases"
        if not self.embeddings:
            also, rest = "", f"embeddings, the head, {rest}"
        assumed = tuple(text.format(also=also, rest=rest) for text in _ASSUMED)
        result = StudyResult(assumed, command=f"tracker quantise {told}", beside=beside)
        for subject in subjects:
            units, within = self._budget(subject.request, asked.options.trust_remote_code)
            losses = _losses(subject.record, units, self.formats)
            if losses is None:
                result.lacking.append(
                    f"{subject.record.title}: some map has no defined loss, so that nothing adds up"
                )
                continue
            candidates = self._candidates(asked, subject, units, within, losses)
            tried = self._tried(asked, subject, candidates, within)
            best = min(tried, key=lambda one: one.chosen_on)
            result.answers += _answers(subject, tried, best, within)
            result.tables += [_choices_table(subject, tried, best), _formats_table(subject, best)]
            result.files.append(_keep(asked, subject, best))
        return result

    def _candidates(
        self,
        asked: StudyContext,
        subject: Subject,
        units: Sequence[Unit],
        within: BitBudget,
        losses: Array,
    ) -> list[Candidate]:
        def summed(choice: Choice) -> float:
            places = [self.formats.index(choice[unit]) for unit in units]
            return float(losses[np.arange(len(units)), places].sum())

        made = {MEASURED: least_loss(units, self.formats, losses, within)}
        if self.by == "map":
            for name, errors in _errors(asked, subject, units, self.formats).items():
                made[name] = least_loss(units, self.formats, errors, within)
        if kept := ends_kept(units, self.formats, within):
            made[f"first and last {ENDS} layers in more bits"] = kept
        made[ALIKE] = alike(units, self.formats, within)
        return [Candidate(name, choice, summed(choice)) for name, choice in made.items()]

    def _tried(
        self,
        asked: StudyContext,
        subject: Subject,
        candidates: Sequence[Candidate],
        within: BitBudget,
    ) -> list[Tried]:
        lender = Lender(asked.ledger, asked.options, asked.progress)
        request = subject.request
        sample = request.sample if self.test_sample is None else self.test_sample
        test = request.model_copy(update={"part": "test", "sample": sample})
        ablations = [ablation_of(each.choice) for each in candidates]
        chose, tests = (OpenCell(each, lender) for each in (request, test))
        asked.progress.say(f"{test.title}: {counted(len(ablations), 'choice')}, whole")
        on_calibration = chose.paired(ablations, "gold_logprob").mean_drops
        metric, gold = (tests.paired(ablations, by) for by in ("accuracy", "gold_logprob"))
        for cell in (chose, tests):
            cell.end()
        alike_at = [each.by for each in candidates].index(ALIKE)
        return [
            Tried(
                candidate=candidate,
                n=len(gold.weights),
                bits=bits_of(candidate.choice),
                size=within.bytes_of(bits_of(candidate.choice)),
                chosen_on=float(on_calibration[place]),
                gold=gold.drop(place),
                drop=metric.drop(place),
                level=metric.level(place),
                beside=None if place == alike_at else _apart(metric, place, alike_at),
                gold_beside=None if place == alike_at else _apart(gold, place, alike_at),
            )
            for place, candidate in enumerate(candidates)
        ]


def _losses(record: CellRecord, units: Sequence[Unit], formats: Sequence[str]) -> Array | None:
    """What each unit costs in each format, [units, formats] in nats; None where one is unknown."""
    found = {
        (run.layer, run.map or "", str(run.intervention)): run.gold_logprob_drop
        for run in record.runs
    }
    losses = [[found.get((unit.layer, unit.which, form)) for form in formats] for unit in units]
    if any(loss is None for row in losses for loss in row):
        return None
    return np.array(losses, dtype=np.float64)


def _errors(
    asked: StudyContext, subject: Subject, units: Sequence[Unit], formats: Sequence[str]
) -> dict[str, Array]:
    """Observe the errors of weights and outputs [units, formats], by what people call them."""
    maps = [Rounded(form, unit.layer, unit.which) for unit in units for form in formats]
    key = content_hash([each.name for each in maps])[:8]
    seen = observe(subject, f"rounding-{key}", asked, partial(errors_of, maps=maps))
    figures = lined_up(seen, subject.outcomes())
    shape = (len(units), len(formats))
    outputs = figures["output_error"].sum(axis=0) / figures["output_size"].sum(axis=0)
    return {
        "error of weights": figures["weight_error"][0].reshape(shape),
        "error of outputs": outputs.reshape(shape),
    }


def _apart(paired: PairedOutcomes, place: int, other: int) -> Estimate:
    """By how much the one keeps more than the other, of the same documents."""
    return PairedOutcomes(
        paired.ablated[:, place],
        paired.ablated[:, [other]],
        paired.weights,
        paired.higher_is_better,
    ).drop(0)


def _keep(asked: StudyContext, subject: Subject, best: Tried) -> Path:
    """Keep which map has which format in the results folder; say where."""
    record = subject.record
    stem = f"{record.model.name}-{record.benchmark.name}-{best.candidate.by}-{asked.asked.name}"
    chosen = {unit.place: form for unit, form in best.candidate.choice.items()}
    readable = re.sub(r"[^A-Za-z0-9_]+", "-", stem).strip("-")
    path = asked.ledger.root / "formats" / f"{readable}-{content_hash(chosen)[:8]}.json"
    request = subject.request
    loads = {"model": request.model, "revision": request.revision, "dtype": request.dtype}
    write_note(path, {**loads, "model_args": request.model_args, "formats": chosen})
    return path


def _written(record: CellRecord, figure: Estimate) -> str:
    measure = measure_of(record)
    if figure.value is None:
        return f"an undefined amount ({figure.reason})"
    text = f"{measure.write(figure.value)} {measure.unit}"
    return text + ends(figure.low, figure.high, measure.write)


def _answers(subject: Subject, tried: Sequence[Tried], best: Tried, within: BitBudget) -> list[str]:
    """Say whether the choice beats all alike, and what it costs; what does not hold first."""
    record = subject.record
    named = f"{record.model.name}, {record.benchmark.name}, {within.text}"
    alike_one = next(one for one in tried if one.beside is None)
    forms = dict.fromkeys(alike_one.candidate.choice.values())
    level = measure_of(record).level
    cost = f"{_written(record, best.drop)} of {level}"
    cost += f" and {with_interval(best.gold, three_digits, ' nats')} of the right answer's"
    cost += " log-probability on test documents"
    if best.beside is None or best.gold_beside is None:
        return [
            f"{named}: no choice cost less on the calibration documents than {', '.join(forms)} "
            f"everywhere, {best.bits:.3g} bits a weight, which costs {cost}."
        ]
    beside = f"{_written(record, best.beside)} more {level} and "
    beside += f"{with_interval(best.gold_beside, three_digits, ' nats')} more log-probability"
    # Two statements, which hold together.
    wide = together([best.beside, best.gold_beside], [best.n] * 2)
    sides = dict(zip((level, "log-probability"), map(side, wide), strict=True))
    clauses = [
        f"is shown to {does} {', '.join(forms)} everywhere ({alike_one.bits:.3g} bits) in "
        f"{listed(measures)}"
        for does, sign in (("beat", 1), ("lose to", -1))
        if (measures := [measure for measure, which in sides.items() if which == sign])
    ] or [f"is not shown to beat {', '.join(forms)} everywhere ({alike_one.bits:.3g} bits)"]
    text = (
        f"{named}: the choice by {best.candidate.by} ({best.bits:.3g} bits a weight) "
        f"{', and '.join(clauses)}: it keeps {beside}. It costs {cost}"
    )
    if best.candidate.expected is not None:
        text += (
            f"; on the calibration documents {three_digits(best.chosen_on)} nats, where the sum of "
            f"its maps' losses says {three_digits(best.candidate.expected)}"
        )
    return [f"{text}."]


def _choices_table(subject: Subject, tried: Sequence[Tried], best: Tried) -> Table:
    record = subject.record
    measure = measure_of(record)

    def by(row: Tried) -> str:
        return f"{row.candidate.by} (recommended)" if row is best else row.candidate.by

    columns: tuple[Column[Tried], ...] = (
        Column("chosen by", "text", by),
        Column("bits a weight", "proxy", lambda row: row.bits),
        Column("model (MB)", "proxy", lambda row: row.size / 1e6),
        Column("sum of losses where it was chosen", "nats", lambda row: row.candidate.expected),
        Column("loss of the whole there", "nats", lambda row: row.chosen_on),
        Column(f"{measure.level} on test documents", measure.level_form, lambda row: row.level),
        Column(measure.change, measure.form, lambda row: row.drop),
        Column("loss of gold log-probability", "nats", lambda row: row.gold),
        Column(
            f"{measure.level} kept beside {ALIKE}",
            measure.form,
            lambda row: row.beside or Estimate(None, reason="it is that itself"),
        ),
        Column(
            f"log-probability kept beside {ALIKE}",
            "nats",
            lambda row: row.gold_beside or Estimate(None, reason="it is that itself"),
        ),
    )
    return table(
        f"{record.model.name}, {record.benchmark.name}: choices within the budget.",
        columns,
        tried,
        f"Chosen on {record.counted} documents. 95 % intervals, each for itself.",
    )


def _formats_table(subject: Subject, best: Tried) -> Table:
    """Count in how many layers what is recommended gives a map which format."""
    record = subject.record
    counts = Counter((unit.which or "layer", form) for unit, form in best.candidate.choice.items())
    columns: tuple[Column[tuple[tuple[str, str], int]], ...] = (
        Column("what", "text", lambda row: row[0][0]),
        Column("format", "text", lambda row: row[0][1]),
        Column(
            *("layers", "count", lambda row: None if row[0][0] in kinds.ENDS else row[1]),
            otherwise="of no layer",
        ),
    )
    return table(
        f"{record.model.name}, {record.benchmark.name}: what is recommended.",
        columns,
        sorted(counts.items()),
    )

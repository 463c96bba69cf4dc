"""Which weights may have fewer bits within a budget, chosen by what they cost?

Calibration documents say what each linear map costs in each format, alone. The formats whose losses
add up to the least within the budget are one choice; what swaps make of it that are measured as a
whole is another, and choices by the errors of weights and outputs, all maps alike, and the ends
kept in more bits are others. Each is measured as a whole on the same documents, which recommend
one; test documents, which none of them met, say what each is worth.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, get_args

from tracker.core.config import CellRequest
from tracker.core.errors import RequestError, did_you_mean
from tracker.core.estimates import Estimate
from tracker.core.formats import counted, listed, measure_of, three_digits, with_interval
from tracker.core.provenance import content_hash
from tracker.core.records import CellRecord
from tracker.core.weight_formats import FORMATS
from tracker.ledger.files import write_note
from tracker.models.ends import shapes_of_ends
from tracker.models.load import hollow
from tracker.models.maps import maps_of
from tracker.models.placement import weight_bytes
from tracker.models.sources import find_model
from tracker.search.bit_budgets import BitBudget, Unit, budget, units_of
from tracker.search.cells import Lender, OpenCell
from tracker.search.format_requests import each_layer, each_map
from tracker.search.request import calibration_of
from tracker.stats.support import together
from tracker.studies.base import (
    Study,
    StudyContext,
    StudyResult,
    Subject,
    amount,
    refuse_removed,
    second_roundings,
    side,
)
from tracker.studies.quantise.figures import (
    MEASURED,
    Choosing,
    Chosen,
    Tried,
    least,
    losses_of,
    measured,
)
from tracker.studies.quantise.layout import choices_table, formats_table, sums_table
from tracker.studies.registry import PAIRS, REFINE

By = Literal["map", "layer"]
DEFAULT = ("q3_k", "q4_k", "q6_k")
"""Formats where none is named: those that llama.cpp's own mixtures choose among."""
_ASSUMED = (
    "What chooses and what tests are different documents. Losses are falls of the right answer's "
    "log-probability, added up over maps: that they add up is an assumption, which the whole "
    "choice and drawn pairs are held against.",
    "A swap gives one unit more bits and others fewer within the budget. The best swap of a round "
    "is kept where it is shown to cost less on the documents that choose, for all swaps of its "
    "round at once (95 %).",
    "Bits are those of the linear maps of layers, scales with them{also}; {rest} stay as they are, "
    "and count in the size.",
    "Recommended is the choice that costs least on the calibration documents. Differences of two "
    "choices: paired test documents, 95 % intervals (accuracy: Bonett and Price 2012).",
)


class Quantise(Study):
    """See the module.

    `budget` is how many bits there are (4.5bpw, 80 MB, 25 % bytes), `format` the formats that may
    be taken, `by` what gets one each (map or layer), `test_sample` how many test documents of each
    task (None = as many as choose), `embeddings` whether the embedding and the head get formats
    too, `refine` how many rounds of swaps at most, `pairs` how many pairs are drawn.
    """

    question = "Which weights may have fewer bits, and is the choice better than all alike?"

    def __init__(
        self,
        budget: str,
        format: str | Sequence[str] = DEFAULT,
        by: By = "map",
        test_sample: int | None = None,
        embeddings: bool = False,
        refine: int = REFINE,
        pairs: int = PAIRS,
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
        if refine < 0 or pairs < 0:
            raise RequestError("--refine and --pairs are 0 or more")
        self.budget, self.by, self.test_sample = budget, by, test_sample
        self.embeddings, self.refine, self.pairs = embeddings, refine, pairs

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
        told += f" --refine {self.refine}" if self.refine != REFINE else ""
        told += f" --pairs {self.pairs}" if self.pairs != PAIRS else ""
        words = [self.budget, self.by, *(["embeddings"] if self.embeddings else []), *self.formats]
        beside = re.sub(r"[^\w.]+", "-", " ".join(words))
        also, rest = ", of the embedding and of the head", "norms and biases"
        if not self.embeddings:
            also, rest = "", f"embeddings, the head, {rest}"
        assumed = tuple(text.format(also=also, rest=rest) for text in _ASSUMED)
        result = StudyResult(assumed, command=f"tracker quantise {told}", beside=beside)
        for subject in subjects:
            record = subject.record
            units, within = self._budget(subject.request, asked.options.trust_remote_code)
            losses = losses_of(record, units, self.formats)
            if losses is None:
                result.lacking.append(
                    f"{record.title}: some map has no defined loss, so that nothing adds up"
                )
                continue
            lender = Lender(asked.ledger, asked.options, asked.progress)
            chose = OpenCell(subject.request, lender)
            tests = OpenCell(self._test(subject.request), lender)
            choosing = Choosing(asked, subject, chose, units, self.formats, within, losses)
            found = choosing.chosen(self.by == "map", self.refine, self.pairs)
            tried = measured(found.candidates, chose, tests, within)
            for cell in (chose, tests):
                cell.end()
            tested = tests.store
            count = sum(tested.counts(tests.request.extent).values())
            view = tested.views.name_of(tests.view)
            result.rests_on.append((tested.identity.key, view, count))
            best = tried[least([one.chosen_on for one in tried])]
            named = f"{record.model.name}, {record.benchmark.name}, {within.text}"
            result.answers.append(f"{named}: {_answer(record, tried, best)}")
            result.answers += [f"{named}: {said}" for said in _of_sets(found)]
            result.tables += [
                choices_table(record, tried, best),
                sums_table(record, found.sums),
                formats_table(record, best),
            ]
            result.files.append(_keep(asked, record, tests.request, best))
        result.answers += second_roundings(subjects)
        return result

    def _test(self, request: CellRequest) -> CellRequest:
        sample = request.sample if self.test_sample is None else self.test_sample
        return request.model_copy(update={"part": "test", "sample": sample})


def _keep(asked: StudyContext, record: CellRecord, tests: CellRequest, best: Tried) -> Path:
    """Keep which map has which format in the results folder; say where."""
    stem = f"{record.model.name}-{record.benchmark.name}-{best.candidate.by}-{asked.asked.name}"
    chosen = {unit.place: form for unit, form in best.candidate.choice.items()}
    readable = re.sub(r"[^A-Za-z0-9_]+", "-", stem).strip("-")
    path = asked.ledger.root / "formats" / f"{readable}-{content_hash(chosen)[:8]}.json"
    write_note(path, {"tested_on": tests.model_dump(mode="json"), "formats": chosen})
    return path


def _answer(record: CellRecord, tried: Sequence[Tried], best: Tried) -> str:
    """Say whether the choice beats all alike, and what it costs; what does not hold first."""
    alike_one = next(one for one in tried if one.beside is None)
    forms = dict.fromkeys(alike_one.candidate.choice.values())
    measure = measure_of(record)
    cost = f"{amount(best.drop, measure)} of {measure.level}"
    cost += f" and {_nats(best.gold)} of the right answer's log-probability on test documents"
    if best.beside is None or best.gold_beside is None:
        return (
            f"no choice cost less on the calibration documents than {', '.join(forms)} "
            f"everywhere, {best.bits:.3g} bits a weight, which costs {cost}."
        )
    beside = f"{amount(best.beside, measure)} more {measure.level} and "
    beside += f"{_nats(best.gold_beside)} more log-probability"
    # Two statements, which hold together.
    wide = together([best.beside, best.gold_beside], [best.n] * 2)
    sides = dict(zip((measure.level, "log-probability"), map(side, wide), strict=True))
    clauses = [
        f"is shown to {does} {', '.join(forms)} everywhere ({alike_one.bits:.3g} bits) in "
        f"{listed(measures)}"
        for does, sign in (("beat", 1), ("lose to", -1))
        if (measures := [measure for measure, which in sides.items() if which == sign])
    ] or [f"is not shown to beat {', '.join(forms)} everywhere ({alike_one.bits:.3g} bits)"]
    return (
        f"the choice by {best.candidate.by} ({best.bits:.3g} bits a weight) "
        f"{', and '.join(clauses)}: it keeps {beside}. It costs {cost}."
    )


def _of_sets(found: Chosen) -> list[str]:
    """Say whether losses add up, and what measuring whole choices added."""
    sums, open_ = found.sums, "whether losses add up is open"
    text = (
        f"{'losses do not add up' if side(sums.more) else open_}: the choice by {MEASURED} costs "
        f"{three_digits(sums.whole)} nats on the calibration documents as a whole, and its "
        f"{counted(sums.units, 'unit')} alone {three_digits(sums.expected)} in sum (whole less sum "
        f"{_nats(sums.more)})"
    )
    if (pairs := sums.pairs) is not None:
        wide = [side(one) for one in pairs.at_once.values()]
        text += (
            f". Of {counted(len(pairs.pairs), 'drawn pair')} {wide.count(1)} are shown to cost "
            f"more than the sum of the two, and {wide.count(-1)} less; on average they cost "
            f"{_nats(pairs.mean)} more{'' if side(pairs.mean) else ', which is open'}"
        )
    said = [f"{text}."]
    for start, end in found.swapped.items():
        if end.tried:
            swaps = f"of {counted(end.tried, 'swap')} of formats, each measured as a whole beside"
            kept = "none is shown to cost less on the calibration documents"
            if end.gains:
                kept = f"{len(end.gains)} {'are' if len(end.gains) > 1 else 'is'} kept, shown to "
                kept += "cost less on the calibration documents: by "
                kept += listed([_nats(gain) for gain in end.gains])
            said.append(f"{swaps} the choice by {start}, {kept}.")
    return said


def _nats(figure: Estimate) -> str:
    return with_interval(figure, three_digits, " nats")

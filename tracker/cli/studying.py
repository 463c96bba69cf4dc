"""Commands that answer a question: one a study."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from tracker.cli.commands import main
from tracker.cli.options import Place, running
from tracker.cli.printing import print_end, print_finding
from tracker.cli.terminal import Show


@main.group()
def study() -> None:
    """Answer a question of the paper or of its reviewers over an experiment file.

    A study measures just what its answer lacks, through the ledger and the tracking backends as
    'tracker run' does, prints the answer, and adds a section to the report.

    \b
    Examples:
      tracker study audit experiments/demo.yaml
      tracker study snowball experiments/demo.yaml
    """


def _study(name: str, help_text: str, *options: Callable[[Any], Any]) -> None:
    """Register the command of a study, with the options that it alone has."""

    def command(
        experiment: Path,
        results: Path,
        track: tuple[str, ...] | None,
        device: str,
        memory: int | None,
        publish_documents: bool,
        trust_remote_code: bool,
        **settings: Any,
    ) -> None:
        from tracker import api

        done = api.study(
            name,
            experiment,
            results=results,
            track=track,
            device=device,
            memory=memory,
            trust_remote_code=trust_remote_code,
            publish_documents=publish_documents,
            progress=Show(),
            **settings,
        )
        print_finding(done.finding)
        print_end(done.outcome, done.report)
        sys.exit(done.outcome.exit_code)

    command.__doc__ = help_text
    wrapped = running(command)
    for option in reversed(options):
        wrapped = option(wrapped)
    study.command(name)(click.argument("experiment", type=Place())(wrapped))


_study(
    "snowball",
    """Follow what a layer's removal changes through all later layers.

    Each layer is removed, and perturbed by as much in random directions; the relative difference
    to the intact residual stream behind each later layer says whether it grows. The file's
    'layer' should hold every layer: their accuracy drops are set beside the growth.

    \b
    Examples:
      tracker study snowball experiments/demo.yaml
      tracker study snowball experiments/demo.yaml --draws 8
    """,
    click.option(
        "--draws",
        type=click.IntRange(1, 1000),
        default=2,
        show_default=True,
        help="Random directions for each layer and token; each costs as much as all removals.",
    ),
)

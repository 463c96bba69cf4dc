"""Commands that answer a question: one a study, made of what the study says of itself."""

from __future__ import annotations

import sys
from inspect import cleandoc
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tracker.cli.commands import main
from tracker.cli.options import Place, running
from tracker.cli.printing import print_end, print_finding
from tracker.cli.terminal import Show, begin
from tracker.studies.registry import STUDIES, study_class

if TYPE_CHECKING:
    from tracker.studies.base import StudySetting


class _Studies(click.Group):
    """Loads a study when its command is typed, so that all others start without it."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*STUDIES]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        return _command(cmd_name) if cmd_name in STUDIES else None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([*STUDIES.items()])


@main.group(cls=_Studies)
def study() -> None:
    """Answer a question of the paper or of its reviewers over an experiment file.

    Each command below is one question, asked of all models and benchmarks in EXPERIMENT, a file
    such as 'tracker run' takes. A study measures just what its answer lacks, as 'tracker run' does:
    what the results folder holds already is not measured again, and the rest is tracked. It prints
    its answer, and adds tables and charts to the report in the results folder.

    \b
    Examples:
      tracker study audit experiments/demo.yaml
      tracker study theorem experiments/demo.yaml --epsilon 1e-8
      tracker study snowball experiments/demo.yaml --draws 8
      tracker study joint experiments/demo.yaml --track none
      tracker study rescale experiments/replaced.yaml
      tracker study calibration experiments/demo.yaml --reliability 0.8
      tracker study savings experiments/demo.yaml --question "top 5 within 1 pp"
      tracker study prune experiments/study.yaml --remove "25 %" --text c4.txt
    """


def _command(name: str) -> click.Command:
    """Make the command of a study, with the options that it alone has."""

    def command(experiment: Path, **settings: Any) -> None:
        begin()
        from tracker import api

        done = api.study(name, experiment, progress=Show(), **settings)
        print_finding(done.finding)
        print_end(done.outcome, done.report)
        sys.exit(done.outcome.exit_code)

    chosen = study_class(name)
    command.__doc__ = f"{STUDIES[name]}\n\n{cleandoc(chosen.about)}"
    wrapped = running(command)
    for setting in reversed(chosen.settings):
        wrapped = _option(setting)(wrapped)
    return click.command(name)(click.argument("experiment", type=Place())(wrapped))


def _option(setting: StudySetting) -> Any:
    """Make the option of a setting."""
    kind: Any = {int: int, float: float, str: str, Path: Place()}[setting.kind]
    if (setting.least, setting.most) != (None, None):
        kind = click.IntRange(setting.least, setting.most)
    dashed = setting.name.replace("_", "-")
    flags = (setting.flag,) if setting.flag else dict.fromkeys((f"--{setting.name}", f"--{dashed}"))
    return click.option(
        *flags,
        setting.name,
        type=kind,
        multiple=setting.repeated,
        default=setting.default,
        show_default=setting.default is not None,
        help=setting.help,
    )

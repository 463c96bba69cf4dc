"""Print the help of commands with options in groups, the most common options first."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from copy import copy
from itertools import chain

import click

from tracker.schema.config import BenchmarkSpec, DocumentSpec, ModelSpec

MAX_CHOICES = 8
"""An option with more choices lists them in its help instead of its usage."""
COMMON = "Common options"
OPTION_GROUPS: Mapping[str, Iterable[str]] = {
    COMMON: ("benchmark", "sample", "layer", "results", "track"),
    "Model": (*ModelSpec.model_fields, "removed", "trust_remote_code"),
    "Benchmark": (*BenchmarkSpec.model_fields, "metric"),
    "Changes": [
        *("component", "head", "expert", "neuron", "map"),
        *("span", "intervention", "repeats", "control"),
    ],
    "Documents": (*DocumentSpec.model_fields, "until", "cluster", "observe"),
    "Execution": [
        *("executor", "slurm", "device", "memory", "weights", "offload"),
        *("workers", "devices_per_worker"),
    ],
    "Tracking": ("project", "runs", "publish", "publish_documents"),
    "Other options": ("set", "help"),
}
"""Title of a group → its options, as in Python; those of no group are the command's own."""
COMMAND_GROUPS: Mapping[str, Iterable[str]] = {
    "Measure": ("init", "validate", "plan", "run", "evaluate"),
    "Results": (
        *("ls", "report", "leaderboard", "profile", "compare"),
        *("sync", "log-samples", "check"),
    ),
    "Questions and models": ("study", "prune", "quantise", "export"),
    "This machine": ("doctor", "bench"),
}


class DashedOption(click.Option):
    """Option with a short usage line in the help."""

    def get_help_record(self, ctx: click.Context) -> tuple[str, str] | None:
        """Return the option's usage (e.g. `--sample N`) and its help text."""
        shown = copy(self)
        shown.opts = [name for name in self.opts if "_" not in name] or self.opts
        if isinstance(self.type, click.IntRange):
            shown.metavar = "N"
        elif isinstance(self.type, click.Choice) and len(self.type.choices) > MAX_CHOICES:
            shown.metavar = str(self.name).upper()
            shown.help = f"{self.help} Choices: {', '.join(self.type.choices)}."
        return super(DashedOption, shown).get_help_record(ctx)


class GroupedCommand(click.Command):
    """Command whose help lists the options in groups."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the command's options to the help, group by group."""
        records = {
            parameter.opts[-1].lstrip("-").replace("-", "_"): record
            for parameter in self.get_params(ctx)
            if isinstance(parameter, click.Option) and (record := parameter.get_help_record(ctx))
        }
        groups = {
            title: [records.pop(name) for name in names if name in records]
            for title, names in OPTION_GROUPS.items()
        }
        own_options = {f"Options of {ctx.info_name}": [*records.values()]}
        common = {COMMON: groups.pop(COMMON)}
        for title, rows in chain(common.items(), own_options.items(), groups.items()):
            if rows:
                with formatter.section(title):
                    formatter.write_dl(rows)


class GroupedCommands(click.Group):
    """Command group whose help lists the subcommands in thematic groups."""

    command_class = GroupedCommand

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the subcommands to the help, group by group."""
        width = max(map(len, self.commands))
        for title, names in COMMAND_GROUPS.items():
            rows = [
                (name.ljust(width), self.commands[name].get_short_help_str(formatter.width))
                for name in names
            ]
            with formatter.section(title):
                formatter.write_dl(rows)

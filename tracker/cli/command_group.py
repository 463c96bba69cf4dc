"""Define the group of commands, which shows help in sections and errors with exit codes."""

from __future__ import annotations

import gc
import os
import sys
import tempfile
import traceback
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from itertools import chain
from typing import Any

import click

from tracker.cli.terminal import echo
from tracker.schema.config import BenchmarkSpec, DocumentSpec, ModelSpec
from tracker.schema.distribution import REPOSITORY, UNSUPPORTED_SYSTEM, __version__
from tracker.schema.errors import TrackerError, first_line
from tracker.schema.text import is_writable, mask_secrets

ISSUES_URL = f"{REPOSITORY}/issues"
COLLECTION_THRESHOLD = 10_000
"""Number of new objects after which Python collects garbage. A pass of the engine leaves none."""
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
        """Return the option's usage, such as `--sample N`, and its help text."""
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


class ErrorBoundary(GroupedCommands):
    """Command group that converts all errors to messages and exit codes.

    Errors of tracker and of the system (e.g. a full disk) are printed as one message. All other
    errors are reported as internal errors, and their tracebacks are saved in files.
    """

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse arguments; raise UsageError if an argument cannot be written to files as UTF-8."""
        for word in args:
            if not is_writable(word):
                raise click.UsageError(f"{word!r} is no UTF-8 text", ctx)
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; print any error as a message, and exit with the error's code."""
        if sys.platform == "win32":
            raise click.UsageError(UNSUPPORTED_SYSTEM, ctx)
        try:
            with _infrequent_garbage_collection():
                return super().invoke(ctx)
        except (click.exceptions.Exit, click.ClickException, click.Abort, BrokenPipeError):
            raise
        except KeyboardInterrupt:
            echo("tracker: stopped; type the same command to continue", error=True)
            ctx.exit(130)
        except Exception as error:  # an internal error becomes a message, with a file to send
            if ctx.params.get("debug"):
                raise
            if isinstance(error, TrackerError):
                echo(f"tracker: {error}", error=True)
                ctx.exit(error.exit_code)
            if isinstance(error, OSError) and error.strerror:
                location = f"{error.filename}: " if error.filename is not None else ""
                echo(f"tracker: {location}{error.strerror}", error=True)
                ctx.exit(1)
            report_bug(error)
            ctx.exit(1)


@contextmanager
def _infrequent_garbage_collection() -> Iterator[None]:
    """Make Python's garbage collector run less often until the context exits."""
    old_threshold = gc.get_threshold()
    gc.set_threshold(COLLECTION_THRESHOLD, *old_threshold[1:])
    try:
        yield
    finally:
        gc.set_threshold(*old_threshold)


def report_bug(error: Exception) -> None:
    """Print two lines about an internal error, and save the traceback in a temporary file."""
    description = f"{type(error).__name__}: {first_line(error)}"
    echo(f"tracker: internal error, please report it: {description}", error=True)
    with tempfile.NamedTemporaryFile(
        "w", prefix="tracker-bug-", suffix=".txt", delete=False, encoding="utf-8", errors="replace"
    ) as file:
        file.write(f"tracker {__version__}, Python {sys.version}, {os.name}\n")
        file.write(mask_secrets(f"{' '.join(sys.argv)}\n{traceback.format_exc()}"))
    echo(f"all measurements are kept; please send {file.name} to {ISSUES_URL}", error=True)

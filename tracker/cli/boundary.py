"""Convert every error of a command to a message and an exit code."""

from __future__ import annotations

import gc
import os
import sys
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click

from tracker.cli.help import GroupedCommands
from tracker.cli.terminal import echo
from tracker.schema.distribution import REPOSITORY, UNSUPPORTED_SYSTEM, __version__
from tracker.schema.errors import TrackerError, first_line
from tracker.schema.text import is_writable, mask_secrets

ISSUES_URL = f"{REPOSITORY}/issues"
COLLECTION_THRESHOLD = 10_000
"""Number of new objects after which Python collects garbage. A pass of the engine leaves none."""


class ErrorBoundary(GroupedCommands):
    """Command group that converts all errors to messages and exit codes.

    Errors of tracker and of the system (e.g. a full disk) are printed as one message. Any other
    error is reported as an internal error, and the traceback is saved in a file.
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
            with _infrequent_collection():
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
def _infrequent_collection() -> Iterator[None]:
    """Collect garbage less often in a `with` block."""
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

"""The boundary between tracker and the person at the terminal: every error ends here, in words."""

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
from tracker.cli.terminal import say
from tracker.core.distribution import REPOSITORY, UNSUPPORTED, __version__
from tracker.core.errors import TrackerError, first_line
from tracker.core.text import is_writable, masked

ISSUES = f"{REPOSITORY}/issues"
NEW_OBJECTS = 10_000
"""From how many on Python looks for garbage. A pass of the engine leaves none."""


class Boundary(GroupedCommands):
    """Turns whatever is raised into a message and an exit code.

    Errors of tracker say themselves what to do. What the system refuses (a full disk, a folder
    that may not be read) is its own message. All else is a bug of tracker, and is called so.
    """

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Refuse what no file, no hash and no tracker can hold, wherever it is typed."""
        for word in args:
            if not is_writable(word):
                raise click.UsageError(f"{word!r} is no UTF-8 text", ctx)
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command."""
        if sys.platform == "win32":
            raise click.UsageError(UNSUPPORTED, ctx)
        try:
            with _garbage_sought_rarely():
                return super().invoke(ctx)
        except (click.exceptions.Exit, click.ClickException, click.Abort, BrokenPipeError):
            raise
        except KeyboardInterrupt:
            say("tracker: stopped; type the same command to continue", error=True)
            ctx.exit(130)
        except Exception as error:  # a bug becomes a message, with a file to send
            if ctx.params.get("debug"):
                raise
            if isinstance(error, TrackerError):
                say(f"tracker: {error}", error=True)
                ctx.exit(error.exit_code)
            if isinstance(error, OSError) and error.strerror:
                what = f"{error.filename}: " if error.filename is not None else ""
                say(f"tracker: {what}{error.strerror}", error=True)
                ctx.exit(1)
            report_bug(error)
            ctx.exit(1)


@contextmanager
def _garbage_sought_rarely() -> Iterator[None]:
    """Start faster: what is imported stays, and Python looks through all of it again and again."""
    before = gc.get_threshold()
    gc.set_threshold(NEW_OBJECTS, *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)


def report_bug(error: Exception) -> None:
    """Report an internal error in two lines, and save its traceback."""
    what = f"{type(error).__name__}: {first_line(error)}"
    say(f"tracker: this is a bug of tracker's: {what}", error=True)
    with tempfile.NamedTemporaryFile(
        "w", prefix="tracker-bug-", suffix=".txt", delete=False, encoding="utf-8", errors="replace"
    ) as file:
        file.write(f"tracker {__version__}, Python {sys.version}, {os.name}\n")
        file.write(masked(f"{' '.join(sys.argv)}\n{traceback.format_exc()}"))
    say(f"what was measured is kept; please send {file.name} to {ISSUES}", error=True)

"""Output to the terminal: lines, tables and bars, without passwords and control characters.

Everything that tracker prints goes through `say`, `table` or `Show`.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from threading import Timer
from typing import TYPE_CHECKING

import click

from tracker.core.tables import Table, headed, written
from tracker.core.text import harmless, masked
from tracker.measuring.progress import Progress

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as Bar

LONG = 2.0
"""Seconds after which a terminal shows what is being done."""
FIRST, EVERY = 15, 300
"""Seconds to the first line about some work, and between two, where no terminal shows its bar."""
LOUD = (
    *("accelerate", "lm_eval", "lm-eval", "datasets", "transformers"),
    *("alembic", "mlflow", "urllib3", "httpx"),
)
"""Libraries that log what a user does not need."""


def shown(text: object) -> str:
    """Make anything fit to be printed."""
    return masked(harmless(str(text)))


def say(text: object = "", error: bool = False) -> None:
    """Print a line, to the standard error if it is an `error`."""
    click.echo(shown(text), err=error)


def say_all(*lines: str, error: bool = False) -> None:
    """Print lines, but for empty ones."""
    for line in filter(None, lines):
        say(line, error)


def begin() -> None:
    """Announce the first step of a command, whose imports take seconds."""
    say("reading models and benchmarks", error=True)


def print_table(made: Table) -> None:
    """Print a table, without its notes; figures never wrap and stand at the right."""
    from rich.table import Table as Printed
    from rich.text import Text

    printed = Printed(
        title=Text(shown(made.title), style="bold") if made.title else None,
        title_justify="left",
        box=None,
        pad_edge=False,
        header_style="bold",
    )
    lines = [
        [Text(shown(written(e, h).text)) for e, h in zip(row, made.headings, strict=True)]
        for row in made.rows
    ]
    for place, heading in enumerate(made.headings):
        number = heading.unit != "text"
        widest = max((line[place].cell_len for line in lines), default=0)
        printed.add_column(
            Text(shown(headed(heading))),
            justify="right" if number else "left",
            min_width=widest * number,
            overflow="fold",
        )
    for line in lines:
        printed.add_row(*line)
    console().print(printed)


class Show(Progress):
    """Shows a run: a bar with the remaining time, and lines above it.

    What is written into a file, as a job's log is, gets the bar as a line now and then.
    """

    def __init__(self, error: bool = False) -> None:
        self._console = console(error)
        self._bar: Bar | None = None
        self._due = 0.0

    def say(self, message: str) -> None:
        """Print a line."""
        self._console.print(shown(message), style="dim", markup=False, highlight=False)

    def start(self, title: str, total: int, unit: str = "responses") -> None:
        """Open the bar of some work."""
        from rich import progress as parts

        self._bar = parts.Progress(
            parts.TextColumn("{task.description}", markup=False),
            parts.BarColumn(),
            parts.MofNCompleteColumn(),
            parts.TextColumn(f"{unit} ·"),
            parts.TimeElapsedColumn(),
            parts.TextColumn("· left"),
            parts.TimeRemainingColumn(compact=True),
            console=self._console,
            speed_estimate_period=600,
        )
        self._bar.add_task(shown(title), total=total)
        self._bar.start()
        self._due = time.monotonic() + FIRST

    def expect(self, more: int) -> None:
        """Change the total of the bar."""
        if self._bar is not None:
            (task,) = self._bar.tasks
            self._bar.update(task.id, total=(task.total or 0) + more)

    def advance(self, responses: int) -> None:
        """Move the bar."""
        if self._bar is not None:
            self._bar.advance(self._bar.task_ids[0], responses)
            if not self._console.is_terminal and time.monotonic() >= self._due:
                self._console.print(self._bar.get_renderable())
                self._due = time.monotonic() + EVERY

    def finish(self) -> None:
        """Close the bar."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


class StatusLine(Show):
    """Shows on a terminal what has been done for two seconds and longer, until it ends."""

    def __init__(self) -> None:
        super().__init__()
        self._status = console(error=True).status("reading models and benchmarks")
        self._timer = Timer(LONG, self._status.start)

    def __enter__(self) -> StatusLine:
        if sys.stderr.isatty():
            self._timer.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()
        if self._timer.ident:
            self._timer.join()
        self._status.stop()

    def step(self, message: str) -> None:
        """Show it in the place of what was done before."""
        from rich.text import Text

        self._status.update(Text(shown(message)))


def console(error: bool = False) -> Console:
    """Make the console that bars and tables are drawn on."""
    from rich.console import Console

    found = Console(stderr=error, soft_wrap=True)
    if not found.is_terminal:
        found.width = 1000  # a file has no edge to wrap at; tables stay whole
    return found


def quiet(debug: bool) -> None:
    """Silence the bars and notes of libraries, unless debugging."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE") and not debug:
        # Nothing can be downloaded, so no bar of a library shows what a user waits for.
        os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    for library in ("TRANSFORMERS", "DATASETS", "HF_HUB"):
        os.environ.setdefault(f"{library}_VERBOSITY", "warning" if debug else "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[_Lines()])
    logging.getLogger("tracker").setLevel(logging.DEBUG if debug else logging.INFO)
    for name in LOUD:
        logging.getLogger(name).setLevel(logging.INFO if debug else logging.ERROR)
    # What draws png and pdf logs a traceback for every message of the browser that it ignores.
    logging.getLogger("choreographer").setLevel(logging.INFO if debug else logging.CRITICAL)


class _Lines(logging.Handler):
    """Prints what is logged, above whatever is shown at the time."""

    def emit(self, record: logging.LogRecord) -> None:
        say(self.format(record), error=True)

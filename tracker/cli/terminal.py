"""Print lines, tables and progress bars without passwords and control characters.

All output of tracker is printed by `echo`, `print_table` or `ProgressDisplay`.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from threading import Timer
from typing import TYPE_CHECKING

import click

from tracker.measuring.progress import Progress
from tracker.schema.tables import Table, entry_text, heading_text
from tracker.schema.text import mask_secrets, replace_controls
from tracker.schema.text_templates import TextTemplate

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as Bar

STATUS_DELAY = 2.0
"""Seconds after which a terminal shows the current step."""
FIRST_LINE_DELAY, LINE_INTERVAL = 15, 300
"""Seconds to the first line about some work, and between two, if no terminal shows its bar."""
NOISY_LIBRARIES = (
    *("accelerate", "lm_eval", "lm-eval", "datasets", "transformers"),
    *("alembic", "mlflow", "urllib3", "httpx"),
)
"""Libraries whose messages users do not need."""
TEXTS = TextTemplate("tracker.cli", "terminal")
"""Template of sentences that commands print."""


def printable(text: object) -> str:
    """Convert a value to text; mask passwords and replace control characters."""
    return mask_secrets(replace_controls(str(text)))


def echo(text: object = "", error: bool = False) -> None:
    """Print a line to standard output, or to standard error if `error` is set."""
    click.echo(printable(text), err=error)


def echo_all(*lines: str, error: bool = False) -> None:
    """Print all lines that are not empty."""
    for line in filter(None, lines):
        echo(line, error)


def announce_start() -> None:
    """Print that a command has started, because its imports take seconds."""
    echo("reading models and benchmarks", error=True)


def print_table(table: Table) -> None:
    """Print a table without its notes; align numbers to the right and never wrap them."""
    from rich.table import Table as Printed
    from rich.text import Text

    rich_table = Printed(
        title=Text(printable(table.title), style="bold") if table.title else None,
        title_justify="left",
        box=None,
        pad_edge=False,
        header_style="bold",
    )
    lines = [
        [Text(printable(entry_text(e, h).text)) for e, h in zip(row, table.headings, strict=True)]
        for row in table.rows
    ]
    for column, heading in enumerate(table.headings):
        is_number = heading.unit != "text"
        # A minimum as wide as the widest entry keeps figures on one line.
        max_width = max((line[column].cell_len for line in lines), default=0)
        rich_table.add_column(
            Text(printable(heading_text(heading))),
            justify="right" if is_number else "left",
            min_width=max_width * is_number,
            overflow="fold",
        )
    for line in lines:
        rich_table.add_row(*line)
    make_console().print(rich_table)


class ProgressDisplay(Progress):
    """Progress bar that shows the remaining time, with messages printed above the bar.

    If the output is not a terminal (e.g. a job's log file), the bar is printed as a line every few
    minutes.
    """

    def __init__(self, error: bool = False) -> None:
        self._console = make_console(error)
        self._bar: Bar | None = None
        self._due = 0.0

    def say(self, message: str) -> None:
        """Print a message above the progress bar."""
        self._console.print(printable(message), style="dim", markup=False, highlight=False)

    def start(self, title: str, total: int, unit: str = "responses") -> None:
        """Show a progress bar for `total` units of work."""
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
        self._bar.add_task(printable(title), total=total)
        self._bar.start()
        self._due = time.monotonic() + FIRST_LINE_DELAY

    def expect(self, more: int) -> None:
        """Increase the total amount of work of the progress bar by `more` units."""
        if self._bar is not None:
            (task,) = self._bar.tasks
            self._bar.update(task.id, total=(task.total or 0) + more)

    def advance(self, responses: int) -> None:
        """Advance the progress bar by a number of finished units (e.g. responses)."""
        if self._bar is not None:
            self._bar.advance(self._bar.task_ids[0], responses)
            if not self._console.is_terminal and time.monotonic() >= self._due:
                self._console.print(self._bar.get_renderable())
                self._due = time.monotonic() + LINE_INTERVAL

    def finish(self) -> None:
        """Stop the progress bar."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


class StatusLine(ProgressDisplay):
    """Status line with the current step of a command; it is shown after two seconds."""

    def __init__(self) -> None:
        super().__init__()
        self._status = make_console(error=True).status("reading models and benchmarks")
        self._timer = Timer(STATUS_DELAY, self._status.start)

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
        """Replace the text of the status line by `message`."""
        from rich.text import Text

        self._status.update(Text(printable(message)))


def make_console(error: bool = False) -> Console:
    """Create the rich console that prints progress bars and tables."""
    from rich.console import Console

    new_console = Console(stderr=error, soft_wrap=True)
    if not new_console.is_terminal:
        new_console.width = 1000  # a file has no edge to wrap at; tables stay whole
    return new_console


def silence_libraries(debug: bool) -> None:
    """Hide progress bars of libraries, and their messages unless `debug` is set."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE") and not debug:
        # Nothing can be downloaded, so no bar of a library shows what a user waits for.
        os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    for library in ("TRANSFORMERS", "DATASETS", "HF_HUB"):
        os.environ.setdefault(f"{library}_VERBOSITY", "warning" if debug else "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[_EchoHandler()])
    logging.getLogger("tracker").setLevel(logging.DEBUG if debug else logging.INFO)
    for name in NOISY_LIBRARIES:
        logging.getLogger(name).setLevel(logging.INFO if debug else logging.ERROR)
    # The renderer of png and pdf logs a traceback for every browser message that it ignores.
    logging.getLogger("choreographer").setLevel(logging.INFO if debug else logging.CRITICAL)


class _EchoHandler(logging.Handler):
    """Handler that prints log messages above the progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        echo(self.format(record), error=True)

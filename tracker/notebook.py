"""A progress bar where a notebook runs."""

from __future__ import annotations

import sys
import warnings
from typing import Any

from tracker.measuring.progress import Progress, Silent


def default_progress() -> Progress:
    """Listen with a bar in a notebook, and not at all elsewhere."""
    # What was not imported does not run; importing it takes half a second.
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return Bar() if getattr(shell, "kernel", None) is not None else Silent()


class Bar:
    """Shows a run below a notebook's code: a bar, and lines above it."""

    def __init__(self) -> None:
        self._bar: Any = None

    def say(self, message: str) -> None:
        """Print a line."""
        print(message)  # noqa: T201

    def start(self, title: str, total: int, unit: str = "responses") -> None:
        """Open the bar of some work."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it is plain text without ipywidgets
            from tqdm.auto import tqdm
        self._bar = tqdm(total=total, desc=title, unit=f" {unit}", disable=False)

    def expect(self, more: int) -> None:
        """Let the bar be longer, or shorter."""
        if self._bar is not None:
            self._bar.total += more
            self._bar.refresh()

    def advance(self, responses: int) -> None:
        """Move the bar."""
        if self._bar is not None:
            self._bar.update(responses)

    def finish(self) -> None:
        """Close the bar."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

"""The command line: parse, call, print. Exit codes: 0 done, 1 some work failed, 2 wrong request."""

from tracker.cli import pruning, quantising, studying, viewing  # noqa: F401  they register their commands
from tracker.cli.commands import main

__all__ = ["main"]

"""The command line: parse, call, print. Exit codes: 0 done, 1 some work failed, 2 wrong request."""

from tracker.cli import pruning as _pruning  # noqa: F401  registers its commands
from tracker.cli import searching as _searching  # noqa: F401  likewise
from tracker.cli import studying as _studying  # noqa: F401  likewise
from tracker.cli import viewing as _viewing  # noqa: F401  likewise
from tracker.cli.commands import main

__all__ = ["main"]

"""Parse the command line, call the API and print its results.

The exit code is 0 if all work is done, 1 if some work failed, and 2 if the request is invalid.

Modules:
    command_group: Define the group of commands, its help and its error messages.
    commands: Define `main` and the commands that measure, plan or check.
    options: Define the options that commands share, and their types.
    printing: Print records, plans and leaderboards.
    studying: Define the commands study, quantise, prune and export.
    terminal: Print lines, tables and progress bars to the terminal.
    viewing: Define the commands on stored results: report, leaderboard, compare, sync, ls, check.
"""

from tracker.cli import studying, viewing  # noqa: F401  they register their commands
from tracker.cli.commands import main

__all__ = ["main"]

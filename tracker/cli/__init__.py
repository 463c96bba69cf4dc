"""Parse the command line, call the API and print its results.

The exit code is 0 if all work is done, 1 if some work failed, and 2 if the request is invalid.

Modules:
    boundary: Turn every error into a message and an exit code.
    commands: Define `main` and the commands that measure, plan or check.
    comparing: Define the command compare.
    help: Print the help of commands, with options in groups.
    options: Define the options that commands share, and their types.
    printing: Print records, plans and leaderboards.
    pruning: Define the commands prune and export.
    studying: Define the commands study, with a subcommand for each study, and quantise.
    terminal: Print lines, tables and progress bars to the terminal.
    viewing: Define the commands on stored results: report, leaderboard, sync, ls, check.
"""

from tracker.cli import comparing, pruning, studying, viewing  # noqa: F401  they register their commands
from tracker.cli.commands import main

__all__ = ["main"]

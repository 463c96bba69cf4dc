"""`make fuzz`: minutes of everything, and a table; exit code 1 on any find."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

from tests.conftest import TRACKER, save_llama
from tests.tools.fuzz import folders, tried

SEED = 20261125
COUNTS = {"experiments": 7500, "command_lines": 2000, "configurations": 500}
FLIPS, FILES, KILLS = 500, 100, 100
MANY_HANDS = {"months": 24, "at_once": 12, "caches": 40, "users": 60}


def main() -> int:
    """Try everything, and print the table, a row a topic."""
    found_any = False
    header = "".join(f"{name:>20}" for name in tried.OUTCOMES)
    sys.stdout.write(f"{'':20}{'tries':>8}{header}\n")

    def add(*topics: tried.Tried) -> None:
        """Print the row of each topic and what it found, so that nothing is lost by a Ctrl-C."""
        nonlocal found_any
        for one in topics:
            found_any = found_any or bool(one.finds)
            counts = "".join(f"{one.counts[name]:20}" for name in tried.OUTCOMES)
            row = f"{one.what:20}{one.counts.total():8}{counts}"
            sys.stdout.write("\n\n".join([row, *one.finds]) + "\n")
            sys.stdout.flush()

    with tempfile.TemporaryDirectory(prefix="fuzz") as name:
        room = Path(name)
        os.environ["TRACKER_CACHE"] = str(room / "cache")
        model = save_llama(room / "tiny")
        add(*tried.ledgers(FLIPS, FILES, SEED, room))
        for kind, count in COUNTS.items():
            add(getattr(tried, kind)(model, count, SEED, room))
        for kind, count in MANY_HANDS.items():
            add(getattr(folders, kind)(model, count, SEED, room))
        add(folders.kills(model, [str(TRACKER)], KILLS, SEED, room))
    return int(found_any)


if __name__ == "__main__":
    sys.exit(main())

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

    def print_topics(*topics: tried.FuzzTrial) -> None:
        """Print the row of each topic and what it found, so that nothing is lost by a Ctrl-C."""
        nonlocal found_any
        for topic in topics:
            found_any = found_any or bool(topic.finds)
            counts = "".join(f"{topic.counts[name]:20}" for name in tried.OUTCOMES)
            row = f"{topic.topic:20}{topic.counts.total():8}{counts}"
            sys.stdout.write("\n\n".join([row, *topic.finds]) + "\n")
            sys.stdout.flush()

    with tempfile.TemporaryDirectory(prefix="fuzz") as name:
        scratch = Path(name)
        os.environ["TRACKER_CACHE"] = str(scratch / "cache")
        model = save_llama(scratch / "tiny")
        print_topics(*tried.try_ledgers(FLIPS, FILES, SEED, scratch))
        for kind, count in COUNTS.items():
            print_topics(getattr(tried, kind)(model, count, SEED, scratch))
        for kind, count in MANY_HANDS.items():
            print_topics(getattr(folders, kind)(model, count, SEED, scratch))
        print_topics(folders.try_kills(model, [str(TRACKER)], KILLS, SEED, scratch))
    return int(found_any)


if __name__ == "__main__":
    sys.exit(main())

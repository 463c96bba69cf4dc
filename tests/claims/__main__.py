"""How often something is named that is not there: `make claims`, the table of docs/statistics.md.

Each results folder is made of outcomes of which it is known which layers matter: none, or three.
Everything that is said of it is read, and every layer that a sentence names is looked up.
"""

from __future__ import annotations

import sys
import tempfile
from collections import Counter
from pathlib import Path

from tracker.cli.terminal import say

from .made_up import THREE, write_results
from .reading import false_statements, read

FOLDERS = 200
SIZES = (8, 30, 100, 400)


def main(folders: int, *sizes: int) -> None:
    """Print in how many folders each kind of text names too much, for some numbers of documents."""
    say("| layers that matter | documents | folders | where | with a false name | three found |")
    say("|---|---|---|---|---|---|")
    for costs in ({}, THREE):
        for documents in sizes or SIZES:
            wrong, found = Counter[str](), 0
            for seed in range(folders):
                with tempfile.TemporaryDirectory() as scratch:
                    results = Path(scratch) / "results"
                    write_results(results, seed, costs, documents)
                    texts = read(results)
                wrong.update(
                    where for where, said in texts.items() if false_statements(said, costs)
                )
                found += any("without layer 0, 3 or 7" in each for each in texts["page"])
            for where in texts:
                share = f"{found / folders:.0%}" if costs else "–"
                say(
                    f"| {len(costs) or 'none'} | {documents} | {folders} | {where} | "
                    f"{wrong[where] / folders:.1%} | {share} |"
                )


if __name__ == "__main__":
    main(*(map(int, sys.argv[1:]) if len(sys.argv) > 1 else (FOLDERS,)))

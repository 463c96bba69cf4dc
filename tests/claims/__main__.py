"""How often something is said that is not so: `make claims`, the table of docs/statistics.md.

Each results folder is made of outcomes of which it is known which layers matter: none, or three.
Everything that is said of it is read, and every layer that a sentence or a table names, marks or
ranks is looked up; so is every order of two models that are alike.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import chain, product
from pathlib import Path

from tracker.cli.terminal import say

from .made_up import ALIKE, THREE
from .reading import named, tried

FOLDERS = 200
SIZES = (8, 30, 100, 400)


def some(seed: int, costs: Mapping[int, float], documents: int) -> list[tuple[dict, bool]]:
    """Try folders from a seed on: where it is said → what is not so; whether all are named."""
    with tempfile.TemporaryDirectory() as scratch:
        found = tried(Path(scratch), range(seed, seed + ALIKE), costs, documents, studies=True)
        return [(wrong, {*THREE} <= named(said["run"][0])) for said, wrong in found]


def main(folders: int, *sizes: int) -> None:
    """Print in how many folders each kind of text is wrong, for some numbers of documents."""
    cases = list(product(({}, THREE), sizes or SIZES))
    with ProcessPoolExecutor(os.cpu_count()) as workers:
        for number, (costs, documents) in enumerate(cases):
            each = partial(some, costs=costs, documents=documents)
            done = [*chain(*workers.map(each, range(0, folders, ALIKE)))]
            if not number:
                heads = ("layers that matter", "documents", "folders", "all named", *done[0][0])
                say(f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
            wrong = Counter(where for found, _ in done for where in found if found[where])
            shares = [f"{100 * wrong[where] / len(done):.1f} %" for where in done[0][0]]
            both = f"{100 * sum(all_named for _, all_named in done) / len(done):.0f} %"
            row = (
                "three" if costs else "none",
                documents,
                len(done),
                both if costs else "–",
                *shares,
            )
            say(f"| {' | '.join(map(str, row))} |")
            every = Counter(each for found, _ in done for said in found.values() for each in said)
            for sentence, count in every.most_common(8):
                say(f"{count} × {sentence[:200]}", error=True)


if __name__ == "__main__":
    main(*(map(int, sys.argv[1:]) if len(sys.argv) > 1 else (FOLDERS,)))

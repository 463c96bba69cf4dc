"""Trust, then verify: whether sharing gives the numbers of the really pruned model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import torch

from tracker.ablations import INTACT, Ablation
from tracker.documents import Document
from tracker.engine.sweep import DEPTH_ONLY, FULL, PLAIN, DocumentScores, Engine

DOCUMENTS = 2
_REFUSALS = (RuntimeError, ValueError, TypeError, IndexError, AttributeError, KeyError)


@dataclass(frozen=True)
class Check:
    """What the self-check found.

    Attributes:
        engine: The engine with as much sharing as is exact.
        difference: Largest difference of a log-likelihood between it and the plainly pruned model,
            in nats; 0 when nothing is shared.
        lost: One line that says which sharing was lost and why; None when none was.
    """

    engine: Engine
    difference: float
    lost: str | None


def check(engine: Engine, documents: Sequence[Document], layers: Sequence[int]) -> Check:
    """Score a few documents both ways, and keep as much sharing as agrees.

    Args:
        engine: The engine, with full sharing.
        documents: The cell's documents; the first few are scored.
        layers: The layers that will be removed; the first, middle and last are tried.

    Returns:
        The engine to use.
    """
    few = documents[:DOCUMENTS]
    tried = sorted({layers[0], layers[len(layers) // 2], layers[-1]})
    ablations = [INTACT, *(Ablation((layer,)) for layer in tried)]
    plain = engine.with_sharing(PLAIN)
    truth = plain.score(few, ablations)
    reasons = []
    for sharing, name in ((FULL, "tokens"), (DEPTH_ONLY, "depth")):
        candidate = engine.with_sharing(sharing)
        try:
            worst, agree = compare(candidate.score(few, ablations), truth, engine)
        except _REFUSALS as error:
            said = str(error).strip().splitlines() or [type(error).__name__]
            reasons.append(f"sharing over {name} is refused by the model ({said[0][:120]})")
            continue
        if agree:
            return Check(candidate, worst, "; ".join(reasons) or None)
        reasons.append(f"sharing over {name} changes a log-likelihood by {worst:.3g} nats")
    return Check(plain, 0.0, "; ".join(reasons))


def compare(
    shared: Sequence[DocumentScores], plain: Sequence[DocumentScores], engine: Engine
) -> tuple[float, bool]:
    """Compare two sets of scores of the same documents and ablations.

    In float32 every log-likelihood may differ by 1e-3 nats and 1e-4 of itself: where a removed
    layer leaves a model unstable, float32 itself is further than 1e-3 from float64. In half
    precision the order of summation alone moves single values by per cents, so the median may
    differ by 0.1 nats and 1 %, a single value by 1 nat and 5 %.

    Args:
        shared: One way.
        plain: The other way.
        engine: Tells the precision.

    Returns:
        The largest difference in nats, and whether the two agree.
    """
    pairs = [
        (a.loglikelihood, b.loglikelihood)
        for one, other in zip(shared, plain, strict=True)
        for ours, theirs in zip(one.responses, other.responses, strict=True)
        for a, b in zip(ours, theirs, strict=True)
    ]
    if any(math.isfinite(a) != math.isfinite(b) for a, b in pairs):
        return math.inf, False
    found = [(abs(a - b), abs(b)) for a, b in pairs if math.isfinite(b)]
    worst = max((difference for difference, _ in found), default=0.0)
    if engine.loaded.model.dtype in (torch.float32, torch.float64):
        return worst, all(difference <= 1e-3 + 1e-4 * size for difference, size in found)
    typical = median(difference / (0.1 + 0.01 * size) for difference, size in found or [(0, 0)])
    return worst, typical <= 1 and all(difference <= 1 + 0.05 * size for difference, size in found)

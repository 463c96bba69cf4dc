"""Trust, then verify: whether sharing gives the numbers of the really pruned model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

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
            worst, excess = compare(candidate.score(few, ablations), truth, engine)
        except _REFUSALS as error:
            said = str(error).strip().splitlines() or [type(error).__name__]
            reasons.append(f"sharing over {name} is refused by the model ({said[0][:120]})")
            continue
        if excess <= 0:
            return Check(candidate, worst, "; ".join(reasons) or None)
        reasons.append(f"sharing over {name} changes a log-likelihood by {worst:.3g} nats")
    return Check(plain, 0.0, "; ".join(reasons))


def compare(
    shared: Sequence[DocumentScores], plain: Sequence[DocumentScores], engine: Engine
) -> tuple[float, float]:
    """Compare two sets of scores of the same documents and ablations.

    In float32 1e-3 nats and 1e-4 of the log-likelihood are allowed: where a removed layer leaves a
    model unstable, float32 itself is further than 1e-3 from float64. In half precision the order of
    summation alone moves it by per cents, so 0.2 nats and 2 % are allowed.

    Args:
        shared: One way.
        plain: The other way.
        engine: Tells the precision.

    Returns:
        The largest difference, and by how much the worst one exceeds what is allowed (≤ 0 = none).
    """
    exact = engine.loaded.model.dtype in (torch.float32, torch.float64)
    worst, excess = 0.0, -math.inf
    for one, other in zip(shared, plain, strict=True):
        for ours, theirs in zip(one.responses, other.responses, strict=True):
            for a, b in zip(ours, theirs, strict=True):
                if not math.isfinite(b.loglikelihood):
                    difference = 0.0 if not math.isfinite(a.loglikelihood) else math.inf
                else:
                    difference = abs(a.loglikelihood - b.loglikelihood)
                size = abs(b.loglikelihood)
                allowed = 1e-3 + 1e-4 * size if exact else 0.2 + 0.02 * size
                worst = max(worst, difference)
                excess = max(excess, difference - allowed)
    return worst, (math.inf if math.isnan(excess) or math.isnan(worst) else excess)

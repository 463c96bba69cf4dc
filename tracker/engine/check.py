"""Trust, then verify: whether sharing gives the numbers of the really pruned model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import torch

from tracker.ablations import INTACT, Ablation
from tracker.documents import Document
from tracker.engine.sweep import DEPTH_ONLY, FULL, NO_PREFIX, PLAIN, DocumentScores, Engine
from tracker.errors import CellError

DOCUMENTS = 2
REFUSALS = (RuntimeError, ValueError, TypeError, IndexError, AttributeError, KeyError)
"""What a model may raise that cannot be shared."""


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


def check(engine: Engine, documents: Sequence[Document], ablations: Sequence[Ablation]) -> Check:
    """Score a few documents both ways, and keep as much sharing as agrees.

    Args:
        engine: The engine, with full sharing.
        documents: The cell's documents; the first few are scored.
        ablations: What will be removed; the first, middle and last are tried, and where they are of
            several kinds (layers, attention, MLP) one of each other kind.

    Returns:
        The engine to use.

    Raises:
        CellError: The model cannot run without one of its layers.
    """
    few = documents[:DOCUMENTS]
    tried = [INTACT, *some_of_each_kind(ablations)]
    plain = engine.with_sharing(PLAIN)
    try:
        truth = plain.score(few, tried)
    except torch.OutOfMemoryError:
        raise
    except REFUSALS as error:
        raise CellError(
            f"{type(engine.loaded.model).__name__} does not run with a layer taken out "
            f"({type(error).__name__}: {error}): its layers depend on each other by their numbers"
        ) from error
    reasons = []
    for sharing, name in ((FULL, "documents"), (NO_PREFIX, "tokens"), (DEPTH_ONLY, "depth")):
        candidate = engine.with_sharing(sharing)
        if sharing == FULL and not candidate.shares_a_prefix(few):
            continue
        try:
            worst, agree = compare(candidate.score(few, tried), truth, engine)
        except REFUSALS as error:
            said = str(error).strip().splitlines() or [type(error).__name__]
            reasons.append(f"sharing over {name} is refused by the model ({said[0][:120]})")
            continue
        if agree:
            best = engine.with_sharing(FULL) if sharing == NO_PREFIX and not reasons else candidate
            return Check(best, worst, "; ".join(reasons) or None)
        reasons.append(f"sharing over {name} changes a log-likelihood by {worst:.3g} nats")
    return Check(plain, 0.0, "; ".join(reasons))


def some_of_each_kind(ablations: Sequence[Ablation]) -> list[Ablation]:
    """Choose ablations to try: the first, middle and last, and one of each other kind.

    Args:
        ablations: All of them.

    Returns:
        Some of them, without the baseline.
    """
    kinds: dict[tuple[bool, bool, bool], list[Ablation]] = {}
    for a in ablations:
        if a != INTACT:
            kinds.setdefault((bool(a.layers), bool(a.attention), bool(a.mlp)), []).append(a)
    first, *others = kinds.values() or [[]]
    ends = [first[0], first[len(first) // 2], first[-1]] if first else []
    return list(dict.fromkeys([*ends, *(kind[len(kind) // 2] for kind in others)]))


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

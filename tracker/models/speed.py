"""How much faster one model reads than another, measured by turns in one process."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

SECONDS = 4.0
"""What the two are given at least."""
TURNS = 8
MOST = 1.15
"""How far apart the ends of the turns' middle half may be, as a factor: else the machine did other
work, now for the one and now for the other."""


@torch.inference_mode()
def times_as_fast(
    model: Any, base: Any, batch: int, length: int
) -> tuple[float, float, float] | None:
    """Let two models read the same tokens by turns.

    Args:
        model: A causal language model.
        base: The one that it is compared with, on the same device.
        batch: Texts at a time.
        length: Tokens of each.

    Returns:
        How many times as fast the first one reads, as `ratio` says.
    """
    place = base.get_input_embeddings().weight.device
    vocabulary = base.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocabulary, (batch, length), generator=generator).to(place)
    turns: list[tuple[float, float]] = []
    for each in (model, base):
        _seconds(each, ids)
    while len(turns) < TURNS or sum(map(sum, turns)) < SECONDS:
        turns.append((_seconds(model, ids), _seconds(base, ids)))
    return ratio(turns)


def ratio(turns: Sequence[tuple[float, float]]) -> tuple[float, float, float] | None:
    """Say how many times as fast the first of two is.

    Other work that slows both in a turn leaves their ratio as it is.

    Args:
        turns: The seconds of both, turn by turn.

    Returns:
        The median of the turns' ratios, and the ends of their middle half; None where these are
        further apart than `MOST`.
    """
    first, second = np.array(turns).T
    low, middle, high = np.quantile(second / first, (0.25, 0.5, 0.75))
    return (float(middle), float(low), float(high)) if high <= MOST * low else None


def _seconds(model: Any, ids: torch.Tensor) -> float:
    start = time.perf_counter()
    # Reading a number waits for the accelerator.
    float(model(input_ids=ids, use_cache=False).logits[0, -1, 0])
    return time.perf_counter() - start

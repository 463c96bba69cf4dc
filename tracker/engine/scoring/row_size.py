"""How large a row is fastest, which the processor and the dtype decide: found by trying."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from itertools import combinations

import torch

from tracker.core.ablations import Ablation
from tracker.core.documents import Document, Request
from tracker.engine.refusal import tried
from tracker.engine.scoring.sharing import FULL
from tracker.engine.scoring.sweep import ROW_TOKENS, Engine

SIZES = (ROW_TOKENS, 2 * ROW_TOKENS, 4 * ROW_TOKENS)
"""Nodes of a row that are tried."""
WORTH = 0.93
"""Below this share of the default's seconds another size is taken; what is nearer may be noise."""
LAYERS = 5
"""Layers that the rows pass, under every set of them: up to 16 streams, as in a sweep."""
TOKENS = 64
"""Nodes of a made-up document."""
TURNS = 2
WIDE = 2048
"""From this width on a row of the default size is a large matrix already."""


def matters(engine: Engine) -> bool:
    """Say whether the size is worth trying: for half precision on a CPU, of models not too wide."""
    loaded = engine.loaded
    narrow = loaded.model.config.get_text_config().hidden_size < WIDE
    on_cpu = loaded.device.type == "cpu" and loaded.offloaded is None
    is_half = loaded.model.dtype.itemsize == 2
    return on_cpu and narrow and is_half and engine.row_tokens is None


def fastest(engine: Engine) -> int:
    """Time rows of each size by turns, on a copy of the model's first layers.

    Args:
        engine: The engine, with full sharing; its model is left as it is.

    Returns:
        One of `SIZES`; the default where the model cannot take such rows.
    """
    seconds, _ = tried(lambda: _timed(engine))  # why it cannot, the check says
    return ROW_TOKENS if seconds is None else chosen(seconds)


def _timed(engine: Engine) -> dict[int, float]:
    total = len(engine.loaded.layers)
    copy = engine.without(Ablation(layers=tuple(range(LAYERS, total))))
    layers = range(min(LAYERS, total))
    ablations = [Ablation(some) for count in range(LAYERS) for some in combinations(layers, count)]
    documents = _documents(engine)
    seconds = dict.fromkeys(SIZES, float("inf"))
    for turn in range(TURNS + 1):
        for size in SIZES:
            sized = replace(copy, sharing=FULL, row_tokens=size)
            start = time.perf_counter()
            sized.score(documents, ablations)
            if turn:  # the first one warms up
                seconds[size] = min(seconds[size], time.perf_counter() - start)
    return seconds


def chosen(seconds: Mapping[int, float]) -> int:
    """Choose the size that is clearly faster than the default, or the default."""
    best = min(seconds, key=lambda size: seconds[size])
    return best if seconds[best] < WORTH * seconds[ROW_TOKENS] else ROW_TOKENS


def _documents(engine: Engine) -> list[Document]:
    """Make up questions with one-token answers, which fill rows of every size."""
    config = engine.loaded.model.config.get_text_config()
    drawn = torch.Generator().manual_seed(0)
    tokens = torch.randint(config.vocab_size, (max(SIZES) // TOKENS, TOKENS), generator=drawn)
    return [
        Document(
            task="made up",
            index=index,
            requests=tuple(Request(tuple(context), (answer,)) for answer in context[:4]),
            gold=0,
            choices=4,
        )
        for index, context in enumerate(tokens[:, 1:].tolist())
    ]

"""Find the fastest size of a row by timing; it depends on the processor and the dtype."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from itertools import combinations, product

import torch

from tracker.core.changes import Ablation
from tracker.core.documents import Document, Request
from tracker.engine.refusal import tried
from tracker.engine.scoring.model import FULL
from tracker.engine.scoring.sweep import ROW_TOKENS, ROW_TOKENS_ACCELERATOR, Engine

SIZES = (ROW_TOKENS, 2 * ROW_TOKENS, 4 * ROW_TOKENS)
"""Sizes in nodes that are timed on a CPU, the default first."""
ACCELERATOR_SIZES = (ROW_TOKENS_ACCELERATOR, 512, 2048, 4096, 8192)
"""Sizes in nodes that are timed on an accelerator, the default first."""
SLOW = 5.0
"""Seconds per size on an accelerator above which the default is used without timing."""
WORTH = 0.93
"""Share of the default's seconds below which another size is chosen; smaller gains may be noise."""
LAYERS = 5
"""Layers that the rows pass, under every subset of them: up to 16 streams, as in a sweep."""
TOKENS = 64
"""Nodes of a generated document."""
TURNS = 2
WIDE = 2048
"""Width from which a row of the default size is already a large matrix."""


def matters(engine: Engine) -> bool:
    """Return whether other sizes are worth timing.

    They are on an accelerator, and on a CPU in half precision for models that are not too wide.
    """
    loaded = engine.loaded
    if loaded.offloaded is not None or engine.row_tokens is not None:
        return False
    narrow = loaded.model.config.get_text_config().hidden_size < WIDE
    return loaded.device.type != "cpu" or (narrow and loaded.model.dtype.itemsize == 2)


def sizes(engine: Engine) -> tuple[int, ...]:
    """Return the sizes to time on the device of an engine's model, the default first."""
    return SIZES if engine.loaded.device.type == "cpu" else ACCELERATOR_SIZES


def fastest(engine: Engine) -> int:
    """Find the fastest row size by timing each on a copy of the model's first layers.

    Args:
        engine: The engine, with full sharing; its model is not changed.

    Returns:
        One of `sizes`; the default if the model cannot take such rows.
    """
    seconds, _ = tried(lambda: time_sizes(engine))  # the self-check reports why it cannot
    return sizes(engine)[0] if seconds is None else chosen(seconds)


def time_sizes(engine: Engine) -> dict[int, float]:
    """Time rows of each size: size → seconds, the default's first."""
    total = len(engine.loaded.layers)
    copy = engine.without(Ablation.of(removed=range(LAYERS, total)))
    layers = range(min(LAYERS, total))
    ablations = [
        Ablation.of(removed=some) for count in range(LAYERS) for some in combinations(layers, count)
    ]
    seconds = dict.fromkeys(sizes(engine), float("inf"))
    documents = make_documents(engine, max(seconds) // TOKENS, TOKENS)
    for turn, size in product(range(TURNS + 1), tuple(seconds)):
        start = time.perf_counter()
        replace(copy, sharing=FULL, row_tokens=size).score(documents, ablations)
        took = time.perf_counter() - start
        if turn:  # the first one warms up
            seconds[size] = min(seconds[size], took)
        elif took > SLOW and engine.loaded.device.type != "cpu":
            return {sizes(engine)[0]: took}
    return seconds


def chosen(seconds: Mapping[int, float]) -> int:
    """Return the size that is clearly faster than the first one, the default, or the default."""
    default, best = next(iter(seconds)), min(seconds, key=lambda size: seconds[size])
    return best if seconds[best] < WORTH * seconds[default] else default


def make_documents(
    engine: Engine, count: int, tokens: int, longest: int = 1, beginning: int = 0
) -> list[Document]:
    """Generate questions with four answers each.

    Args:
        engine: The engine; the questions have tokens of its model's vocabulary.
        count: Number of documents.
        tokens: Tokens of each document, of which one is left for an answer.
        longest: Tokens of the longest answer; the shortest has one.
        beginning: Number of tokens at the beginning that all contexts share.

    Returns:
        The documents; the same ones each time.
    """
    draw = torch.Generator().manual_seed(0)
    vocabulary = engine.loaded.model.config.get_text_config().vocab_size
    contexts = torch.randint(vocabulary, (count, tokens), generator=draw)[:, 1:]
    contexts[:, :beginning] = contexts[0, :beginning]
    return [
        Document(
            task="made up",
            index=index,
            requests=tuple(
                Request(tuple(context), tuple(context[n : n + 1 + n % longest])) for n in range(4)
            ),
            gold=0,
            choices=4,
        )
        for index, context in enumerate(contexts.tolist())
    ]

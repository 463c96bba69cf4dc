"""Measure which number of tokens per forward pass is the fastest."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from itertools import chain, combinations, product

import torch

from tracker.engine.refusal import try_model
from tracker.engine.scoring.model import FULL
from tracker.engine.scoring.sweep import ROW_TOKENS, ROW_TOKENS_ACCELERATOR, Engine
from tracker.schema.changes import Ablation
from tracker.schema.documents import Document, Request

CPU_ROW_SIZES = (ROW_TOKENS, 2 * ROW_TOKENS, 4 * ROW_TOKENS)
"""Sizes in nodes that are timed on a CPU, the default first."""
ACCELERATOR_ROW_SIZES = (ROW_TOKENS_ACCELERATOR, 512, 2048, 4096, 8192)
"""Sizes in nodes that are timed on an accelerator, the default first."""
MAX_TIMING_SECONDS = 5.0
"""Seconds per size on an accelerator above which the default is used without timing."""
MAX_TIME_SHARE = 0.93
"""Share of the default size's seconds below which another size is chosen; smaller gains may be
noise."""
TIMED_LAYERS = 5
"""Layers that the rows pass, under every subset of them: up to 16 streams, as in a sweep."""
TIMED_TOKENS = 64
"""Number of nodes of a generated document."""
TIMED_TURNS = 2
MAX_CPU_WIDTH = 2048
"""Width from which a row of the default size is already a large matrix."""


def is_worth_timing(engine: Engine) -> bool:
    """Return whether timing can find a better number of tokens per forward pass (row size).

    Row sizes are timed on an accelerator, and on a CPU for small half-precision models. The result
    is False if weights are offloaded, or if the row size is already set.
    """
    loaded = engine.loaded
    if loaded.offloaded is not None or engine.row_tokens is not None:
        return False
    is_narrow = loaded.model.config.get_text_config().hidden_size < MAX_CPU_WIDTH
    return loaded.device.type != "cpu" or (is_narrow and loaded.model.dtype.itemsize == 2)


def row_sizes(engine: Engine) -> tuple[int, ...]:
    """Return the row sizes (tokens per forward pass) to time on a device, the default first."""
    return CPU_ROW_SIZES if engine.loaded.device.type == "cpu" else ACCELERATOR_ROW_SIZES


def find_row_size(engine: Engine) -> int:
    """Measure the fastest number of tokens per forward pass (row).

    Args:
        engine: The engine; its model is not changed.

    Returns:
        One of `row_sizes`; the default size if the timing fails.
    """
    seconds, _ = try_model(lambda: time_sizes(engine))  # the self-check reports why it cannot
    return row_sizes(engine)[0] if seconds is None else choose_row_size(seconds)


def time_sizes(engine: Engine) -> dict[int, float]:
    """Measure how long scoring random documents takes with each row size, the default first."""
    n_layers = len(engine.loaded.layers)
    engine_copy = engine.ablate(Ablation.from_changes(removed=range(TIMED_LAYERS, n_layers)))
    layers = range(min(TIMED_LAYERS, n_layers))
    subsets = chain.from_iterable(combinations(layers, n) for n in range(TIMED_LAYERS))
    ablations = [Ablation.from_changes(removed=subset) for subset in subsets]
    seconds = dict.fromkeys(row_sizes(engine), float("inf"))
    documents = make_documents(engine, max(seconds) // TIMED_TOKENS, TIMED_TOKENS)
    for turn, size in product(range(TIMED_TURNS + 1), tuple(seconds)):
        start = time.perf_counter()
        replace(engine_copy, sharing=FULL, row_tokens=size).score(documents, ablations)
        elapsed = time.perf_counter() - start
        if turn:  # the first one warms up
            seconds[size] = min(seconds[size], elapsed)
        elif elapsed > MAX_TIMING_SECONDS and engine.loaded.device.type != "cpu":
            return {row_sizes(engine)[0]: elapsed}
    return seconds


def choose_row_size(seconds: Mapping[int, float]) -> int:
    """Return the fastest row size, or the default (first) size if nearly as fast.

    `seconds` maps row sizes to measured times.
    """
    default, best = next(iter(seconds)), min(seconds, key=lambda size: seconds[size])
    return best if seconds[best] < MAX_TIME_SHARE * seconds[default] else default


def make_documents(
    engine: Engine, count: int, tokens: int, longest: int = 1, beginning: int = 0
) -> list[Document]:
    """Generate multiple-choice documents of random tokens, with four answers per document.

    Args:
        engine: The engine; its model's vocabulary supplies the tokens.
        count: Number of documents.
        tokens: Number of tokens of each document: the context and one token of an answer.
        longest: Maximum number of tokens of an answer. At least one answer has one token.
        beginning: Number of first tokens that all contexts share.

    Returns:
        The documents; equal arguments always give the same documents.
    """
    rng = torch.Generator().manual_seed(0)
    vocabulary = engine.loaded.model.config.get_text_config().vocab_size
    contexts = torch.randint(vocabulary, (count, tokens), generator=rng)[:, 1:]
    contexts[:, :beginning] = contexts[0, :beginning]
    documents = []
    for index, context in enumerate(contexts.tolist()):
        answers = (tuple(context[n : n + 1 + n % longest]) for n in range(4))
        requests = tuple(Request(tuple(context), answer) for answer in answers)
        documents.append(Document("made up", index, requests, gold=0, choices=4))
    return documents

"""How fast models read, measured side by side in one process."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch

SECONDS = 2.0
"""What each model is given at least."""
PASSES = 3


@torch.inference_mode()
def tokens_per_second(models: Sequence[Any], batch: int, length: int) -> list[float]:
    """Let models read the same tokens in turn, and take the fastest pass of each.

    Args:
        models: Causal language models, on one device.
        batch: Texts at a time.
        length: Tokens of each.

    Returns:
        Tokens a second, of each model.
    """
    place = models[0].get_input_embeddings().weight.device
    vocabulary = models[0].config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocabulary, (batch, length), generator=generator).to(place)
    spent: list[list[float]] = [[] for _ in models]
    for model in models:
        _read(model, ids)
    while min(map(len, spent)) < PASSES or min(map(sum, spent)) < SECONDS:
        for model, seconds in zip(models, spent, strict=True):
            start = time.perf_counter()
            _read(model, ids)
            seconds.append(time.perf_counter() - start)
    return [batch * length / min(seconds) for seconds in spent]


def _read(model: Any, ids: torch.Tensor) -> None:
    # Reading a number waits for the accelerator.
    float(model(input_ids=ids, use_cache=False).logits[0, -1, 0])

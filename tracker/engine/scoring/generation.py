"""Generation under all ablations: groups that fit into memory, and the cache of a prompt."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from tracker.core.changes import Ablation
from tracker.engine.refusal import RefusalError
from tracker.engine.scoring.decode import decoding
from tracker.engine.scoring.prefix import cache_argument
from tracker.engine.scoring.sweep import Engine, grouped_ablations


def generation_groups(
    engine: Engine, ablations: Sequence[Ablation], tokens: int
) -> Iterator[list[Ablation]]:
    """Split ablations so that the texts of each group fit into half of the budget.

    Each group has the baseline; `tokens` is the longest text, the prompt included. RefusalError
    if the model takes no keys and values.
    """
    loaded = engine.loaded
    if cache_argument(loaded.model) is None:
        raise RefusalError("it takes no cache of keys and values")
    if engine.plan(ablations).repeats:
        raise RefusalError("a layer that is passed again would need a cache of its own")
    size = tokens * len(loaded.layers) * engine.kept_bytes
    return grouped_ablations(ablations, engine.budget // 2 // size)


@contextmanager
def generating(
    engine: Engine, ablations: Sequence[Ablation], prompt: Sequence[int]
) -> Iterator[dict[str, Any]]:
    """Continue one prompt under every ablation, a row an ablation, in the open context.

    Yields the arguments for transformers' `generate`: the prompt's keys and values; nothing for a
    model that takes none.
    """
    plan = engine.plan(ablations)
    prefix = engine.prefix_of(plan, prompt)
    engine.put_back()
    try:
        # A kept prefix was read in inference mode: only there it can be added to.
        with (
            torch.inference_mode(),
            decoding(engine.parts(plan), ablations, prompt, prefix) as cache,
        ):
            name = cache_argument(engine.loaded.model)
            yield {} if name is None else {name: cache}
    finally:
        engine.put_back()

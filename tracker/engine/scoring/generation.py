"""Generate under all ablations at once: the streams are the batch, each with its own layers.

The prompt is read once for all ablations, as in scoring. Each layer's keys and values are then
copied to every stream that passes its attention, and the model's own generation continues with one
row per ablation. Ablations are generated in groups that fit into memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from transformers.cache_utils import Cache

from tracker.core.changes import Ablation
from tracker.engine.forward.layer import ForwardPass
from tracker.engine.forward.streams import LayerStep, StreamPlan
from tracker.engine.refusal import RefusalError
from tracker.engine.scoring.head import by_row
from tracker.engine.scoring.rows import reading_row
from tracker.engine.scoring.score import (
    GrowingLayer,
    Prefix,
    cache_argument,
    kept_bytes,
    new_cache,
    run_base,
)
from tracker.engine.scoring.sweep import Engine, grouped_ablations
from tracker.models.devices import take


@contextmanager
def decoding(
    engine: Engine, ablations: Sequence[Ablation], prompt: Sequence[int], prefix: Prefix | None
) -> Iterator[Cache]:
    """Make a model continue one prompt under every ablation, while the context is open.

    Reading the prompt forks as scoring does. After it nothing is shared, because the texts soon
    differ: each ablation has its own row of the batch in every layer. A layer computes just the
    rows that do not skip it, each with its own keys and values.

    Args:
        engine: The engine of the model.
        ablations: The rows of the batch; the baseline must be among them.
        prompt: The prompt's token ids.
        prefix: A beginning of the prompt that was read for these ablations.

    Yields:
        Keys and values of all but the prompt's last token, as the model takes them. A forward pass
        must have one row per ablation, in their order.
    """
    layers, plan = engine.loaded.layers, engine.plan(ablations)
    start = 0 if prefix is None else len(prefix.tokens)
    rest = prompt[start:-1]
    cache = new_cache() if prefix is None else prefix.cache
    if rest:
        run_base(engine, plan, reading_row(rest, start), cache)
    done = [tuple(a.at(layer) for a in ablations) for layer in range(len(layers))]
    together = StreamPlan(
        tuple(LayerStep(len(ablations), (), actions, plan.is_divided) for actions in done),
        (tuple(range(len(ablations))),) * len(layers),
    )
    caches = _handed_out(cache, plan, len(prompt) - 1)
    with ExitStack() as stack:
        if plan.has_ends:
            starts = [ablation.ends.get("embedding") for ablation in ablations]
            stack.enter_context(by_row(engine.ends, "embedding", starts))
            stack.enter_context(by_row(engine.ends, "lm_head", plan.heads))
        anatomy, replacements = engine.anatomy_for(together), engine.placed_replacements
        stack.enter_context(
            ForwardPass(
                layers, together, anatomy, replacements=replacements, batched=True
            ).installed()
        )
        yield caches


def _handed_out(cache: Cache, plan: StreamPlan, tokens: int) -> Cache:
    """Copy the prompt's keys and values to every ablation, layer by layer.

    The prompt was read with a row for each attention that differs in the layer, [computed, heads,
    tokens, size]; `plan.attention_of` says which one an ablation used. These rows are copied to
    [ablations that pass the attention, heads, tokens, size], in the order of the ablations: the
    rows that reach the layer's attention during generation.
    """
    if not cache.layers:
        return new_cache()
    layers = []
    for held, sources in zip(cache.layers, plan.attention_of, strict=True):
        index = [source for source in sources if source is not None]
        layer = GrowingLayer()
        layer.update(*(take(x[:, :, :tokens], index) for x in (held.keys, held.values)))
        layers.append(layer)
    return Cache(layers=layers)


def generation_groups(
    engine: Engine, ablations: Sequence[Ablation], tokens: int
) -> Iterator[list[Ablation]]:
    """Split ablations so that the texts of each group fit into half of the budget.

    Each group has the baseline; `tokens` is the longest text, including the prompt. Raises
    RefusalError if the model takes no keys and values.
    """
    loaded = engine.loaded
    if cache_argument(loaded.model) is None:
        raise RefusalError("it takes no cache of keys and values")
    if engine.plan(ablations).repeats:
        raise RefusalError("a layer that is passed again would need a cache of its own")
    size = tokens * len(loaded.layers) * kept_bytes(engine)
    return grouped_ablations(ablations, engine.budget // 2 // size)


@contextmanager
def generating(
    engine: Engine, ablations: Sequence[Ablation], prompt: Sequence[int]
) -> Iterator[dict[str, Any]]:
    """Continue one prompt under every ablation, one row per ablation, in the open context.

    Yields the arguments for transformers' `generate`: the prompt's keys and values; nothing for a
    model that takes none.
    """
    prefix = engine.prefix_of(engine.plan(ablations), prompt)
    engine.put_back()
    try:
        # A kept prefix was read in inference mode, and can only be extended there.
        with torch.inference_mode(), decoding(engine, ablations, prompt, prefix) as cache:
            name = cache_argument(engine.loaded.model)
            yield {} if name is None else {name: cache}
    finally:
        engine.put_back()

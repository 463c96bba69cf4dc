"""Generate texts for all ablations at once, in a batch with one row per ablation.

The model reads the prompt once for all ablations, as in scoring. Then the keys and values are
copied for each ablation, and the model's own generation code continues with one row per ablation.
Ablations are processed in groups that fit into memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from transformers.cache_utils import Cache

from tracker.engine.forward.layer import ForwardPass
from tracker.engine.forward.streams import Ablations, LayerStep, StreamPlan
from tracker.engine.refusal import RefusalError
from tracker.engine.scoring.head import use_row_formats
from tracker.engine.scoring.rows import reading_row
from tracker.engine.scoring.score import (
    GrowingLayer,
    Prefix,
    find_cache_argument,
    measure_cache_bytes,
    new_cache,
    run_base,
)
from tracker.engine.scoring.sweep import Engine, split_ablations
from tracker.models.devices import take_entries
from tracker.schema.changes import Ablation


@contextmanager
def fork_decoding(
    engine: Engine, ablations: Ablations, prompt: Sequence[int], prefix: Prefix | None
) -> Iterator[Cache]:
    """Read a prompt, and yield a cache to continue the prompt under all ablations.

    The model is changed until the context exits. Ablations share computation while the model reads
    the prompt, as in scoring. After the prompt, each ablation is a separate row of the batch.

    Args:
        engine: The engine of the model that generates.
        ablations: The ablation of each row of the batch, including the baseline.
        prompt: The prompt's token ids.
        prefix: A beginning of the prompt that the model has already read, or None.

    Yields:
        A cache with the keys and values of the prompt without its last token. Forward passes with
        this cache must have one row per ablation, in the order of `ablations`.
    """
    layers, plan = engine.loaded.layers, engine.plan(ablations)
    n_prefix = 0 if prefix is None else len(prefix.tokens)
    cache = new_cache() if prefix is None else prefix.cache
    if new_tokens := prompt[n_prefix:-1]:
        run_base(engine, plan, reading_row(new_tokens, n_prefix), cache)
    # From here on, each ablation is a stream from the first layer on.
    changes = [tuple(a.at_layer(layer) for a in ablations) for layer in range(len(layers))]
    n_streams, divided = len(ablations), plan.steps[0].divided
    steps = tuple(LayerStep(n_streams, (), layer_changes, divided) for layer_changes in changes)
    decoding_plan = StreamPlan(steps, (tuple(range(n_streams)),) * len(layers))
    ablation_cache = _spread_cache(cache, plan, len(prompt) - 1)
    with ExitStack() as stack:
        if plan.has_rounded_embeddings:
            formats = [ablation.outer_formats.get("embedding") for ablation in ablations]
            stack.enter_context(use_row_formats(engine.embeddings, "embedding", formats))
            stack.enter_context(use_row_formats(engine.embeddings, "lm_head", plan.head_formats))
        decoding = ForwardPass(
            layers,
            decoding_plan,
            engine.find_anatomy(decoding_plan),
            replacements=engine.device_replacements,
            batched=True,
        )
        stack.enter_context(decoding.install())
        yield ablation_cache


def _spread_cache(cache: Cache, plan: StreamPlan, tokens: int) -> Cache:
    """Copy the prompt's cache, with one batch row per ablation in each layer.

    In `cache`, ablations with the same attention in a layer share a row. `plan.attention_paths`
    contains the index of the row for each ablation. The copy has a separate row for each ablation
    that runs the attention.
    """
    if not cache.layers:
        return new_cache()
    layers = []
    for cached, sources in zip(cache.layers, plan.attention_paths, strict=True):
        indices = [source for source in sources if source is not None]
        layer = GrowingLayer()
        buffers = cached.keys, cached.values
        layer.update(*(take_entries(buffer[:, :, :tokens], indices) for buffer in buffers))
        layers.append(layer)
    return Cache(layers=layers)


def generation_groups(
    engine: Engine, ablations: Ablations, tokens: int
) -> Iterator[list[Ablation]]:
    """Split ablations into groups whose key-value caches fit into half of the memory budget.

    Each group includes the baseline. `tokens` is the maximum number of tokens of prompt and
    generated text. Raises RefusalError if the model accepts no cache, or if an ablation repeats
    layers.
    """
    loaded = engine.loaded
    if find_cache_argument(loaded.model) is None:
        raise RefusalError("the model accepts no key-value cache")
    if engine.plan(ablations).n_repeats:
        raise RefusalError("repeated layers would need a key-value cache for each repetition")
    size = tokens * len(loaded.layers) * measure_cache_bytes(engine)
    return split_ablations(ablations, engine.budget // 2 // size)


@contextmanager
def prepare_generation(
    engine: Engine, ablations: Ablations, prompt: Sequence[int]
) -> Iterator[dict[str, Any]]:
    """Yield the arguments of `generate` to continue a prompt under all ablations.

    `generate` is the method of transformers. The arguments contain the cache of the prompt. For a
    model without a cache, there are no arguments. The model is changed until the context exits.
    """
    prefix = engine.find_read_prefix(engine.plan(ablations), prompt)
    engine.restore_state()
    try:
        # A kept prefix was read in inference mode, and can only be extended there.
        with torch.inference_mode(), fork_decoding(engine, ablations, prompt, prefix) as cache:
            name = find_cache_argument(engine.loaded.model)
            yield {} if name is None else {name: cache}
    finally:
        engine.restore_state()

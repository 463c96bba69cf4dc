"""Generate texts for all ablations at once, in a batch with one row per ablation and sample.

The model reads the prompt once for all ablations. The prompt's keys and values are copied for each
row of the batch, and the model's own code generates the texts. Ablations and samples are processed
in groups that fit into memory.
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
    engine: Engine,
    ablations: Ablations,
    prompt: Sequence[int],
    prefix: Prefix | None,
    n_samples: int = 1,
) -> Iterator[Cache]:
    """Read a prompt, and yield a cache to continue the prompt under all ablations.

    The model is changed in the `with` block, and restored on exit. The prompt is read once for all
    ablations. Then each sample of each ablation is a separate row of the batch.

    Args:
        engine: The engine of the model that generates.
        ablations: The ablations, including the baseline.
        prompt: The prompt's token ids.
        prefix: A cached beginning of the prompt, or None.
        n_samples: Number of texts that each ablation generates.

    Yields:
        A cache with the keys and values of the prompt without its last token. A batch that uses the
        cache must have `n_samples` rows per ablation, in the order of `ablations`.
    """
    layers, plan = engine.loaded.layers, engine.plan(ablations)
    n_prefix = 0 if prefix is None else len(prefix.tokens)
    cache = new_cache() if prefix is None else prefix.cache
    if new_tokens := prompt[n_prefix:-1]:
        run_base(engine, plan, reading_row(new_tokens, n_prefix), cache)
    # From here on, each row is a stream from the first layer on.
    rows = [number for number in range(len(ablations)) for _ in range(n_samples)]
    changes = [tuple(ablations[a].at_layer(layer) for a in rows) for layer in range(len(layers))]
    n_streams, divided = len(rows), plan.steps[0].divided
    steps = tuple(LayerStep(n_streams, (), layer_changes, divided) for layer_changes in changes)
    decoding_plan = StreamPlan(steps, (tuple(range(n_streams)),) * len(layers))
    row_cache = _copy_prompt_cache(cache, plan, len(prompt) - 1, rows)
    with ExitStack() as stack:
        if plan.has_rounded_embeddings:
            formats = [ablations[row].outer_formats.get("embedding") for row in rows]
            stack.enter_context(use_row_formats(engine.embeddings, "embedding", formats))
            heads = [plan.head_formats[row] for row in rows]
            stack.enter_context(use_row_formats(engine.embeddings, "lm_head", heads))
        anatomy, replaced = engine.find_anatomy(decoding_plan), engine.device_replacements
        decoding = ForwardPass(layers, decoding_plan, anatomy, replacements=replaced, batched=True)
        stack.enter_context(decoding.install())
        yield row_cache


def _copy_prompt_cache(cache: Cache, plan: StreamPlan, tokens: int, rows: Sequence[int]) -> Cache:
    """Copy a prompt's keys and values, with one row for each text to generate.

    In `cache`, ablations with the same attention have one common row. A layer's copy has no row for
    texts whose ablation removes the attention. The first `tokens` tokens are copied. `rows`
    contains the index of each text's ablation.
    """
    if not cache.layers:
        return new_cache()
    layers = []
    for cached, sources in zip(cache.layers, plan.attention_indices, strict=True):
        indices = [source for row in rows if (source := sources[row]) is not None]
        layer = GrowingLayer()
        buffers = cached.keys, cached.values
        layer.update(*(take_entries(buffer[:, :, :tokens], indices) for buffer in buffers))
        layers.append(layer)
    return Cache(layers=layers)


def generation_groups(
    engine: Engine, ablations: Ablations, tokens: int, n_samples: int = 1
) -> Iterator[tuple[list[Ablation], range]]:
    """Split ablations and samples into groups whose key-value caches fit into memory.

    The caches of a group take at most half of the memory budget.

    Args:
        engine: The engine of the model that generates.
        ablations: All ablations, including the baseline.
        tokens: Maximum number of tokens of prompt and generated text.
        n_samples: Number of texts that each ablation generates.

    Yields:
        The ablations of a group, with the baseline, and the range of sample indices. Each ablation
        of the group generates one text for each sample index.

    Raises:
        RefusalError: The model accepts no cache, or an ablation repeats layers.
    """
    loaded = engine.loaded
    if find_cache_argument(loaded.model) is None:
        raise RefusalError("the model accepts no key-value cache")
    if engine.plan(ablations).n_repeats:
        raise RefusalError("repeated layers would need a key-value cache for each repetition")
    size = tokens * len(loaded.layers) * measure_cache_bytes(engine)
    n_rows = max(2, engine.budget // 2 // size)
    n_together = min(n_samples, n_rows // 2)
    for start in range(0, n_samples, n_together):
        samples = range(start, min(start + n_together, n_samples))
        for group in split_ablations(ablations, n_rows // len(samples)):
            yield group, samples


@contextmanager
def prepare_generation(
    engine: Engine, ablations: Ablations, prompt: Sequence[int], n_samples: int = 1
) -> Iterator[dict[str, Any]]:
    """Prepare a model so that `generate` continues a prompt under all ablations in one batch.

    Yields the keyword arguments for transformers' `generate`: the prompt's cache with `n_samples`
    rows per ablation, or nothing if the model accepts no cache. The model is changed in the `with`
    block, and restored on exit.
    """
    prefix = engine.find_read_prefix(engine.plan(ablations), prompt)
    engine.restore_state()
    try:
        # A kept prefix was read in inference mode, and can only be extended there.
        forked = fork_decoding(engine, ablations, prompt, prefix, n_samples)
        with torch.inference_mode(), forked as cache:
            name = find_cache_argument(engine.loaded.model)
            yield {} if name is None else {name: cache}
    finally:
        engine.restore_state()

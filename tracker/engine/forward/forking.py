"""Sharing over depth, computed: a model's layers run all streams of a plan as one batch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

from torch import Tensor, nn

from tracker.engine.forward.base import LayerSite, ModuleFork
from tracker.engine.forward.experts import RouterFork, SharedExpertFork
from tracker.engine.forward.heads import HeadFork
from tracker.engine.forward.layer import (
    ForwardPass,
    InputMasks,
    LayerChange,
    LayerFork,
    Observer,
)
from tracker.engine.forward.replacements import Replacement
from tracker.engine.forward.rounding import RoundedFork
from tracker.engine.forward.streams import StreamPlan
from tracker.engine.forward.sublayers import SublayerFork
from tracker.engine.forward.whole_layers import RepeatedSpan, ReplacedLayer, SkippedLayer
from tracker.models.hooks import replaced_forward
from tracker.models.parts.anatomy import LayerAnatomy

LAYER_CHANGES: tuple[LayerChange, ...] = (RepeatedSpan(), SkippedLayer(), ReplacedLayer())
"""Interventions on whole layers."""
MODULE_FORKS: tuple[type[ModuleFork], ...] = (
    SublayerFork,
    RoundedFork,
    HeadFork,
    RouterFork,
    SharedExpertFork,
)
"""Interventions within layers. Of two on one module the later one calls the earlier one."""


@contextmanager
def forking(
    layers: nn.ModuleList,
    plan: StreamPlan,
    anatomy: LayerAnatomy | None = None,
    observe: Observer | None = None,
    masks: InputMasks | None = None,
    replacements: Mapping[int, Replacement] | None = None,
    embedded: Sequence[Tensor] = (),
    at_once: int | None = None,
    batched: bool = False,
) -> Iterator[None]:
    """Make a model's layers fork streams while the context is open.

    The streams are the batch. The model is called with `rows` rows, [rows, tokens, hidden] reach
    the first layer, and the batch grows on the way: a new stream starts from its parent's hidden
    state before the layer, a stream that passes goes through the layer, one that skips it keeps
    the state that it came with. Behind the last layer are [streams × rows, tokens, hidden], stream
    by stream: block s of `rows` rows is stream s. Each is what the pruned model computes, because a
    layer treats the rows of a batch apart and everything between layers is in the hidden state;
    where either is not so, the pass is refused here or the check on a miniature finds it.

    The model makes the other inputs of a layer (masks, rotary embeddings, positions) for `rows`
    rows, so they must broadcast over the batch, or with `batched` may have a row a stream.

    Args:
        layers: The model's decoder layers.
        plan: Where to fork.
        anatomy: The parts of the layers; those that the plan takes apart are found.
        observe: Called with the baseline's input and output of each layer.
        masks: Masks in place of the model's own.
        replacements: Replacements of layers, by layer.
        embedded: Inputs to the first layer of streams with other embeddings, each [rows, tokens,
            …]: `plan.starts`, without the model's own.
        at_once: Number of streams that pass a layer at once, besides those that it is taken apart
            for. None where all must: with a cache, or where weights are loaded a layer at a time.
        batched: Whether the other inputs of a layer are cut to the streams that enter it.

    Yields:
        Nothing; on exit, also by an exception, the layers are what they were.
    """
    common = ForwardPass(
        LAYER_CHANGES, at_once, observe, batched, masks, replacements or {}, embedded
    )
    with ExitStack() as stack:
        # Each fork refers to all others: without this, only the garbage collector would free them.
        stack.callback(common.forks.clear)
        for index, (layer, whole) in enumerate(zip(layers, plan.steps, strict=True)):
            step, apart = whole, whole.entering
            if at_once is not None and len(apart) > at_once:
                step, apart = whole.apart
            fork = LayerFork(index, layer, whole, apart, layer.forward, common)
            common.forks.append(fork)
            stack.enter_context(replaced_forward(layer, fork))
            if anatomy is not None:
                site = LayerSite(index, layer, step, anatomy, batched)
                for intervention in MODULE_FORKS:
                    for part in intervention.of_layer(site):
                        stack.enter_context(part.installed(fork))
        yield

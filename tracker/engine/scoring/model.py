"""A model taken apart: its layers, their parts, and facts that are computed once.

The module also defines which computations ablations may share, the side effects of calling a model,
and really changed copies of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tracker.core.changes import Ablation
from tracker.core.documents import Request, Response
from tracker.core.errors import ModelError
from tracker.core.grouping import grouped
from tracker.core.kinds import NUMBERED, Action
from tracker.core.model_parts import experts_of_a_token
from tracker.engine.forward.layer import FittedReplacement, Replacement
from tracker.engine.forward.streams import StreamPlan, plan_streams
from tracker.engine.refusal import RefusalError
from tracker.engine.scoring.head import Head
from tracker.engine.scoring.masks import AttentionWindows, attention_windows
from tracker.engine.scoring.rows import ANY_LENGTH, Lengths
from tracker.models.devices import take
from tracker.models.hooks import returning
from tracker.models.layers import find_layers
from tracker.models.load import LoadedModel
from tracker.models.offloaded import least_free
from tracker.models.parts.anatomy import KIND_OF, LayerAnatomy
from tracker.models.parts.experts import SharedExperts
from tracker.models.parts.linear_maps import (
    Embeddings,
    RoundedWeights,
    find_embeddings,
    round_embeddings,
)
from tracker.models.parts.sublayers import Sublayers
from tracker.models.pruned import State, as_loaded, left, pruned, put_back


@dataclass(frozen=True)
class Sharing:
    """The parts of a computation that the ablations of a model share, exactly.

    Attributes:
        depth: Whether layers below the removed one are computed once for all ablations.
        tokens: Whether common tokens of the requests of a row are computed once.
        prefix: Whether the common beginning of all documents is computed once for all rows.
        calls: Whether texts of one length share a call, of which only predicting tokens pass the
            head. Otherwise each request is a call of the unchanged model, with all of its logits.
    """

    depth: bool = True
    tokens: bool = True
    prefix: bool = True
    calls: bool = True

    def __str__(self) -> str:
        """Return the names of what is shared, as the ledger and the page show them."""
        names = ("depth", "tokens", "prefix")
        return ", ".join(name for name in names if getattr(self, name)) or "nothing"


FULL = Sharing()


NO_PREFIX = Sharing(prefix=False)


DEPTH_ONLY = Sharing(tokens=False, prefix=False)


PLAIN = Sharing(depth=False, tokens=False, prefix=False)


ONE_BY_ONE = Sharing(depth=False, tokens=False, prefix=False, calls=False)
"""No sharing at all: the reference."""


ALONE = DEPTH_ONLY
"""The sharing for one model by itself: there is no second stream to share depth with."""


@dataclass(frozen=True)
class Quirks:
    """Side effects of calling a model, found by the self-check.

    Attributes:
        lengths: Lengths at which its computation changes.
        leftovers: Original values of the attributes that one call leaves changed for the next.
        first: Original values of what the first call changes for good, including weights.
        stay: Whether a removed layer stays in place and passes on its input, because the model
            cannot be cut there.
        loaded: Whether a copy without layers gets the values that its class computes on loading, if
            possible. Otherwise the layers stay in place, if `stay` says so.
    """

    lengths: Lengths = ANY_LENGTH
    leftovers: State = field(default_factory=dict, compare=False)
    first: State = field(default_factory=dict, compare=False)
    stay: bool = False
    loaded: bool = False


NO_HABITS = Quirks()


ROW_MULTIPLE_ACCELERATOR = 8
"""Multiple of nodes per row on accelerators: attention kernels copy other masks in each layer."""
AT_ONCE = 2048
"""Tokens of all streams that pass a layer at once on a CPU, per thread: intermediate results stay
in the cache, and no large buffers are requested from the system."""
WINDOW_STEP = 256
"""Lengths of text for which attention windows are found are multiples of this."""


def logits_of(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Compute logits of texts [texts, tokens] in one call: [texts, tokens, vocabulary].

    Raises RefusalError if the model returns something else.
    """
    logits = getattr(model(input_ids=ids, use_cache=False), "logits", None)
    if not isinstance(logits, Tensor) or logits.shape[:2] != ids.shape:
        raise RefusalError("it does not return 'logits' of every token")
    return logits


@torch.inference_mode()
def read(loaded: LoadedModel, tokens: Sequence[int]) -> Tensor:
    """Compute the logits of one text in a call of its own: [tokens, vocabulary]."""
    return logits_of(loaded.model, torch.tensor([tokens], device=loaded.device))[0]


def read_for(request: Request, max_length: int) -> tuple[int, ...]:
    """Return the tokens that lm-eval gives a model to read for a request."""
    return (request.context + request.continuation)[-(max_length + 1) :][:-1]


@torch.inference_mode()
def scored(logits: Tensor, continuation: Sequence[int]) -> Response:
    """Score a continuation by the logits of the text that ends before its last token.

    Log-likelihood in nats, greedy flag and hits are computed as in lm-eval.
    """
    logits = logits[-len(continuation) :]
    tokens = torch.tensor(continuation, device=logits.device)
    logprobs = logits.log_softmax(-1).gather(1, tokens[:, None]).sum()
    hits = int((logits.argmax(-1) == tokens).sum())
    return Response(float(logprobs), hits == len(continuation), hits)


@dataclass
class ModelFacts:
    """Facts about a model, computed once and cached.

    Attributes:
        windows: The attention windows of its layers.
        kept_bytes: Bytes of the keys and values of one token in one attention.
        parts: The parts of its layers found so far; see `LayerAnatomy`.
        weights: Weights of its layers in formats.
        ends: Its embedding and output head, with weights in formats.
    """

    windows: AttentionWindows | None = None
    kept_bytes: int | None = None
    parts: dict[Any, Any] = field(default_factory=dict)
    weights: RoundedWeights | None = None
    ends: Embeddings | None = None


@dataclass(frozen=True)
class EngineModel:
    """A model with its layers accessible, for ablations by a plan.

    Attributes:
        loaded: The model.
        max_length: Maximum number of tokens that it reads, as lm-eval determines it.
        quirks: Side effects of a call of the model.
        memory: Bytes that hidden states and kept prefixes may take; None = half of the free memory
            of the fullest device.
        at_once: Tokens of all streams that pass a layer at once on a CPU; None = by its threads.
        row_multiple: Multiple to which the nodes of a row are padded, see `Row.padded`; None = by
            the device.
        replacements: Replacements of layers, by layer.
        facts: Facts about the model, shared by all engines of it.
    """

    loaded: LoadedModel
    max_length: int
    quirks: Quirks = NO_HABITS
    memory: int | None = None
    at_once: int | None = None
    row_multiple: int | None = None
    replacements: Mapping[int, Replacement] = field(default_factory=dict, repr=False, compare=False)
    facts: ModelFacts = field(default_factory=ModelFacts, repr=False, compare=False)

    @property
    def class_name(self) -> str:
        """The name of the model's class, for messages."""
        return type(self.loaded.model).__name__

    def put_back(self) -> None:
        """Undo the side effects of the last call, so that calls do not depend on each other."""
        if self.quirks.leftovers:
            put_back(self.loaded.model, self.quirks.leftovers)

    def left(self, ablation: Ablation) -> list[int]:
        """List the layers of a copy under an ablation, in order; a repeated one twice."""
        return left(len(self.loaded.layers), ablation.removed(), ablation.repeated)

    def read(self, tokens: Sequence[int]) -> Tensor:
        """Return the intact model's logits [tokens, vocabulary], in a call of its own."""
        self.put_back()
        return read(self.loaded, tokens)

    def run(self, tokens: Sequence[int]) -> Any:
        """Return the output of the intact model's base for a text, in a call of its own."""
        self.put_back()
        ids = torch.tensor([tokens], device=self.loaded.device)
        return self.head.base(input_ids=ids, use_cache=False)

    @cached_property
    def budget(self) -> int:
        """The bytes that hidden states and kept prefixes may take."""
        return self.memory or least_free(self.loaded.model, self.loaded.device) // 2

    def streams(self, tokens: int) -> int:
        """Return how many streams of so many tokens each fit into the budget."""
        return self.budget // (tokens * stream_bytes(self.loaded.model))

    def plan(self, ablations: Sequence[Ablation]) -> StreamPlan:
        """Plan where the streams of some ablations fork."""
        tied = any(ablation.ends for ablation in ablations) and self.ends.is_tied
        return plan_streams(ablations, len(self.loaded.layers), tied, self._is_divided(ablations))

    def anatomy_for(self, plan: StreamPlan) -> LayerAnatomy:
        """Return the anatomy of the layers, with the parts found that a plan takes apart."""
        anatomy, components = self.anatomy, {c for step in plan.steps for c in step.components}
        kinds = [KIND_OF[component] for component in NUMBERED if component in components]
        if "shared_expert" in components:
            kinds.append(SharedExperts)
        if any(step.has_sublayers for step in plan.steps) or plan.has_groups_of_maps:
            kinds.append(Sublayers)
        for kind in kinds:  # now, before layers fork
            anatomy.find(kind)
        return anatomy

    @property
    def tokens_at_once(self) -> int | None:
        """The tokens of all streams that pass a layer at once; None = all, as on accelerators."""
        if self.loaded.device.type != "cpu" or self.loaded.offloaded is not None:
            return None
        return self.at_once or AT_ONCE * torch.get_num_threads()

    @property
    def row_size_multiple(self) -> int:
        """The multiple to which the nodes of a row are padded; see `Row.padded`."""
        usual = 1 if self.loaded.device.type == "cpu" else ROW_MULTIPLE_ACCELERATOR
        return self.row_multiple or usual

    @cached_property
    def placed_replacements(self) -> Mapping[int, Replacement]:
        """The replacements of layers, each moved once to the device of its layer.

        With offloaded weights they stay on the host: the device has room for layers alone.
        """
        if self.loaded.offloaded is not None:
            return self.replacements
        placed = dict(self.replacements)
        for index, layer in enumerate(self.loaded.layers):
            if isinstance(fitted := placed.get(index), FittedReplacement):
                device = next((p.device for p in layer.parameters()), self.loaded.device)
                placed[index] = fitted.on(device)
        return placed

    def logits(self, plan: StreamPlan, output: Any, states: Tensor) -> Tensor:
        """Run the head of each of a plan's ablations: [ablations, kept, vocabulary].

        `output` is the output of the base, `states` [ablations, kept, hidden] are the ablations'
        own. All logits are in memory at once.
        """
        if not plan.has_ends:
            return self.head.logits(output, states)
        logits = dict[int, Tensor]()
        for form, numbers in grouped(range(len(states)), lambda n: plan.heads[n]).items():
            with self.having_head(form):
                logits |= zip(numbers, self.head.logits(output, take(states, numbers)), strict=True)
        return torch.stack([logits[n] for n in range(len(states))])

    def windows(self, tokens: int) -> AttentionWindows:
        """Find the attention windows of the layers for texts of so many tokens."""
        facts = self.facts
        if facts.windows is None or facts.windows.tokens < tokens:
            loaded = self.loaded
            reach = min(-(-tokens // WINDOW_STEP) * WINDOW_STEP, max(self.max_length, tokens))
            self.put_back()
            facts.windows = attention_windows(self.head.base, loaded.layers, reach, loaded.device)
            # Windows are needed in the middle of a call, which must begin like every other.
            self.put_back()
        return facts.windows

    @cached_property
    def head(self) -> Head:
        """The output head, behind the model's base."""
        return Head(self.loaded.model)

    def having_head(self, form: str | None) -> AbstractContextManager[None]:
        """Give the head weights in a format until exit; None for its own."""
        return self.ends.having("lm_head", form) if form else nullcontext()

    @property
    def anatomy(self) -> LayerAnatomy:
        """The parts of its layers."""
        facts, loaded = self.facts, self.loaded
        facts.weights = facts.weights or RoundedWeights(self.cached_weights)
        # Not cached: it holds this engine, whose quirks apply to every call of the model.
        return LayerAnatomy(
            loaded.model, loaded.layers, loaded.device, self._alone, facts.parts, facts.weights
        )

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Provide a context in which a call of the model does not affect later passes."""
        self.put_back()
        with nullcontext() if self.loaded.offloaded is None else self.loaded.offloaded.alone():
            yield
        self.put_back()

    def _is_divided(self, ablations: Sequence[Ablation]) -> bool:
        """Check whether layers are divided into attention and MLP; parts can do without."""
        is_whole = any(ablation.has_sublayers for ablation in ablations)
        has_parts = any(ablation.parts for ablation in ablations)
        return is_whole or not has_parts or self.anatomy.is_divided

    @property
    def ends(self) -> Embeddings:
        """The embedding and the head; their formats are large, and each row needs all of them."""
        facts = self.facts
        if facts.ends is None:
            facts.ends = find_embeddings(self.loaded.model, self.budget // 2)
        return facts.ends

    @property
    def cached_weights(self) -> int:
        """The bytes that cached weights in formats may take while no layer uses them."""
        return self.budget // 8


def changed_copy(model: EngineModel, ablation: Ablation, briefly: bool = False) -> LoadedModel:
    """Copy a model and really apply an ablation to the copy.

    The copy shares the weights; removed sublayers stay in place and add nothing.

    Args:
        model: The model.
        ablation: The changes.
        briefly: Whether the copy is for a few calls: with several layers in formats it holds no
            more of their weights than fit, and a layer has them while it is called.

    Returns:
        The copy.
        The copy.
    """
    model.put_back()
    few = briefly and sum(bool(at.rounded) for at in ablation.by_layer.values()) > 1
    cache = RoundedWeights(model.cached_weights) if few else None
    loaded, quirks = model.loaded, model.quirks
    make = partial(
        pruned,
        loaded.model,
        ablation.removed(),
        quirks.first,
        changes=[*_changes(model, ablation, cache)],
        repeated=ablation.repeated,
    )
    copied = make(stay=quirks.stay and not quirks.loaded)
    if quirks.loaded:
        try:
            as_loaded(loaded.model, copied, model.left(ablation))
        except ModelError:  # no checkpoint can hold such layers
            copied = make(stay=quirks.stay)
    round_embeddings(copied, ablation.ends)
    return replace(loaded, model=copied, layers=find_layers(copied))


def _changes(
    model: EngineModel, ablation: Ablation, cache: RoundedWeights | None
) -> Iterator[tuple[int, Callable[[nn.Module], object]]]:
    """Yield the changes of layers that an ablation neither removes nor repeats.

    Each layer comes with the function that changes the weights or the output of a copy of it.
    `cache` is as for `round_layer`.
    """
    for change in ablation.replaced:
        # The layer still runs; its output is dropped.
        make = partial(model.replacements[change.layer].change, change.action)
        yield change.layer, partial(returning, make=make)
    if any(c.action.enters and c.action is not Action.REPEAT for c in ablation.changes):
        yield from model.anatomy.changes(ablation, cache)


def stream_bytes(model: PreTrainedModel) -> int:
    """Estimate the maximum bytes of one token of one stream inside a layer.

    A mixture holds a token once for each of its experts: before, inside and behind the expert.
    """
    config = model.config.get_text_config()

    def width(name: str, otherwise: int) -> int:
        size = getattr(config, name, None) or otherwise
        return size if isinstance(size, int) else max(size)

    between = width("intermediate_size", 4 * config.hidden_size)
    of_expert = 2 * config.hidden_size + 3 * width("moe_intermediate_size", between)
    wide = 6 * config.hidden_size + max(3 * between, experts_of_a_token(config) * of_expert)
    return int(wide * model.dtype.itemsize)

"""Access a model's layers and their modules, and cache facts about the model.

The function `make_changed_copy` makes changed copies of a model.
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

from tracker.engine.forward.layer import FittedReplacement, Replacement
from tracker.engine.forward.streams import Ablations, StreamPlan, plan_streams
from tracker.engine.refusal import RefusalError
from tracker.engine.scoring.head import Head
from tracker.engine.scoring.masks import AttentionWindows, find_attention_windows
from tracker.engine.scoring.rows import ANY_LENGTH, Lengths
from tracker.models.devices import take_entries
from tracker.models.hooks import replace_output
from tracker.models.layers import find_layers
from tracker.models.load import LoadedModel
from tracker.models.offloaded import min_free_memory
from tracker.models.parts.anatomy import PART_CLASSES, LayerAnatomy
from tracker.models.parts.experts import SharedExperts
from tracker.models.parts.linear_maps import (
    Embeddings,
    RoundedWeights,
    find_embeddings,
    round_embeddings,
)
from tracker.models.parts.sublayers import Sublayers
from tracker.models.pruned import (
    ModuleState,
    prune_model,
    reload_values,
    remaining_layers,
    restore_state,
)
from tracker.schema.changes import Ablation
from tracker.schema.documents import Request, Response
from tracker.schema.errors import ModelError
from tracker.schema.grouping import group_by
from tracker.schema.kinds import NUMBERED_COMPONENTS, Action
from tracker.schema.model_parts import experts_per_token


@dataclass(frozen=True)
class Sharing:
    """Kinds of computation that are done once for several ablations or requests.

    Attributes:
        depth: Whether layers below a removed layer are computed once for all ablations.
        tokens: Whether common beginnings of requests in one forward pass are computed once.
        prefix: Whether the common beginning of all documents is computed once for all rows.
        calls: Whether texts of equal length are computed in one call of the model. If False, each
            request is read in a separate call.
    """

    depth: bool = True
    tokens: bool = True
    prefix: bool = True
    calls: bool = True

    def __str__(self) -> str:
        """Return the names of the shared computations, such as `depth, tokens`."""
        names = ("depth", "tokens", "prefix")
        return ", ".join(name for name in names if getattr(self, name)) or "nothing"


FULL = Sharing()
NO_PREFIX = Sharing(prefix=False)
DEPTH_ONLY = Sharing(tokens=False, prefix=False)
PLAIN = Sharing(depth=False, tokens=False, prefix=False)
ONE_BY_ONE = Sharing(depth=False, tokens=False, prefix=False, calls=False)
"""No sharing at all, as in the reference."""


@dataclass(frozen=True)
class Quirks:
    """Side effects of calling a model, found by the self-check.

    Attributes:
        lengths: Text lengths at which the model switches to a different computation.
        leftovers: Attributes that each call changes and the next call uses, with their original
            values.
        first: Attributes and weights that the first call of the model changes permanently, with
            their original values.
        in_place: Whether a removed layer stays in the model and returns its input.
        as_loaded: Whether a copy without some layers gets the attribute values of a model that is
            loaded from a checkpoint without these layers.
    """

    lengths: Lengths = ANY_LENGTH
    leftovers: ModuleState = field(default_factory=dict, compare=False)
    first: ModuleState = field(default_factory=dict, compare=False)
    in_place: bool = False
    as_loaded: bool = False


NO_QUIRKS = Quirks()


ROW_MULTIPLE_ACCELERATOR = 8
"""Multiple of nodes per row on accelerators; attention kernels copy masks of other sizes."""
PASS_TOKENS_PER_THREAD = 2048
"""Number of tokens of all streams that pass a layer at once on a CPU, per thread. Intermediate
results stay in the cache, and no large buffers are requested from the system."""
WINDOW_STEP = 256
"""Attention windows are found for lengths of text that are multiples of this number."""


def compute_logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Compute the logits [texts, tokens, vocabulary] of token ids [texts, tokens] in one call.

    Raises RefusalError if the model returns no logits for every token.
    """
    logits = getattr(model(input_ids=ids, use_cache=False), "logits", None)
    if not isinstance(logits, Tensor) or logits.shape[:2] != ids.shape:
        raise RefusalError("the model does not return 'logits' for every token")
    return logits


def input_tokens(request: Request, max_length: int) -> tuple[int, ...]:
    """Return the tokens of a request that lm-eval passes to the model.

    The text is truncated from the left. The last token is left out, because the model predicts this
    token but does not read it.
    """
    return (request.context + request.continuation)[-(max_length + 1) :][:-1]


@torch.inference_mode()
def score_continuation(logits: Tensor, continuation: Sequence[int]) -> Response:
    """Score a continuation as lm-eval does.

    `logits` contains the logits at each token of context and continuation except the last token of
    the continuation. The log-likelihood is in nats.
    """
    logits = logits[-len(continuation) :]
    tokens = torch.tensor(continuation, device=logits.device)
    logprobs = logits.log_softmax(-1).gather(1, tokens[:, None]).sum()
    is_greedy = logits.argmax(-1) == tokens
    hits, leading = int(is_greedy.sum()), int(is_greedy.cumprod(0).sum())
    return Response(float(logprobs), hits == len(continuation), hits, leading=leading)


@dataclass
class ModelFacts:
    """Facts about a model, computed once and cached.

    Attributes:
        windows: The attention windows of the model's layers.
        cache_bytes: Bytes of the cached keys and values of one token in one layer.
        parts: Cache of the layers' modules (e.g. attention, experts) that `LayerAnatomy` has found.
        weights: Cache of quantised weights of the layers.
        embeddings: The embedding and the output head, with a cache of their quantised weights.
    """

    windows: AttentionWindows | None = None
    cache_bytes: int | None = None
    parts: dict[Any, Any] = field(default_factory=dict)
    weights: RoundedWeights | None = None
    embeddings: Embeddings | None = None


@dataclass(frozen=True)
class EngineModel:
    """A model, with the settings and cached facts that are needed to run ablations.

    Attributes:
        loaded: The loaded model.
        max_length: Maximum number of tokens that the model reads, determined as in lm-eval.
        quirks: Side effects of calling the model.
        memory: Maximum bytes of hidden states and cached prefixes. None = half of the device's free
            memory.
        pass_tokens: Maximum number of tokens per call of a layer on a CPU, for all ablations
            together. None = a number that depends on the number of threads.
        row_multiple: Rows are padded to a multiple of this number of tokens, see `Row.pad_nodes`.
            None = the default number for the device.
        replacements: Functions that replace layers, by layer number.
        facts: Cached facts about the model, shared by all engines of the model.
    """

    loaded: LoadedModel
    max_length: int
    quirks: Quirks = NO_QUIRKS
    memory: int | None = None
    pass_tokens: int | None = None
    row_multiple: int | None = None
    replacements: Mapping[int, Replacement] = field(default_factory=dict, repr=False, compare=False)
    facts: ModelFacts = field(default_factory=ModelFacts, repr=False, compare=False)

    @property
    def class_name(self) -> str:
        """The name of the model's class, for messages."""
        return type(self.loaded.model).__name__

    def restore_state(self) -> None:
        """Undo the side effects of the model's last call."""
        if self.quirks.leftovers:
            restore_state(self.loaded.model, self.quirks.leftovers)

    def layers_left(self, ablation: Ablation) -> list[int]:
        """List the layers that run under an ablation, in order, with repetitions."""
        return remaining_layers(len(self.loaded.layers), ablation.removed(), ablation.repetitions)

    @torch.inference_mode()
    def read_logits(self, tokens: Sequence[int]) -> Tensor:
        """Compute the logits [tokens, vocabulary] of a text with the unchanged model."""
        self.restore_state()
        ids = torch.tensor([tokens], device=self.loaded.device)
        return compute_logits(self.loaded.model, ids)[0]

    def run_text(self, tokens: Sequence[int]) -> Any:
        """Return the unchanged model's output for a text, computed without the output head."""
        self.restore_state()
        ids = torch.tensor([tokens], device=self.loaded.device)
        return self.head.base(input_ids=ids, use_cache=False)

    @cached_property
    def budget(self) -> int:
        """The maximum number of bytes for hidden states and cached prefixes."""
        return self.memory or min_free_memory(self.loaded.model, self.loaded.device) // 2

    def count_streams(self, tokens: int) -> int:
        """Return how many streams (ablations) of `tokens` tokens fit into the memory budget."""
        return self.budget // (tokens * stream_bytes(self.loaded.model))

    def plan(self, ablations: Ablations) -> StreamPlan:
        """Plan how to compute several ablations in one forward pass."""
        is_tied = any(ablation.outer_formats for ablation in ablations) and self.embeddings.is_tied
        # Parts of attentions and MLPs can be removed from layers that are not divided into the two.
        has_parts = any(ablation.parts for ablation in ablations)
        has_sublayers = any(ablation.has_sublayers for ablation in ablations)
        divided = has_sublayers or not has_parts or self.anatomy.has_sublayers
        return plan_streams(ablations, len(self.loaded.layers), is_tied, divided)

    def find_anatomy(self, plan: StreamPlan) -> LayerAnatomy:
        """Return a `LayerAnatomy` that has located all modules that a plan changes."""
        anatomy, components = self.anatomy, {c for step in plan.steps for c in step.components}
        kinds = [PART_CLASSES[name] for name in NUMBERED_COMPONENTS if name in components]
        if "shared_expert" in components:
            kinds.append(SharedExperts)
        if any(step.has_sublayers for step in plan.steps) or plan.has_groups_of_maps:
            kinds.append(Sublayers)
        for kind in kinds:  # now, before layers fork
            anatomy.find(kind)
        return anatomy

    @property
    def max_pass_tokens(self) -> int | None:
        """The maximum number of tokens per call of a layer; None if there is no limit."""
        if self.loaded.device.type != "cpu" or self.loaded.offloaded is not None:
            return None
        return self.pass_tokens or PASS_TOKENS_PER_THREAD * torch.get_num_threads()

    @property
    def row_size_multiple(self) -> int:
        """Rows are padded to a multiple of this number of tokens."""
        default = 1 if self.loaded.device.type == "cpu" else ROW_MULTIPLE_ACCELERATOR
        return self.row_multiple or default

    @cached_property
    def device_replacements(self) -> Mapping[int, Replacement]:
        """Functions that replace layers, with their tensors on the layer's device.

        If weights are offloaded, the tensors stay in host memory.
        """
        if self.loaded.offloaded is not None:
            return self.replacements
        replacements = dict(self.replacements)
        for index, layer in enumerate(self.loaded.layers):
            if isinstance(replacement := replacements.get(index), FittedReplacement):
                device = next((p.device for p in layer.parameters()), self.loaded.device)
                replacements[index] = replacement.to_device(device)
        return replacements

    def logits(self, plan: StreamPlan, output: Any, states: Tensor) -> Tensor:
        """Compute logits [ablations, tokens, vocabulary], with exact or quantised output heads.

        `plan` gives each ablation's head format. `output` is the output of the model without the
        head, and `states` [ablations, tokens, hidden] are the last hidden states. All
        logits are in memory at the same time.
        """
        if not plan.has_rounded_embeddings:
            return self.head.logits(output, states)
        logits = dict[int, Tensor]()
        for form, numbers in group_by(range(len(states)), lambda n: plan.head_formats[n]).items():
            with self.use_head_format(form):
                parts = self.head.logits(output, take_entries(states, numbers))
                logits |= zip(numbers, parts, strict=True)
        return torch.stack([logits[n] for n in range(len(states))])

    def find_windows(self, tokens: int) -> AttentionWindows:
        """Find the attention windows of the layers for texts of up to `tokens` tokens."""
        facts = self.facts
        if facts.windows is None or facts.windows.tokens < tokens:
            base, loaded = self.head.base, self.loaded
            n_tokens = min(-(-tokens // WINDOW_STEP) * WINDOW_STEP, max(self.max_length, tokens))
            self.restore_state()
            facts.windows = find_attention_windows(base, loaded.layers, n_tokens, loaded.device)
            # Windows are needed in the middle of a call, which must begin like every other.
            self.restore_state()
        return facts.windows

    @cached_property
    def head(self) -> Head:
        """The output head, which computes logits from the last hidden states."""
        return Head(self.loaded.model)

    def use_head_format(self, form: str | None) -> AbstractContextManager[None]:
        """Quantise the weights of the output head in a `with` block, unless `form` is None."""
        return self.embeddings.temporary_format("lm_head", form) if form else nullcontext()

    @property
    def anatomy(self) -> LayerAnatomy:
        """An object that finds the modules (e.g. the attention) of each layer."""
        facts, loaded = self.facts, self.loaded
        facts.weights = facts.weights or RoundedWeights(self.weight_cache_bytes)
        # Not cached: it holds this engine, whose quirks apply to every call of the model.
        return LayerAnatomy(
            loaded.model, loaded.layers, loaded.device, self._isolate, facts.parts, facts.weights
        )

    @contextmanager
    def _isolate(self) -> Iterator[None]:
        """Reset attributes that model calls change, before and after a `with` block."""
        self.restore_state()
        offloaded = self.loaded.offloaded
        with nullcontext() if offloaded is None else offloaded.sequential_passes():
            yield
        self.restore_state()

    @property
    def embeddings(self) -> Embeddings:
        """The embedding and the output head, with a cache of their quantised weights."""
        facts = self.facts
        if facts.embeddings is None:
            facts.embeddings = find_embeddings(self.loaded.model, self.budget // 2)
        return facts.embeddings

    @property
    def weight_cache_bytes(self) -> int:
        """The maximum size of the cache of quantised weights, in bytes."""
        return self.budget // 8


def make_changed_copy(model: EngineModel, ablation: Ablation, brief: bool = False) -> LoadedModel:
    """Apply an ablation to a copy of a model.

    Unchanged weights are not copied. Removed sublayers stay in the copy, but add nothing to the
    residual stream.

    Args:
        model: The model.
        ablation: The changes to apply to the copy.
        brief: Whether the copy is only used for a few calls. A brief copy can quantise a layer's
            weights only while the layer runs, to save memory.

    Returns:
        The changed copy.
    """
    model.restore_state()
    is_limited = brief and sum(bool(change.roundings) for change in ablation.by_layer.values()) > 1
    cache = RoundedWeights(model.weight_cache_bytes) if is_limited else None
    loaded, quirks = model.loaded, model.quirks
    make_copy = partial(
        prune_model,
        loaded.model,
        ablation.removed(),
        quirks.first,
        changes=[*_layer_changes(model, ablation, cache)],
        repeated=ablation.repetitions,
    )
    model_copy = make_copy(in_place=quirks.in_place and not quirks.as_loaded)
    if quirks.as_loaded:
        try:
            reload_values(loaded.model, model_copy, model.layers_left(ablation))
        except ModelError:  # no checkpoint can hold such layers
            model_copy = make_copy(in_place=quirks.in_place)
    round_embeddings(model_copy, ablation.outer_formats)
    return replace(loaded, model=model_copy, layers=find_layers(model_copy))


def _layer_changes(
    model: EngineModel, ablation: Ablation, cache: RoundedWeights | None
) -> Iterator[tuple[int, Callable[[nn.Module], object]]]:
    """Yield (layer number, function that changes the layer) for changes inside layers."""
    for change in ablation.replacements:
        # The layer still runs; its output is dropped.
        make = partial(model.replacements[change.layer].apply, change.action)
        yield change.layer, partial(replace_output, make=make)
    if any(c.action.runs_modules and c.action is not Action.REPEAT for c in ablation.changes):
        yield from model.anatomy.part_changes(ablation, cache)


def stream_bytes(model: PreTrainedModel) -> int:
    """Estimate the peak memory of a layer, in bytes per token and ablation."""
    config = model.config.get_text_config()

    def width(name: str, default: int) -> int:
        size = getattr(config, name, None) or default
        return size if isinstance(size, int) else max(size)

    inner_width = width("intermediate_size", 4 * config.hidden_size)
    expert_width = 2 * config.hidden_size + 3 * width("moe_intermediate_size", inner_width)
    module_width = max(3 * inner_width, experts_per_token(config) * expert_width)
    return int((6 * config.hidden_size + module_width) * model.dtype.itemsize)

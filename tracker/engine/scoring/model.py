"""A model taken apart: its layers, their parts, and facts that are computed once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from tracker.core.changes import INTACT, Ablation
from tracker.core.grouping import grouped
from tracker.engine.forward.replacements import FittedReplacement, Replacement
from tracker.engine.forward.streams import StreamPlan, plan_streams
from tracker.engine.memory import stream_bytes
from tracker.engine.scoring.head import Head
from tracker.engine.scoring.masks import AttentionWindows, attention_windows
from tracker.engine.scoring.plain_call import read
from tracker.engine.scoring.rounded_embeddings import RoundedEmbeddings
from tracker.engine.scoring.score import Parts, kept_bytes
from tracker.engine.scoring.sharing import NO_HABITS, Quirks
from tracker.models.load import LoadedModel
from tracker.models.parts.anatomy import LayerAnatomy
from tracker.models.parts.embeddings import find_embeddings
from tracker.models.parts.experts import Experts, SharedExperts
from tracker.models.parts.heads import Heads
from tracker.models.parts.linear_maps import RoundedWeights
from tracker.models.parts.probe import LayerPart
from tracker.models.parts.sublayers import Sublayers
from tracker.models.placement import least_free
from tracker.models.pruned import left, put_back
from tracker.models.slices import take

ROW_MULTIPLE_ACCELERATOR = 8
"""Rows of other sizes have their masks copied by the attention kernels, in each layer."""
AT_ONCE = 2048
"""Tokens of all streams that pass a layer at once on a CPU, a thread: intermediate results stay in
the cache, and the system is not asked for a large buffer for each."""
WINDOW_STEP = 256
"""Lengths of text for which attention windows are found are multiples of this."""
_CHANGED: Mapping[str, type[LayerPart]] = {
    "heads": Heads,
    "experts": Experts,
    "shared": SharedExperts,
}
"""Names in `LayerStep.changes`, with the parts that must be found."""


@dataclass
class ModelFacts:
    """Facts about a model, computed once and cached.

    Attributes:
        windows: The attention windows of its layers.
        kept_bytes: Bytes of the keys and values of one token in one attention.
        parts: The parts of its layers that were needed so far; see `LayerAnatomy`.
        weights: Weights of its layers in formats.
        ends: Its embedding and output head, with weights in formats.
    """

    windows: AttentionWindows | None = None
    kept_bytes: int | None = None
    parts: dict[Any, Any] = field(default_factory=dict)
    weights: RoundedWeights | None = None
    ends: RoundedEmbeddings | None = None


@dataclass(frozen=True)
class EngineModel:
    """A model that layers are removed from, taken apart as a plan needs it.

    Attributes:
        loaded: The model.
        max_length: Tokens that it reads at most, as lm-eval determines it.
        quirks: Side effects of a call of the model.
        memory: Bytes that hidden states and kept prefixes may take; None = half of what is free on
            the fullest device.
        at_once: Tokens of all streams that pass a layer at once on a CPU; None = by its threads.
        row_multiple: A multiple of so many nodes is scored, see `Row.padded`; None = by the device.
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
        """The name of the model's class, as it stands in messages."""
        return type(self.loaded.model).__name__

    def put_back(self) -> None:
        """Undo what the last call left behind, so that no call depends on the one before."""
        if self.quirks.leftovers:
            put_back(self.loaded.model, self.quirks.leftovers)

    def left(self, ablation: Ablation) -> list[int]:
        """List which layers a copy has, in order; a repeated one twice."""
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
        """Bytes that hidden states and kept prefixes may take."""
        return self.memory or least_free(self.loaded.model, self.loaded.device) // 2

    def streams(self, tokens: int) -> int:
        """Count the streams of so many tokens each that fit into the budget."""
        return self.budget // (tokens * stream_bytes(self.loaded.model))

    def plan(self, ablations: Sequence[Ablation]) -> StreamPlan:
        """Plan where the streams of some ablations fork."""
        tied = any(ablation.ends for ablation in ablations) and self.ends.matrices.is_tied
        return plan_streams(ablations, len(self.loaded.layers), tied, self._is_divided(ablations))

    def parts(self, plan: StreamPlan) -> Parts:
        """Take the model apart for a plan."""
        loaded, on_cpu, at_once = self.loaded, self.loaded.device.type == "cpu", None
        if on_cpu and loaded.offloaded is None:  # elsewhere all streams pass a layer together
            at_once = self.at_once or AT_ONCE * torch.get_num_threads()
        anatomy = self.anatomy
        changes = {name for step in plan.steps for name in step.changes}
        kinds = [kind for name, kind in _CHANGED.items() if name in changes]
        if any(step.has_sublayers for step in plan.steps) or plan.has_groups_of_maps:
            kinds.append(Sublayers)
        for kind in kinds:  # now, before layers fork
            anatomy.find(kind)
        return Parts(
            loaded.model,
            loaded.layers,
            anatomy,
            self.head,
            loaded.device,
            self._windows,
            self._placed_replacements,
            self.ends if plan.has_ends else None,
            at_once,
            self.row_multiple or (1 if on_cpu else ROW_MULTIPLE_ACCELERATOR),
        )

    @cached_property
    def _placed_replacements(self) -> Mapping[int, Replacement]:
        """Replacements of layers on the devices of these, moved once.

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
        """Run the head that each of a plan's ablations has: [ablations, kept, vocabulary].

        `output` is what the base returned, `states` [ablations, kept, hidden] are the ablations'
        own. All logits are there at once.
        """
        if not plan.has_ends:
            return self.head.logits(output, states)
        parts, logits = self.parts(plan), dict[int, Tensor]()
        for form, numbers in grouped(range(len(states)), lambda n: plan.heads[n]).items():
            with parts.having_head(form):
                logits |= zip(numbers, self.head.logits(output, take(states, numbers)), strict=True)
        return torch.stack([logits[n] for n in range(len(states))])

    def _windows(self, tokens: int) -> AttentionWindows:
        """Find the attention windows of the layers for texts of so many tokens."""
        facts = self.facts
        if facts.windows is None or facts.windows.tokens < tokens:
            loaded = self.loaded
            reach = min(-(-tokens // WINDOW_STEP) * WINDOW_STEP, max(self.max_length, tokens))
            self.put_back()
            facts.windows = attention_windows(self.head.base, loaded.layers, reach, loaded.device)
            # It is needed in the middle of a call, which must begin as every other.
            self.put_back()
        return facts.windows

    @property
    def kept_bytes(self) -> int:
        """Bytes of the keys and values of one token in one attention."""
        if self.facts.kept_bytes is None:
            self.put_back()
            alone = plan_streams([INTACT], len(self.loaded.layers))
            self.facts.kept_bytes = kept_bytes(self.parts(alone))
        return self.facts.kept_bytes

    @cached_property
    def head(self) -> Head:
        """The output head, behind the model's base."""
        return Head(self.loaded.model)

    @property
    def anatomy(self) -> LayerAnatomy:
        """The parts of its layers."""
        facts, loaded = self.facts, self.loaded
        facts.weights = facts.weights or RoundedWeights(self.cached_weights)
        # Not kept: it holds this engine, whose quirks a call of the model must heed.
        return LayerAnatomy(
            loaded.model, loaded.layers, loaded.device, self._alone, facts.parts, facts.weights
        )

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Provide a context in which a call of the model leaves no trace in later passes."""
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
    def ends(self) -> RoundedEmbeddings:
        """The embedding and the head; in formats each is large, and each row wants all of them."""
        facts = self.facts
        if facts.ends is None:
            weights = RoundedWeights(self.budget // 2)
            facts.ends = RoundedEmbeddings(find_embeddings(self.loaded.model), weights)
        return facts.ends

    @property
    def cached_weights(self) -> int:
        """Bytes that weights in formats may take while no layer has them."""
        return self.budget // 8

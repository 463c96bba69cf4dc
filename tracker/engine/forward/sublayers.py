"""Removed sublayers: attentions and MLPs that only some streams of a layer compute."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tracker.engine.forward.base import LayerSite, ModuleFork, by_stream, cut
from tracker.models.hooks import first_of, nothing, state_of, with_first
from tracker.models.parts.sublayers import Sublayers
from tracker.models.slices import take


@dataclass
class SublayerFork(ModuleFork):
    """The attention or the MLP of a layer.

    Streams that fork within the layer enter it with the same state, so the attention of such a
    state is computed once: with its MLP removed, a stream takes the attention of the baseline.
    The input [entering × rows, tokens, hidden] is cut to the streams that are computed. The outputs
    are distributed to [entering × rows, tokens, hidden] again. A stream without the sublayer gets
    what a silent sublayer returns: zeros where the layer adds to the residual stream, the residual
    stream itself where the sublayer does.

    Attributes:
        computed: Places of the entering streams that the sublayer computes.
        taken: For each entering stream the output that it takes; None = the sublayer is removed.
        outputs: Number of outputs: one for each computed stream, or more where some lack heads.
        batched: Whether each stream has a row of its own in all inputs of the layer.
    """

    computed: Sequence[int]
    taken: tuple[int | None, ...]
    outputs: int
    batched: bool

    @classmethod
    def of_layer(cls, site: LayerSite) -> Iterator[ModuleFork]:
        """Yield the forks of both sublayers."""
        step = site.step
        if step.has_sublayers:
            parts = site.anatomy.at(Sublayers, site.index)
            yield cls(parts.attention, step.computed, step.projected, len(step.heads), site.batched)
            yield cls(parts.mlp, step.mlps, step.mlp, len(step.mlps), site.batched)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the output of the sublayer, computing only what the streams need."""
        entering, computed = len(self.taken), list(self.computed)
        if self.taken == tuple(range(entering)) == tuple(computed):
            return self.original(*args, **kwargs)
        given = (args, kwargs)
        if self.batched:
            args, kwargs = cut((args, kwargs), entering, computed)
        else:
            hidden: Tensor = state_of(args, kwargs)
            args = tuple(self._computed_rows("", value, hidden) for value in args)
            kwargs = {n: self._computed_rows(n, value, hidden) for n, value in kwargs.items()}
        output = self.original(*args, **kwargs)
        # Never of no stream: the baseline passes everything.
        added = first_of(output)
        outputs = by_stream(added, self.outputs, "what its attention makes of its heads has")
        silent = nothing(self.module, *given, added, len(added) * entering // self.outputs)
        nil = by_stream(silent, entering)
        sources = enumerate(self.taken)
        merged = [nil[stream] if source is None else outputs[source] for stream, source in sources]
        return with_first(output, torch.stack(merged).flatten(0, 1))

    def _computed_rows(self, name: str, value: Any, hidden: Tensor) -> Any:
        """Cut an argument with a row a stream: of the hidden states' shape, or Bloom's ALiBi."""
        if not isinstance(value, Tensor):
            return value
        if value.shape[:2] == hidden.shape[:2] or (name == "alibi" and value.ndim == 3):
            return take(by_stream(value, len(self.taken)), self.computed).flatten(0, 1)
        return value

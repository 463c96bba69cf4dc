"""Interventions on whole layers: layers that are removed, replaced or passed again."""

from __future__ import annotations

from torch import Tensor

from tracker.core.kinds import Action
from tracker.engine.forward.layer import LayerFork
from tracker.engine.refusal import RefusalError
from tracker.models.offloaded import is_absent
from tracker.models.slices import put, take


class SkippedLayer:
    """A removed layer: the stream keeps the state that it came with."""

    def forward(self, fork: LayerFork, before: Tensor, after: Tensor) -> None:
        """Copy the states of streams without the layer."""
        for stream, action in enumerate(fork.step.actions):
            if action is Action.SKIP:
                after[stream] = before[fork.step.origin(stream)]


class ReplacedLayer:
    """A layer of which a mean update, a factor or a linear map takes the place."""

    def forward(self, fork: LayerFork, before: Tensor, after: Tensor) -> None:
        """Compute the replacement for the streams that have one."""
        for stream, action in enumerate(fork.step.actions):
            if action.is_fitted:
                replacement = fork.common.replacements[fork.index]
                after[stream] = replacement.change(action, before[fork.step.origin(stream)])


class RepeatedSpan:
    """Layers that are passed again, behind the last of them.

    Each of them gets the inputs that it had, besides the hidden state, when all streams passed it.
    """

    def forward(self, fork: LayerFork, before: Tensor, after: Tensor) -> None:
        """Pass the spans again that end at the layer."""
        repeating = fork.step.repeating
        if not repeating:
            return
        if fork.common.batched:
            raise RefusalError("a layer that is passed again would need a cache of its own")
        states = take(after, [source for _, source, _ in repeating])
        spans = [span for *_, span in repeating]
        for time in range(1, max(span.repeats for span in spans)):
            for layer in range(min(span.layer for span in spans), fork.index + 1):
                streams = [
                    stream
                    for stream, span in enumerate(spans)
                    if span.layer <= layer and time < span.repeats
                ]
                if streams:
                    repeated = fork.common.forks[layer]
                    if any(map(is_absent, repeated.module.parameters())):
                        raise RefusalError(
                            "layers that rest elsewhere cannot be passed again together"
                        )
                    put(states, streams, repeated.run(take(states, streams)))
        put(after, [stream for stream, *_ in repeating], states)

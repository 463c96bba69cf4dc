"""The common beginning of many documents (few-shot examples), read once by every stream.

Its keys and values are kept, layer by layer, for just the streams that pass the layer's attention;
each row then attends to them.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from tracker.engine.forward.streams import StreamPlan
from tracker.engine.scoring.rows import Lengths
from tracker.engine.scoring.tree import alike

SHORTEST = 48
"""Tokens from which a common beginning is read apart: below, repeating it in every row is cheap."""
MARGIN = 64
"""Tokens by which a buffer is larger than it must be."""
WORTH = 0.9
"""Share of a new beginning from which one that was read already serves it."""


class GrowingLayer(DynamicLayer):  # type: ignore[misc]
    """Keys and values [streams, heads, tokens, size] in a buffer with room to grow.

    A buffer that is too short is replaced by one with `MARGIN` tokens to spare, so that a token
    that is appended while a text is generated is written in its place and nothing else is copied.
    What `update` returns is the front of the buffer, `[:, :, :tokens]`, a view.

    A beginning that is `kept` stands still: what a row adds is forgotten with the next row. A row's
    `update` writes its keys [streams, heads, row, size] behind the beginning's and gets both, and
    the next row writes over them, as if the row had never been. No row sees another one, because
    what `update` returns ends with the row's own last token; and no row copies the beginning,
    unless it needs a longer buffer.
    """

    kept = False

    def __init__(self) -> None:
        super().__init__()
        self.tokens = 0

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append keys and values, and return all."""
        if not self.tokens:
            self.keys, self.values = key_states, value_states
            self.is_initialized = True
        stop = self.tokens + key_states.shape[-2]
        if self.keys.shape[-2] < stop:
            self.keys, self.values = (self._wider(x, stop) for x in (self.keys, self.values))
        if self.tokens:
            self.keys[:, :, self.tokens : stop] = key_states
            self.values[:, :, self.tokens : stop] = value_states
        if not self.kept:
            self.tokens = stop
        return self.keys[:, :, :stop], self.values[:, :, :stop]

    def get_seq_length(self) -> int:
        """Say how many tokens are held."""
        return self.tokens

    def _wider(self, held: Tensor, tokens: int) -> Tensor:
        wide = held.new_empty(*held.shape[:2], tokens + MARGIN, held.shape[-1])
        wide[:, :, : self.tokens] = held[:, :, : self.tokens]
        return wide


@dataclass
class Prefix:
    """A common beginning that was read.

    Attributes:
        plan: For which streams it was read.
        tokens: Its token ids; of as many as there were when it was read, or the first of them.
        cache: Its keys and values, as the model's base takes them. A layer holds [computed
            attentions, heads, tokens, size]: only streams that pass its attention, in the plan's
            order, so that a row under the same plan meets its own.
        proxies: Of each of its tokens [`OBSERVED`, tokens, layers].
    """

    plan: StreamPlan
    tokens: tuple[int, ...]
    cache: Cache
    proxies: Tensor

    def __post_init__(self) -> None:
        self._read = len(self.tokens)
        self._keep(self._read)

    def cut_to(self, beginning: tuple[int, ...], lengths: Lengths) -> bool:
        """Shorten it to what it shares with another beginning, and say whether that was worth it.

        It is where nearly all of the other beginning is shared; if not, nothing is changed. Keys
        and values of the remaining tokens depend on none that is cut off, since the model is
        causal, and on how many there were only where `lengths` says so.
        """
        shared = alike(self.tokens, beginning)
        if shared < max(SHORTEST, WORTH * len(beginning)):
            return False
        if lengths.side(shared) != lengths.side(self._read):
            return False
        self._keep(shared)
        return True

    def begins(self, prompt: Sequence[int]) -> bool:
        """Say whether a prompt begins with it, and goes on."""
        own = len(self.tokens)
        return own < len(prompt) and tuple(prompt[:own]) == self.tokens

    def _keep(self, tokens: int) -> None:
        self.tokens = self.tokens[:tokens]
        self.proxies = self.proxies[:, :tokens]
        for layer in self.cache.layers:
            layer.kept, layer.tokens = True, tokens


def new_cache() -> Cache:
    """Make an empty cache that holds whole texts, also for layers with a sliding window.

    How far a layer sees is the masks' affair: a cache that drops what lies before the window of the
    last token would drop what nodes on other branches of the tree still see.
    """
    return Cache(layer_class_to_replicate=GrowingLayer)


def cache_argument(base: Any) -> str | None:
    """Name the argument by which a model's base takes a cache of keys and values; None without."""
    names = inspect.signature(base.forward).parameters
    return next((name for name in ("cache", "past_key_values") if name in names), None)

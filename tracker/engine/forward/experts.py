"""Removed experts: routers that choose among fewer of them, shared experts that give zeros."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tracker.engine.forward.base import LayerSite, ModuleFork, by_stream
from tracker.models.hooks import call_with, first_of, state_of, with_first
from tracker.models.parts.experts import Experts, SharedExperts, routed
from tracker.models.slices import neighbours, take


@dataclass
class RouterFork(ModuleFork):
    """The router of a mixture, which in some streams chooses among fewer experts.

    Its input are the tokens of the streams whose MLPs are computed, stream by stream. Its output
    for a stream is that of a router with rows for the remaining experts alone, in the numbers of
    all: so the experts are called once.

    Attributes:
        experts: The experts of the layer.
        remaining: For each computed MLP the experts that are left; None for all.
    """

    experts: Experts
    remaining: Sequence[list[int] | None]

    @classmethod
    def of_layer(cls, site: LayerSite) -> Iterator[ModuleFork]:
        """Yield the fork of the router, if some stream lacks experts."""
        if "experts" in site.step.changes:
            experts = site.anatomy.at(Experts, site.index)
            remaining = [
                experts.without(gone, site.name) if gone else None for gone in site.step.experts
            ]
            yield cls(site.layer.get_submodule(experts.router), experts, remaining)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the router's choices for all streams."""
        streams, given = len(self.remaining), (args, kwargs)
        states = by_stream(state_of(args, kwargs), streams, "the router of its experts has")
        intact = [stream for stream, remaining in enumerate(self.remaining) if remaining is None]
        # Never of no stream: the baseline lacks none.
        whole = call_with(self.original, take(states, intact).flatten(0, 1), *given)
        parted = zip(*(by_stream(table, len(intact)) for table in whole), strict=True)
        choices = [
            next(parted)
            if remaining is None
            else routed(self.module, self.experts, remaining, whole, state, given)
            for remaining, state in zip(self.remaining, states, strict=True)
        ]
        make = getattr(type(whole), "_make", type(whole))
        return make(torch.cat(tables) for tables in zip(*choices, strict=True))


@dataclass
class SharedExpertFork(ModuleFork):
    """A shared expert, which gives zeros in some streams.

    Attributes:
        streams: Number of computed MLPs, whose tokens are its input, stream by stream.
        removed: Those of them that lack the expert.
    """

    streams: int
    removed: Sequence[int]

    @classmethod
    def of_layer(cls, site: LayerSite) -> Iterator[ModuleFork]:
        """Yield a fork of each shared expert, if some stream lacks them."""
        step = site.step
        if "shared" in step.changes:
            for path in site.anatomy.at(SharedExperts, site.index).paths:
                yield cls(site.layer.get_submodule(path), len(step.mlps), step.without_shared)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the output of the expert, with zeros for the streams that lack it."""
        output = self.original(*args, **kwargs)
        added: Tensor = first_of(output)
        outputs = by_stream(added, self.streams, "its shared experts have").clone()
        for run in neighbours(self.removed):
            outputs[run] = 0
        return with_first(output, outputs.reshape(added.shape))

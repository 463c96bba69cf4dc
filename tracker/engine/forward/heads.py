"""Removed attention heads: columns of zeros before an attention's output projection."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from tracker.engine.forward.base import LayerSite, ModuleFork, by_stream
from tracker.models.parts.heads import Heads
from tracker.models.slices import take


@dataclass
class HeadFork(ModuleFork):
    """The output projection of an attention, before which some streams lose heads.

    Its input is [computed × rows, tokens, columns], all heads side by side. A checkpoint whose
    projection has zeros in the columns of removed heads computes the same.

    Attributes:
        sources: For each output the computed attention that it is made of.
        columns: For each output the columns of its input that are zero.
    """

    sources: list[int]
    columns: Sequence[Sequence[slice]]

    @classmethod
    def of_layer(cls, site: LayerSite) -> Iterator[ModuleFork]:
        """Yield the fork of the projection, if some stream lacks heads."""
        step = site.step
        if "heads" in step.changes:
            heads = site.anatomy.at(Heads, site.index)
            columns = [[heads.columns(part, site.name) for part in gone] for _, gone in step.heads]
            sources = [step.computed.index(source) for source, _ in step.heads]
            yield cls(site.layer.get_submodule(heads.projection), sources, columns)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the projection of the heads that are left, for each output."""
        (given,) = (*args, *kwargs.values())
        streams = max(self.sources) + 1
        states: Tensor = take(
            by_stream(given, streams, "the heads of its attention have"), self.sources
        )
        for state, removed in zip(states, self.columns, strict=True):
            for columns in removed:
                state[..., columns] = 0
        return self.original(states.flatten(0, 1))

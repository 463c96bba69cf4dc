"""What can be done to a layer: each way with its word, what it is, and its look in charts.

A new way of changing a layer is a word of `Intervention`, an `Action` and an entry of `KINDS`.
Formats of weights, also those of other packages, are words of both by themselves.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from itertools import cycle, product
from typing import TYPE_CHECKING, Literal, get_args

from tracker.core.weight_formats import FORMATS

SearchUnit = Literal["layer", "attention", "mlp", "head", "kv_head", "expert"]
"""What a search removes: whole layers, one of their two sublayers, or one of several parts."""
Component = Literal[SearchUnit, "shared_expert", "linear"]
"""What of a layer is changed: all of it, one of its two sublayers, one attention head, all heads
that share keys and values, one routed expert, the experts that every token passes, or one linear
map, which has a name."""
NUMBERED: tuple[Component, ...] = ("head", "kv_head", "expert")
"""Components of which a layer has several, by their number, 0-based."""
if TYPE_CHECKING:
    Intervention = str
else:
    _FIRST = ("remove", "mean", "scale", "linear", "int8", "int4", "repeat")
    Intervention = Literal[tuple(dict.fromkeys((*_FIRST, *FORMATS)))]
"""What is done to a layer: it is removed, something stands in its place, it is passed again, or its
weights are those of a format."""
COMPONENTS: tuple[Component, ...] = get_args(Component)
UNITS: tuple[Component, ...] = ("layer", "attention", "mlp")
"""Whole layers, and the two sublayers that each has."""
INTERVENTIONS: tuple[Intervention, ...] = get_args(Intervention)


class Action(Enum):
    """What an ablation does at one layer: nothing, a removal, or an intervention."""

    PASS = "pass"
    SKIP = "skip"
    NO_ATTENTION = "no attention"
    NO_MLP = "no mlp"
    NO_PARTS = "no parts"
    MEAN = "mean"
    SCALE = "scale"
    LINEAR = "linear"
    ROUNDED = "rounded"
    REPEAT = "repeat"

    @property
    def is_fitted(self) -> bool:
        """Whether something that was fitted on calibration text stands in for the layer."""
        return self.value in KINDS and KINDS[self.value].fitted

    @property
    def enters(self) -> bool:
        """Whether the layer's own modules compute it."""
        return self is not Action.SKIP and not self.is_fitted


@dataclass(frozen=True)
class KindLook:
    """Runs of one kind, as they are called and drawn.

    Attributes:
        what: What is removed, or what stands in the layer's place, where people read it.
        colour: Of its points; a mid-tone, legible on white and on black.
        mark: Their symbol, one of plotly's.
        fitted: Whether what stands in was fitted on calibration text.
        many: What several of a layer's, or of a model's, are called; empty where they are layers.
    """

    what: str
    colour: str
    mark: str
    fitted: bool = False
    many: str = ""


_MARKS = ("hexagon", "star", "triangle-left", "triangle-right", "bowtie")

KINDS: Mapping[str, KindLook] = {
    "layer": KindLook("the layer", "#3d74a8", "circle"),
    "attention": KindLook("its attention", "#a8558f", "square"),
    "mlp": KindLook("its MLP", "#5f8a3a", "diamond"),
    "head": KindLook("an attention head", "#b06a3d", "square-open", many="heads"),
    "kv_head": KindLook(
        "heads that share keys and values", "#8a5a44", "square-cross", many="groups of heads"
    ),
    "expert": KindLook("a routed expert", "#4f8a6b", "diamond-open", many="experts"),
    "shared_expert": KindLook("its shared expert", "#6a7f3d", "hexagram"),
    "mean": KindLook("its mean update", "#2f8f8f", "triangle-up", fitted=True),
    "scale": KindLook("a factor", "#8c7a2e", "triangle-down", fitted=True),
    "linear": KindLook("a linear map", "#7a6bc0", "pentagon", fitted=True),
    "repeat": KindLook("itself twice", "#b0607a", "cross", many="stretches passed again"),
    **{
        name: KindLook(f"itself in {name}", colour, mark)
        for name, (colour, mark) in zip(
            FORMATS,
            cycle(product(("#6b7f8f", "#b5483f", "#4c7a9c", "#997a2f"), _MARKS)),
            strict=False,
        )
    },
}
"""Every component that is removed and every intervention by its word."""
REPLACED_BY: Mapping[Intervention, str] = {
    word: KINDS[word].what for word in INTERVENTIONS if word != "remove"
}
"""What stands in a layer's place where it is not removed."""
MAPS = ("attention", "mlp")
"""Names for several linear maps of a layer: all of its attention, or of its MLP."""
ENDS = ("embedding", "lm_head")
"""Names for the two matrices outside of a model's layers."""

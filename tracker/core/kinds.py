"""Define the interventions and how charts draw them.

A new intervention needs a word in `Intervention`, an `Action` and an entry in `KINDS`. Formats of
weights, also those of other packages, are added to both automatically.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from itertools import cycle, product
from typing import TYPE_CHECKING, Literal, get_args

from tracker.core.weight_formats import FORMATS

SearchUnit = Literal["layer", "attention", "mlp", "head", "kv_head", "expert"]
"""Units that a search removes: whole layers, sublayers, heads or experts."""
Component = Literal[SearchUnit, "shared_expert", "linear"]
"""The changed component of a layer: all of it, one of its two sublayers, one attention head, all
heads that share keys and values, one routed expert, the experts that every token passes, or one
named linear map."""
NUMBERED: tuple[Component, ...] = ("head", "kv_head", "expert")
"""Components of which a layer has several, by their number, 0-based."""
if TYPE_CHECKING:
    Intervention = str
else:
    _FIRST = ("remove", "mean", "scale", "linear", "int8", "int4", "repeat")
    Intervention = Literal[tuple(dict.fromkeys((*_FIRST, *FORMATS)))]
"""The intervention on a layer: it is removed, replaced or repeated, or its weights are rounded to a
format."""
COMPONENTS: tuple[Component, ...] = get_args(Component)
UNITS: tuple[Component, ...] = ("layer", "attention", "mlp")
"""Whole layers, and the two sublayers that each has."""
INTERVENTIONS: tuple[Intervention, ...] = get_args(Intervention)


class Action(Enum):
    """Action of an ablation at one layer: none, a removal, or another intervention."""

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
        """True if the layer has a replacement that was fitted on calibration text."""
        return self.value in KINDS and KINDS[self.value].fitted

    @property
    def enters(self) -> bool:
        """True if the layer's own modules are computed."""
        return self is not Action.SKIP and not self.is_fitted


@dataclass(frozen=True)
class KindLook:
    """Names, colour and symbol of the runs of one kind.

    Attributes:
        what: The removed part, or the layer's replacement, for display.
        colour: The colour of its points: a mid-tone, legible on white and on black.
        mark: The symbol of its points, one of plotly's.
        fitted: True if the replacement was fitted on calibration text.
        many: The plural of the part; empty for whole layers.
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
"""Word of a removed component or an intervention → its look."""
REPLACED_BY: Mapping[Intervention, str] = {
    word: KINDS[word].what for word in INTERVENTIONS if word != "remove"
}
"""Intervention other than removal → the layer's replacement, for display."""
MAPS = ("attention", "mlp")
"""Names for several linear maps of a layer: all of its attention, or of its MLP."""
ENDS = ("embedding", "lm_head")
"""Names for the two matrices outside of a model's layers."""

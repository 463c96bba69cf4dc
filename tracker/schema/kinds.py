"""Define the interventions on layers, such as removal, and their chart styles.

A new intervention needs a name in `Intervention`, a member of `Action` and an entry in
`KIND_STYLES`. Weight formats are added automatically.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from itertools import cycle, product
from typing import TYPE_CHECKING, Literal, get_args

from tracker.schema.weight_formats import FORMATS

SearchUnit = Literal["layer", "attention", "mlp", "head", "kv_head", "expert", "neuron"]
"""Units that a search removes: whole layers, sublayers, heads, experts or groups of neurons."""
SEARCH_UNITS: tuple[SearchUnit, ...] = get_args(SearchUnit)
Component = Literal[SearchUnit, "shared_expert", "linear"]
"""The changed component of a layer: the whole layer, one of its two sublayers, one attention head,
all heads that share keys and values, one routed expert, a group of neurons of the MLP, the experts
that every token passes, or one named linear map."""
NUMBERED_COMPONENTS: tuple[Component, ...] = ("head", "kv_head", "expert", "neuron")
"""Components of which a layer has several, each with a 0-based number."""
if TYPE_CHECKING:
    Intervention = str
else:
    _FIRST_INTERVENTIONS = ("remove", "mean", "scale", "linear", "int8", "int4", "repeat")
    Intervention = Literal[tuple(dict.fromkeys((*_FIRST_INTERVENTIONS, *FORMATS)))]
"""The intervention on a layer: it is removed, replaced or repeated, or its weights are rounded to a
format."""
COMPONENTS: tuple[Component, ...] = get_args(Component)
UNITS: tuple[Component, ...] = ("layer", "attention", "mlp")
"""Components that are a whole layer or one of its two sublayers."""
INTERVENTIONS: tuple[Intervention, ...] = get_args(Intervention)


class Action(Enum):
    """Action of an ablation on one layer, e.g. to skip the layer or only its attention."""

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
        """True if the action replaces the layer by a function fitted on calibration text."""
        return self.value in KIND_STYLES and KIND_STYLES[self.value].fitted

    @property
    def runs_modules(self) -> bool:
        """True if the engine still executes modules of the original layer."""
        return self is not Action.SKIP and not self.is_fitted


@dataclass(frozen=True)
class KindStyle:
    """Display name, colour and symbol for one kind of ablation, e.g. for removed heads.

    Attributes:
        description: Display text for the removed part or its replacement, such as `a linear map`.
        colour: Colour of the points, legible on white and on black.
        mark: Plotly's name for the symbol of the points.
        fitted: True if the intervention fits a replacement on calibration text.
        plural: Plural name of the removed parts; empty for whole layers.
    """

    description: str
    colour: str
    mark: str
    fitted: bool = False
    plural: str = ""


_MARKS = ("hexagon", "star", "triangle-left", "triangle-right", "bowtie")

KIND_STYLES: Mapping[str, KindStyle] = {
    "layer": KindStyle("the layer", "#3d74a8", "circle"),
    "attention": KindStyle("its attention", "#a8558f", "square"),
    "mlp": KindStyle("its MLP", "#5f8a3a", "diamond"),
    "head": KindStyle("an attention head", "#b06a3d", "square-open", plural="heads"),
    "kv_head": KindStyle(
        "a group of heads that share keys and values",
        "#8a5a44",
        "square-cross",
        plural="groups of heads",
    ),
    "expert": KindStyle("a routed expert", "#4f8a6b", "diamond-open", plural="experts"),
    "neuron": KindStyle(
        "a group of neurons", "#8f5f9c", "diamond-tall", plural="groups of neurons"
    ),
    "shared_expert": KindStyle("its shared expert", "#6a7f3d", "hexagram"),
    "mean": KindStyle("its mean update", "#2f8f8f", "triangle-up", fitted=True),
    "scale": KindStyle("a factor", "#8c7a2e", "triangle-down", fitted=True),
    "linear": KindStyle("a linear map", "#7a6bc0", "pentagon", fitted=True),
    "repeat": KindStyle("itself twice", "#b0607a", "cross", plural="stretches passed again"),
    **{
        name: KindStyle(f"itself in {name}", colour, mark)
        for name, (colour, mark) in zip(
            FORMATS,
            cycle(product(("#6b7f8f", "#b5483f", "#4c7a9c", "#997a2f"), _MARKS)),
            strict=False,
        )
    },
}
"""Removed component or intervention → names, colour and symbol of such runs."""
REPLACEMENT_WORDS: Mapping[Intervention, str] = {
    word: KIND_STYLES[word].description for word in INTERVENTIONS if word != "remove"
}
"""Intervention other than removal → description of the layer's replacement, for display."""
MAP_GROUPS = ("attention", "mlp")
"""Names for all linear maps of a layer's attention, and for all maps of its MLP."""
OUTER_MATRICES = ("embedding", "lm_head")
"""Names of the two matrices outside a model's layers: embedding and output head."""

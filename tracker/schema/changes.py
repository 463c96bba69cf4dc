"""Define changes of a model, and sets of changes."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, cast

from pydantic_core import core_schema

from tracker.schema.grouping import group_by
from tracker.schema.kinds import (
    COMPONENTS,
    INTERVENTIONS,
    KIND_STYLES,
    MAP_GROUPS,
    NUMBERED_COMPONENTS,
    OUTER_MATRICES,
    Action,
    Component,
    Intervention,
)
from tracker.schema.provenance import content_hash
from tracker.schema.weight_formats import FORMATS

BASELINE = "baseline"
"""The name of the ablation that changes nothing."""
MAX_LAYERS = 10_000
"""Maximum number of layers of a model; real models have less than a tenth of this number."""
MAX_NAMED_MAPS = 4
"""Maximum number of rounded maps that an ablation's name lists one by one."""
CHANGE_COLUMNS = (
    *("component", "layer", "span", "intervention"),
    *("number", "repeats", "members", "drawn", "map"),
)
"""Columns of a change in data frames and in records of former versions."""
_DRAWN = "drawn"
_REPEAT = "repeat"
_TEXT = re.compile(r"([a-z]\w*):(?:(\d[\d,-]*)(?:\.(.+))?|([a-z]\w*))")
"""A word and a target: layers with an optional part after a period, or an outer matrix."""


@dataclass(frozen=True, repr=False)
class Change:
    """Change of a model: an intervention, e.g. a removal, on one component.

    `str(change)` returns the canonical text of the change, such as `layer:3`, `layers:3,4`,
    `head:3.0`, `int4:5.mlp.down_proj` or `int4:embedding`. `Change.parse` reads this text. The text
    `repeat3:3-6` means that layers 3 to 6 are executed three times.

    Attributes:
        component: Kind of the component: whole layers, a sublayer, a part such as a head, or a
            linear map.
        layers: Numbers of the changed layers, ascending; empty for the embedding and the output
            head.
        intervention: Kind of the intervention: `remove`, `repeat`, a fitted replacement, or a
            weight format.
        part: Number of a head or another numbered part, or path of a linear map in its layer
            (`mlp.down_proj`). If the component is `linear`, the part can also be `attention`,
            `mlp`, `embedding` or `lm_head`. The part is None for whole layers and sublayers.
        repeats: Number of times that repeated layers are executed.
        drawn: True if the layers were drawn at random, as a control.
    """

    component: Component = "layer"
    layers: tuple[int, ...] = (0,)
    intervention: Intervention = "remove"
    part: int | str | None = None
    repeats: int = 2
    drawn: bool = False

    @classmethod
    def parse(cls, text: str) -> Change:
        """Parse the canonical text of a change; raise ValueError if the text is invalid."""
        match = _TEXT.fullmatch(text)
        change = None if match is None else cls._from_parts(*match.groups())
        if change is None:
            raise ValueError(f"invalid change {text!r}; expected e.g. layer:3, head:3.0 or int4:5")
        return change

    @classmethod
    def _from_parts(
        cls, word: str, layers: str | None, part: str | None, matrix: str | None
    ) -> Change | None:
        """Build a change from the parsed parts of its text; return None if the text is invalid.

        The text `head:3.0` has the word `head`, the layers `3` and the part `0`. The text
        `int4:lm_head` has the word `int4` and the matrix `lm_head`.
        """
        numbers = _parse_layers(layers) if layers else ()
        component, is_format = cast("Component", word.removesuffix("s")), word in FORMATS
        # A matrix outside the layers, or a linear map of one layer: only formats apply to these.
        if matrix is not None or (is_format and part is not None):
            fits = matrix in OUTER_MATRICES if part is None else len(numbers) == 1
            return cls("linear", numbers, word, part or matrix) if is_format and fits else None
        if not numbers:
            return None
        if component in NUMBERED_COMPONENTS:
            is_numbered = len(numbers) == 1 and part is not None and part.isdecimal()
            return cls(component, numbers, part=int(part or 0)) if is_numbered else None
        if part is not None:
            return None
        if word == _DRAWN:
            return cls(layers=numbers, drawn=True)
        if re.fullmatch(rf"{_REPEAT}\d*", word):
            passes = word.removeprefix(_REPEAT)
            return cls(layers=numbers, intervention="repeat", repeats=int(passes or 2))
        if component in COMPONENTS and component != "linear":
            return cls(component, numbers)
        if word in INTERVENTIONS and word != "remove" and len(numbers) == 1:
            return cls(layers=numbers, intervention=word)
        return None

    @classmethod
    def from_columns(
        cls,
        layer: int,
        component: Component = "layer",
        span: int = 1,
        intervention: Intervention = "remove",
        number: int | None = None,
        repeats: int = 2,
        members: Iterable[int] | None = None,
        drawn: bool = False,
        map: str | None = None,
    ) -> Change:
        """Build a change from the data frame columns of former versions."""
        layers = range(layer, layer + span) if members is None else members
        part = map if number is None else number
        numbers = () if map in OUTER_MATRICES else (*layers,)
        return cls(component, numbers, intervention, part, repeats, drawn)

    @classmethod
    def __get_pydantic_core_schema__(cls, *_: object) -> core_schema.CoreSchema:
        return core_schema.no_info_plain_validator_function(
            cls._validate, serialization=core_schema.to_string_ser_schema()
        )

    @classmethod
    def _validate(cls, value: object) -> Change:
        if isinstance(value, str):
            return cls.parse(value)
        if isinstance(value, Mapping):
            try:
                value = cls.parse(str(cls.from_columns(**value)))
            except TypeError as error:
                raise ValueError(f"invalid change: {error}") from None
        if not isinstance(value, cls):
            raise ValueError(f"invalid change {value!r}; expected a text such as layer:3")
        return value

    def __str__(self) -> str:
        if self.is_outer:
            return f"{self.intervention}:{self.part}"
        word, layers = self.word, ",".join(map(str, self.layers))
        if self.intervention == _REPEAT:
            word += "" if self.repeats == 2 else str(self.repeats)
            layers = str(self.layer) + (f"-{self.stop - 1}" if self.span > 1 else "")
        elif self.drawn:
            word = _DRAWN
        elif word == "layer" and self.span > 1:
            word = "layers"
        return f"{word}:{layers}" + ("" if self.part is None else f".{self.part}")

    __repr__ = __str__

    @property
    def is_outer(self) -> bool:
        """True if the change affects the embedding or the output head instead of a layer."""
        return self.part in OUTER_MATRICES

    @property
    def layer(self) -> int:
        """The number of the first changed layer, 0-based; 0 if the change affects no layer."""
        return self.layers[0] if self.layers else 0

    @property
    def first_layer(self) -> int | None:
        """The number of the first changed layer, 0-based; None if the change affects no layer."""
        return self.layers[0] if self.layers else None

    @property
    def stop(self) -> int:
        """The number of the last changed layer plus 1; 0 if the change affects no layer."""
        return self.layers[-1] + 1 if self.layers else 0

    @property
    def span(self) -> int:
        """The number of changed layers; 1 for a change of the embedding or the output head."""
        return len(self.layers) or 1

    @property
    def members(self) -> tuple[int, ...] | None:
        """The changed layers if they are not consecutive or were drawn at random; else None."""
        is_span = self.stop - self.layer == len(self.layers)
        return None if is_span and not self.drawn else self.layers

    @property
    def number(self) -> int | None:
        """The number of the changed head or other part, 0-based; None for other components."""
        return self.part if isinstance(self.part, int) else None

    @property
    def map(self) -> str | None:
        """The name of the changed linear maps, such as `mlp.down_proj`; None for other
        components."""
        return self.part if isinstance(self.part, str) else None

    @property
    def path(self) -> str:
        """The value of `map`, or an empty string if `map` is None."""
        return self.map or ""

    @property
    def extra(self) -> int:
        """The number of additional layer calls in a forward pass; 0 without repeated layers."""
        return (self.repeats - 1) * len(self.layers) if self.intervention == _REPEAT else 0

    @property
    def word(self) -> str:
        """The first word of the change's text, such as `layer`, `attention`, `mean`, `head`."""
        return self.component if self.intervention == "remove" else self.intervention

    @property
    def action(self) -> Action:
        """The action that the engine takes at the changed layer, such as `Action.SKIP`."""
        if self.intervention == "remove":
            actions = {"layer": Action.SKIP, "attention": Action.NO_ATTENTION, "mlp": Action.NO_MLP}
            return actions.get(self.component, Action.NO_PARTS)
        return Action.ROUNDED if self.intervention in FORMATS else Action(self.intervention)

    @property
    def plural(self) -> str:
        """The plural name of the changed components, such as `heads`; empty for whole layers."""
        if self.component == "linear":
            return f"linear maps in {self.word}"
        return KIND_STYLES[self.word].plural

    @property
    def target(self) -> str:
        """The text of the change after the colon: `3.0`, `5.mlp.down_proj`, `3-6`, `embedding`."""
        return str(self).partition(":")[2]

    def at_layer(self, layer: int) -> Change:
        """Return a copy with `layer` added to all layer numbers."""
        return replace(self, layers=tuple(layer + n for n in self.layers))

    @property
    def kind(self) -> Change:
        """The change moved to layer 0, to group equal changes of different layers.

        All removals of single layers, for example, have the kind `layer:0`. A change of random or
        non-consecutive layers is its own kind.
        """
        return self if self.members or self.is_outer else replace(self, layers=(*range(self.span),))

    @property
    def family(self) -> Change:
        """The change without its layer numbers and part, to group changes for heat maps.

        All removals of heads, for example, share one heat map.
        """
        return replace(self, layers=(0,), part=None, drawn=False)

    @property
    def is_single(self) -> bool:
        """True if the change affects one whole layer, attention sublayer or MLP."""
        return self.span == 1 and self.part is None

    @property
    def has_taylor(self) -> bool:
        """True if a Taylor proxy exists for the change.

        A Taylor proxy exists for the removal of a part of a layer, and for rounding the weights of
        a layer.
        """
        is_removed_part = self.component != "layer" and self.intervention == "remove"
        is_in_one_layer = self.span == 1 and not self.is_outer
        return is_in_one_layer and (is_removed_part or self.intervention in FORMATS)

    @property
    def sample(self) -> str:
        """The name of the observations in correlations, such as `head` or `int4 linear`."""
        component = self.path if self.path in MAP_GROUPS else self.component
        return component if self.intervention == "remove" else f"{self.intervention} {component}"

    @property
    def order(self) -> tuple[int | str, ...]:
        """The sort key of changes: component, intervention, number of layers, layer numbers."""
        kinds = COMPONENTS.index(self.component), INTERVENTIONS.index(self.intervention)
        number = -1 if self.number is None else self.number
        order = (*kinds, self.repeats, self.drawn, self.span, self.layer, number)
        return (*order, self.path, *(self.members or ()))

    def __lt__(self, other: Change) -> bool:
        return self.order < other.order

    def label(self, digits: int = 1) -> str:
        """Return the change's display name: `layers 3–6`, `mlp 3–6`, `mean 3`, `layer 3 head 0`.

        Layer numbers are padded with zeros to `digits` digits.
        """
        if self.is_outer:
            return f"{self.map} {self.intervention}"
        if self.members:
            return f"layers {', '.join(map(str, self.members))}{' (drawn)' if self.drawn else ''}"
        start, end = (f"{n:0{digits}d}" for n in (self.layer, self.stop - 1))
        if self.number is not None:
            return f"layer {start} {self.word} {self.number}"
        if self.map is not None:
            return f"layer {start} {self.map} {self.intervention}"
        word = "layers" if self.component == "layer" and self.span > 1 else self.word
        if self.intervention == _REPEAT:
            word = _REPEAT if self.repeats == 2 else f"{_REPEAT} {self.repeats} times:"
        return f"{word} {start}" if self.span == 1 else f"{word} {start}–{end}"

    @property
    def layer_words(self) -> str:
        """The changed layers in words, for sentences: `layer 5`, `layers 3 to 6`."""
        last = self.stop - 1
        return f"layer {last}" if self.span == 1 else f"layers {self.layer} to {last}"

    @property
    def times(self) -> str:
        """The number of executions of repeated layers in words: `twice`, `3 times`."""
        return "twice" if self.repeats == 2 else f"{self.repeats} times"

    @property
    def clause(self) -> str:
        """A clause about the repetition of layers, such as `layers 3 to 6 are passed twice`."""
        return f"{self.layer_words} {'is' if self.span == 1 else 'are'} passed {self.times}"

    def split_by_layer(self) -> list[Change]:
        """Split the change into changes of single layers.

        A repetition of layers is not split.
        """
        if self.intervention == _REPEAT or self.is_outer:
            return [self]
        return [replace(self, layers=(layer,), drawn=False) for layer in self.layers]

    @property
    def columns(self) -> dict[str, Any]:
        """The fields of the change as a dict from column names to values.

        The columns `component`, `layer` and `span` are always included. Other columns are left out
        if they have their default value.
        """
        usual = {name: getattr(WHOLE_LAYER, name) for name in CHANGE_COLUMNS[3:]}
        values = {name: getattr(self, name) for name in CHANGE_COLUMNS}
        return {n: value for n, value in values.items() if n not in usual or value != usual[n]}


WHOLE_LAYER = Change()
"""The kind of change that removes one whole layer; only such changes have layer proxies."""


@dataclass(frozen=True, repr=False)
class Ablation:
    """Changes that are applied to a model together; no changes are the baseline (intact model).

    Attributes:
        changes: Changes of single layers, and repetitions of several layers.
    """

    changes: frozenset[Change] = frozenset()

    @classmethod
    def from_changes(cls, *changes: Change, removed: Iterable[int] = ()) -> Ablation:
        """Build an ablation that applies `changes` and removes the layers in `removed`."""
        removals = frozenset(Change(layers=(layer,)) for layer in removed)
        parts = (part for change in changes for part in change.split_by_layer())
        # Other changes of a removed layer have no effect.
        layers = {change.layer for change in removals}
        return cls(removals.union(p for p in parts if p.is_outer or p.layer not in layers))

    @classmethod
    def combine(cls, ablations: Iterable[Ablation]) -> Ablation:
        """Build an ablation that applies the changes of several ablations."""
        both = cls(frozenset().union(*(ablation.changes for ablation in ablations)))
        others = (change for change in both.changes if change.word != "layer")
        return cls.from_changes(*others, removed=both.removed())

    @classmethod
    def parse(cls, name: str) -> Ablation:
        """Parse an ablation's name; raise ValueError if it is invalid or contains a hash."""
        return cls.from_changes(*map(Change.parse, name.split("+"))) if name != BASELINE else cls()

    def __str__(self) -> str:
        return self.name

    __repr__ = __str__

    @cached_property
    def name(self) -> str:
        """The ablation's name: `baseline`, `layer:3`, `layers:3,17+mean:5`, `head:3.0`.

        If the ablation rounds more than `MAX_NAMED_MAPS` linear maps, the name contains a hash
        instead of their names.
        """
        components: tuple[Component, ...] = ("layer", "attention", "mlp", "shared_expert")
        names = [str(Change(c, layers)) for c in components if (layers := self.removed(c))]
        names += map(str, (*self.replacements, *self.parts))
        roundings = [str(change) for change in self.roundings]
        if len(roundings) > MAX_NAMED_MAPS:  # a mixture of formats
            roundings = [f"rounded:{content_hash(roundings)[:16]}"]
        return "+".join([*names, *roundings, *map(str, self.repetitions)]) or BASELINE

    def removed(self, component: Component = "layer") -> tuple[int, ...]:
        """List the layers (ascending) in which `component`, e.g. the attention, is removed."""
        changes = self._by_word.get(component, [])
        return tuple(sorted(change.layer for change in changes))

    @property
    def heads(self) -> tuple[Change, ...]:
        """The changes that remove attention heads or groups of heads."""
        return self._with_words("head", "kv_head")

    @property
    def experts(self) -> tuple[Change, ...]:
        """The changes that remove routed experts."""
        return self._with_words("expert")

    @property
    def neurons(self) -> tuple[Change, ...]:
        """The changes that remove groups of neurons."""
        return self._with_words("neuron")

    @property
    def parts(self) -> tuple[Change, ...]:
        """The changes that remove numbered parts such as heads or experts, sorted by layer."""
        return self._with_words(*NUMBERED_COMPONENTS)

    @property
    def renumbered_parts(self) -> Ablation:
        """The removals of heads and other parts, renumbered for a pruned model.

        The pruned model lacks the whole layers that this ablation removes. Its other layers are
        numbered consecutively from 0.
        """
        removed = self.removed()
        return Ablation(frozenset(c.at_layer(-bisect_left(removed, c.layer)) for c in self.parts))

    @property
    def replacements(self) -> tuple[Change, ...]:
        """The changes that replace a layer by a fitted function."""
        return self._with_words(*(word for word, style in KIND_STYLES.items() if style.fitted))

    @cached_property
    def roundings(self) -> tuple[Change, ...]:
        """The changes that quantise weights, sorted by layer and name.

        A change can quantise a layer, a linear map, the embedding or the output head.
        """
        changes = (change for change in self.changes if change.intervention in FORMATS)
        return tuple(sorted(changes, key=lambda change: (change.layer, change.path)))

    @property
    def repetitions(self) -> tuple[Change, ...]:
        """The changes that repeat layers in the forward pass."""
        return self._with_words(_REPEAT)

    @property
    def outer_formats(self) -> dict[str, str]:
        """A dict from the name of each rounded matrix outside the layers to its weight format."""
        return {str(c.part): c.intervention for c in self.roundings if c.is_outer}

    @property
    def has_sublayers(self) -> bool:
        """True if the ablation removes the attention or the MLP of any layer."""
        return bool(self._with_words("attention", "mlp"))

    @property
    def has_map_groups(self) -> bool:
        """True if any change rounds all linear maps of an attention sublayer or of an MLP."""
        return any(change.part in MAP_GROUPS for change in self.roundings)

    @property
    def part(self) -> Change | None:
        """The only change besides removed layers, if a Taylor proxy (from gradients) exists for it.

        The value is None if there are no such changes or several.
        """
        changes = [change for change in self.changes if change.word != "layer"]
        return changes[0] if len(changes) == 1 and changes[0].has_taylor else None

    @property
    def has_replacements(self) -> bool:
        """True if the ablation replaces any layer by a fitted function."""
        return bool(self.replacements)

    @cached_property
    def by_layer(self) -> dict[int, Ablation]:
        """A dict from each changed layer to an ablation with the changes of this layer.

        For a repetition of several layers, the key is the last repeated layer.
        """
        changes = (change for change in self.changes if not change.is_outer)
        layers = group_by(changes, lambda change: change.stop - 1)
        return {layer: Ablation(frozenset(group)) for layer, group in layers.items()}

    def at_layer(self, layer: int) -> Ablation:
        """Return an ablation that contains only the changes of one layer."""
        return self.by_layer.get(layer, INTACT)

    @cached_property
    def action(self) -> Action:
        """The action that the engine takes at the changed layer, such as `Action.SKIP`.

        All changes of the ablation must affect the same layer.
        """
        actions = {change.action for change in self.changes}
        if {Action.NO_ATTENTION, Action.NO_MLP} <= actions:
            return Action.SKIP
        return next((action for action in Action if action in actions), Action.PASS)

    @cached_property
    def _by_word(self) -> dict[str, list[Change]]:
        return group_by(self.changes, lambda change: change.word)

    def _with_words(self, *words: str) -> tuple[Change, ...]:
        changes = (change for word in words for change in self._by_word.get(word, ()))
        return tuple(sorted(changes, key=lambda change: (change.layer, change)))


INTACT = Ablation()
"""The baseline: the ablation without changes."""


def _parse_layers(text: str) -> tuple[int, ...]:
    """Parse layer numbers such as `3`, `3,17` or `3-7`; return () if the text is invalid."""
    layers: set[int] = set()
    for item in text.split(","):
        match = re.fullmatch(r"(\d{1,5})(?:-(\d{1,5}))?", item)
        span = range(int(match[1]), int(match[2] or match[1]) + 1) if match else ()
        if not span or len(span) > MAX_LAYERS:
            return ()
        layers.update(span)
    return tuple(sorted(layers))

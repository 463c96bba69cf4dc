"""What an ablation does to a model: one change of one component, and sets of them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, cast

from pydantic_core import core_schema

from tracker.core.grouping import grouped
from tracker.core.kinds import (
    COMPONENTS,
    ENDS,
    INTERVENTIONS,
    KINDS,
    MAPS,
    NUMBERED,
    Action,
    Component,
    Intervention,
)
from tracker.core.provenance import content_hash
from tracker.core.weight_formats import FORMATS

BASELINE = "baseline"
"""The name of the ablation that changes nothing."""
MAX_LAYERS = 10_000
"""Of a model; no model has a tenth of it."""
FEW_MAPS = 4
"""So many rounded maps are named one by one."""
COLUMNS = (
    *("component", "layer", "span", "intervention"),
    *("number", "repeats", "members", "drawn", "map"),
)
"""Names under which data frames have a change, and former versions stored it."""
_DRAWN = "drawn"
_REPEAT = "repeat"
_TEXT = re.compile(r"([a-z]\w*):(?:(\d[\d,-]*)(?:\.(.+))?|([a-z]\w*))")
"""A word; the layers and, behind a period, the part of them; or a matrix outside of the layers."""


@dataclass(frozen=True, repr=False)
class Change:
    """One component of a model and what is done to it.

    `str` gives the canonical text, which `parse` reads: `layer:3`, `layers:3,4`, `head:3.0`,
    `int4:5.mlp.down_proj`, `int4:embedding`, `repeat:3-6`, and `repeat3:3-6` for three passes.

    Attributes:
        component: Whole layers, a sublayer, one of several parts of a layer, or a linear map.
        layers: The layers that have it, ascending; none for the embedding and the output head.
        intervention: What is done to it.
        part: The number of a head or an expert; the path of a linear map in its layer, one of
            `MAPS`, or one of `ENDS`; None for what a layer has once.
        repeats: How many times the layers are passed, where they are repeated.
        drawn: Whether the layers were drawn at random, as a control for others.
    """

    component: Component = "layer"
    layers: tuple[int, ...] = (0,)
    intervention: Intervention = "remove"
    part: int | str | None = None
    repeats: int = 2
    drawn: bool = False

    @classmethod
    def parse(cls, text: str) -> Change:
        """Read the text of a change; ValueError if it is none."""
        match = _TEXT.fullmatch(text)
        change = None if match is None else cls._of_words(*match.groups())
        if change is None:
            raise ValueError(
                f"invalid change {text!r}; expected e.g. layer:3, head:3.0, int4:5.mlp.down_proj "
                "or repeat:3-6"
            )
        return change

    @classmethod
    def _of_words(
        cls, word: str, layers: str | None, part: str | None, end: str | None
    ) -> Change | None:
        """Make the change of the words of a text; None if they do not fit together."""
        numbers = _parse_layers(layers) if layers else ()
        component, is_format = cast("Component", word.removesuffix("s")), word in FORMATS
        if end is not None or (is_format and part is not None):
            whole = end in ENDS if part is None else len(numbers) == 1
            return cls("linear", numbers, word, part or end) if is_format and whole else None
        if not numbers:
            return None
        if component in NUMBERED:
            single = len(numbers) == 1 and part is not None and part.isdecimal()
            return cls(component, numbers, part=int(part or 0)) if single else None
        if part is not None:
            return None
        if word == _DRAWN:
            return cls(layers=numbers, drawn=True)
        if re.fullmatch(rf"{_REPEAT}\d*", word):
            times = word.removeprefix(_REPEAT)
            return cls(layers=numbers, intervention="repeat", repeats=int(times or 2))
        if component in COMPONENTS and component != "linear":
            return cls(component, numbers)
        if word in INTERVENTIONS and word != "remove" and len(numbers) == 1:
            return cls(layers=numbers, intervention=word)
        return None

    @classmethod
    def of_fields(
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
        """Make a change of the columns of data frames, which former versions stored."""
        layers = range(layer, layer + span) if members is None else members
        part = map if number is None else number
        return cls(component, () if map in ENDS else (*layers,), intervention, part, repeats, drawn)

    @classmethod
    def __get_pydantic_core_schema__(cls, *_: object) -> core_schema.CoreSchema:
        return core_schema.no_info_plain_validator_function(
            cls._validated, serialization=core_schema.to_string_ser_schema()
        )

    @classmethod
    def _validated(cls, value: object) -> Change:
        if isinstance(value, str):
            return cls.parse(value)
        if isinstance(value, Mapping):
            try:
                value = cls.parse(str(cls.of_fields(**value)))
            except TypeError as error:
                raise ValueError(f"invalid change: {error}") from None
        if not isinstance(value, cls):
            raise ValueError(f"invalid change {value!r}; expected a text such as layer:3")
        return value

    def __str__(self) -> str:
        if self.is_end:
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
    def is_end(self) -> bool:
        """Check whether it changes the embedding or the output head, and no layer."""
        return self.part in ENDS

    @property
    def layer(self) -> int:
        """The first changed layer; 0 where none is."""
        return self.layers[0] if self.layers else 0

    @property
    def first(self) -> int | None:
        """The first changed layer; None where none is."""
        return self.layers[0] if self.layers else None

    @property
    def stop(self) -> int:
        """One more than the last changed layer."""
        return self.layers[-1] + 1 if self.layers else 0

    @property
    def span(self) -> int:
        """How many layers are changed; 1 for a matrix outside of them."""
        return len(self.layers) or 1

    @property
    def members(self) -> tuple[int, ...] | None:
        """The layers, where others lie between them or they were drawn at random; else None."""
        is_span = self.stop - self.layer == len(self.layers)
        return None if is_span and not self.drawn else self.layers

    @property
    def number(self) -> int | None:
        """The number of a head or an expert, 0-based; None for other components."""
        return self.part if isinstance(self.part, int) else None

    @property
    def map(self) -> str | None:
        """The linear map, as its path in the layer, or one of `MAPS` or `ENDS`; else None."""
        return self.part if isinstance(self.part, str) else None

    @property
    def path(self) -> str:
        """The same as a path; empty for all linear maps of its layers."""
        return self.map or ""

    @property
    def extra(self) -> int:
        """How many layers are passed again."""
        return (self.repeats - 1) * len(self.layers) if self.intervention == _REPEAT else 0

    @property
    def word(self) -> str:
        """Its name beside other changes of a layer: `layer`, `attention`, `mean`, `head`."""
        return self.component if self.intervention == "remove" else self.intervention

    @property
    def action(self) -> Action:
        """What a stream of the engine does at its layer."""
        if self.intervention == "remove":
            whole = {"layer": Action.SKIP, "attention": Action.NO_ATTENTION, "mlp": Action.NO_MLP}
            return whole.get(self.component, Action.NO_PARTS)
        return Action.ROUNDED if self.intervention in FORMATS else Action(self.intervention)

    @property
    def many(self) -> str:
        """The plural of its part of a layer or of a model; empty where that is a layer."""
        if self.component == "linear":
            return f"linear maps in {self.word}"
        return KINDS[self.word].many

    @property
    def target(self) -> str:
        """The text behind its word: `3.0`, `5.mlp.down_proj`, `3-6`, `embedding`."""
        return str(self).partition(":")[2]

    def at(self, layer: int) -> Change:
        """Move a kind, which is at layer 0, to a layer."""
        return replace(self, layers=tuple(layer + n for n in self.layers))

    @property
    def kind(self) -> Change:
        """The same change at layer 0: changes of one kind form a curve over the layers."""
        return self if self.members or self.is_end else replace(self, layers=(*range(self.span),))

    @property
    def family(self) -> Change:
        """What it shares with others on its map: all but the layers and the part."""
        return replace(self, layers=(0,), part=None, drawn=False)

    @property
    def is_single(self) -> bool:
        """Check whether it changes a single layer as such, so that it is on a curve over layers."""
        return self.span == 1 and self.part is None

    @property
    def order(self) -> tuple[int | str, ...]:
        """The sort key: components (layer, attention, MLP, …), interventions, spans, layers."""
        component, done = COMPONENTS.index(self.component), INTERVENTIONS.index(self.intervention)
        number = -1 if self.number is None else self.number
        order = (component, done, self.repeats, self.drawn, self.span, self.layer, number)
        return (*order, self.map or "", *(self.members or ()))

    def __lt__(self, other: Change) -> bool:
        return self.order < other.order

    def label(self, digits: int = 1) -> str:
        """Return the name that people read: `layers 3–6`, `mlp 3–6`, `mean 3`, `layer 3 head 0`.

        A layer's number is filled up with zeros to `digits`.
        """
        if self.is_end:
            return f"{self.map} {self.intervention}"
        if self.members:
            return f"layers {', '.join(map(str, self.members))}{' (drawn)' if self.drawn else ''}"
        first, last = (f"{n:0{digits}d}" for n in (self.layer, self.stop - 1))
        if self.number is not None:
            return f"layer {first} {self.word} {self.number}"
        if self.map is not None:
            return f"layer {first} {self.map} {self.intervention}"
        word = "layers" if self.component == "layer" and self.span > 1 else self.word
        if self.intervention == _REPEAT:
            word = _REPEAT if self.repeats == 2 else f"{_REPEAT} {self.repeats} times:"
        return f"{word} {first}" if self.span == 1 else f"{word} {first}–{last}"

    @property
    def layer_words(self) -> str:
        """Its layers in a sentence: `layer 5`, `layers 3 to 6`."""
        last = self.stop - 1
        return f"layer {last}" if self.span == 1 else f"layers {self.layer} to {last}"

    @property
    def times(self) -> str:
        """How often repeated layers are passed, in words."""
        return "twice" if self.repeats == 2 else f"{self.repeats} times"

    @property
    def clause(self) -> str:
        """The sentence of a repeated span: `layers 3 to 6 are passed twice`."""
        return f"{self.layer_words} {'is' if self.span == 1 else 'are'} passed {self.times}"

    def each(self) -> list[Change]:
        """List the changes of single layers that it is made of; a repeated span is one."""
        if self.intervention == _REPEAT or self.is_end:
            return [self]
        return [replace(self, layers=(layer,), drawn=False) for layer in self.layers]

    @property
    def columns(self) -> dict[str, Any]:
        """Its columns, without those that say of most changes the same."""
        usual = COLUMNS[3:]
        return {
            name: value
            for name in COLUMNS
            if (value := getattr(self, name)) != getattr(WHOLE_LAYER, name) or name not in usual
        }


WHOLE_LAYER = Change()
"""The kind that removes one whole layer: the proxies are measured for these alone."""


@dataclass(frozen=True, repr=False)
class Ablation:
    """A set of changes that one stream of the engine computes; the empty set is the baseline.

    Attributes:
        changes: Changes of single layers, and repeated spans of which no two end at one layer.
    """

    changes: frozenset[Change] = frozenset()

    @classmethod
    def of(cls, *changes: Change, removed: Iterable[int] = ()) -> Ablation:
        """Make an ablation of changes on a model without `removed` layers."""
        gone = frozenset(Change(layers=(layer,)) for layer in removed)
        single = (part for change in changes for part in change.each())
        # What a removed layer would have lost besides is lost with it.
        lost = {change.layer for change in gone}
        rest = (part for part in single if part.is_end or part.layer not in lost)
        return cls(gone.union(rest))

    @classmethod
    def parse(cls, name: str) -> Ablation:
        """Read the name of an ablation; ValueError if it is none, or names a digest."""
        return cls.of(*map(Change.parse, name.split("+"))) if name != BASELINE else cls()

    def __str__(self) -> str:
        return self.name

    __repr__ = __str__

    @cached_property
    def name(self) -> str:
        """The name in the ledger: `baseline`, `layer:3`, `layers:3,17+mean:5`, `head:3.0`.

        Several removed layers, or sublayers of a kind, are one change; many rounded maps are named
        by a digest.
        """
        whole = [
            str(Change(component, layers))
            for component in ("layer", "attention", "mlp", "shared_expert")
            if (layers := self.removed(component))
        ]
        rounded = [str(change) for change in self.rounded]
        if len(rounded) > FEW_MAPS:  # a mixture of formats
            rounded = [f"rounded:{content_hash(rounded)[:16]}"]
        names = (*self.replaced, *self.parts)
        return "+".join([*whole, *map(str, names), *rounded, *map(str, self.repeated)]) or BASELINE

    def removed(self, component: Component = "layer") -> tuple[int, ...]:
        """List the layers that lose a component of which each has one, ascending."""
        changes = self._by_word.get(component, [])
        return tuple(sorted(change.layer for change in changes))

    @property
    def heads(self) -> tuple[Change, ...]:
        """The removed heads, and groups of them."""
        return self._of("head", "kv_head")

    @property
    def experts(self) -> tuple[Change, ...]:
        """The removed routed experts."""
        return self._of("expert")

    @property
    def parts(self) -> tuple[Change, ...]:
        """The removed heads and experts, by layer."""
        return self._of(*NUMBERED)

    @property
    def replaced(self) -> tuple[Change, ...]:
        """The layers that something fitted stands in for."""
        return self._of(*(word for word, look in KINDS.items() if look.fitted))

    @cached_property
    def rounded(self) -> tuple[Change, ...]:
        """The layers, linear maps and matrices outside of layers whose weights are of a format.

        In the order of layers and names: a map's own format comes behind that of its group.
        """
        rounded = (change for change in self.changes if change.intervention in FORMATS)
        return tuple(sorted(rounded, key=lambda change: (change.layer, change.map or "")))

    @property
    def repeated(self) -> tuple[Change, ...]:
        """The spans of layers that are passed several times."""
        return self._of(_REPEAT)

    @property
    def ends(self) -> dict[str, str]:
        """The formats of the embedding and the output head."""
        return {str(change.part): change.intervention for change in self.rounded if change.is_end}

    @property
    def has_sublayers(self) -> bool:
        """Check whether it removes a whole sublayer somewhere."""
        return bool(self._of("attention", "mlp"))

    @property
    def has_groups_of_maps(self) -> bool:
        """Check whether it rounds an attention's or an MLP's linear maps as a whole somewhere."""
        return any(change.part in MAPS for change in self.rounded)

    @property
    def expert(self) -> Change | None:
        """The routed expert that it removes; None where that is not just one part."""
        parts = self.parts
        return parts[0] if len(parts) == 1 and parts[0].component == "expert" else None

    @property
    def is_fitted(self) -> bool:
        """Check whether something that was fitted stands in for a layer."""
        return bool(self.replaced)

    @cached_property
    def by_layer(self) -> dict[int, Ablation]:
        """Its changes by layer; a repeated span belongs to its last one, where it begins again."""
        layers = grouped(
            (change for change in self.changes if not change.is_end), lambda change: change.stop - 1
        )
        return {layer: Ablation(frozenset(changes)) for layer, changes in layers.items()}

    def at(self, layer: int) -> Ablation:
        """Return the changes at one layer."""
        return self.by_layer.get(layer, INTACT)

    @cached_property
    def action(self) -> Action:
        """What it does at a layer, where all of its changes are at one."""
        actions = {change.action for change in self.changes}
        if {Action.NO_ATTENTION, Action.NO_MLP} <= actions:
            return Action.SKIP
        return next((action for action in Action if action in actions), Action.PASS)

    @cached_property
    def _by_word(self) -> dict[str, list[Change]]:
        return grouped(self.changes, lambda change: change.word)

    def _of(self, *words: str) -> tuple[Change, ...]:
        changes = (change for word in words for change in self._by_word.get(word, ()))
        return tuple(sorted(changes, key=lambda change: (change.layer, change)))


INTACT = Ablation()
"""The baseline: nothing is changed."""


def _parse_layers(text: str) -> tuple[int, ...]:
    """Read layers such as `3`, `3,17` or `3-7`, ascending; none where they are no such list."""
    layers: set[int] = set()
    for piece in text.split(","):
        match = re.fullmatch(r"(\d{1,5})(?:-(\d{1,5}))?", piece)
        span = range(int(match[1]), int(match[2] or match[1]) + 1) if match else ()
        if not span or len(span) > MAX_LAYERS:
            return ()
        layers.update(span)
    return tuple(sorted(layers))

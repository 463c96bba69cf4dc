"""Ablations: what is done to which layers and sublayers, and their names."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, product
from typing import NamedTuple

from tracker.core.config import IN_THE_FILE, CellRequest, field_of
from tracker.core.errors import ExperimentError
from tracker.core.grouping import grouped
from tracker.core.kinds import ENDS, MAPS, NUMBERED, UNITS, Action, Component, Intervention
from tracker.core.provenance import content_hash
from tracker.core.records import BASELINE, RunIdentity
from tracker.core.search_parts import SearchParts
from tracker.core.weight_formats import FORMATS

FEW_MAPS = 4
"""So many rounded maps are named one by one."""


class Part(NamedTuple):
    """One of several parts of a layer: a head, a group of heads, or a routed expert."""

    component: Component
    layer: int
    number: int


class Stretch(NamedTuple):
    """Neighbouring layers that are passed several times: `start` to `stop`, half-open."""

    start: int
    stop: int
    times: int = 2

    @property
    def layers(self) -> range:
        """The layers of it."""
        return range(self.start, self.stop)

    @property
    def extra(self) -> int:
        """How many layers are passed besides."""
        return (self.times - 1) * (self.stop - self.start)

    @property
    def which(self) -> str:
        """The layers in words: `layer 5`, `layers 3 to 6`."""
        last = self.stop - 1
        return f"layer {last}" if last == self.start else f"layers {self.start} to {last}"

    @property
    def often(self) -> str:
        """How often they are passed, in words."""
        return "twice" if self.times == 2 else f"{self.times} times"

    @property
    def clause(self) -> str:
        """What is done, in words: `layers 3 to 6 are passed twice`."""
        return f"{self.which} {'are' if len(self.layers) > 1 else 'is'} passed {self.often}"

    @property
    def name(self) -> str:
        """The name in the ledger: `repeat:5`, `repeat:3-6`, `repeat3:3-6` for three times."""
        last = f"-{self.stop - 1}" if self.stop - self.start > 1 else ""
        return f"repeat{self.times if self.times != 2 else ''}:{self.start}{last}"


class Rounded(NamedTuple):
    """Linear maps of one layer whose weights are those of a format.

    `which` is one of them, as its path within the layer, or one of `MAPS`; empty for all. Or it is
    one of `ENDS`, which are of no layer: `layer` is 0 then.
    """

    format: str
    layer: int
    which: str = ""

    @property
    def name(self) -> str:
        """The name in the ledger: `int4:5`, `int4:5.mlp.down_proj`, `int4:embedding`."""
        if self.is_end:
            return f"{self.format}:{self.which}"
        return f"{self.format}:{self.layer}{'.' if self.which else ''}{self.which}"

    @property
    def is_end(self) -> bool:
        """Whether it is the embedding or the head."""
        return self.which in ENDS


class Done(NamedTuple):
    """What an ablation does at one layer: to which of its parts, or from where layers come again.

    A stretch is named at its last layer, behind which it begins again. `shared` says whether its
    MLP lacks the experts that every token passes.
    """

    action: Action
    parts: tuple[Part, ...] = ()
    stretch: Stretch | None = None
    shared: bool = False
    rounded: tuple[Rounded, ...] = ()

    @property
    def heads(self) -> tuple[Part, ...]:
        """The heads, and groups of them, that its attention lacks."""
        return tuple(part for part in self.parts if part.component in ("head", "kv_head"))

    @property
    def experts(self) -> tuple[Part, ...]:
        """The experts that its MLP lacks."""
        return tuple(part for part in self.parts if part.component == "expert")


_PASS = Done(Action.PASS)


@dataclass(frozen=True)
class Ablation:
    """A set of layers whose output is their input, and of parts that are changed otherwise.

    Attributes:
        layers: The removed layers, 0-based, ascending; none for the baseline.
        attention: Layers whose attention adds nothing to the residual stream.
        mlp: Layers whose MLP adds nothing to the residual stream.
        replaced: What stands in for which layers: pairs of an intervention and a layer.
        rounded: Linear maps whose weights are those of a format; of one layer none twice.
        parts: Heads, or groups of them, that add nothing to what their attention gives, and experts
            that no token is sent to.
        repeated: Stretches that are passed several times; no two end at the same layer.
        shared: Layers whose shared experts add nothing to what their MLP gives.
    """

    layers: tuple[int, ...] = ()
    attention: tuple[int, ...] = ()
    mlp: tuple[int, ...] = ()
    replaced: tuple[tuple[Intervention, int], ...] = ()
    parts: tuple[Part, ...] = ()
    repeated: tuple[Stretch, ...] = ()
    shared: tuple[int, ...] = ()
    rounded: tuple[Rounded, ...] = ()

    @property
    def name(self) -> str:
        """The name in the ledger: `baseline`, `layer:3`, `layers:3,17+mean:5`, `head:3.0`."""
        sets = [
            f"{component}:{','.join(map(str, numbers))}"
            for component, numbers in (
                ("layer" if len(self.layers) == 1 else "layers", self.layers),
                ("attention", self.attention),
                ("mlp", self.mlp),
                ("shared_expert", self.shared),
                *((done, (layer,)) for done, layer in self.replaced),
            )
            if numbers
        ]
        parts = [f"{part.component}:{part.layer}.{part.number}" for part in self.parts]
        rounded = [each.name for each in self.rounded]
        if len(rounded) > FEW_MAPS:  # a mixture of formats
            rounded = [f"rounded:{content_hash(rounded)[:16]}"]
        more = [*rounded, *(each.name for each in self.repeated)]
        return "+".join((*sets, *parts, *more)) or BASELINE

    @property
    def has_sublayers(self) -> bool:
        """Whether it removes a whole sublayer somewhere."""
        return bool(self.attention or self.mlp)

    @property
    def has_groups_of_maps(self) -> bool:
        """Whether it rounds an attention's or an MLP's linear maps as a whole somewhere."""
        return any(each.which in MAPS for each in self.rounded)

    @property
    def ends(self) -> dict[str, str]:
        """Which of `ENDS` has which format."""
        return {each.which: each.format for each in self.rounded if each.is_end}

    @cached_property
    def rounded_of(self) -> dict[int, list[Rounded]]:
        """What is rounded of which layers."""
        return grouped((each for each in self.rounded if not each.is_end), lambda each: each.layer)

    def at(self, layer: int) -> Done:
        """Say what it does at a layer."""
        attention, mlp = layer in self.attention, layer in self.mlp
        if layer in self.layers or (attention and mlp):
            return Done(Action.SKIP)
        if attention:
            return Done(Action.NO_ATTENTION)
        if mlp:
            return Done(Action.NO_MLP)
        parts, shared = tuple(self._parts_of.get(layer, ())), layer in self.shared
        if parts or shared:
            return Done(Action.NO_PARTS, parts, shared=shared)
        if rounded := self.rounded_of.get(layer):
            return Done(Action.ROUNDED, rounded=tuple(rounded))
        for stretch in self.repeated:
            if stretch.stop == layer + 1:
                return Done(Action.REPEAT, stretch=stretch)
        return next((Done(Action(done)) for done, at in self.replaced if at == layer), _PASS)

    @cached_property
    def _parts_of(self) -> dict[int, list[Part]]:
        return grouped(self.parts, lambda part: part.layer)

    @property
    def expert(self) -> Part | None:
        """The routed expert that it takes out; None where that is not just one."""
        one = self.parts[0] if len(self.parts) == 1 else None
        return one if one is not None and one.component == "expert" else None

    @property
    def is_fitted(self) -> bool:
        """Whether something that was fitted stands in for a layer."""
        return any(Action(done).is_fitted for done, _ in self.replaced)


INTACT = Ablation()
"""The baseline: nothing is removed."""


def ablate(component: Component, layers: Iterable[int], removed: Iterable[int] = ()) -> Ablation:
    """Make an ablation of one component of some layers, besides `removed` layers; all 0-based."""
    beneath = set(removed)
    chosen = set(layers) - beneath
    whole = beneath | chosen if component == "layer" else beneath
    return Ablation(
        layers=tuple(sorted(whole)),
        attention=tuple(sorted(chosen)) if component == "attention" else (),
        mlp=tuple(sorted(chosen)) if component == "mlp" else (),
        shared=tuple(sorted(chosen)) if component == "shared_expert" else (),
    )


def without_parts(parts: SearchParts, removed: Iterable[int]) -> Ablation:
    """Make the ablation of a set of what a search removes."""
    if parts.unit not in NUMBERED:
        return ablate(parts.unit, removed)
    places = ((parts.layer_of(part), parts.number_of(part)) for part in sorted(removed))
    return Ablation(parts=tuple(Part(parts.unit, *place) for place in places))


def stretch_of(run: RunIdentity) -> Stretch:
    """Say which layers a run passes again."""
    return Stretch(run.layer, run.layer + run.span, run.repeats)


def ablation_of(run: RunIdentity, removed: Iterable[int]) -> Ablation:
    """Say what a run does, where some layers are removed as a whole besides."""
    beneath = tuple(sorted(removed))
    if run.intervention == "repeat":
        return Ablation(beneath, repeated=(stretch_of(run),))
    if run.intervention in FORMATS:
        maps = Rounded(run.intervention, run.layer, run.map or "")
        return Ablation(beneath, rounded=(maps,))
    if run.intervention != "remove":
        return Ablation(beneath, replaced=((run.intervention, run.layer),))
    if run.number is not None:
        return Ablation(beneath, parts=(Part(run.component, run.layer, run.number),))
    return ablate(run.component, run.changed, removed)


def first_run(request: CellRequest) -> RunIdentity:
    """Say which run a request for one run asks for, whether there is such a run or not.

    ExperimentError where it does not say which part of the layer.
    """
    if "linear" in request.components and not request.maps:
        raise ExperimentError(
            "which linear map of the layer? Give its name: --map mlp.down_proj (a sweep lists "
            "them: 'map: {values: [mlp.down_proj]}'); all of a layer at once are --component layer"
        )
    for part in request.components:
        if part in NUMBERED and not request.numbers(part):
            key = IN_THE_FILE[field_of(part)]
            raise ExperimentError(f"which {part} of the layer? Give its number: --{key} 0")
    return next(_grid(request))


def _grid(request: CellRequest) -> Iterator[RunIdentity]:
    """List every combination of what is asked for, be it a run or not."""
    asked = (request.components, request.interventions, request.spans, request.layers)
    for component, done, span, layer in product(*asked):
        numbers = request.numbers(component) if component in NUMBERED else (None,)
        maps = request.maps if component == "linear" else (None,)
        repeats = request.repeats if done == "repeat" else (2,)
        for number, name, times in product(numbers, maps, repeats):
            yield RunIdentity(
                component=component,
                layer=0 if name in ENDS else layer,
                span=span,
                intervention=done,
                number=number,
                map=name,
                repeats=times,
            )


def why_no_run(run: RunIdentity, request: CellRequest, layers: int) -> str | None:
    """Say why a combination of what is asked for is no run; None where it is one."""
    if run.component not in (*UNITS, "linear") and (run.intervention, run.span) != ("remove", 1):
        return f"{run.component} is removed from one layer at a time"
    if run.component == "linear" and (run.intervention not in FORMATS or run.span != 1):
        return (
            "a linear map is given weights of a format, such as intervention: int4, one at a time"
        )
    if run.is_end:
        return None
    if run.intervention == "repeat" and run.component != "layer":
        return "repeat is done to whole layers"
    if run.intervention in FORMATS and run.component not in ("layer", "linear"):
        return f"{run.intervention} is done to layers, or to linear maps (component: linear)"
    if run.intervention not in ("remove", "repeat") and run.span != 1:
        return f"{run.intervention} is done to single layers"
    if run.intervention not in ("remove", "repeat", *FORMATS) and run.component != "layer":
        return f"{run.intervention} is done to whole single layers"
    if max(run.changed) >= layers:
        return (
            f"{run.span} layers from layer {run.layer} on reach beyond layer {layers - 1}, the "
            "last one"
        )
    if set(run.changed) & set(request.removed):
        what = f"layer {run.layer}"
        if run.span > 1:
            what = f"one of layers {run.layer} to {max(run.changed)}"
        return f"{what} is among the removed layers {', '.join(map(str, request.removed))}"
    if len(ablation_of(run, request.removed).layers) >= layers:
        return "no layer would be left"
    return None


def removals(request: CellRequest, layers: int) -> Iterator[RunIdentity]:
    """List the runs of a cell: components outermost, then interventions, spans, layers, heads.

    A span that reaches beyond the last layer, one that holds a layer which is removed already, one
    that would leave no layer at all, and a part to which what is to be done cannot be done, is no
    run and is left out.
    """
    only = None if request.only is None else set(request.only)
    asked = [run for run in _grid(request) if only is None or run.asked in only]
    sets = (set_of(layers) for layers in request.sets)
    drawn = (set_of(layers, drawn=True) for layers in request.drawn)
    for run in dict.fromkeys((*asked, *sets, *drawn)):
        if why_no_run(run, request, layers) is None:
            yield run


def set_of(layers: Sequence[int], drawn: bool = False) -> RunIdentity:
    """Say which run removes some layers together, ascending; neighbours are a span."""
    first, span = layers[0], len(layers)
    near = layers[-1] - first + 1 == span
    members = None if near and not drawn else tuple(layers)
    return RunIdentity(layer=first, span=span, members=members, drawn=drawn)


def ablations_of(request: CellRequest, layers: int) -> list[Ablation]:
    """List what a cell is measured under: baseline, `removed` alone, every run; none twice."""
    runs = (ablation_of(run, request.removed) for run in removals(request, layers))
    return list(dict.fromkeys([INTACT, ablate("layer", request.removed), *runs]))


def all_ablations(requests: Iterable[CellRequest], layers: int) -> list[Ablation]:
    """List what several requests are measured under together; none twice."""
    each = (ablations_of(request, layers) for request in requests)
    return list(dict.fromkeys(chain.from_iterable(each)))

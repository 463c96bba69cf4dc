"""The changes that a request asks for, and the ablations that its cell is measured under."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain, product

from tracker.core.changes import INTACT, Ablation, Change
from tracker.core.config import IN_THE_FILE, CellRequest, field_of
from tracker.core.errors import ExperimentError
from tracker.core.kinds import ENDS, NUMBERED, UNITS
from tracker.core.search_parts import SearchParts
from tracker.core.weight_formats import FORMATS


def without_parts(parts: SearchParts, removed: Iterable[int]) -> Ablation:
    """Make the ablation of a set of what a search removes."""
    several = parts.unit in NUMBERED
    return Ablation.of(
        *(
            Change(
                parts.unit,
                (parts.layer_of(part),),
                part=parts.number_of(part) if several else None,
            )
            for part in removed
        )
    )


def first_change(request: CellRequest) -> Change:
    """Return the change that a request for one run asks for, valid for its model or not.

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
    return next(grid_changes(request))


def grid_changes(request: CellRequest) -> Iterator[Change]:
    """Yield every combination of a request's fields, valid for its model or not."""
    fields = (request.components, request.interventions, request.spans, request.layers)
    for component, intervention, span, layer in product(*fields):
        numbers = request.numbers(component) if component in NUMBERED else (None,)
        maps = request.maps if component == "linear" else (None,)
        repeats = request.repeats if intervention == "repeat" else (2,)
        for number, name, times in product(numbers, maps, repeats):
            layers = () if name in ENDS else (*range(layer, layer + span),)
            part = name if number is None else number
            yield Change(component, layers, intervention, part, times)


def why_invalid(change: Change, removed: Iterable[int], layers: int) -> str | None:
    """Return why a change cannot be measured on a model without some of its layers.

    Args:
        change: The change.
        removed: Layers that the model lacks besides.
        layers: How many layers it has with these.

    Returns:
        The reason; None where it can be measured.
    """
    component, intervention = change.component, change.intervention
    if component not in (*UNITS, "linear") and (intervention, change.span) != ("remove", 1):
        return f"{component} is removed from one layer at a time"
    if component == "linear" and (intervention not in FORMATS or change.span != 1):
        return (
            "a linear map is given weights of a format, such as intervention: int4, one at a time"
        )
    if change.is_end:
        return None
    if intervention == "repeat" and component != "layer":
        return "repeat is done to whole layers"
    if intervention in FORMATS and component not in ("layer", "linear"):
        return f"{intervention} is done to layers, or to linear maps (component: linear)"
    if intervention not in ("remove", "repeat") and change.span != 1:
        return f"{intervention} is done to single layers"
    if intervention not in ("remove", "repeat", *FORMATS) and component != "layer":
        return f"{intervention} is done to whole single layers"
    if change.stop > layers:
        return (
            f"{change.span} layers from layer {change.layer} on reach beyond layer {layers - 1}, "
            "the last one"
        )
    if {*change.layers} & {*removed}:
        what = f"layer {change.layer}"
        if change.span > 1:
            what = f"one of layers {change.layer} to {change.stop - 1}"
        return f"{what} is among the removed layers {', '.join(map(str, removed))}"
    if len(Ablation.of(change, removed=removed).removed()) >= layers:
        return "no layer would be left"
    return None


def changes_of(request: CellRequest, layers: int) -> list[Change]:
    """List the changes of a cell: components outermost, then interventions, spans, layers, parts.

    What cannot be measured is left out: a span that reaches beyond the last layer or holds one that
    is removed already, and an intervention that its component does not take.
    """
    changes = grid_changes(request) if request.changes is None else request.changes
    return [
        change
        for change in dict.fromkeys(changes)
        if why_invalid(change, request.removed, layers) is None
    ]


def ablations_of(request: CellRequest, layers: int) -> list[Ablation]:
    """List what a cell is measured under: baseline, `removed` alone, every change; none twice."""
    ablations = (
        Ablation.of(change, removed=request.removed) for change in changes_of(request, layers)
    )
    return list(dict.fromkeys([INTACT, Ablation.of(removed=request.removed), *ablations]))


def all_ablations(requests: Iterable[CellRequest], layers: int) -> list[Ablation]:
    """List what several requests are measured under together; none twice."""
    ablations = (ablations_of(request, layers) for request in requests)
    return list(dict.fromkeys(chain.from_iterable(ablations)))

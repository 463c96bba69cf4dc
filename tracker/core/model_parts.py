"""How many parts a model has, as its configuration says."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from itertools import chain
from typing import Any, NamedTuple

from tracker.core.ablations import grid_changes
from tracker.core.changes import Change
from tracker.core.config import IN_THE_FILE, CellRequest, field_of
from tracker.core.errors import ExperimentError, did_you_mean
from tracker.core.kinds import ENDS, KINDS, MAPS, NUMBERED, Component

ROUTED = ("moe_num_experts", "n_routed_experts", "num_experts", "num_local_experts")
"""What configurations call how many routed experts a layer has."""
CHOSEN = (
    *("moe_k", "moe_topk", "num_experts_per_tok", "num_experts_per_token"),
    "top_k_experts",
)
"""What they call to how many of them a token goes."""
_ONE_EXPERTS = re.compile(r"(.+)\.(\d+)\.([^.]+)")

CONTROLS = 40
"""Sets of each size that are drawn: as few as leave a two-sided p below 5 %."""


class ModelParts(NamedTuple):
    """What a model has.

    Attributes:
        layers: How many layers.
        head: How many attention heads a layer has; None where that is not said.
        kv_head: How many groups of heads share keys and values; the same.
        of_kind: The layers of the kinds that are asked for; None for layers of any kind.
        expert: How many routed experts a layer has that has some; None where that is not said.
        maps: The names of each layer's linear maps; None where nobody asked.
    """

    layers: int
    head: int | None = None
    kv_head: int | None = None
    of_kind: tuple[int, ...] | None = None
    expert: int | None = None
    maps: tuple[tuple[str, ...], ...] | None = None

    def numbered(self, component: Component) -> int | None:
        """Count the parts of a layer that have numbers."""
        found: int | None = getattr(self, component)
        return found


def experts_of_a_token(config: Any) -> int:
    """Say to how many routed experts a token goes by a text model's configuration; 0 for none."""
    count, chosen = (
        next((each for name in names if isinstance(each := getattr(config, name, None), int)), 0)
        for names in (ROUTED, CHOSEN)
    )
    return min(count, chosen)


def one_experts(map_name: str) -> tuple[str, int] | None:
    """Part `mlp.experts.7.down_proj` into `mlp.experts.down_proj` and 7; None where it has none."""
    found = _ONE_EXPERTS.fullmatch(map_name)
    return (f"{found[1]}.{found[3]}", int(found[2])) if found else None


Counting = Callable[[CellRequest, Collection[str]], ModelParts]
"""Counts the parts of a request's model, and finds its layers of some kinds."""


def numbered_components(request: CellRequest) -> list[Component]:
    """List those of a request's components of which a layer has several."""
    return [component for component in request.components if component in NUMBERED]


def has_parts(request: CellRequest) -> bool:
    """Whether a request is about parts of which a layer has several."""
    return bool(numbered_components(request)) or "linear" in request.components


def with_all_parts(request: CellRequest, parts: ModelParts) -> CellRequest:
    """Name all layers, heads or experts, where a request names none.

    ExperimentError where the configuration does not say how many there are.
    """
    found: dict[str, tuple[int, ...]] = {}
    if not request.layers:
        found["layers"] = tuple(range(parts.layers)) if parts.of_kind is None else parts.of_kind
    some = [each for each in numbered_components(request) if not request.numbers(each)]
    for component in some:
        count, field = parts.numbered(component), field_of(component)
        if count is None:
            raise ExperimentError(
                f"{request.title}: how many parts of the kind {component} a layer has is not "
                f"in the model's configuration; name them by '{IN_THE_FILE[field]}'"
            )
        if len(found.setdefault(field, tuple(range(count)))) != count:
            raise ExperimentError(
                f"{request.title}: it has {parts.head} heads in {parts.kv_head} groups a layer; "
                "ask for head and kv_head in two files, or name some by 'head'"
            )
    request = request.model_copy(update=found) if found else request
    if "linear" in request.components and not request.maps:
        request = _with_all_maps(request, parts)
    spans = [span for span in request.spans if span > 1]
    removing = "remove" in request.interventions and "layer" in request.components
    if not (spans and removing and (request.control or parts.of_kind is not None)):
        return request
    changes = [*grid_changes(request)]
    if parts.of_kind is not None:
        if (request.components, request.interventions) != (("layer",), ("remove",)):
            raise ExperimentError(
                f"{request.title}: layers of a kind are removed together as whole layers; ask for "
                "other components and interventions in a file of their own, or leave 'kind' out"
            )
        # Neighbours among the layers of the kind, whatever lies between them.
        changes = [change for change in changes if change.span == 1] + [
            Change(layers=parts.of_kind[first : first + span])
            for span in spans
            for first in range(len(parts.of_kind) - span + 1)
        ]
    if request.control:
        free = [layer for layer in range(parts.layers) if layer not in request.removed]
        near = (tuple(range(n, n + span)) for span in spans for n in request.layers)
        taken = {*(change.layers for change in changes), *near}
        drawn = _drawn(free, spans, taken, request.seed)
        changes += [Change(layers=layers, drawn=True) for layers in drawn]
    return request.model_copy(update={"changes": tuple(changes)})


def _with_all_maps(request: CellRequest, parts: ModelParts) -> CellRequest:
    """Name all linear maps of the layers that are asked for."""
    if parts.maps is None:
        raise ExperimentError(
            f"{request.title}: which linear maps its layers have is not known here; name them by "
            "'map'"
        )
    of_layer = dict(enumerate(parts.maps))
    every = dict.fromkeys(name for layer in request.layers for name in of_layer.get(layer, ()))
    named = request.model_copy(update={"maps": tuple(every)})
    if all(set(of_layer.get(layer, every)) == set(every) for layer in request.layers):
        return named
    if request.components != ("linear",) or request.spans != (1,):
        raise ExperimentError(
            f"{request.title}: its layers have different linear maps; ask for them in a file of "
            "their own, or name some by 'map'"
        )
    changes = tuple(
        Change("linear", (layer,), intervention, name)
        for intervention in request.interventions
        for layer in request.layers
        for name in of_layer[layer]
    )
    return named.model_copy(update={"changes": changes})


def _drawn(
    free: Sequence[int], spans: Sequence[int], taken: Collection[tuple[int, ...]], seed: int
) -> Iterator[tuple[int, ...]]:
    """Draw sets of each size that are not asked for already, each once, as many as there are."""
    for span in spans:
        draw = random.Random(f"control/{seed}/{span}")
        found: set[tuple[int, ...]] = set()
        for _ in range(50 * CONTROLS if span <= len(free) else 0):
            some = tuple(sorted(draw.sample(free, span)))
            if len(found) < CONTROLS and some not in taken and some not in found:
                found.add(some)
                yield some


def check_parts(request: CellRequest, parts: ModelParts) -> None:
    """Raise ExperimentError for a layer, a head or an expert that the model has not."""
    for layer in (*request.layers, *request.removed):
        if layer >= parts.layers:
            raise ExperimentError(
                f"layer {layer} is out of range: {request.model} has {parts.layers} layers, "
                f"0 to {parts.layers - 1}"
            )
    known = {*MAPS, *ENDS, *chain.from_iterable(parts.maps or ())}
    for name in request.maps if parts.maps is not None and "linear" in request.components else ():
        if name not in known and (one_experts(name) or (name,))[0] not in known:
            near = did_you_mean(name, known)
            raise ExperimentError(
                f"{request.model} has no linear map {name!r}.{near} It has "
                f"{', '.join(sorted(known))}"
            )
    for component in numbered_components(request):
        count, last = parts.numbered(component), max(request.numbers(component), default=0)
        if count is not None and last >= count:
            raise ExperimentError(
                f"{component} {last} is out of range: a layer of {request.model} "
                f"has {count} {KINDS[component].many}, 0 to {count - 1}"
            )

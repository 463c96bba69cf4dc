"""How many parts a model has, as its configuration says."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import NamedTuple

from tracker.core.config import IN_THE_FILE, CellRequest, field_of
from tracker.core.errors import ExperimentError
from tracker.core.kinds import NUMBERED, Component

ROUTED = ("moe_num_experts", "n_routed_experts", "num_experts", "num_local_experts")
"""What configurations call how many routed experts a layer has."""


class ModelParts(NamedTuple):
    """What a model has.

    Attributes:
        layers: How many layers.
        head: How many attention heads a layer has; None where that is not said.
        kv_head: How many groups of heads share keys and values; the same.
        of_kind: The layers of the kinds that are asked for; None for layers of any kind.
        expert: How many routed experts a layer has that has some; None where that is not said.
    """

    layers: int
    head: int | None = None
    kv_head: int | None = None
    of_kind: tuple[int, ...] | None = None
    expert: int | None = None

    def numbered(self, component: Component) -> int | None:
        """Count the parts of a layer that have numbers."""
        found: int | None = getattr(self, component)
        return found


Counting = Callable[[CellRequest, Collection[str]], ModelParts]
"""Counts the parts of a request's model, and finds its layers of some kinds."""


def numbered_components(request: CellRequest) -> list[Component]:
    """List those of a request's components of which a layer has several."""
    return [component for component in request.components if component in NUMBERED]


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
    return request.model_copy(update=found) if found else request


def check_parts(request: CellRequest, parts: ModelParts) -> None:
    """Raise ExperimentError for a layer, a head or an expert that the model has not."""
    for layer in (*request.layers, *request.removed):
        if layer >= parts.layers:
            raise ExperimentError(
                f"layer {layer} is out of range: {request.model} has {parts.layers} layers, "
                f"0 to {parts.layers - 1}"
            )
    for component in numbered_components(request):
        count, last = parts.numbered(component), max(request.numbers(component), default=0)
        if count is not None and last >= count:
            what = {"head": "heads", "kv_head": "groups of heads"}.get(component, "experts")
            raise ExperimentError(
                f"{component} {last} is out of range: a layer of {request.model} "
                f"has {count} {what}, 0 to {count - 1}"
            )

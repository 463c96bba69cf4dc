"""How many parts a model has, as its configuration says."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import NamedTuple

from tracker.core.config import CellRequest
from tracker.core.errors import ExperimentError
from tracker.core.kinds import NUMBERED, Component


class ModelParts(NamedTuple):
    """What a model has.

    Attributes:
        layers: How many layers.
        head: How many attention heads a layer has; None where that is not said.
        kv_head: How many groups of heads share keys and values; the same.
        of_kind: The layers of the kinds that are asked for; None for layers of any kind.
    """

    layers: int
    head: int | None = None
    kv_head: int | None = None
    of_kind: tuple[int, ...] | None = None

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
    """Name all layers, or all heads, where a request names none.

    ExperimentError where the configuration does not say how many there are.
    """
    found: dict[str, tuple[int, ...]] = {}
    if not request.layers:
        found["layers"] = tuple(range(parts.layers)) if parts.of_kind is None else parts.of_kind
    if (some := numbered_components(request)) and not request.heads:
        counts = {component: parts.numbered(component) for component in some}
        for component, count in counts.items():
            if count is None:
                raise ExperimentError(
                    f"{request.title}: how many parts of the kind {component} a layer has is not "
                    "in the model's configuration; name them by 'head'"
                )
        if len(set(counts.values())) > 1:
            raise ExperimentError(
                f"{request.title}: it has {parts.head} heads in {parts.kv_head} groups a layer; "
                "ask for head and kv_head in two files, or name some by 'head'"
            )
        found["heads"] = tuple(range(counts[some[0]] or 0))
    return request.model_copy(update=found) if found else request


def check_parts(request: CellRequest, parts: ModelParts) -> None:
    """Raise ExperimentError for a layer or a head that the model has not."""
    for layer in (*request.layers, *request.removed):
        if layer >= parts.layers:
            raise ExperimentError(
                f"layer {layer} is out of range: {request.model} has {parts.layers} layers, "
                f"0 to {parts.layers - 1}"
            )
    for component in numbered_components(request):
        count = parts.numbered(component)
        if count is not None and max(request.heads, default=0) >= count:
            what = "heads" if component == "head" else "groups of heads"
            raise ExperimentError(
                f"{component} {max(request.heads)} is out of range: a layer of {request.model} "
                f"has {count} {what}, 0 to {count - 1}"
            )

"""Count a model's layers, heads and experts, and find its layers of a kind.

A configuration names the kind of each layer, such as `sliding_attention` or `mamba`, in a list.
The list is in its file, or its class computes it. Every model has `odd` and `even` layers.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any, NamedTuple

from tracker.core.changes import Change
from tracker.core.config import IN_THE_FILE, CellRequest, Changes, field_of
from tracker.core.errors import ExperimentError, ModelError, did_you_mean
from tracker.core.kinds import ENDS, KINDS, MAPS, Component

ROUTED = ("moe_num_experts", "n_routed_experts", "num_experts", "num_local_experts")
"""Names in configurations of the number of routed experts of a layer."""
CHOSEN = (
    *("moe_k", "moe_topk", "num_experts_per_tok", "num_experts_per_token"),
    "top_k_experts",
)
"""Names in configurations of the number of experts of a token."""
_ONE_EXPERTS = re.compile(r"(.+)\.(\d+)\.([^.]+)")

CONTROLS = 40
"""Number of random sets of each size: the fewest with a two-sided p below 5 %."""


class ModelParts(NamedTuple):
    """Numbers of a model's parts.

    Attributes:
        layers: Number of layers.
        head: Number of attention heads of a layer; None if the configuration does not give it.
        kv_head: Number of groups of heads that share keys and values; None as for `head`.
        of_kind: The layers of the requested kinds; None for layers of any kind.
        expert: Number of routed experts of a layer that has some; None as for `head`.
        maps: The names of each layer's linear maps; None if they were not determined.
    """

    layers: int
    head: int | None = None
    kv_head: int | None = None
    of_kind: tuple[int, ...] | None = None
    expert: int | None = None
    maps: tuple[tuple[str, ...], ...] | None = None

    def numbered(self, component: Component) -> int | None:
        """Return the number of a layer's heads, groups of heads or experts; None if unknown."""
        found: int | None = getattr(self, component)
        return found


def experts_of_a_token(config: Any) -> int:
    """Return the number of routed experts of each token by the configuration; 0 for none."""
    count, chosen = (
        next((each for name in names if isinstance(each := getattr(config, name, None), int)), 0)
        for names in (ROUTED, CHOSEN)
    )
    return min(count, chosen)


def one_experts(map_name: str) -> tuple[str, int] | None:
    """Split `mlp.experts.7.down_proj` into `mlp.experts.down_proj` and 7; None without a number."""
    found = _ONE_EXPERTS.fullmatch(map_name)
    return (f"{found[1]}.{found[3]}", int(found[2])) if found else None


Counting = Callable[[CellRequest, Collection[str]], ModelParts]
"""Function that counts the parts of a request's model and finds its layers of some kinds."""


def with_all_parts(request: CellRequest, parts: ModelParts) -> CellRequest:
    """Fill in all layers, heads, experts or linear maps where a request names none.

    If the configuration does not give their number, ExperimentError is raised.
    """
    found: dict[str, tuple[int, ...]] = {}
    if not request.changes.layers:
        found["layers"] = tuple(range(parts.layers)) if parts.of_kind is None else parts.of_kind
    some = [each for each in request.changes.numbered if not request.changes.numbers(each)]
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
    changes = request.changes.model_copy(update=found)
    try:
        if changes.lacks_maps:
            changes = _with_all_maps(changes, parts)
        exact = _with_sets(changes, parts, request)
    except ExperimentError as error:
        raise ExperimentError(f"{request.title}: {error}") from None
    return replace(request, changes=changes if exact is None else changes.exactly(exact))


def _with_sets(changes: Changes, parts: ModelParts, request: CellRequest) -> list[Change] | None:
    """List the changes with sets of one kind and random sets; None if neither is requested."""
    spans = [span for span in changes.spans if span > 1]
    removing = "remove" in changes.interventions and "layer" in changes.components
    if not (spans and removing and (changes.control or parts.of_kind is not None)):
        return None
    exact = [*changes.expanded()]
    if parts.of_kind is not None:
        if (changes.components, changes.interventions) != (("layer",), ("remove",)):
            raise ExperimentError(
                "layers of a kind are removed together as whole layers; ask for other components "
                "and interventions in a file of their own, or leave 'kind' out"
            )
        # Neighbours among the layers of the kind, whatever lies between them.
        exact = [change for change in exact if change.span == 1] + [
            Change(layers=parts.of_kind[first : first + span])
            for span in spans
            for first in range(len(parts.of_kind) - span + 1)
        ]
    if changes.control:
        free = [layer for layer in range(parts.layers) if layer not in request.removed]
        near = (tuple(range(n, n + span)) for span in spans for n in changes.layers)
        taken = {*(change.layers for change in exact), *near}
        drawn = _drawn(free, spans, taken, request.documents.seed)
        exact += [Change(layers=layers, drawn=True) for layers in drawn]
    return exact


def _with_all_maps(changes: Changes, parts: ModelParts) -> Changes:
    """Fill in all linear maps of the requested layers."""
    if parts.maps is None:
        raise ExperimentError(
            "which linear maps its layers have is not known here; name them by 'map'"
        )
    of_layer = dict(enumerate(parts.maps))
    every = dict.fromkeys(name for layer in changes.layers for name in of_layer.get(layer, ()))
    named = changes.model_copy(update={"maps": tuple(every)})
    if all(set(of_layer.get(layer, every)) == set(every) for layer in changes.layers):
        return named
    if changes.components != ("linear",) or changes.spans != (1,):
        raise ExperimentError(
            "its layers have different linear maps; ask for them in a file of their own, or name "
            "some by 'map'"
        )
    return named.exactly(
        Change("linear", (layer,), intervention, name)
        for intervention in changes.interventions
        for layer in changes.layers
        for name in of_layer[layer]
    )


def _drawn(
    free: Sequence[int], spans: Sequence[int], taken: Collection[tuple[int, ...]], seed: int
) -> Iterator[tuple[int, ...]]:
    """Yield up to `CONTROLS` random sets of each size, each once and none already requested."""
    for span in spans:
        draw = random.Random(f"control/{seed}/{span}")
        found: set[tuple[int, ...]] = set()
        for _ in range(50 * CONTROLS if span <= len(free) else 0):
            some = tuple(sorted(draw.sample(free, span)))
            if len(found) < CONTROLS and some not in taken and some not in found:
                found.add(some)
                yield some


def check_parts(request: CellRequest, parts: ModelParts) -> None:
    """Raise ExperimentError for a layer, head, expert or map that the model does not have."""
    changes = request.changes
    for layer in (*changes.layers, *request.removed):
        if layer >= parts.layers:
            raise ExperimentError(
                f"layer {layer} is out of range: {request.model} has {parts.layers} layers, "
                f"0 to {parts.layers - 1}"
            )
    known = {*MAPS, *ENDS, *chain.from_iterable(parts.maps or ())}
    named = changes.maps if parts.maps is not None and "linear" in changes.components else ()
    for name in named:
        if name not in known and (one_experts(name) or (name,))[0] not in known:
            near = did_you_mean(name, known)
            raise ExperimentError(
                f"{request.model} has no linear map {name!r}.{near} It has "
                f"{', '.join(sorted(known))}"
            )
    for component in changes.numbered:
        count, last = parts.numbered(component), max(changes.numbers(component), default=0)
        if count is not None and last >= count:
            raise ExperimentError(
                f"{component} {last} is out of range: a layer of {request.model} "
                f"has {count} {KINDS[component].many}, 0 to {count - 1}"
            )


LISTS = ("layer_types", "layers_block_type", "attention_layers", "mlp_layer_types")
"""Names of the lists in configurations that give the kind of each layer."""
HALVES = ("even", "odd")
"""Kinds that every model has: layers 0, 2, …, and 1, 3, …."""


def kinds_of(config: Any) -> Mapping[str, tuple[int, ...]]:
    """List the kinds of layers that a configuration names.

    Args:
        config: The text model's configuration, as transformers reads it.

    Returns:
        Kind → its layers, 0-based, ascending. A layer may be of several kinds: Jamba's are
        `linear_attention` and `mamba`. Empty where all layers are alike.
    """
    total = config.num_hidden_layers
    found: dict[str, list[int]] = {}
    for name in LISTS:
        words = getattr(config, name, None)
        if not isinstance(words, (list, tuple)) or len(words) != total:
            continue
        for layer, word in enumerate(words):
            if isinstance(word, str) and layer not in found.setdefault(word, []):
                found[word].append(layer)
    return {kind: tuple(sorted(layers)) for kind, layers in found.items()}


def layers_of_kind(config: Any, words: Collection[str]) -> tuple[int, ...]:
    """Return the layers of the given kinds.

    Args:
        config: The text model's configuration, as transformers reads it.
        words: The kinds, as the configuration names them; or `odd`, `even`.

    Returns:
        The layers, 0-based, ascending.

    Raises:
        ModelError: The model has no such kind; the message lists its kinds.

    Examples:
        >>> from types import SimpleNamespace
        >>> config = SimpleNamespace(num_hidden_layers=3, layer_types=["conv", "moe", "conv"])
        >>> layers_of_kind(config, ["conv"]), layers_of_kind(config, ["odd"])
        ((0, 2), (1,))
    """
    kinds = {half: tuple(range(n, config.num_hidden_layers, 2)) for n, half in enumerate(HALVES)}
    kinds = {**kinds, **kinds_of(config)}
    for word in words:
        if word not in kinds:
            own = ", ".join(f"{kind} ({len(kinds[kind])})" for kind in kinds if kind not in HALVES)
            has = f"its kinds are {own}" if own else "its configuration names none"
            raise ModelError(
                f"the model has no layers of kind {word!r}: {has}; odd and even are kinds of "
                f"every model.{did_you_mean(word, kinds)}"
            )
    return tuple(sorted({layer for word in words for layer in kinds[word]}))

"""Count a model's layers and their parts, and find the layers of a given kind.

Many model configurations list the kind of each layer, such as `sliding_attention` or `mamba`. The
additional kinds `odd` and `even` exist for every model.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any, NamedTuple

from tracker.schema.changes import Change
from tracker.schema.config import FILE_KEYS, CellRequest, Changes, number_field
from tracker.schema.errors import ExperimentError, ModelError, did_you_mean
from tracker.schema.kinds import KIND_STYLES, MAP_GROUPS, OUTER_MATRICES, Component

EXPERT_COUNT_KEYS = ("moe_num_experts", "n_routed_experts", "num_experts", "num_local_experts")
"""Names in configurations of the number of routed experts of a layer."""
MLP_WIDTH_KEYS = ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size")
"""Names in configurations of the number of neurons of a layer's MLP."""
TOKEN_EXPERT_KEYS = (
    *("moe_k", "moe_topk", "num_experts_per_tok", "num_experts_per_token"),
    "top_k_experts",
)
"""Names in configurations of the number of experts that a router chooses for each token."""
_EXPERT_MAP = re.compile(r"(.+)\.(\d+)\.([^.]+)")
_EXPERTS = re.compile(r".*?\bexperts(?=\.)")
_FUSED_NAMES = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
)
"""Names of linear maps that vLLM and SGLang fuse if they lie in the same module.

References:
    `FUSED_LAYER_NAMES` of github.com/vllm-project/llm-compressor, and vLLM's
    `packed_modules_mapping`.
"""

N_CONTROLS = 40
"""Number of random sets of each size; the smallest number with which p can be below 5 %."""


class ModelParts(NamedTuple):
    """Numbers of layers and of their parts in a model.

    Attributes:
        layers: Number of layers.
        head: Number of attention heads per layer; None if it is unknown.
        kv_head: Number of key/value heads per layer; None if it is unknown.
        kind_layers: The layers of the requested kinds, such as `mamba`; None if no kind is
            requested.
        expert: Number of routed experts per mixture-of-experts layer; None if it is unknown.
        maps: Names of the linear maps of each layer; None if they are unknown.
        neuron: Number of groups of neurons per layer; None if it is unknown.
    """

    layers: int
    head: int | None = None
    kv_head: int | None = None
    kind_layers: tuple[int, ...] | None = None
    expert: int | None = None
    maps: tuple[tuple[str, ...], ...] | None = None
    neuron: int | None = None

    def count_of(self, component: Component) -> int | None:
        """Return the number of parts of a kind (e.g. heads) in one layer; None if unknown."""
        count: int | None = getattr(self, component)
        return count


def experts_per_token(config: Any) -> int:
    """Return the number of experts per token in a model; 0 for models without experts."""
    count, chosen = (
        next((n for name in names if isinstance(n := getattr(config, name, None), int)), 0)
        for names in (EXPERT_COUNT_KEYS, TOKEN_EXPERT_KEYS)
    )
    return min(count, chosen)


def mlp_width(config: Any) -> int | None:
    """Return the number of neurons in each MLP of a model; None if it is unknown."""
    width = next((n for name in MLP_WIDTH_KEYS if (n := getattr(config, name, None))), None)
    if width is None and hasattr(config, "n_inner"):  # GPT-2 and GPT-J
        width = 4 * config.hidden_size
    return width if isinstance(width, int) else None


def neuron_group_size(width: int) -> int | None:
    """Return the number of neurons per group in an MLP with `width` neurons.

    A group has 128 neurons if `width` is at least 1,024 and a multiple of 128, else 64. If `width`
    is below 256, there are four groups. The result is None if the neurons cannot be divided into
    groups of equal size.
    """
    size = 128 if width >= 1024 and width % 128 == 0 else 64
    size = width // 4 if width < 4 * size else size
    return size if size and width % size == 0 else None


def split_expert_map(map_name: str) -> tuple[str, int] | None:
    """Split the name of an expert's linear map into a name and a number.

    For example, `mlp.experts.7.down_proj` is split into `mlp.experts.down_proj` and 7. The function
    returns None if the name does not contain the number of an expert.
    """
    match = _EXPERT_MAP.fullmatch(map_name)
    return (f"{match[1]}.{match[3]}", int(match[2])) if match else None


def fused_map(path: str) -> str:
    """Return the path of the fused linear map that contains a linear map.

    Inference engines fuse several linear maps into one. For example, the path for
    `self_attn.k_proj` is `self_attn.q_proj+k_proj+v_proj`. The path for all maps of experts is
    `mlp.experts`. Paths of other linear maps are returned unchanged.
    """
    if experts := _EXPERTS.match(path):
        return experts[0]
    module, dot, name = path.rpartition(".")
    return module + dot + next(("+".join(names) for names in _FUSED_NAMES if name in names), name)


PartsCounter = Callable[[CellRequest, Collection[str]], ModelParts]
"""Function that counts the parts of a request's model and finds the layers of some kinds."""


def fill_parts(request: CellRequest, parts: ModelParts) -> CellRequest:
    """Return a copy of a request with explicit lists of layers and parts.

    An empty list in the request means all layers, heads, other parts or linear maps of the model.
    ExperimentError is raised if the model's number of layers or parts is unknown.
    """
    numbers: dict[str, tuple[int, ...]] = {}
    if not request.changes.layers:
        layers = range(parts.layers) if parts.kind_layers is None else parts.kind_layers
        numbers["layers"] = tuple(layers)
    components = [kind for kind in request.changes.numbered if not request.changes.numbers(kind)]
    for component in components:
        count, field = parts.count_of(component), number_field(component)
        if count is None:
            raise ExperimentError(
                f"{request.title}: the model's configuration does not give the number of "
                f"{KIND_STYLES[component].plural} per layer; list numbers in '{FILE_KEYS[field]}'"
            )
        # Heads and groups of heads share the field, but not the count.
        if len(numbers.setdefault(field, tuple(range(count)))) != count:
            raise ExperimentError(
                f"{request.title}: a layer has {parts.head} attention heads, but {parts.kv_head} "
                "key/value heads. Request the components head and kv_head in separate files, or "
                "list numbers in 'head'"
            )
    changes = request.changes.model_copy(update=numbers)
    try:
        if changes.lacks_maps:
            changes = _fill_linear_maps(changes, parts)
        exact = _list_changes_with_sets(changes, parts, request)
    except ExperimentError as error:
        raise ExperimentError(f"{request.title}: {error}") from None
    return replace(request, changes=changes if exact is None else changes.with_exact(exact))


def _list_changes_with_sets(
    changes: Changes, parts: ModelParts, request: CellRequest
) -> list[Change] | None:
    """List all changes of a request that removes sets of layers; None for other requests.

    A set is drawn at random as a control, or contains successive layers of one kind. Between
    successive `mamba` layers, for example, there can be other layers.
    """
    spans = [span for span in changes.spans if span > 1]
    is_removal = "remove" in changes.interventions and "layer" in changes.components
    if not (spans and is_removal and (changes.control or parts.kind_layers is not None)):
        return None
    exact = [*changes.expand()]
    if parts.kind_layers is not None:
        if (changes.components, changes.interventions) != (("layer",), ("remove",)):
            raise ExperimentError(
                "with 'kind', spans of several layers allow only the removal of whole layers. "
                "Leave 'kind' out, or request other components and interventions in a separate file"
            )
        # Neighbours among the layers of the kind, whatever lies between them.
        exact = [change for change in exact if change.span == 1] + [
            Change(layers=parts.kind_layers[start : start + span])
            for span in spans
            for start in range(len(parts.kind_layers) - span + 1)
        ]
    if changes.control:
        free = [layer for layer in range(parts.layers) if layer not in request.removed]
        neighbours = (tuple(range(n, n + span)) for span in spans for n in changes.layers)
        taken = {*(change.layers for change in exact), *neighbours}
        drawn_sets = _draw_layer_sets(free, spans, taken, request.documents.seed)
        exact += [Change(layers=layers, drawn=True) for layers in drawn_sets]
    return exact


def _fill_linear_maps(changes: Changes, parts: ModelParts) -> Changes:
    """Return a copy of `changes` that names all linear maps of the requested layers.

    `parts` contains the names of the linear maps in each layer, such as `mlp.up_proj`.
    """
    if parts.maps is None:
        raise ExperimentError("the model's linear maps are unknown; list their names in 'map'")
    by_layer = dict(enumerate(parts.maps))
    all_maps = dict.fromkeys(name for layer in changes.layers for name in by_layer.get(layer, ()))
    filled = changes.model_copy(update={"maps": tuple(all_maps)})
    if all(set(by_layer.get(layer, all_maps)) == set(all_maps) for layer in changes.layers):
        return filled
    if changes.components != ("linear",) or changes.spans != (1,):
        raise ExperimentError("the layers have different linear maps; list the names in 'map'")
    return filled.with_exact(
        Change("linear", (layer,), intervention, name)
        for intervention in changes.interventions
        for layer in changes.layers
        for name in by_layer[layer]
    )


def _draw_layer_sets(
    layers: Sequence[int], sizes: Sequence[int], excluded: Collection[tuple[int, ...]], seed: int
) -> Iterator[tuple[int, ...]]:
    """Draw random sets of `layers`: at most `N_CONTROLS` different sets of each size.

    Sets in `excluded` are skipped.
    """
    for size in sizes:
        generator = random.Random(f"control/{seed}/{size}")
        drawn: set[tuple[int, ...]] = set()
        for _ in range(50 * N_CONTROLS if size <= len(layers) else 0):
            chosen = tuple(sorted(generator.sample(layers, size)))
            if len(drawn) < N_CONTROLS and chosen not in excluded and chosen not in drawn:
                drawn.add(chosen)
                yield chosen


def check_parts(request: CellRequest, parts: ModelParts) -> None:
    """Raise ExperimentError if the request contains a part that the model does not have.

    The function checks layers, heads, experts and linear maps.
    """
    changes = request.changes
    for layer in (*changes.layers, *request.removed):
        if layer >= parts.layers:
            model, last = request.model, parts.layers - 1
            raise ExperimentError(f"layer {layer} is out of range: {model} has layers 0 to {last}")
    names = {*MAP_GROUPS, *OUTER_MATRICES, *chain.from_iterable(parts.maps or ())}
    maps = changes.maps if parts.maps is not None and "linear" in changes.components else ()
    for name in maps:
        if name not in names and (split_expert_map(name) or (name,))[0] not in names:
            suggestion, map_names = did_you_mean(name, names), ", ".join(sorted(names))
            message = f"{request.model} has no linear map {name!r}.{suggestion} It has {map_names}"
            raise ExperimentError(message)
    for component in changes.numbered:
        count, last = parts.count_of(component), max(changes.numbers(component), default=0)
        if count is not None and last >= count:
            raise ExperimentError(
                f"{component} {last} is out of range: a layer of {request.model} has {count} "
                f"{KIND_STYLES[component].plural}, numbered 0 to {count - 1}"
            )


KIND_LIST_KEYS = ("layer_types", "layers_block_type", "attention_layers", "mlp_layer_types")
"""Names of the lists in configurations that give the kind of each layer."""
PARITY_KINDS = ("even", "odd")
"""Kinds that every model has: layers with even numbers, and layers with odd numbers."""


def layer_kinds(config: Any) -> Mapping[str, tuple[int, ...]]:
    """Return the layers of each kind in a model's configuration.

    Args:
        config: The configuration of the text model, as a transformers object.

    Returns:
        A dict from kinds to 0-based layer numbers. A layer can have several kinds. The dict is
        empty if the configuration lists no kinds.
    """
    total = config.num_hidden_layers
    kinds: dict[str, list[int]] = {}
    for name in KIND_LIST_KEYS:
        words = getattr(config, name, None)
        if not isinstance(words, (list, tuple)) or len(words) != total:
            continue
        for layer, word in enumerate(words):
            if isinstance(word, str) and layer not in kinds.setdefault(word, []):
                kinds[word].append(layer)
    return {kind: tuple(sorted(layers)) for kind, layers in kinds.items()}


def layers_of_kind(config: Any, words: Collection[str]) -> tuple[int, ...]:
    """Return the numbers of the layers of the given kinds.

    Args:
        config: The configuration of the text model, as a transformers object.
        words: Names of kinds in the configuration, or `odd` or `even`.

    Returns:
        The numbers of the layers, 0-based, ascending.

    Raises:
        ModelError: The model has no layers of a given kind.

    Examples:
        >>> from types import SimpleNamespace
        >>> config = SimpleNamespace(num_hidden_layers=3, layer_types=["conv", "moe", "conv"])
        >>> layers_of_kind(config, ["conv"]), layers_of_kind(config, ["odd"])
        ((0, 2), (1,))
    """
    total = config.num_hidden_layers
    kinds = {name: tuple(range(n, total, 2)) for n, name in enumerate(PARITY_KINDS)}
    kinds = {**kinds, **layer_kinds(config)}
    for word in words:
        if word not in kinds:
            own_kinds = layer_kinds(config).items()
            names = ", ".join(f"{kind} ({len(layers)})" for kind, layers in own_kinds)
            listing = f"kinds {names}" if names else "no kinds"
            raise ModelError(
                f"the model has no layers of kind {word!r}. Its configuration lists {listing}. "
                f"The kinds odd and even exist for every model.{did_you_mean(word, kinds)}"
            )
    return tuple(sorted({layer for word in words for layer in kinds[word]}))

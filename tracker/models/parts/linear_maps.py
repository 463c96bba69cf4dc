"""Find the linear maps of a layer, in linear modules and in modules of experts.

One linear map can contain the matrices of all experts, as in files of llama.cpp (`ffn_down_exps`).
A linear map can also be the matrix of one expert, the embedding or the output head.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from tracker.models.hooks import replaced_attributes, shallow_copy
from tracker.models.offloaded import ModuleAttribute, replace_attributes
from tracker.models.parts.experts import count_experts
from tracker.models.rounding import round_weight
from tracker.schema.errors import CellError, ExperimentError
from tracker.schema.kinds import OUTER_MATRICES
from tracker.schema.model_parts import split_expert_map


@dataclass(frozen=True)
class LinearMap:
    """A weight matrix of a layer, or the stacked weight matrices of all experts of a layer.

    Attributes:
        module: The module that holds the weight.
        name: Name of the weight in the module.
        inputs_first: Whether the stored weight has a row per input, as in GPT-2 and the experts of
            GPT-OSS.
        experts: Number of experts; 0 if the map is not part of experts.
        expert: Index of the expert if the map is one expert's matrix, else None.
    """

    module: nn.Module
    name: str = "weight"
    inputs_first: bool = False
    experts: int = 0
    expert: int | None = None

    @property
    def weight(self) -> Tensor:
        """The weight [outputs, inputs]; for all experts [experts, outputs, inputs]."""
        matrix = self.parameter if self.expert is None else self.parameter[self.expert]
        return matrix.mT if self.inputs_first else matrix

    @property
    def shape(self) -> tuple[int, int]:
        """The number of outputs, summed over all experts of the map, and the number of inputs."""
        weight = self.weight
        return weight.numel() // weight.shape[-1], weight.shape[-1]

    @property
    def parameter(self) -> Tensor:
        """The module's parameter: the weight, or the weights of all experts."""
        tensor: Tensor = getattr(self.module, self.name)
        return tensor

    def to_module_layout(self, weight: Tensor, all_weights: Tensor) -> Tensor:
        """Convert a weight to the shape of the module's parameter.

        If `weight` belongs to one expert, the weights of the other experts are copied from
        `all_weights`.
        """
        rows = weight.mT.contiguous() if self.inputs_first else weight
        if self.expert is None:
            return rows
        new_weights = all_weights.detach().clone()
        new_weights[self.expert] = rows
        return new_weights


def map_of_module(module: nn.Module) -> LinearMap:
    """Return the linear map of a linear module (`nn.Linear` or `Conv1D`)."""
    return LinearMap(module, inputs_first=isinstance(module, Conv1D))


def find_linear_maps(layer: nn.Module, name: str) -> dict[str, LinearMap]:
    """Find the linear maps of a layer, by their paths in the layer.

    The result does not include routers, biases of experts and matrices with one row, because
    llama.cpp does not quantise these weights.

    Args:
        layer: The layer.
        name: The layer's name in messages.

    Returns:
        The linear maps by path. The path of a map of experts is the path of their module and the
        tensor's name.

    Raises:
        CellError: The layer has other matrices, or weights that are already quantised.
    """
    maps: dict[str, LinearMap] = {}
    router_ids: set[int] = set()
    modules = dict(layer.named_modules())
    for path, module in modules.items():
        if isinstance(module, (nn.Linear, Conv1D)):
            maps[path] = map_of_module(module)
        elif matrices := [*_find_expert_matrices(module)]:
            maps |= {f"{path}.{linear.name}": linear for linear in matrices}
            block = modules[path.rpartition(".")[0]]
            router_ids |= {*map(id, _find_router_weights(block, matrices[0].experts))}
    # A matrix that is neither a map nor a router would stay unrounded without notice.
    known_ids = {id(linear.parameter) for linear in maps.values()} | router_ids
    for path, parameter in layer.named_parameters():
        problem = ""
        if parameter.ndim > 1 and id(parameter) not in known_ids:
            problem = f"{path} of {name} is not a linear map, so it cannot be quantised"
        elif not parameter.is_floating_point():
            problem = f"{path} of {name} is quantised already"
        if problem:
            raise CellError(f"{problem}; leave weight formats out of 'intervention'")
    return {
        path: linear
        for path, linear in maps.items()
        if id(linear.parameter) not in router_ids and linear.shape[0] > 1
    }


def _find_expert_matrices(module: nn.Module) -> Iterator[LinearMap]:
    """Yield the input map and the output map of a module's experts.

    The function yields nothing if the weights of an expert do not have the shapes
    [2 width, hidden] and [hidden, width], or both transposed.
    """
    count, tensors = count_experts(module), module._parameters.items()
    matrices = {name: t.shape[1:] for name, t in tensors if t is not None and t.ndim == 3}
    if not count or len(matrices) != 2:
        return
    input_shape, output_shape = matrices.values()
    inputs_first = input_shape == (output_shape[1], 2 * output_shape[0])
    if inputs_first or input_shape == (2 * output_shape[1], output_shape[0]):
        for name in matrices:
            yield LinearMap(module, name, inputs_first, count)


def _find_router_weights(block: nn.Module, count: int) -> Iterator[Tensor]:
    """Yield the weights of an MLP `block` that can belong to a router of `count` experts.

    The weights are matrices with one row or column per expert. If a child module of `block`
    contains several linear modules, these are skipped.
    """
    for child in block.children():
        linears = [module for module in child.modules() if isinstance(module, nn.Linear)]
        ambiguous_ids = {id(module.weight) for module in linears} if len(linears) > 1 else set()
        for weight in child.parameters():
            has_expert_rows = weight.shape[:1] == (count,) or weight.shape == (1, count)
            if weight.ndim == 2 and has_expert_rows and id(weight) not in ambiguous_ids:
                yield weight


def find_map(maps: Mapping[str, LinearMap], path: str, name: str) -> LinearMap:
    """Return the linear map at a path in a layer; raise CellError if there is no such map."""
    if path in maps:
        return maps[path]
    shared_path, number = split_expert_map(path) or ("", 0)
    all_experts = maps.get(shared_path)
    if all_experts is not None and number < all_experts.experts:
        return replace(all_experts, expert=number)
    raise CellError(f"{name} has no linear map {path}; it has {', '.join(maps)}")


class RoundedWeights:
    """Cache of quantised weights, which many ablations share.

    Args:
        max_bytes: Maximum bytes of cached weights. If the cache is full, it drops the least
            recently used weights.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._weights: OrderedDict[tuple[int, str, str], Tensor] = OrderedDict()
        self._bytes = 0

    def get_weight(self, layer: int, path: str, linear: LinearMap, name: str) -> Tensor:
        """Return a linear map's weight [outputs, inputs], quantised to the format `name`."""
        key = (layer, path, name)
        weight = self._weights.get(key)
        if weight is None:
            weight = self._weights[key] = round_weight(linear.weight, name)
            self._bytes += weight.nbytes
        self._weights.move_to_end(key)
        while self._bytes > self._max_bytes and len(self._weights) > 1:  # the last one is in use
            self._bytes -= self._weights.popitem(last=False)[1].nbytes
        return weight


def rounded_parameters(
    maps: Mapping[str, LinearMap],
    formats: Mapping[str, str],
    round_map: Callable[[str, LinearMap, str], Tensor],
) -> dict[ModuleAttribute, Tensor]:
    """Compute the quantised parameters of linear maps.

    Args:
        maps: Linear maps of a layer by their paths.
        formats: Format of each linear map to quantise, by path. The format of a single expert
            overrides the format of all experts.
        round_map: Function that quantises a weight, given the path, the linear map and the format.

    Returns:
        The quantised parameters by module and parameter name.
    """
    weights: dict[ModuleAttribute, Tensor] = {}
    for path in sorted(formats, key=lambda path: maps[path].expert is not None):
        linear = maps[path]
        attribute = (linear.module, linear.name)
        weight = round_map(path, linear, formats[path])
        all_weights = weights.get(attribute, linear.parameter)
        weights[attribute] = linear.to_module_layout(weight, all_weights)
    return weights


def copy_with_weights(module: nn.Module, weights: Mapping[str, Tensor]) -> nn.Module:
    """Copy a module with new weights for some parameters; share all other parameters."""
    parameters = {name: nn.Parameter(weight, False) for name, weight in weights.items()}
    return shallow_copy(module, _parameters={**module._parameters, **parameters})


def round_layer(
    layer: nn.Module,
    formats: Mapping[str, str],
    number: int = 0,
    cache: RoundedWeights | None = None,
) -> None:
    """Quantise linear maps of a copied layer.

    Args:
        layer: The copied layer, which is changed in place.
        formats: Format of each linear map to quantise, by path.
        number: Number of the layer.
        cache: Cache of quantised weights. With a cache, the layer has the quantised weights only
            during calls of the layer. Without a cache, the quantised weights are permanent.
    """
    name = f"layer {number}"
    layer_maps = find_linear_maps(layer, name)
    maps = {path: find_map(layer_maps, path, name) for path in formats}
    round_map = partial((cache or RoundedWeights(0)).get_weight, number)
    attributes = {(linear.module, linear.name) for linear in maps.values()}
    replace_attributes(
        layer,
        attributes,
        partial(rounded_parameters, maps, formats, round_map),
        during_calls=cache is not None,
    )


@dataclass(frozen=True)
class Embeddings:
    """A model's embedding and output head.

    Attributes:
        embedding: The input embedding as a linear map; its weight has one row per token.
        lm_head: The output head as a linear map; its weight has one row per token.
        weights: Cache of the quantised weights.
    """

    embedding: LinearMap
    lm_head: LinearMap
    weights: RoundedWeights

    def __getitem__(self, name: str) -> LinearMap:
        """Return the embedding or the output head by its name."""
        linear: LinearMap = getattr(self, name)
        return linear

    @property
    def is_tied(self) -> bool:
        """True if embedding and output head share one weight tensor."""
        return self.embedding.parameter is self.lm_head.parameter

    def rounded_weight(self, name: str, form: str) -> Tensor:
        """Return the quantised weight [tokens, width] of the embedding or output head."""
        path = OUTER_MATRICES[0] if self.is_tied else name
        return self.weights.get_weight(0, path, self[name], form)

    def temporary_format(self, name: str, form: str | None) -> AbstractContextManager[None]:
        """Quantise the weights of the embedding or the output head until the context exits.

        If `form` is None, nothing is quantised.
        """
        if form is None:
            return nullcontext()
        weight = nn.Parameter(self.rounded_weight(name, form), requires_grad=False)
        return replaced_attributes(self[name].module, weight=weight)


def find_embeddings(model: PreTrainedModel, max_bytes: int = 0) -> Embeddings:
    """Find the embedding and the output head of a model.

    `max_bytes` is the size of the cache of quantised weights. Raises CellError if the embedding or
    the head cannot be quantised.
    """
    maps = []
    class_name = type(model).__name__
    getters = ("get_input_embeddings", "get_output_embeddings")
    for name, getter in zip(OUTER_MATRICES, getters, strict=True):
        try:
            module = getattr(model, getter)()
        except (AttributeError, NotImplementedError):  # a download's code need not define it
            module = None
        weight = None if module is None else module._parameters.get("weight")
        if weight is None or weight.ndim != 2:
            raise CellError(
                f"{class_name} has no {name} with a single weight matrix; leave {name} out of 'map'"
            )
        if not weight.is_floating_point():
            raise CellError(f"{name} of {class_name} is quantised already; leave it out of 'map'")
        maps.append(LinearMap(module))
    return Embeddings(maps[0], maps[1], RoundedWeights(max_bytes))


def embedding_shapes(model: PreTrainedModel) -> dict[str, tuple[int, int]]:
    """Return the shapes of the embedding and the output head, by name.

    If the embedding and the head share one weight, the result contains only the embedding.

    Raises ExperimentError if the embedding or the head cannot be quantised.
    """
    try:
        embeddings = find_embeddings(model)
    except CellError as error:
        raise ExperimentError(str(error)) from None
    return {
        name: embeddings[name].shape
        for name in (OUTER_MATRICES[:1] if embeddings.is_tied else OUTER_MATRICES)
    }


def round_embeddings(model: PreTrainedModel, formats: Mapping[str, str]) -> None:
    """Quantise the embedding, the output head, or both, in a copied model.

    `formats` contains the format of each matrix to quantise, by name (`embedding`, `lm_head`).
    """
    if not formats:
        return
    embeddings = find_embeddings(model)
    for name, form in formats.items():
        weight = nn.Parameter(round_weight(embeddings[name].weight, form), requires_grad=False)
        # A tensor shared by both stays shared.
        for end in OUTER_MATRICES if embeddings.is_tied else [name]:
            embeddings[end].module.weight = weight

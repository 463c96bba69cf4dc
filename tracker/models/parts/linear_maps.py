"""Find the linear maps of a layer by structure: modules, and matrices of a mixture's experts.

A mixture holds its experts' matrices in tensors with one entry per expert. Each such tensor is one
map, as in files of llama.cpp (`ffn_down_exps`), with the rows of all experts. The matrix of a
single expert can also be requested as a map, by the expert's number. The embedding and the output
head, which are outside of layers, are linear maps as well.
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

from tracker.core.errors import CellError, ExperimentError
from tracker.core.kinds import OUTER_MATRICES
from tracker.core.model_parts import split_expert_map
from tracker.models.hooks import replaced_attributes, shallow_copy
from tracker.models.offloaded import ModuleAttribute, replace_attributes
from tracker.models.parts.experts import count_experts
from tracker.models.rounding import round_weight


@dataclass(frozen=True)
class LinearMap:
    """A linear map of a layer, or the matrices of all experts under one name.

    Attributes:
        module: The module that holds the weight.
        name: Name of the weight in the module.
        inputs_first: Whether the stored weight has a row per input, as in GPT-2 and the experts of
            GPT-OSS.
        experts: Number of experts; 0 if the map belongs to no experts.
        expert: Index of the single expert; None for all experts.
    """

    module: nn.Module
    name: str = "weight"
    inputs_first: bool = False
    experts: int = 0
    expert: int | None = None

    @property
    def weight(self) -> Tensor:
        """The weight as [outputs, inputs], for experts as [experts, outputs, inputs]."""
        matrix = self.parameter if self.expert is None else self.parameter[self.expert]
        return matrix.mT if self.inputs_first else matrix

    @property
    def shape(self) -> tuple[int, int]:
        """The number of outputs (for experts, the total of all experts), and of inputs."""
        weight = self.weight
        return weight.numel() // weight.shape[-1], weight.shape[-1]

    @property
    def parameter(self) -> Tensor:
        """The tensor that the module holds."""
        tensor: Tensor = getattr(self.module, self.name)
        return tensor

    def to_module_layout(self, weight: Tensor, all_weights: Tensor) -> Tensor:
        """Return a weight in the module's layout; insert a single expert's into `all_weights`."""
        rows = weight.mT.contiguous() if self.inputs_first else weight
        if self.expert is None:
            return rows
        new_weights = all_weights.detach().clone()
        new_weights[self.expert] = rows
        return new_weights


def map_of_module(module: nn.Module) -> LinearMap:
    """Return a module's own linear map."""
    return LinearMap(module, inputs_first=isinstance(module, Conv1D))


def find_linear_maps(layer: nn.Module, name: str) -> dict[str, LinearMap]:
    """Find the linear maps of a layer, by their paths in the layer.

    Routers, experts' biases and matrices of one row are left out, since llama.cpp does not round
    them.

    Args:
        layer: The layer.
        name: The layer's name in messages.

    Returns:
        Path → map; the path of experts' maps is that of their module and the tensor's name.

    Raises:
        CellError: The layer holds other matrices, or weights that are already quantised.
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
        problem = "" if parameter.is_floating_point() else "is quantised already"
        if parameter.ndim > 1 and id(parameter) not in known_ids:
            problem = "is not a linear map, so it cannot be rounded to a format"
        if problem:
            raise CellError(f"{path} of {name} {problem}; leave formats out of 'intervention'")
    return {
        path: linear
        for path, linear in maps.items()
        if id(linear.parameter) not in router_ids and linear.shape[0] > 1
    }


def _find_expert_matrices(module: nn.Module) -> Iterator[LinearMap]:
    """Yield experts' matrices with the axis of their inputs; none if the shapes are ambiguous.

    One tensor computes two halves, the gate and the gated values, and the other tensor reads one
    half. Their shapes are [2 width, hidden] and [hidden, width], or both transposed.
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
    """Yield a mixture's tensors with a row per expert (router, biases), or one row for all experts.

    A linear map is the router if it is the only linear map in its part of the mixture.
    """
    for child in block.children():
        linears = [module for module in child.modules() if isinstance(module, nn.Linear)]
        ambiguous_ids = {id(module.weight) for module in linears} if len(linears) > 1 else set()
        for weight in child.parameters():
            has_expert_rows = weight.shape[:1] == (count,) or weight.shape == (1, count)
            if weight.ndim == 2 and has_expert_rows and id(weight) not in ambiguous_ids:
                yield weight


def find_map(maps: Mapping[str, LinearMap], path: str, name: str) -> LinearMap:
    """Return a map of a layer or of one expert; raise CellError if layer `name` lacks it."""
    if path in maps:
        return maps[path]
    shared_path, number = split_expert_map(path) or ("", 0)
    all_experts = maps.get(shared_path)
    if all_experts is not None and number < all_experts.experts:
        return replace(all_experts, expert=number)
    raise CellError(f"{name} has no linear map {path}; it has {', '.join(maps)}")


class RoundedWeights:
    """Cache of quantised weights, since many rows need the same weights.

    Args:
        max_bytes: Maximum bytes of cached weights; the most recently used are kept.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._weights: OrderedDict[tuple[int, str, str], Tensor] = OrderedDict()
        self._bytes = 0

    def get_weight(self, layer: int, path: str, linear: LinearMap, name: str) -> Tensor:
        """Return the weight of a layer's linear map in a format, with the outputs as first axis."""
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
    """Compute the quantised parameters of linear maps, in the layout of their modules.

    Args:
        maps: Linear maps of a layer by their paths.
        formats: Path of each rounded map → format; a single expert's format overrides that of all
            experts.
        round_map: Function that computes the weight, with the outputs first, from a path, a map and
            a format.

    Returns:
        Each parameter to replace, with the replacement.
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
    """Copy a module, replacing some parameters by other weights and sharing everything else."""
    parameters = {name: nn.Parameter(weight, False) for name, weight in weights.items()}
    return shallow_copy(module, _parameters={**module._parameters, **parameters})


def round_layer(
    layer: nn.Module,
    formats: Mapping[str, str],
    number: int = 0,
    cache: RoundedWeights | None = None,
) -> None:
    """Replace the weights of linear maps of a copied layer by quantised weights.

    Args:
        layer: The layer.
        formats: Path of a map → format.
        number: Number of the layer.
        cache: Cache for the quantised weights. With a cache, the layer has them only while it is
            called. None = the layer has them permanently.
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
        embedding: Linear map whose weight has a row for each token that can be read.
        lm_head: Linear map whose weight has a row for each token that can be predicted.
        weights: Cache of quantised weights of both.
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
        """Return the weight of the embedding or the head, quantised to a format [tokens, width]."""
        path = OUTER_MATRICES[0] if self.is_tied else name
        return self.weights.get_weight(0, path, self[name], form)

    def temporary_format(self, name: str, form: str | None) -> AbstractContextManager[None]:
        """Quantise the weights of the embedding or the head until exit; None leaves them unchanged.

        No other pass of the model may run meanwhile: it would use these weights.
        """
        if form is None:
            return nullcontext()
        weight = nn.Parameter(self.rounded_weight(name, form), requires_grad=False)
        return replaced_attributes(self[name].module, weight=weight)


def find_embeddings(model: PreTrainedModel, max_bytes: int = 0) -> Embeddings:
    """Find a model's embedding and head; raise CellError if either has no weights to round.

    The model's weights may be on the meta device. `max_bytes` is as for `RoundedWeights`.
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
                f"{class_name} has no {name} that is one matrix; leave {name} out of 'map'"
            )
        if not weight.is_floating_point():
            raise CellError(f"{name} of {class_name} is quantised already; leave it out of 'map'")
        maps.append(LinearMap(module))
    return Embeddings(maps[0], maps[1], RoundedWeights(max_bytes))


def embedding_shapes(model: PreTrainedModel) -> dict[str, tuple[int, int]]:
    """Return the shapes of a model's embedding and head; only of the embedding if they are tied.

    Raises ExperimentError if the embedding or the head has no weights to round.
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
    """Quantise embedding and head of a copied model by `formats`, which maps names to formats."""
    if not formats:
        return
    embeddings = find_embeddings(model)
    for name, form in formats.items():
        weight = nn.Parameter(round_weight(embeddings[name].weight, form), requires_grad=False)
        # A tensor shared by both stays shared.
        for end in OUTER_MATRICES if embeddings.is_tied else [name]:
            embeddings[end].module.weight = weight

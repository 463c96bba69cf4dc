"""Linear maps of a layer, found by structure: modules, and the matrices of a mixture's experts.

A mixture holds its experts' matrices in tensors with one entry per expert. Each such tensor is one
map, as in files of llama.cpp (`ffn_down_exps`), with the rows of all experts. The matrix of one
expert is a map too if it is requested by its number. The two matrices outside of layers, the
embedding and the output head, are linear maps as well.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from tracker.core.errors import CellError, ExperimentError
from tracker.core.kinds import ENDS
from tracker.core.model_parts import one_experts
from tracker.models.hooks import shallow_copy
from tracker.models.offloaded import Attribute, replace_attributes
from tracker.models.parts.experts import entries
from tracker.models.rounding import in_format


@dataclass(frozen=True)
class LinearMap:
    """One linear map of a layer, or those of all experts that have one name.

    Attributes:
        module: The module that holds the weight.
        name: Name of the weight in the module.
        inputs_first: Whether it has a row per input, like GPT-2's and the experts of GPT-OSS.
        experts: Number of experts; 0 if the map belongs to none.
        expert: Number of the single expert; None for all.
    """

    module: nn.Module
    name: str = "weight"
    inputs_first: bool = False
    experts: int = 0
    expert: int | None = None

    @property
    def weight(self) -> Tensor:
        """The weight as [outputs, inputs], for experts as [experts, outputs, inputs]."""
        held = self.parameter if self.expert is None else self.parameter[self.expert]
        return held.mT if self.inputs_first else held

    @property
    def shape(self) -> tuple[int, int]:
        """The number of its rows (for experts, of all together), and of its inputs."""
        weight = self.weight
        return weight.numel() // weight.shape[-1], weight.shape[-1]

    @property
    def parameter(self) -> Tensor:
        """The tensor that the module holds."""
        held: Tensor = getattr(self.module, self.name)
        return held

    def laid_out(self, weight: Tensor, others: Tensor) -> Tensor:
        """Return a weight in the module's layout; one expert's is inserted among the `others`."""
        rows = weight.mT.contiguous() if self.inputs_first else weight
        if self.expert is None:
            return rows
        whole = others.detach().clone()
        whole[self.expert] = rows
        return whole


def map_of(module: nn.Module) -> LinearMap:
    """Return a module's own linear map."""
    return LinearMap(module, inputs_first=isinstance(module, Conv1D))


def linear_maps(layer: nn.Module, name: str) -> dict[str, LinearMap]:
    """Find the linear maps of a layer, by their paths in it.

    Routers are left out, and so are experts' biases and matrices of one row: llama.cpp rounds none
    of them.

    Args:
        layer: The layer.
        name: Its name in messages.

    Returns:
        Path → map; experts' by the path of their module and the tensor's name.

    Raises:
        CellError: It holds other matrices, or weights that are quantised already.
    """
    maps: dict[str, LinearMap] = {}
    choosing: set[int] = set()
    modules = dict(layer.named_modules())
    for path, module in modules.items():
        if isinstance(module, (nn.Linear, Conv1D)):
            maps[path] = map_of(module)
        elif matrices := [*_matrices_of_experts(module)]:
            maps |= {f"{path}.{linear.name}": linear for linear in matrices}
            block = modules[path.rpartition(".")[0]]
            choosing |= {*map(id, _rows_of_experts(block, matrices[0].experts))}
    mapped = {id(linear.parameter) for linear in maps.values()} | choosing
    for path, parameter in layer.named_parameters():
        why = "" if parameter.is_floating_point() else "is quantised already"
        if parameter.ndim > 1 and id(parameter) not in mapped:
            why = "is no linear map, so it has no weights in a format"
        if why:
            raise CellError(f"{path} of {name} {why}; leave formats out of 'intervention'")
    return {
        path: linear
        for path, linear in maps.items()
        if id(linear.parameter) not in choosing and linear.shape[0] > 1
    }


def _matrices_of_experts(module: nn.Module) -> Iterator[LinearMap]:
    """Yield experts' matrices with their axis of inputs; none if shapes do not determine it.

    One tensor makes two halves, a gate and what passes it, and the other one reads one half:
    [2 width, hidden] and [hidden, width], or the other way round in both.
    """
    count, tensors = entries(module), module._parameters.items()
    matrices = {name: t.shape[1:] for name, t in tensors if t is not None and t.ndim == 3}
    if not count or len(matrices) != 2:
        return
    into, out = matrices.values()
    inputs_first = into == (out[1], 2 * out[0])
    if inputs_first or into == (2 * out[1], out[0]):
        for name in matrices:
            yield LinearMap(module, name, inputs_first, count)


def _rows_of_experts(block: nn.Module, count: int) -> Iterator[Tensor]:
    """Yield tensors of a mixture with a row per expert: its router, and biases, also in one row.

    A linear map is the router if it is the only one in its part of the mixture.
    """
    for part in block.children():
        linears = [module for module in part.modules() if isinstance(module, nn.Linear)]
        several = {id(module.weight) for module in linears} if len(linears) > 1 else set()
        for weight in part.parameters():
            is_row_each = weight.shape[:1] == (count,) or weight.shape == (1, count)
            if weight.ndim == 2 and is_row_each and id(weight) not in several:
                yield weight


def map_at(maps: Mapping[str, LinearMap], path: str, name: str) -> LinearMap:
    """Return one of a layer's maps, or one expert's; raise CellError if `name` has none there."""
    if path in maps:
        return maps[path]
    of_all, number = one_experts(path) or ("", 0)
    whole = maps.get(of_all)
    if whole is not None and number < whole.experts:
        return replace(whole, expert=number)
    raise CellError(f"{name} has no linear map {path}; it has {', '.join(maps)}")


class RoundedWeights:
    """Cache of weights in a format: many rows need the same ones.

    Args:
        most: Maximum bytes of the most recently used weights.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._weights: OrderedDict[tuple[int, str, str], Tensor] = OrderedDict()
        self._bytes = 0

    def of(self, layer: int, path: str, linear: LinearMap, name: str) -> Tensor:
        """Return the weight of a linear map of a layer in a format, its outputs first."""
        key = (layer, path, name)
        weight = self._weights.get(key)
        if weight is None:
            weight = self._weights[key] = in_format(linear.weight, name)
            self._bytes += weight.nbytes
        self._weights.move_to_end(key)
        while self._bytes > self._most and len(self._weights) > 1:  # the last one is in use
            self._bytes -= self._weights.popitem(last=False)[1].nbytes
        return weight


def weights_in(
    maps: Mapping[str, LinearMap],
    formats: Mapping[str, str],
    make: Callable[[str, LinearMap, str], Tensor],
) -> dict[Attribute, Tensor]:
    """Compute the parameters of maps in formats, in the layout of their modules.

    Args:
        maps: Linear maps of a layer by their paths.
        formats: Path of each rounded map → format; one expert's has priority over that of all.
        make: Function that computes the weight, outputs first, from a path, its map and a format.

    Returns:
        Each parameter with its replacement.
    """
    weights: dict[Attribute, Tensor] = {}
    for path in sorted(formats, key=lambda path: maps[path].expert is not None):
        linear = maps[path]
        attribute = (linear.module, linear.name)
        others = weights.get(attribute, linear.parameter)
        weights[attribute] = linear.laid_out(make(path, linear, formats[path]), others)
    return weights


def holding(module: nn.Module, weights: Mapping[str, Tensor]) -> nn.Module:
    """Copy a module with other weights among its parameters, sharing everything else."""
    parameters = {name: nn.Parameter(w, requires_grad=False) for name, w in weights.items()}
    return shallow_copy(module, _parameters={**module._parameters, **parameters})


def round_layer(
    layer: nn.Module,
    formats: Mapping[str, str],
    number: int = 0,
    cache: RoundedWeights | None = None,
) -> None:
    """Give linear maps of a copied layer weights in formats.

    Args:
        layer: The layer.
        formats: Path of a map → format.
        number: Number of the layer.
        cache: Cache of its weights while it is not called, as far as they fit: then it has them
            only while it is called. None = it has them permanently.
    """
    name = f"layer {number}"
    every = linear_maps(layer, name)
    maps = {path: map_at(every, path, name) for path in formats}
    make = partial((cache or RoundedWeights(0)).of, number)
    attributes = {(linear.module, linear.name) for linear in maps.values()}
    replace_attributes(
        layer, attributes, partial(weights_in, maps, formats, make), briefly=cache is not None
    )


@dataclass(frozen=True)
class Embeddings:
    """A model's embedding and output head.

    Attributes:
        embedding: Linear map whose weight has a row for each token that is read.
        lm_head: Linear map whose weight has a row for each token that is predicted.
        weights: Cache of their weights in formats.
    """

    embedding: LinearMap
    lm_head: LinearMap
    weights: RoundedWeights

    def __getitem__(self, name: str) -> LinearMap:
        """Return one of them by its name."""
        linear: LinearMap = getattr(self, name)
        return linear

    @property
    def is_tied(self) -> bool:
        """True if both weights are one tensor."""
        return self.embedding.parameter is self.lm_head.parameter

    def weight(self, name: str, form: str) -> Tensor:
        """Return the weight of one of them in a format [tokens, width]."""
        return self.weights.of(0, ENDS[0] if self.is_tied else name, self[name], form)

    @contextmanager
    def having(self, name: str, form: str | None) -> Iterator[None]:
        """Give one of them weights in a format until exit; None for its own.

        No other pass of the model may run meanwhile: it would use these weights.
        """
        if form is None:
            yield
            return
        module = self[name].module
        usual, rounded = module.weight, self.weight(name, form)
        module.weight = nn.Parameter(rounded, requires_grad=False)
        try:
            yield
        finally:
            module.weight = usual


def find_embeddings(model: PreTrainedModel, most: int = 0) -> Embeddings:
    """Find a model's embedding and head; raise CellError if one has no weights to round.

    The model's weights may be on the meta device. `most` is as for `RoundedWeights`.
    """
    maps = []
    class_name = type(model).__name__
    getters = ("get_input_embeddings", "get_output_embeddings")
    for name, getter in zip(ENDS, getters, strict=True):
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
    return Embeddings(maps[0], maps[1], RoundedWeights(most))


def embedding_shapes(model: PreTrainedModel) -> dict[str, tuple[int, int]]:
    """Return the shapes of a model's embedding and head; if both are one, of the embedding.

    Raises ExperimentError if one has no weights to round.
    """
    try:
        embeddings = find_embeddings(model)
    except CellError as error:
        raise ExperimentError(str(error)) from None
    return {name: embeddings[name].shape for name in (ENDS[:1] if embeddings.is_tied else ENDS)}


def round_embeddings(model: PreTrainedModel, formats: Mapping[str, str]) -> None:
    """Give a copied model's embedding and head their own weights in formats: name → format."""
    if not formats:
        return
    embeddings = find_embeddings(model)
    for name, form in formats.items():
        weight = nn.Parameter(in_format(embeddings[name].weight, form), requires_grad=False)
        # A tensor shared by both stays shared.
        for end in ENDS if embeddings.is_tied else [name]:
            embeddings[end].module.weight = weight

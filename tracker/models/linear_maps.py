"""The linear maps of a layer, found by structure: modules, and the matrices of a mixture's experts.

A mixture holds its experts' matrices in tensors with one entry an expert. Each such tensor is one
map, as files of llama.cpp hold it (`ffn_down_exps`), whose rows are those of all experts; one
expert's alone is a map too where it is asked for by its number.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tracker.core.errors import CellError
from tracker.core.model_parts import one_experts
from tracker.models.experts import entries


@dataclass(frozen=True)
class LinearMap:
    """One linear map of a layer, or those of all experts that have one name.

    Attributes:
        module: What holds the weight.
        name: What the weight is called there.
        inputs_first: Whether it has a row an input, as GPT-2's and the experts of GPT-OSS.
        experts: How many experts there are; 0 where it is not theirs.
        expert: Which of them alone is meant; None for all.
    """

    module: nn.Module
    name: str = "weight"
    inputs_first: bool = False
    experts: int = 0
    expert: int | None = None

    @property
    def weight(self) -> Tensor:
        """View the weight as [outputs, inputs], of experts as [experts, outputs, inputs]."""
        own = self.parameter if self.expert is None else self.parameter[self.expert]
        return own.mT if self.inputs_first else own

    @property
    def shape(self) -> tuple[int, int]:
        """How many rows it has, those of all experts, and how many inputs."""
        weight = self.weight
        return weight.numel() // weight.shape[-1], weight.shape[-1]

    @property
    def parameter(self) -> Tensor:
        """What the module holds."""
        held: Tensor = getattr(self.module, self.name)
        return held

    def laid_out(self, weight: Tensor, beside: Tensor) -> Tensor:
        """Lay a weight out as the module holds it; one expert's `beside` those of the others."""
        own = weight.mT.contiguous() if self.inputs_first else weight
        if self.expert is None:
            return own
        every = beside.detach().clone()
        every[self.expert] = own
        return every


def map_of(module: nn.Module) -> LinearMap:
    """Give the linear map that a module is."""
    return LinearMap(module, inputs_first=isinstance(module, Conv1D))


def linear_maps(layer: nn.Module, name: str) -> dict[str, LinearMap]:
    """List the linear maps of a layer by their paths in it.

    What chooses among experts is left out, and so are experts' biases and matrices of one row:
    llama.cpp rounds none of them.

    Args:
        layer: The layer.
        name: What it is called in messages.

    Returns:
        Path → map; experts' by the path of their module and the tensor's name.

    Raises:
        CellError: It holds other matrices, or weights that are quantised already.
    """
    found: dict[str, LinearMap] = {}
    apart: set[int] = set()
    modules = dict(layer.named_modules())
    for path, module in modules.items():
        if isinstance(module, (nn.Linear, Conv1D)):
            found[path] = map_of(module)
        elif matrices := [*_of_experts(module)]:
            found |= {f"{path}.{each.name}": each for each in matrices}
            block = modules[path.rpartition(".")[0]]
            apart |= {*map(id, _an_entry_each(block, matrices[0].experts))}
    known = {id(each.parameter) for each in found.values()} | apart
    for path, parameter in layer.named_parameters():
        why = "" if parameter.is_floating_point() else "is quantised already"
        if parameter.ndim > 1 and id(parameter) not in known:
            why = "is no linear map, so it has no weights in a format"
        if why:
            raise CellError(f"{path} of {name} {why}; leave formats out of 'intervention'")
    return {
        path: each
        for path, each in found.items()
        if id(each.parameter) not in apart and each.shape[0] > 1
    }


def _of_experts(module: nn.Module) -> Iterator[LinearMap]:
    """Tell which axis of experts' matrices is inputs, by their shapes; none where these are silent.

    One tensor makes two halves, a gate and what passes it, of which the other one takes one:
    [2 width, hidden] and [hidden, width], or the other way round in both.
    """
    count, named = entries(module), module._parameters.items()
    matrices = {name: each.shape[1:] for name, each in named if each is not None and each.ndim == 3}
    if not count or len(matrices) != 2:
        return
    into, out = matrices.values()
    inputs_first = into == (out[1], 2 * out[0])
    if inputs_first or into == (2 * out[1], out[0]):
        for name in matrices:
            yield LinearMap(module, name, inputs_first, count)


def _an_entry_each(block: nn.Module, count: int) -> Iterator[Tensor]:
    """List what a mixture has an entry an expert of: its router, and biases, also in one row.

    A linear map is the router where the part of the mixture that it is, or is in, has no other.
    """
    for part in block.children():
        maps = [each for each in part.modules() if isinstance(each, nn.Linear)]
        ours = {id(each.weight) for each in maps} if len(maps) > 1 else set()
        for weight in part.parameters():
            an_entry_each = weight.shape[:1] == (count,) or weight.shape == (1, count)
            if weight.ndim == 2 and an_entry_each and id(weight) not in ours:
                yield weight


def map_at(maps: Mapping[str, LinearMap], path: str, name: str) -> LinearMap:
    """Give one of a layer's linear maps, or one expert's; CellError where `name` has none there."""
    if path in maps:
        return maps[path]
    of_all, number = one_experts(path) or ("", 0)
    every = maps.get(of_all)
    if every is not None and number < every.experts:
        return replace(every, expert=number)
    raise CellError(f"{name} has no linear map {path}; it has {', '.join(maps)}")

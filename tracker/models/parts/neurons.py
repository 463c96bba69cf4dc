"""Find the neurons (intermediate channels) of MLPs, and group them by norms of their weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tracker.models import hooks
from tracker.models.offloaded import is_absent
from tracker.models.parts.linear_maps import LinearMap, map_of_module
from tracker.models.parts.probe import ModuleCall, PartFinder, module_paths
from tracker.models.parts.projection import ProjectionColumns, count_holders, linear_calls
from tracker.models.parts.sublayers import SUBLAYER_TEXT_TOKENS, Sublayers
from tracker.schema.changes import Change
from tracker.schema.errors import CellError, ModelError
from tracker.schema.kinds import Component
from tracker.schema.model_parts import neuron_group_size

_UNREADABLE = (
    "the weights of the MLP are {state}, so neurons cannot be sorted by their norms; leave neuron "
    "out of 'component'"
)


@dataclass(frozen=True)
class Neurons(ProjectionColumns):
    """The neurons of one MLP, in groups of equal size.

    Attributes:
        projection: Path of the output projection, the linear map that reads all neurons.
        size: Number of neurons of each group.
        groups: Number of groups.
        maps: The output projection and the linear maps that compute the neurons, by path. If the
            weights are unknown, `maps` is empty, and a group contains consecutive neurons.
    """

    KIND: ClassVar[str] = "groups of neurons"
    COMPONENTS: ClassVar[str] = "neuron"
    NEEDS: ClassVar[str] = (
        "Neurons can be removed if the MLP has no experts, one output projection and a multiple of "
        "64 neurons."
    )

    projection: str
    size: int
    groups: int
    maps: Mapping[str, LinearMap] = field(default_factory=dict)

    @classmethod
    def find(cls, finder: PartFinder) -> list[Neurons | None]:
        """Find the neurons of every layer's MLP; the entry of a layer without neurons is None.

        The output projection is the last linear map that the MLP calls. The neurons are the inputs
        of the output projection. An MLP with other matrices, such as a mixture of experts, has no
        neurons. Raises ModelError if weights are offloaded.
        """
        if any(map(is_absent, finder.layers.parameters())):
            raise ModelError(
                f"{type(finder.model).__name__}: {_UNREADABLE.format(state='offloaded')}"
            )
        sublayers = dict(zip(finder.layers, finder.find(Sublayers), strict=True))
        holders = count_holders(finder.layers)

        def find(layer: nn.Module, calls: Sequence[ModuleCall]) -> Neurons | None:
            pair = sublayers[layer]
            assert pair is not None
            attention, mlp = {*pair.attention.modules()}, [*pair.mlp.modules()]
            maps = [call for call in linear_calls(calls) if call.module not in attention]
            if not maps or maps[-1].module not in mlp or holders[maps[-1].module] > 1:
                return None
            *others, last = maps
            width = last.args[0].shape[-1]
            size = neuron_group_size(width)
            modules = [c.module for c in others if _computes_neurons(c.module, last, calls[-1])]
            matrices = {m for m in mlp for p in m.parameters(recurse=False) if p.ndim > 1}
            if not size or not modules or matrices - {*modules, last.module}:
                return None
            paths = module_paths(layer)
            linear_maps = {
                paths[module]: map_of_module(module) for module in (last.module, *modules)
            }
            return cls(paths[last.module], size, width // size, linear_maps)

        return finder.probe(cls, SUBLAYER_TEXT_TOKENS, find)

    @property
    def counts(self) -> Mapping[Component, int]:
        """The number of groups."""
        return {"neuron": self.groups}

    @cached_property
    def order(self) -> Tensor:
        """The indices of the neurons, sorted by the norm of the neuron's weights, largest first.

        A neuron has one weight vector in each linear map of the MLP: a column of the output
        projection, or a row of another map. The neuron's norm is the product of the Euclidean norms
        of these vectors.
        """
        width = self.size * self.groups
        norms = torch.ones(width, dtype=torch.float64)
        for path, linear in self.maps.items():
            weight = linear.weight.detach()
            if not weight.is_floating_point():
                raise CellError(f"{path}: {_UNREADABLE.format(state='quantised')}")
            # A packed map has rows of gates, then rows of values.
            vectors = weight.cpu().double().norm(dim=0 if path == self.projection else 1)
            norms *= vectors.view(-1, width).prod(0)
        # Sums of other devices differ in the last bits.
        order = norms.float().argsort(descending=True, stable=True)
        return order.to(self.maps[self.projection].weight.device) if self.maps else order

    def select_columns(self, number: int, n_parts: int) -> Tensor:
        """Return the indices of the neurons in group `number`."""
        return self.order[number * self.size : (number + 1) * self.size]

    def narrow(self, parts: Sequence[Change], name: str) -> tuple[Neurons, dict[int, list[int]]]:
        """Return the MLP's `Neurons` without the groups in `parts`, and the tensor entries to keep.

        The dictionary maps the length of a tensor's axis to the indices that remain. Raises
        CellError if no group remains.
        """
        width = self.size * self.groups
        is_kept = torch.ones(width, dtype=torch.bool, device=self.order.device)
        for part in parts:
            is_kept[self.columns(part, name)] = False
        remaining = is_kept.nonzero().flatten().tolist()
        if not remaining:
            raise CellError(f"no neuron of {name} would remain; remove fewer groups of neurons")
        entries = {width: remaining}
        if any(linear.shape[0] == 2 * width for linear in self.maps.values()):
            entries[2 * width] = [*remaining, *(width + column for column in remaining)]
        return replace(self, groups=len(remaining) // self.size), entries


def _computes_neurons(module: nn.Module, projection: ModuleCall, layer: ModuleCall) -> bool:
    """Return whether the linear map `module` computes the neurons of an MLP.

    The function changes some outputs of `module`, and tests that exactly the neurons with the same
    indices change. `projection` and `layer` are recorded calls of the output projection and of the
    layer.
    """
    inputs = projection.args[0]
    width = inputs.shape[-1]
    is_marked = torch.rand(width, generator=torch.Generator().manual_seed(0)) < 0.5
    new_inputs: list[Tensor] = []

    def mark(_: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        n_outputs = output.shape[-1]
        if n_outputs not in (width, 2 * width):
            return None
        marks = is_marked.repeat(n_outputs // width).to(output.device)
        return output.masked_fill(marks, 1)

    def record(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        new_inputs.append(args[0])

    with module.register_forward_hook(mark), projection.module.register_forward_pre_hook(record):
        hooks.call_protected(layer.module, layer.module.forward, layer.args, layer.kwargs)
    is_changed = (new_inputs[-1] != inputs).flatten(0, -2).any(0).cpu()
    return torch.equal(is_changed, is_marked)

"""Remove parts, such as heads, that are input columns of an output projection."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import ClassVar

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tracker.models.offloaded import ModuleAttribute, replace_attributes
from tracker.models.parts.linear_maps import map_of_module
from tracker.models.parts.probe import ModuleCall
from tracker.schema.changes import Change
from tracker.schema.config import FILE_KEYS, number_field
from tracker.schema.errors import CellError
from tracker.schema.kinds import KIND_STYLES, Component

Columns = slice | Tensor
"""Selection of columns: a range, or their indices."""


class ProjectionColumns(ABC):
    """Base class of parts (e.g. heads) that are input columns of a sublayer's output projection.

    Attributes:
        projection: Path of the output projection in the layer.
    """

    COMPONENTS: ClassVar[str]

    projection: str

    @property
    @abstractmethod
    def counts(self) -> Mapping[Component, int]:
        """Kind of parts (e.g. `head`) → number of parts in the layer."""

    @abstractmethod
    def select_columns(self, number: int, n_parts: int) -> Columns:
        """Return the input columns of part `number` out of `n_parts` equal parts of the layer."""

    def columns(self, part: Change, name: str) -> Columns:
        """Return the input columns of a part; raise CellError if the part does not exist."""
        n_parts = self.counts[part.component]
        assert part.number is not None
        if part.number >= n_parts:
            raise CellError(
                f"{name} has {n_parts} {KIND_STYLES[part.component].plural}, 0 to {n_parts - 1}; "
                f"leave {part.number} out of '{FILE_KEYS[number_field(part.component)]}'"
            )
        return self.select_columns(part.number, n_parts)

    def remove(self, layer: nn.Module, parts: Sequence[Change], name: str) -> None:
        """Make the output projection of a copied layer ignore some parts."""
        columns = [self.columns(part, name) for part in parts]
        linear = map_of_module(layer.get_submodule(self.projection))
        attribute = (linear.module, linear.name)
        if not linear.weight.is_floating_point():
            raise CellError(
                f"{self.projection} of {name} is quantised, so its columns cannot be set to 0; "
                f"leave {self.COMPONENTS} out of 'component'"
            )

        def make() -> dict[ModuleAttribute, Tensor]:
            weight = linear.weight.detach().clone()
            for part_columns in columns:
                weight[:, part_columns] = 0
            return {attribute: linear.to_module_layout(weight, linear.parameter)}

        replace_attributes(layer, [attribute], make)


def linear_calls(calls: Sequence[ModuleCall]) -> list[ModuleCall]:
    """Return the calls of linear modules."""
    linear = (call for call in calls if isinstance(call.module, (nn.Linear, Conv1D)) and call.args)
    return [call for call in linear if call.args[0].ndim > 1]


def count_holders(layers: Iterable[nn.Module]) -> Counter[nn.Module]:
    """Count, for each module, the layers that contain it."""
    return Counter(module for layer in layers for module in layer.modules())

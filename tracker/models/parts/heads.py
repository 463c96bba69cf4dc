"""Attention heads, found by structure and verified to be the columns of a linear map."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, eager_mask
from transformers.pytorch_utils import Conv1D

from tracker.core.changes import Change
from tracker.core.errors import CellError
from tracker.core.kinds import KINDS, Component
from tracker.models.offloaded import Attribute, replace_attributes
from tracker.models.parts.linear_maps import map_of
from tracker.models.parts.probe import Call, PartFinder, paths_in

TOKENS = 6
"""Length of the text for the verification."""
_PROOF = "tracker_proof_of_heads"


@dataclass(frozen=True)
class Heads:
    """The heads of one attention: adjacent columns of its output projection's input.

    Attributes:
        projection: Path in the layer of the linear map that all heads pass.
        heads: Number of heads.
        groups: Number of groups of heads that share keys and values.
        width: Number of columns of each head.
    """

    KIND: ClassVar[str] = "attention heads"
    COMPONENTS: ClassVar[str] = "head and kv_head"
    NEEDS: ClassVar[str] = (
        "one call of transformers' AttentionInterface and one linear map of all its heads' outputs"
    )

    projection: str
    heads: int
    groups: int
    width: int

    @classmethod
    def find(cls, finder: PartFinder) -> list[Heads | None]:
        """Find the heads of every layer's attention, wherever in the layer it is.

        For one call on a short text, the attention of transformers is replaced by one in which
        every second head returns ones and all others zeros. The output projection is the linear map
        whose input then has ones (or anything but zeros) in exactly these columns, and which no
        other layer has.
        """
        shapes: list[tuple[int, int, int]] = []
        holders = Counter(module for layer in finder.layers for module in layer.modules())

        def alternate(
            module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *_: object, **__: object
        ) -> tuple[Tensor, None]:
            batch, heads, tokens, _width = query.shape
            output = value.new_zeros(batch, tokens, heads, value.shape[-1])
            output[:, :, ::2] = 1
            shapes.append((heads, key.shape[1], value.shape[-1]))
            return output, None

        def find(layer: nn.Module, calls: Sequence[Call]) -> Heads | None:
            attentions = [*shapes]
            shapes.clear()
            if len(attentions) != 1:
                return None
            heads, groups, width = attentions[0]
            ones = torch.arange(heads).repeat_interleave(width) % 2 == 0
            fitting = {call.module for call in calls if _reads(call, ones)}
            if len(fitting) != 1 or heads % groups or holders[module := fitting.pop()] != 1:
                return None
            return cls(paths_in(layer)[module], heads, groups, width)

        with _attention(finder.model, alternate):
            return finder.probe(cls, TOKENS, find)

    def count(self, component: Component) -> int:
        """Return the number of heads, or of groups of heads."""
        return self.groups if component == "kv_head" else self.heads

    def columns(self, part: Change, name: str) -> slice:
        """Return the columns of a head or a group; raise CellError if the layer `name` has none."""
        count = self.count(part.component)
        assert part.number is not None
        if part.number >= count:
            raise CellError(
                f"{name} has {count} {KINDS[part.component].many}, 0 to {count - 1}; leave "
                f"{part.number} out of 'head'"
            )
        width = self.heads // count * self.width
        return slice(part.number * width, (part.number + 1) * width)

    def remove(self, layer: nn.Module, parts: Sequence[Change], name: str) -> None:
        """Give a copied layer its own output projection that ignores some heads."""
        columns = [self.columns(part, name) for part in parts]
        linear = map_of(layer.get_submodule(self.projection))
        attribute = (linear.module, linear.name)
        if not linear.weight.is_floating_point():
            raise CellError(
                f"{self.projection} of {name} is quantised, and has no columns of numbers; leave "
                f"{self.COMPONENTS} out of 'component'"
            )

        def make() -> dict[Attribute, Tensor]:
            weight = linear.weight.detach().clone()
            for run in columns:
                weight[:, run] = 0
            return {attribute: linear.laid_out(weight, linear.parameter)}

        replace_attributes(layer, [attribute], make)


def _reads(call: Call, columns: Tensor) -> bool:
    """Check whether a linear map's input was non-zero in exactly some of its columns."""
    if not isinstance(call.module, (nn.Linear, Conv1D)) or not call.args:
        return False
    given = call.args[0]
    return given.ndim > 1 and torch.equal((given.flatten(0, -2) != 0).any(0).cpu(), columns)


@contextmanager
def _attention(model: nn.Module, function: Callable[..., object]) -> Iterator[None]:
    """Replace the attention of all of a model's modules by a function until exit."""
    AttentionInterface.register(_PROOF, function)
    AttentionMaskInterface.register(_PROOF, eager_mask)
    configs = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
    before = [(config, config._attn_implementation) for config in configs.values()]
    try:
        for config, _ in before:
            config._attn_implementation = _PROOF
        yield
    finally:
        for config, implementation in before:
            config._attn_implementation = implementation

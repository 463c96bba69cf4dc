"""Find the attention heads of layers, and remove heads."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, eager_mask
from transformers.pytorch_utils import Conv1D

from tracker.models.hooks import enter_all, replaced_attributes
from tracker.models.parts.linear_maps import map_of_module
from tracker.models.parts.probe import ModuleCall, PartFinder, module_paths
from tracker.models.parts.projection import ProjectionColumns, count_holders, linear_calls
from tracker.schema.changes import Change
from tracker.schema.errors import CellError
from tracker.schema.formats import join_words
from tracker.schema.kinds import Component

HEAD_TEXT_TOKENS = 6
"""Number of tokens of the text for the verification."""
_PROBE_ATTENTION = "tracker_proof_of_heads"


@dataclass(frozen=True)
class Heads(ProjectionColumns):
    """The heads of one attention module.

    Attributes:
        projection: Path of the output projection, the linear map that reads the outputs of all
            heads.
        heads: Number of heads.
        groups: Number of groups of heads that share keys and values.
        width: Number of input columns of each head.
        is_packed: Whether one linear map may compute queries, keys and values together.
    """

    KIND: ClassVar[str] = "attention heads"
    COMPONENTS: ClassVar[str] = "head and kv_head"
    NEEDS: ClassVar[str] = (
        "Heads can be removed if the attention uses transformers' AttentionInterface once and has "
        "one output projection."
    )

    projection: str
    heads: int
    groups: int
    width: int
    is_packed: bool = True

    @classmethod
    def find(cls, finder: PartFinder) -> list[Heads | None]:
        """Find the heads of every layer's attention; the entry of a layer without heads is None.

        The method runs the model on a short text. During this test, every second head returns ones,
        and the other heads return zeros. The output projection is the linear map with exactly these
        ones and zeros as inputs.
        """
        shapes: list[tuple[int, int, int]] = []
        holders = count_holders(finder.layers)

        def mark_alternate_heads(
            module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *_: object, **__: object
        ) -> tuple[Tensor, None]:
            batch, heads, tokens, _width = query.shape
            output = value.new_zeros(batch, tokens, heads, value.shape[-1])
            output[:, :, ::2] = 1
            shapes.append((heads, key.shape[1], value.shape[-1]))
            return output, None

        def find(layer: nn.Module, calls: Sequence[ModuleCall]) -> Heads | None:
            attentions = [*shapes]
            shapes.clear()
            if len(attentions) != 1:
                return None
            heads, groups, width = attentions[0]
            # Only the output projection reads all heads side by side.
            is_one = torch.arange(heads).repeat_interleave(width) % 2 == 0
            modules = {c.module for c in linear_calls(calls) if _reads_columns(c.args[0], is_one)}
            if heads % groups or [holders[module] for module in modules] != [1]:
                return None
            projection = module_paths(layer)[modules.pop()]
            # A map of queries and gates can be as long as one of queries, keys and values.
            is_packed = groups * width not in _sizes_except_projection(layer, projection)
            return cls(projection, heads, groups, width, is_packed)

        with _replaced_attention(finder.model, mark_alternate_heads):
            return finder.probe(cls, HEAD_TEXT_TOKENS, find)

    def select_columns(self, number: int, n_parts: int) -> slice:
        """Return the input columns of a head or a group of heads."""
        width = self.heads // n_parts * self.width
        return slice(number * width, (number + 1) * width)

    @property
    def counts(self) -> Mapping[Component, int]:
        """The numbers of heads and of groups of heads."""
        return {"head": self.heads, "kv_head": self.groups}

    def narrow(self, parts: Sequence[Change], name: str) -> tuple[Heads, dict[int, list[int]]]:
        """Remove heads; return the remaining `Heads`, and the indices to keep in weight tensors.

        The dictionary maps the length of a tensor's axis to the indices that remain. Raises
        CellError if no head remains, or if the groups of heads would have unequal sizes.
        """
        width, per_group = self.width, self.heads // self.groups
        columns = torch.arange(self.heads * width)
        removed = {c // width for part in parts for c in columns[self.columns(part, name)].tolist()}
        heads = [head for head in range(self.heads) if head not in removed]
        groups = Counter(head // per_group for head in heads)
        if not heads:
            raise CellError(f"no head of {name} would remain; remove fewer heads")
        if len({*groups.values()}) != 1:
            numbers = join_words([str(groups[group]) for group in range(self.groups)])
            raise CellError(
                f"the groups of {name} would keep {numbers} heads, but must have equal sizes. "
                "Remove equally many heads from each group, or whole groups (kv_head)"
            )
        queries, keys = (
            [n * width + i for n in ns for i in range(width)] for ns in (heads, groups)
        )
        n_queries, n_keys = self.heads * width, self.groups * width
        entries = {self.heads: heads, n_keys: keys, n_queries: queries}
        if self.is_packed:
            starts = (n_queries, n_queries + n_keys)
            packed = [*queries, *(start + entry for start in starts for entry in keys)]
            entries[n_queries + 2 * n_keys] = packed
        return replace(self, heads=len(heads), groups=len(groups)), entries


def _sizes_except_projection(layer: nn.Module, projection: str) -> set[int]:
    """List the output sizes of all linear maps of an attention except the output projection.

    `projection` is the path of the output projection in the layer.
    """
    attention, _, name = projection.rpartition(".")
    modules = layer.get_submodule(attention).named_modules()
    maps = (m for path, m in modules if path != name and isinstance(m, (nn.Linear, Conv1D)))
    return {map_of_module(module).shape[0] for module in maps}


def _reads_columns(states: Tensor, columns: Tensor) -> bool:
    """Return whether exactly the columns where `columns` is true contain non-zero values."""
    return torch.equal((states.flatten(0, -2) != 0).any(0).cpu(), columns)


def _replaced_attention(
    model: nn.Module, function: Callable[..., object]
) -> AbstractContextManager[None]:
    """Replace a model's attention function until the context exits."""
    AttentionInterface.register(_PROBE_ATTENTION, function)
    AttentionMaskInterface.register(_PROBE_ATTENTION, eager_mask)
    configs = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
    return enter_all(
        replaced_attributes(config, _attn_implementation=_PROBE_ATTENTION)
        for config in configs.values()
    )

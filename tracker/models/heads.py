"""Finding the heads of attentions by structure, and proving that they are the columns of a map."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, eager_mask
from transformers.pytorch_utils import Conv1D

from tracker.core.changes import Change
from tracker.core.errors import CellError
from tracker.core.kinds import KINDS
from tracker.models.linear_maps import map_of
from tracker.models.offloaded import Place, lend
from tracker.models.sublayers import part_at, read_a_text

COMPONENTS = "head and kv_head"
"""What to leave out where there are none."""
NEEDS = "one call of transformers' AttentionInterface and one linear map of all its heads' outputs"
"""What a layer whose heads are found has."""
TOKENS = 6
"""Length of the text that the proof runs on."""
_PROOF = "tracker_proof_of_heads"


@dataclass(frozen=True)
class Heads:
    """The heads of one attention: neighbouring columns of its output projection's input.

    Attributes:
        projection: The linear map that all heads pass, as its layer names it.
        count: How many heads there are.
        groups: How many groups of them share keys and values.
        width: How many columns each has.
    """

    projection: str
    count: int
    groups: int
    width: int

    def columns(self, part: Change, name: str) -> slice:
        """Say which columns a head or a group of heads has; CellError where it is not there."""
        each = self.count // self.groups if part.component == "kv_head" else 1
        assert part.number is not None
        if part.number >= self.count // each:
            raise CellError(
                f"layer {part.layer} of {name} has {self.count // each} "
                f"{KINDS[part.component].many}, 0 to {self.count // each - 1}; leave {part.number} "
                "out of 'head'"
            )
        first = part.number * each * self.width
        return slice(first, first + each * self.width)


@torch.inference_mode()
def find_heads(model: Any, layers: nn.ModuleList, device: torch.device) -> list[Heads | None]:
    """Find the heads of every layer's attention, wherever in the layer that is.

    For one call on a short text the attention of transformers is another one, in which every second
    head gives ones and all others zeros. The output projection is the linear map whose input then
    has ones (or anything but zeros) in just these columns, and which no other layer has.

    Args:
        model: A causal language model of transformers.
        layers: Its decoder layers.
        device: Where its inputs go.

    Returns:
        One entry a layer; None where its attention has no such heads.
    """
    shapes: list[tuple[int, int, int]] = []
    given: dict[nn.Module, Tensor] = {}
    found: dict[int, Heads] = {}

    def alternating(
        module: Any, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any
    ) -> tuple[Tensor, None]:
        batch, heads, tokens, _width = query.shape
        output = value.new_zeros(batch, tokens, heads, value.shape[-1])
        output[:, :, ::2] = 1
        shapes.append((heads, key.shape[1], value.shape[-1]))
        return output, None

    def begin(*_: Any) -> None:
        shapes.clear()
        given.clear()

    def look(place: int, *_: Any) -> None:
        if len(shapes) != 1:
            return
        heads, groups, width = shapes[0]
        there = torch.arange(heads, device=device).repeat_interleave(width) % 2 == 0
        paths = {module: path for path, module in layers[place].named_modules()}
        those = [m for m, x in given.items() if torch.equal((x != 0).any(0), there)]
        if len(those) == 1 and heads % groups == 0 and holders[those[0]] == 1:
            found[place] = Heads(paths[those[0]], heads, groups, width)

    def taken(module: nn.Module, args: Any) -> None:
        if args and args[0].ndim > 1:
            given[module] = args[0].flatten(0, -2).to(device)

    holders = Counter(module for layer in layers for module in layer.modules())
    with ExitStack() as stack:
        stack.enter_context(_attention(model, alternating))
        for index, layer in enumerate(layers):
            stack.enter_context(layer.register_forward_pre_hook(begin))
            stack.enter_context(layer.register_forward_hook(partial(look, index)))
        for module in holders:
            if isinstance(module, (nn.Linear, Conv1D)):
                stack.enter_context(module.register_forward_pre_hook(taken))
        read_a_text(model, TOKENS, device, "heads", COMPONENTS)
    return [found.get(index) for index in range(len(layers))]


@contextmanager
def _attention(model: nn.Module, function: Any) -> Iterator[None]:
    """Let a function be the attention of all of a model's modules until exit."""
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


def heads_at(found: Sequence[Heads | None], layer: int, name: str) -> Heads:
    """Give the heads of a layer of a model called `name`; CellError where it has none."""
    return part_at(found, layer, name, "attention heads", COMPONENTS, NEEDS)


def take_out(layer: nn.Module, heads: Heads, columns: Sequence[slice], name: str) -> None:
    """Give a layer, called `name`, an output projection of its own that ignores some columns."""
    linear = map_of(layer.get_submodule(heads.projection))
    place = (linear.module, linear.name)
    if not linear.weight.is_floating_point():
        raise CellError(
            f"{heads.projection} of {name} is quantised, and has no columns of numbers; leave head "
            "and kv_head out of 'component'"
        )

    def made() -> dict[Place, Tensor]:
        weight = linear.weight.detach().clone()
        for each in columns:
            weight[:, each] = 0
        return {place: linear.laid_out(weight, linear.parameter)}

    lend(layer, [place], made)

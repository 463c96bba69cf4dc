"""Finding the shared experts of mixtures by structure: what every token passes beside the routed.

Families call them `shared_experts`, `shared_expert` or `shared_mlp`, and some weigh what they give
by a gate of its own. None of that is asked: what counts is what they do.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tracker.models.experts import TOKENS, entries
from tracker.models.sublayers import Sublayers, first_of, part_at, read_a_text, state_of, with_first

Shared = tuple[str, ...]
"""The modules of one layer that are its shared experts, as the layer names them: nearly always one
that holds the matrices of all of them."""
_ROUNDING = 0.1
"""Of what a shared expert adds: what two ways of adding it up may differ by, in half precision."""


@torch.inference_mode()
def find_shared(
    model: Any, sublayers: Sequence[Sublayers], layers: nn.ModuleList, device: torch.device
) -> list[Shared | None]:
    """Find the shared experts of every layer's MLP.

    The MLP holds routed experts: tensors with one entry an expert. Beside these, a shared expert is
    an outermost module that is called with the MLP's own input and whose output the MLP adds, as it
    is or weighed: with zeros in its place something else is left, and with twice its output comes
    twice what it adds.

    Args:
        model: A causal language model of transformers.
        sublayers: Its layers' MLPs.
        layers: Its decoder layers.
        device: Where its inputs go.

    Returns:
        One entry a layer; None where its MLP has no such experts.
    """
    found: dict[int, Shared] = {}
    given: list[Tensor] = []
    with_it: list[nn.Module] = []

    def begin(module: nn.Module, args: Any, kwargs: Any) -> None:
        given[:] = [state_of(args, kwargs)]
        with_it.clear()

    def called(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        taken, made = next(iter((*args, *kwargs.values())), None), first_of(output)
        if isinstance(taken, Tensor) and isinstance(made, Tensor):
            state = given[0]
            if made.numel() == state.numel() and torch.equal(taken.flatten(), state.flatten()):
                with_it.append(module)

    def look(place: int, mlp: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        paths = {module: path for path, module in layers[place].named_modules()}
        called_with_it, own = {*with_it}, list[str]()
        for module in _beside_routed(mlp):
            path = paths[module]
            inside = any(path.startswith(f"{outer}.") for outer in own)
            if module in called_with_it and not inside and _is_added(module, mlp, args, kwargs):
                own.append(path)
        if own:
            found[place] = tuple(own)

    with ExitStack() as stack:
        for place, parts in enumerate(sublayers):
            if not any(map(entries, parts.mlp.modules())):
                continue
            stack.enter_context(parts.mlp.register_forward_pre_hook(begin, with_kwargs=True))
            for module in _beside_routed(parts.mlp):
                stack.enter_context(module.register_forward_hook(called, with_kwargs=True))
            added = partial(look, place)
            stack.enter_context(parts.mlp.register_forward_hook(added, with_kwargs=True))
        read_a_text(model, TOKENS, device, "shared experts", "shared_expert")
    return [found.get(place) for place in range(len(sublayers))]


def _beside_routed(mlp: nn.Module) -> list[nn.Module]:
    """List an MLP's modules that neither hold routed experts nor are of them, outermost first."""
    holding = [each for each in mlp.modules() if entries(each)]
    routed = {module for each in holding for module in each.modules()}
    around = {each for each in mlp.modules() if any(one in holding for one in each.modules())}
    return [each for each in mlp.modules() if each not in routed | around]


def _is_added(module: nn.Module, mlp: nn.Module, args: Any, kwargs: Any) -> bool:
    """Whether an MLP gives what a module of it gives, and something else beside it."""

    def times(factor: int) -> Tensor:
        def changed(_: nn.Module, __: Any, output: Any) -> Any:
            return with_first(output, factor * first_of(output))

        with module.register_forward_hook(changed):
            return torch.as_tensor(first_of(mlp.forward(*args, **kwargs))).float()

    without, once, twice = (times(factor) for factor in (0, 1, 2))
    added = once - without
    apart = (twice - once - added).norm()
    return bool(without.any() and added.any() and apart < _ROUNDING * added.norm())


def shared_at(found: Sequence[Shared | None], layer: int, name: str) -> Shared:
    """Give the shared experts of a layer of a model called `name`; CellError where it has none."""
    return part_at(found, layer, name, "shared experts", "shared_expert")

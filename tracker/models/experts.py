"""Finding the routed experts of mixtures by structure, and making routers that lack some of them.

A mixture is two modules: a router, which says for each token to which experts it goes and with what
weights, and the experts, whose tensors have one entry an expert. A router that lacks an expert is
the same module without that row, as a checkpoint without that expert has it: how the scores of the
others are normalised is the router's own affair.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tracker.core.changes import Change
from tracker.core.errors import CellError
from tracker.models.offloaded import Place, is_absent, lend
from tracker.models.slices import put, take
from tracker.models.sublayers import call_with, part_at, read_a_text, state_of

NEEDS = "tensors with an entry an expert, called with the choice of a router with a row an expert"
"""What a layer whose experts are found has."""
TOKENS = 16
"""Length of the text that the proof runs on."""


@dataclass(frozen=True)
class Experts:
    """The routed experts of one layer.

    Attributes:
        router: The module that chooses among them, as the layer names it.
        held: The module that holds their tensors, as the layer names it.
        count: How many there are.
        chosen: To how many of them a token goes.
        removable: Whether the router does without one, and chooses among the others.
    """

    router: str
    held: str
    count: int
    chosen: int
    removable: bool

    @property
    def block(self) -> str:
        """The module that both are in, as the layer names it; empty for the layer itself."""
        return self.held.rpartition(".")[0]

    def left(self, parts: Sequence[Change], name: str) -> list[int]:
        """List the experts that are left in a layer of a model called `name`; CellError if none."""
        gone = {part.number for part in parts if part.number is not None}
        layer, last = parts[0].layer, max(gone)
        if last >= self.count:
            raise CellError(
                f"layer {layer} of {name} has {self.count} experts, 0 to {self.count - 1}; leave "
                f"{last} out of 'expert'"
            )
        if self.count - len(gone) < self.chosen:
            raise CellError(
                f"layer {layer} of {name} sends each token to {self.chosen} of {self.count} "
                f"experts, and without {len(gone)} of them too few are left; leave it out of "
                "'layer', or expert out of 'component'"
            )
        if not self.removable:
            raise CellError(
                f"the router of layer {layer} of {name} cannot do without an expert, since it "
                "chooses by groups of one size or by a fixed table; leave such layers out of "
                "'layer', or expert out of 'component'"
            )
        return [number for number in range(self.count) if number not in gone]


@torch.inference_mode()
def find_experts(model: Any, layers: nn.ModuleList, device: torch.device) -> list[Experts | None]:
    """Find the routed experts of every layer.

    Experts are a module whose own tensors all have the same number of entries, one of them with a
    matrix in each, and that is called with a choice: numbers of experts for each token, and as many
    weights. The router is the innermost module that returned this choice and has a row an expert.
    It is then asked again without an expert.

    Args:
        model: A causal language model of transformers.
        layers: Its decoder layers.
        device: Where its inputs go.

    Returns:
        One entry a layer; None where it has no such experts.
    """
    found: dict[int, Experts] = {}
    choices: list[tuple[nn.Module, Any, Any, Tensor]] = []

    def begin(*_: Any) -> None:
        choices.clear()

    def chose(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        for choice in integers(output if isinstance(output, tuple) else ()):
            choices.append((module, args, kwargs, choice))

    def look(place: int, module: nn.Module, args: Any, kwargs: Any) -> None:
        paths = {each: path for path, each in layers[place].named_modules()}
        count = entries(module)
        for choice in integers((*args, *kwargs.values())):
            for router, its_args, its_kwargs, made in choices:
                if not torch.equal(made, choice) or not _has_rows(router, count):
                    continue
                removable = _does_without(router, its_args, its_kwargs, made, count)
                own = Experts(paths[router], paths[module], count, made.shape[-1], removable)
                if own.router.rpartition(".")[0] == own.block:
                    found[place] = own
                return

    with ExitStack() as stack:
        for index, layer in enumerate(layers):
            stack.enter_context(layer.register_forward_pre_hook(begin))
            for module in layer.modules():
                stack.enter_context(module.register_forward_hook(chose, with_kwargs=True))
                if entries(module):
                    held = partial(look, index)
                    stack.enter_context(module.register_forward_pre_hook(held, with_kwargs=True))
        read_a_text(model, TOKENS, device, "experts", "expert")
    return [found.get(index) for index in range(len(layers))]


def integers(values: Sequence[Any]) -> list[Tensor]:
    """Pick the tables of whole numbers [tokens, chosen]."""
    tensors = [value for value in values if isinstance(value, Tensor) and value.ndim == 2]
    return [each for each in tensors if each.dtype in (torch.int64, torch.int32)]


def entries(module: nn.Module) -> int:
    """Count a module's experts; 0 where its own tensors have not one entry an expert."""
    own = [each for each in module._parameters.values() if each is not None]
    counts = {len(each) if each.ndim else 0 for each in own}
    if len(counts) != 1 or not any(each.ndim == 3 for each in own):
        return 0
    return count if (count := counts.pop()) > 1 else 0


def _has_rows(module: nn.Module, count: int) -> bool:
    """Whether a module has a row an expert."""
    return any(p.ndim == 2 and len(p) == count for p in module.parameters())


def _does_without(router: nn.Module, args: Any, kwargs: Any, choice: Tensor, count: int) -> bool:
    """Whether a router that lacks its last expert chooses as many of the others for each token."""
    if choice.shape[-1] >= count:
        return True  # of which none may go anyway
    kept = range(count - 1)
    given = _besides((args, kwargs), kept, count)
    try:
        output = lacking(router, kept, count).forward(*given[0], **given[1])
    except Exception:  # noqa: BLE001 - whatever a router says to a number that it cannot divide
        return False
    made = next((each for each in integers(output) if each.shape == choice.shape), None)
    if made is None or made.min() < 0 or made.max() >= len(kept):
        return False
    return bool((made.sort(-1).values.diff(dim=-1) > 0).all())


def lacking(
    module: nn.Module, kept: Sequence[int], count: int, inside: Sequence[nn.Module] = ()
) -> nn.Module:
    """Copy a module of a mixture with the entries of only some experts.

    Args:
        module: A router, the module that holds experts, or the one that both are in.
        kept: The experts whose entries are left.
        count: How many there are.
        inside: Which of its parts have such entries; none for all.

    Returns:
        The copy; all else it shares with the module.
    """
    twin = copy.copy(module)
    own = vars(twin)
    own.pop("forward", None)  # what somebody put in the place of the class's own

    own["_parameters"] = {
        name: None if value is None else nn.Parameter(_cut(value, kept, count), requires_grad=False)
        for name, value in module._parameters.items()
    }
    own["_buffers"] = {
        name: None if value is None else _cut(value, kept, count)
        for name, value in module._buffers.items()
    }
    own["_modules"] = {
        name: each
        if each is None or (inside and each not in inside)
        else lacking(each, kept, count)
        for name, each in module._modules.items()
    }
    for name, value in own.items():
        if type(value) is int and value == count and ("expert" in name or name == "out_features"):
            own[name] = len(kept)
    return twin


def _cut(value: Tensor, kept: Sequence[int], count: int) -> Tensor:
    """Leave some entries of a tensor that has one an expert, also of a row of them."""
    axis = 1 if value.ndim == 2 and len(value) == 1 else 0
    if not value.ndim or value.shape[axis] != count:
        return value
    return take(value, kept, axis)


def _besides(given: Any, kept: Sequence[int], count: int) -> Any:
    """Leave some entries of what a router is called with besides the tokens: a bias of scores."""
    if isinstance(given, dict):
        return {name: _besides(value, kept, count) for name, value in given.items()}
    if isinstance(given, tuple):
        return tuple(_besides(value, kept, count) for value in given)
    return _cut(given, kept, count) if isinstance(given, Tensor) and given.ndim == 1 else given


def routed(
    router: nn.Module,
    experts: Experts,
    kept: Sequence[int],
    whole: Sequence[Any],
    state: Tensor,
    given: tuple[Any, Any],
) -> tuple[Any, ...]:
    """Ask a router that lacks some experts, and say what it says in the numbers of all.

    Args:
        router: The router of all experts.
        experts: What is known of them.
        kept: The experts that are left.
        whole: What the router of all says of other tokens.
        state: The tokens.
        given: What the router is called with by place and by name, other tokens among it.

    Returns:
        An entry for each of `whole`; the score of an expert that is gone is −∞.
    """
    own = lacking(router, kept, experts.count)
    numbers = take(torch.arange(experts.count, device=state.device), kept)

    def in_all(part: Tensor, like: Tensor) -> Tensor:
        if not part.is_floating_point():
            return numbers[part]
        if part.shape[-1] == like.shape[-1]:
            return part
        scores = part.new_full((*part.shape[:-1], experts.count), -torch.inf)
        put(scores.movedim(-1, 0), kept, part.movedim(-1, 0))
        return scores

    said = call_with(own.forward, state, *_besides(given, kept, experts.count))
    return tuple(in_all(part, like) for part, like in zip(said, whole, strict=True))


def each_choice(
    forward: Callable[..., Tensor], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Give what each expert of a token makes of it, before it is weighed.

    What holds the experts is called for one of a token's choices at a time, with a weight of 1.

    Args:
        forward: The forward pass of the module that holds the experts.
        args: What it is called with.
        kwargs: What it is called with by name.

    Yields:
        For each choice the experts' numbers [tokens], their weights [tokens] as the router hands
        them over, and their outputs [tokens, width].
    """
    values, state = (*args, *kwargs.values()), state_of(args, kwargs)
    choice = integers(values)[0]
    weights = next(
        each
        for each in values
        if each is not state and isinstance(each, Tensor) and each.shape == choice.shape
        if each.is_floating_point()
    )

    def alone(value: Any, place: int) -> Any:
        if value is weights:
            return torch.ones_like(weights[:, :1])
        return choice[:, place : place + 1].contiguous() if value is choice else value

    for place in range(choice.shape[-1]):
        given = [alone(value, place) for value in args]
        output = forward(*given, **{name: alone(value, place) for name, value in kwargs.items()})
        yield choice[:, place], weights[:, place], output.flatten(0, -2)


def take_experts(layer: nn.Module, experts: Experts, kept: Sequence[int], name: str) -> None:
    """Give a layer, called `name`, a router and tensors without the experts that are not kept."""
    router, held = (layer.get_submodule(path) for path in (experts.router, experts.held))
    inside = (router, held) if experts.block else ()
    paths = [experts.block] if experts.block else [experts.router, experts.held]
    tensors = [*router.parameters(), *held.parameters()]
    if not all(each.is_floating_point() for each in tensors):
        raise CellError(
            f"the experts of {name} are quantised, and cannot be taken apart; leave expert out of "
            "'component'"
        )

    owners = [path.rpartition(".") for path in paths]
    places = [(layer.get_submodule(owner), name) for owner, _, name in owners]

    def made() -> dict[Place, nn.Module]:
        return {place: lacking(getattr(*place), kept, experts.count, inside) for place in places}

    lend(layer, places, made, briefly=any(map(is_absent, tensors)))


def experts_at(found: Sequence[Experts | None], layer: int, name: str) -> Experts:
    """Give the experts of a layer of a model called `name`; CellError where it has none."""
    return part_at(found, layer, name, "routed experts", "expert", NEEDS)

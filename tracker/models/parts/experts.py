"""Experts of mixtures, routed and shared ones, found by structure.

A mixture has two modules. The router chooses the experts of each token and their weights. The
experts' tensors have one entry per expert. A router that lacks an expert is the same module without
that row, as in a checkpoint without that expert: the router itself normalises the other scores.

Every token passes the shared experts beside the routed ones. Families call them `shared_experts`,
`shared_expert` or `shared_mlp`, and some weight their output by a separate gate. Names do not
count, only the effect.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tracker.core.changes import Change
from tracker.core.errors import CellError, attempt
from tracker.models import hooks
from tracker.models.devices import put, take
from tracker.models.offloaded import Attribute, is_absent, replace_attributes
from tracker.models.parts.probe import Call, PartFinder, integer_tables, paths_in
from tracker.models.parts.sublayers import Sublayers

TOKENS = 16
"""Length of the text for the verification."""
_ROUNDING = 0.1
"""Tolerance between two orders of summation in half precision, relative to a shared expert's
output."""


@dataclass(frozen=True)
class Experts:
    """The routed experts of one layer.

    Attributes:
        router: Path in the layer of the module that chooses among them.
        held: Path in the layer of the module that holds their tensors.
        count: Number of experts.
        chosen: Number of experts of each token.
        removable: Whether the router works without one, and chooses among the others.
    """

    KIND: ClassVar[str] = "routed experts"
    COMPONENTS: ClassVar[str] = "expert"
    NEEDS: ClassVar[str] = (
        "tensors with an entry an expert, called with the choice of a router with a row an expert"
    )

    router: str
    held: str
    count: int
    chosen: int
    removable: bool

    @classmethod
    def find(cls, finder: PartFinder) -> list[Experts | None]:
        """Find the routed experts of every layer.

        The experts are a module whose own tensors all have the same number of entries, one of them
        with a matrix in each. It is called with a choice: numbers of experts for each token, and as
        many weights. The router is the innermost module that returned this choice and has a row per
        expert. It is then called again without an expert.
        """

        def find(layer: nn.Module, calls: Sequence[Call]) -> Experts | None:
            paths, experts = paths_in(layer), None
            for index, call in enumerate(calls):
                count = entries(call.module)
                choice = next(_choices(calls[:index], call, count), None) if count else None
                if choice is None:
                    continue
                router, table = choice
                path, held = paths[router.module], paths[call.module]
                if path.rpartition(".")[0] == held.rpartition(".")[0]:
                    removable = _does_without(router, table, count)
                    experts = cls(path, held, count, table.shape[-1], removable)
            return experts

        return finder.probe(cls, TOKENS, find)

    @property
    def block(self) -> str:
        """The path in the layer of the module around both; empty for the layer itself."""
        return self.held.rpartition(".")[0]

    def without(self, parts: Sequence[Change], name: str) -> list[int]:
        """List the remaining experts of layer `name`; raise CellError if that is impossible."""
        gone = {part.number for part in parts if part.number is not None}
        last = max(gone)
        if last >= self.count:
            raise CellError(
                f"{name} has {self.count} experts, 0 to {self.count - 1}; leave {last} out of "
                "'expert'"
            )
        if self.count - len(gone) < self.chosen:
            raise CellError(
                f"{name} sends each token to {self.chosen} of {self.count} experts, and without "
                f"{len(gone)} of them too few are left; leave it out of 'layer', or expert out of "
                "'component'"
            )
        if not self.removable:
            raise CellError(
                f"the router of {name} cannot do without an expert, since it chooses by groups of "
                "one size or by a fixed table; leave such layers out of 'layer', or expert out of "
                "'component'"
            )
        return [number for number in range(self.count) if number not in gone]

    def remove(self, layer: nn.Module, parts: Sequence[Change], name: str) -> None:
        """Give a copied layer a router and tensors without some experts."""
        remaining = self.without(parts, name)
        router, held = (layer.get_submodule(path) for path in (self.router, self.held))
        inside = (router, held) if self.block else ()
        paths = [self.block] if self.block else [self.router, self.held]
        tensors = [*router.parameters(), *held.parameters()]
        if not all(tensor.is_floating_point() for tensor in tensors):
            raise CellError(
                f"the experts of {name} are quantised, and cannot be taken apart; leave "
                f"{self.COMPONENTS} out of 'component'"
            )
        owners = [path.rpartition(".") for path in paths]
        attributes = [(layer.get_submodule(owner), child) for owner, _, child in owners]

        def make() -> dict[Attribute, nn.Module]:
            return {
                attribute: lacking(getattr(*attribute), remaining, self.count, inside)
                for attribute in attributes
            }

        replace_attributes(layer, attributes, make, briefly=any(map(is_absent, tensors)))


@dataclass(frozen=True)
class SharedExperts:
    """The shared experts of one layer.

    Attributes:
        paths: Paths of their modules in the layer: nearly always one that holds the matrices of all
            of them.
    """

    KIND: ClassVar[str] = "shared experts"
    COMPONENTS: ClassVar[str] = "shared_expert"
    NEEDS: ClassVar[str] = ""

    paths: tuple[str, ...]

    @classmethod
    def find(cls, finder: PartFinder) -> list[SharedExperts | None]:
        """Find the shared experts of every layer's MLP.

        The MLP holds routed experts: tensors with one entry per expert. A shared expert is an
        outermost module beside these, which is called with the MLP's own input and whose output the
        MLP adds, with or without a weight. Replacing its output by zeros leaves another output, and
        doubling it adds the same contribution once more.
        """
        mlps = {sublayers.mlp for sublayers in finder.find(Sublayers) if sublayers}

        def find(layer: nn.Module, calls: Sequence[Call]) -> SharedExperts | None:
            of_mlps = [call for call in calls if call.module in mlps]
            if not of_mlps or not any(map(entries, of_mlps[-1].module.modules())):
                return None
            mlp, names, paths = of_mlps[-1], paths_in(layer), list[str]()
            beside = _beside_routed(mlp.module)
            inner = [call for call in calls if call.module in beside]
            given = {call.module for call in inner if _passes_state(call, mlp)}
            for module in beside:
                path = names[module]
                inside = any(path.startswith(f"{outer}.") for outer in paths)
                if module in given and not inside and _is_added(module, mlp):
                    paths.append(path)
            return cls(tuple(paths)) if paths else None

        return finder.probe(cls, TOKENS, find)

    def remove(self, layer: nn.Module, parts: Sequence[Change], name: str) -> None:
        """Silence the shared experts of a copied layer: they add nothing."""
        for path in self.paths:
            layer.get_submodule(path).register_forward_hook(hooks.add_nothing, with_kwargs=True)


def _choices(calls: Sequence[Call], experts: Call, count: int) -> Iterator[tuple[Call, Tensor]]:
    """Yield the calls of routers that chose the experts' arguments, and the choice."""
    for choice in integer_tables(experts.arguments):
        for call in calls:
            outputs = call.output if isinstance(call.output, tuple) else ()
            for made in integer_tables(outputs):
                has_rows = any(p.ndim == 2 and len(p) == count for p in call.module.parameters())
                if has_rows and torch.equal(made, choice):
                    yield call, made


def entries(module: nn.Module) -> int:
    """Count a module's experts; 0 if its own tensors do not have one entry per expert."""
    tensors = [tensor for tensor in module._parameters.values() if tensor is not None]
    counts = {len(tensor) if tensor.ndim else 0 for tensor in tensors}
    if len(counts) != 1 or not any(tensor.ndim == 3 for tensor in tensors):
        return 0
    return count if (count := counts.pop()) > 1 else 0


def _does_without(router: Call, choice: Tensor, count: int) -> bool:
    """Check whether a router without its last expert chooses as many others for each token."""
    if choice.shape[-1] >= count:
        return True  # all are chosen, so none may be removed anyway
    remaining = range(count - 1)
    args, kwargs = _cut_biases((router.args, router.kwargs), remaining, count)
    output = attempt(lambda: lacking(router.module, remaining, count).forward(*args, **kwargs))
    if isinstance(output, Exception):  # a router may refuse a number that it cannot divide
        return False
    made = next((table for table in integer_tables(output) if table.shape == choice.shape), None)
    if made is None or made.min() < 0 or made.max() >= len(remaining):
        return False
    return bool((made.sort(-1).values.diff(dim=-1) > 0).all())


def lacking(
    module: nn.Module, remaining: Sequence[int], count: int, inside: Sequence[nn.Module] = ()
) -> nn.Module:
    """Copy a module of a mixture with the entries of only some experts.

    Args:
        module: A router, the module that holds experts, or the one around both.
        remaining: The experts whose entries are left.
        count: Number of experts.
        inside: Submodules that have such entries; empty for all.

    Returns:
        The copy, which shares everything else with the module.
    """

    def cut(value: Tensor | nn.Module | None) -> Any:
        if isinstance(value, nn.Parameter):
            return nn.Parameter(_cut(value, remaining, count), requires_grad=False)
        if isinstance(value, nn.Module):
            return value if inside and value not in inside else lacking(value, remaining, count)
        return None if value is None else _cut(value, remaining, count)

    tables = {
        table: {name: cut(value) for name, value in vars(module)[table].items()}
        for table in ("_parameters", "_buffers", "_modules")
    }
    counts = {
        name: len(remaining)
        for name, value in vars(module).items()
        if type(value) is int and value == count and ("expert" in name or name == "out_features")
    }
    return hooks.shallow_copy(module, **tables, **counts)


def _cut(value: Tensor, remaining: Sequence[int], count: int) -> Tensor:
    """Return some entries of a tensor with one per expert, also along a single row."""
    axis = 1 if value.ndim == 2 and len(value) == 1 else 0
    if not value.ndim or value.shape[axis] != count:
        return value
    return take(value, remaining, axis)


def _cut_biases(given: Any, remaining: Sequence[int], count: int) -> Any:
    """Return some entries of a router's arguments other than the tokens: a bias of scores."""
    if isinstance(given, dict):
        return {name: _cut_biases(value, remaining, count) for name, value in given.items()}
    if isinstance(given, tuple):
        return tuple(_cut_biases(value, remaining, count) for value in given)
    return _cut(given, remaining, count) if isinstance(given, Tensor) and given.ndim == 1 else given


def routed(
    router: nn.Module,
    experts: Experts,
    remaining: Sequence[int],
    whole: Sequence[Any],
    state: Tensor,
    given: tuple[Any, Any],
) -> tuple[Any, ...]:
    """Call a router that lacks some experts, and return its outputs in the numbers of all.

    Args:
        router: The router of all experts.
        experts: The experts.
        remaining: The remaining experts.
        whole: Output of the router of all experts for other tokens.
        state: The tokens.
        given: Positional and keyword arguments of the router, with other tokens.

    Returns:
        An entry for each of `whole`; the score of a removed expert is −∞.
    """
    fewer = lacking(router, remaining, experts.count)
    numbers = take(torch.arange(experts.count, device=state.device), remaining)

    def in_all(part: Tensor, like: Tensor) -> Tensor:
        if not part.is_floating_point():
            return numbers[part]
        if part.shape[-1] == like.shape[-1]:
            return part
        scores = part.new_full((*part.shape[:-1], experts.count), -torch.inf)
        put(scores.movedim(-1, 0), remaining, part.movedim(-1, 0))
        return scores

    output = hooks.call_with(fewer.forward, state, *_cut_biases(given, remaining, experts.count))
    return tuple(in_all(part, like) for part, like in zip(output, whole, strict=True))


def single_outputs(
    forward: Callable[..., Tensor], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield the output of each expert of a token before it is weighted.

    The module that holds the experts is called for one of a token's choices at a time, with a
    weight of 1.

    Args:
        forward: The forward pass of that module.
        args: Its positional arguments.
        kwargs: Its keyword arguments.

    Yields:
        The experts' numbers [tokens] of each choice, their weights [tokens] as the router returns
        them, and their outputs [tokens, width].
    """
    values, state = (*args, *kwargs.values()), hooks.state_of(args, kwargs)
    choice = integer_tables(values)[0]
    weights = next(
        value
        for value in values
        if value is not state and isinstance(value, Tensor) and value.shape == choice.shape
        if value.is_floating_point()
    )

    def alone(value: object, index: int) -> object:
        if value is weights:
            return torch.ones_like(weights[:, :1])
        return choice[:, index : index + 1].contiguous() if value is choice else value

    for index in range(choice.shape[-1]):
        given = [alone(value, index) for value in args]
        output = forward(*given, **{name: alone(value, index) for name, value in kwargs.items()})
        yield choice[:, index], weights[:, index], output.flatten(0, -2)


def _passes_state(call: Call, mlp: Call) -> bool:
    """Check whether a module maps the input of its MLP to something of the same size."""
    state = hooks.state_of(mlp.args, mlp.kwargs)
    given, made = next(iter(call.arguments), None), hooks.first_of(call.output)
    if not (isinstance(given, Tensor) and isinstance(made, Tensor)):
        return False
    if made.numel() != state.numel() or given.dtype != state.dtype:
        return False
    return torch.equal(given.flatten(), state.flatten())


def _beside_routed(mlp: nn.Module) -> list[nn.Module]:
    """List an MLP's modules that neither hold nor belong to routed experts, outermost first."""
    holding = [module for module in mlp.modules() if entries(module)]
    routed_modules = {module for holder in holding for module in holder.modules()}
    around = {m for m in mlp.modules() if any(child in holding for child in m.modules())}
    return [module for module in mlp.modules() if module not in routed_modules | around]


def _is_added(module: nn.Module, mlp: Call) -> bool:
    """Check whether an MLP adds the output of one of its modules to something else."""

    def times(factor: int) -> Tensor:
        def scale(_: nn.Module, __: Any, output: Any) -> Any:
            return hooks.with_first(output, factor * hooks.first_of(output))

        with module.register_forward_hook(scale):
            output = hooks.first_of(mlp.module.forward(*mlp.args, **mlp.kwargs))
        return torch.as_tensor(output).float()

    without, once, twice = (times(factor) for factor in (0, 1, 2))
    added = once - without
    apart = (twice - once - added).norm()
    return bool(without.any() and added.any() and apart < _ROUNDING * added.norm())

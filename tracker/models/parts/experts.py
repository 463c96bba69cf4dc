"""Find the routed and the shared experts of mixture-of-experts layers by structure.

A mixture of experts consists of a router and a module with the weights of all experts. The router
chooses the experts of each token. The tensors with the weights of the experts have one entry per
expert. To remove an expert, the expert's entries are deleted from these tensors and from the
router's weight.

Shared experts process every token, in addition to the routed experts of the token. Names of shared
experts differ between model families, so shared experts are identified by their effect.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tracker.models import hooks
from tracker.models.devices import put_entries, take_entries
from tracker.models.hooks import Args, Kwargs
from tracker.models.offloaded import ModuleAttribute, is_absent, replace_attributes
from tracker.models.parts.probe import ModuleCall, PartFinder, integer_tables, module_paths
from tracker.models.parts.sublayers import Sublayers
from tracker.schema.changes import Change
from tracker.schema.errors import CellError, attempt
from tracker.schema.kinds import Component

EXPERT_TEXT_TOKENS = 16
"""Number of tokens of the text for the verification."""
_ADDITION_TOLERANCE = 0.1
"""Tolerance between two orders of summation in half precision, relative to a shared expert's
output."""
_MAX_ROUNDING_SHARE = 0.05
"""Share of the experts' total output by which two orders of summation may differ."""


@dataclass(frozen=True)
class Experts:
    """The routed experts of one layer.

    Attributes:
        router: Path in the layer of the module that chooses the experts of each token.
        holder: Path in the layer of the module that contains the experts' tensors.
        count: Number of experts.
        n_chosen: Number of experts that the router chooses for each token.
        removable: Whether the router still works after the removal of an expert.
    """

    KIND: ClassVar[str] = "routed experts"
    COMPONENTS: ClassVar[str] = "expert"
    NEEDS: ClassVar[str] = (
        "Experts can be removed if all their tensors have one entry per expert, and the router has "
        "one row per expert."
    )

    router: str
    holder: str
    count: int
    n_chosen: int
    removable: bool

    @classmethod
    def find(cls, finder: PartFinder) -> list[Experts | None]:
        """Find the routed experts of every layer; the entry of a layer without experts is None.

        The method runs the model on a short text. The router is the module that returns the indices
        of each token's experts. A later module that receives these indices holds the experts. A
        call of the router without its last expert tests whether experts can be removed.
        """

        def find(layer: nn.Module, calls: Sequence[ModuleCall]) -> Experts | None:
            paths, experts = module_paths(layer), None
            for index, call in enumerate(calls):
                count = count_experts(call.module)
                choice = (
                    next(_find_router_calls(calls[:index], call, count), None) if count else None
                )
                if choice is None:
                    continue
                router, table = choice
                router_path, holder = paths[router.module], paths[call.module]
                if router_path.rpartition(".")[0] == holder.rpartition(".")[0]:
                    removable = _works_without_last_expert(router, table, count)
                    experts = cls(router_path, holder, count, table.shape[-1], removable)
            return experts

        return finder.probe(cls, EXPERT_TEXT_TOKENS, find)

    @property
    def mixture_path(self) -> str:
        """Path in the layer of the module around router and experts; empty = the layer."""
        return self.holder.rpartition(".")[0]

    @property
    def counts(self) -> Mapping[Component, int]:
        """The number of experts."""
        return {"expert": self.count}

    def narrow(self, parts: Sequence[Change], name: str) -> tuple[Experts, dict[int, list[int]]]:
        """Return the layer's `Experts` without `parts`, and {}: `remove` shortens the tensors."""
        return replace(self, count=len(self.remaining_experts(parts, name))), {}

    def remaining_experts(self, parts: Sequence[Change], name: str) -> list[int]:
        """Return the indices of the experts that remain if the experts in `parts` are removed.

        `name` is the layer's name in error messages. Raises CellError if removal is impossible.
        """
        removed = {part.number for part in parts if part.number is not None}
        if max(removed) >= self.count:
            raise CellError(
                f"{name} has {self.count} experts, 0 to {self.count - 1}; leave {max(removed)} out "
                "of 'expert'"
            )
        if self.count - len(removed) < self.n_chosen:
            raise CellError(
                f"{name} sends each token to {self.n_chosen} of {self.count} experts, but only "
                f"{self.count - len(removed)} would remain; leave this layer out of 'layer', or "
                "expert out of 'component'"
            )
        if not self.removable:
            raise CellError(
                f"no expert of {name} can be removed, because the router chooses from groups of "
                "equal size or by a fixed table. Leave such layers out of 'layer', or expert out "
                "of 'component'"
            )
        return [number for number in range(self.count) if number not in removed]

    def remove(self, layer: nn.Module, parts: Sequence[Change], name: str) -> None:
        """Remove some experts from the router and the tensors of a copied layer."""
        remaining = self.remaining_experts(parts, name)
        router, holder = (layer.get_submodule(path) for path in (self.router, self.holder))
        modules = (router, holder) if self.mixture_path else ()
        # The module around both is replaced too, since it may hold the number of experts.
        paths = [self.mixture_path] if self.mixture_path else [self.router, self.holder]
        tensors = [*router.parameters(), *holder.parameters()]
        if not all(tensor.is_floating_point() for tensor in tensors):
            raise CellError(
                f"the experts of {name} are quantised, so they cannot be removed one by one; "
                f"leave {self.COMPONENTS} out of 'component'"
            )
        owners = [path.rpartition(".") for path in paths]
        attributes = [(layer.get_submodule(owner), child) for owner, _, child in owners]

        def make() -> dict[ModuleAttribute, nn.Module]:
            keep = partial(keep_experts, remaining=remaining, count=self.count, modules=modules)
            return {attribute: keep(getattr(*attribute)) for attribute in attributes}

        replace_attributes(layer, attributes, make, during_calls=any(map(is_absent, tensors)))


@dataclass(frozen=True)
class SharedExperts:
    """The shared experts of one layer.

    Attributes:
        paths: Paths of the shared experts' modules in the layer, usually only one path.
    """

    KIND: ClassVar[str] = "shared experts"
    COMPONENTS: ClassVar[str] = "shared_expert"
    NEEDS: ClassVar[str] = ""

    paths: tuple[str, ...]

    @classmethod
    def find(cls, finder: PartFinder) -> list[SharedExperts | None]:
        """Find the shared experts of every layer's MLP; the entry of other layers is None.

        A shared expert reads the input of the MLP. The MLP adds the output of the shared expert to
        the output of the routed experts.
        """
        mlps = {sublayers.mlp for sublayers in finder.find(Sublayers) if sublayers}

        def find(layer: nn.Module, calls: Sequence[ModuleCall]) -> SharedExperts | None:
            mlp = next((call for call in reversed(calls) if call.module in mlps), None)
            if mlp is None or not any(map(count_experts, mlp.module.modules())):
                return None
            path_of, paths = module_paths(layer), list[str]()
            readers = {call.module for call in calls if _reads_mlp_input(call, mlp)}
            for module in _unrouted_modules(mlp.module):
                path = path_of[module]
                is_nested = any(path.startswith(f"{outer}.") for outer in paths)
                if module in readers and not is_nested and _mlp_adds_output(module, mlp):
                    paths.append(path)
            return cls(tuple(paths)) if paths else None

        return finder.probe(cls, EXPERT_TEXT_TOKENS, find)

    def remove(self, layer: nn.Module, parts: Sequence[Change], name: str) -> None:
        """Make the shared experts of a copied layer add nothing to the MLP's output."""
        for path in self.paths:
            layer.get_submodule(path).register_forward_hook(hooks.silence_output, with_kwargs=True)


def _find_router_calls(
    calls: Sequence[ModuleCall], experts: ModuleCall, count: int
) -> Iterator[tuple[ModuleCall, Tensor]]:
    """Yield the calls of modules that can be the router of a module with experts.

    A router returns the indices of each token's experts, which the module with experts receives.
    `experts` is the call of this module with `count` experts, and `calls` are earlier calls. Yields
    pairs: a call, and the indices of the experts.
    """
    for choice in integer_tables(experts.arguments):
        for call in calls:
            weights = [p for p in call.module.parameters() if p.ndim == 2 and len(p) == count]
            outputs = call.output if isinstance(call.output, tuple) and weights else ()
            for table in integer_tables(outputs):
                if torch.equal(table, choice):
                    yield call, table


def count_experts(module: nn.Module) -> int:
    """Count the experts in a module's own tensors; return 0 if the module has no experts."""
    tensors = [tensor for tensor in module._parameters.values() if tensor is not None]
    counts = {len(tensor) if tensor.ndim else 0 for tensor in tensors}
    if len(counts) != 1 or not any(tensor.ndim == 3 for tensor in tensors):
        return 0
    return count if (count := counts.pop()) > 1 else 0


def _works_without_last_expert(router: ModuleCall, choice: Tensor, count: int) -> bool:
    """Test whether a router chooses only existing experts if the last expert is removed.

    `router` is a recorded call. `choice` contains the indices of the experts that the router chose
    in this call, out of `count` experts.
    """
    if choice.shape[-1] >= count:
        return True  # all are chosen, so none may be removed anyway
    remaining = range(count - 1)
    args, kwargs = _keep_biases((router.args, router.kwargs), remaining, count)
    output = attempt(lambda: keep_experts(router.module, remaining, count).forward(*args, **kwargs))
    if isinstance(output, Exception):  # a router may refuse a number that it cannot divide
        return False
    choices = (table for table in integer_tables(output) if table.shape == choice.shape)
    new_choice = next(choices, None)
    if new_choice is None or new_choice.min() < 0 or new_choice.max() >= len(remaining):
        return False
    return bool((new_choice.sort(-1).values.diff(dim=-1) > 0).all())


def keep_experts(
    module: nn.Module, remaining: Sequence[int], count: int, modules: Sequence[nn.Module] = ()
) -> nn.Module:
    """Copy a router or a module with experts, and keep only some experts.

    Args:
        module: A router, the module that holds the experts, or the module around router and
            experts.
        remaining: Indices of the experts to keep.
        count: Number of experts in the original module.
        modules: Submodules from which experts are also removed; empty = all submodules.

    Returns:
        The copy, which shares all other tensors with the original module.
    """

    def keep(value: Tensor | nn.Module | None) -> Any:
        if isinstance(value, nn.Parameter):
            return nn.Parameter(_keep_entries(value, remaining, count), requires_grad=False)
        if isinstance(value, Tensor):
            return _keep_entries(value, remaining, count)
        if value is None or (modules and value not in modules):
            return value
        return keep_experts(value, remaining, count)

    tables = {
        table: {name: keep(value) for name, value in vars(module)[table].items()}
        for table in ("_parameters", "_buffers", "_modules")
    }
    # The router may use these numbers to reshape its scores.
    counts = {
        name: len(remaining)
        for name, value in vars(module).items()
        if type(value) is int and value == count and ("expert" in name or name == "out_features")
    }
    return hooks.shallow_copy(module, **tables, **counts)


def _keep_entries(value: Tensor, remaining: Sequence[int], count: int) -> Tensor:
    """Select the rows or columns of the remaining experts from a tensor.

    A tensor without one row or column per expert is returned unchanged.
    """
    axis = 1 if value.ndim == 2 and len(value) == 1 else 0
    if not value.ndim or value.shape[axis] != count:
        return value
    return take_entries(value, remaining, axis)


def _keep_biases(arguments: Any, remaining: Sequence[int], count: int) -> Any:
    """Return the arguments of a router's call, with only the biases of remaining experts."""
    if isinstance(arguments, dict):
        return {name: _keep_biases(value, remaining, count) for name, value in arguments.items()}
    if isinstance(arguments, tuple):
        return tuple(_keep_biases(value, remaining, count) for value in arguments)
    is_bias = isinstance(arguments, Tensor) and arguments.ndim == 1
    return _keep_entries(arguments, remaining, count) if is_bias else arguments


def call_reduced_router(
    router: nn.Module,
    experts: Experts,
    remaining: Sequence[int],
    full_outputs: Sequence[Any],
    state: Tensor,
    arguments: tuple[Any, Any],
) -> tuple[Any, ...]:
    """Call a copy of a router that lacks some experts.

    Args:
        router: The original router, which has all experts.
        experts: The routed experts of the layer.
        remaining: Indices of the experts that the copy keeps.
        full_outputs: Outputs of the original router; the returned outputs have the same shapes.
        state: The hidden states of the tokens to route.
        arguments: Positional and keyword arguments of the router's call. `state` replaces the
            hidden states in these arguments.

    Returns:
        The outputs of the copy, with experts numbered as in the original router. Scores of removed
        experts are −∞.
    """
    count = experts.count
    reduced_router = keep_experts(router, remaining, count)
    numbers = take_entries(torch.arange(count, device=state.device), remaining)

    def restore_numbers(part: Tensor, full_part: Tensor) -> Tensor:
        if not part.is_floating_point():
            return numbers[part]
        if part.shape[-1] == full_part.shape[-1]:
            return part
        # Scores of the remaining experts: the removed ones are never chosen.
        scores = part.new_full((*part.shape[:-1], count), -torch.inf)
        put_entries(scores.movedim(-1, 0), remaining, part.movedim(-1, 0))
        return scores

    args, kwargs = _keep_biases(arguments, remaining, count)
    output = hooks.call_with(reduced_router.forward, state, args, kwargs)
    return tuple(map(restore_numbers, output, full_outputs))


def single_expert_outputs(
    forward: Callable[..., Tensor], args: Args, kwargs: Kwargs
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield the outputs of each token's first expert, then of the second, without routing weights.

    Args:
        forward: The forward pass of the module that holds the experts.
        args: Positional arguments of the module's call.
        kwargs: Keyword arguments of the module's call.

    Yields:
        Three tensors about one expert of each token: the expert's index [tokens], the routing
        weight [tokens], and the expert's output [tokens, width].
    """
    arguments, state = (*args, *kwargs.values()), hooks.input_state(args, kwargs)
    choice = integer_tables(arguments)[0]
    # Scores of all experts have another shape than the choice.
    weights = next(
        value
        for value in arguments
        if value is not state and isinstance(value, Tensor) and value.shape == choice.shape
        if value.is_floating_point()
    )

    def single_choice(value: object, index: int) -> object:
        if value is weights:
            return torch.ones_like(weights[:, :1])
        return choice[:, index : index + 1].contiguous() if value is choice else value

    for index in range(choice.shape[-1]):
        single_args = (single_choice(value, index) for value in args)
        single_kwargs = {name: single_choice(value, index) for name, value in kwargs.items()}
        output = forward(*single_args, **single_kwargs)
        yield choice[:, index], weights[:, index], output.flatten(0, -2)


def weighted_expert_outputs(
    forward: Callable[..., Tensor], args: Args, kwargs: Kwargs, output: Tensor
) -> tuple[list[tuple[Tensor, Tensor, Tensor]], bool]:
    """Compute the outputs of each token's experts, and compare their weighted sum with `output`.

    Returns the results of `single_expert_outputs` as a list, and whether the sum of the outputs,
    weighted by the routing weights, equals `output` up to rounding.
    """
    outputs = [*single_expert_outputs(forward, args, kwargs)]
    total = sum(gates[:, None].float() * states.float() for _, gates, states in outputs)
    flat_output = output.float().flatten(0, -2)
    error = float((total - flat_output).norm())
    return outputs, error <= _MAX_ROUNDING_SHARE * float(flat_output.norm())


def _reads_mlp_input(call: ModuleCall, mlp: ModuleCall) -> bool:
    """Return whether a module reads the input of an MLP and returns an output of the same size.

    The arguments are a recorded call of the module, and a recorded call of the MLP.
    """
    state = hooks.input_state(mlp.args, mlp.kwargs)
    call_input, call_output = next(iter(call.arguments), None), hooks.first_output(call.output)
    if not (isinstance(call_input, Tensor) and isinstance(call_output, Tensor)):
        return False
    if call_output.numel() != state.numel() or call_input.dtype != state.dtype:
        return False
    return torch.equal(call_input.flatten(), state.flatten())


def _unrouted_modules(mlp: nn.Module) -> list[nn.Module]:
    """List an MLP's modules that neither contain nor belong to routed experts, outermost first."""
    holders = [module for module in mlp.modules() if count_experts(module)]
    routed_modules = {module for holder in holders for module in holder.modules()}
    around = {module for module in mlp.modules() if not routed_modules.isdisjoint(module.modules())}
    return [module for module in mlp.modules() if module not in around]


def _mlp_adds_output(module: nn.Module, mlp: ModuleCall) -> bool:
    """Test whether an MLP adds the output of `module` to the outputs of other modules.

    The function multiplies the output of `module` by 0, 1 and 2. From factor to factor, the output
    of the MLP must change by equal amounts. `mlp` is a recorded call of the MLP.
    """

    def scaled_result(factor: int) -> Tensor:
        def scale(_: nn.Module, __: Any, output: Any) -> Any:
            return hooks.replace_first_output(output, factor * hooks.first_output(output))

        with module.register_forward_hook(scale):
            result = hooks.first_output(mlp.module.forward(*mlp.args, **mlp.kwargs))
        return torch.as_tensor(result).float()

    outputs = [scaled_result(factor) for factor in (0, 1, 2)]
    contribution, difference = outputs[1] - outputs[0], outputs[2] - outputs[1]
    is_linear = (difference - contribution).norm() < _ADDITION_TOLERANCE * contribution.norm()
    return bool(outputs[0].any() and contribution.any() and is_linear)

"""Measure first-order Taylor terms: the gradient of the loss times the change of an output.

For each text, one forward pass and one backward pass suffice to compute the Taylor terms of all
changes.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from tracker.engine.refusal import RefusalError, is_device_lost, is_out_of_memory, try_model
from tracker.engine.scoring.model import compute_logits
from tracker.engine.scoring.rows import measured_texts
from tracker.engine.scoring.sweep import Engine
from tracker.models.devices import empty_cache
from tracker.models.hooks import (
    call_protected,
    first_output,
    input_state,
    neutral_output,
    replace_first_output,
    replaced_forward,
)
from tracker.models.parts.anatomy import PART_CLASSES, LayerAnatomy
from tracker.models.parts.experts import Experts, SharedExperts, weighted_expert_outputs
from tracker.models.parts.linear_maps import LinearMap, map_of_module
from tracker.models.parts.probe import ModuleCall
from tracker.models.parts.projection import Columns, ProjectionColumns
from tracker.models.parts.sublayers import SUBLAYER_TEXT_TOKENS, Sublayers
from tracker.schema.changes import Ablation, Change
from tracker.schema.documents import Document
from tracker.schema.errors import CellError
from tracker.schema.grouping import group_by


def measure_taylor(
    engine: Engine, document: Document, changes: Sequence[Change]
) -> dict[Change, float]:
    """Measure the first-order Taylor term of each change in a document.

    The term estimates how much the change increases the loss (negative log-likelihood). For each
    changed module, the gradient of the loss with respect to the module's output is multiplied by
    the change of the output. The products are summed over the tokens.

    Args:
        engine: The engine with the intact model. Its weights must not be offloaded.
        document: The document that the model reads.
        changes: Changes for which `Change.has_taylor` is true.

    Returns:
        For each change, the absolute value of its term, in nats. The value is NaN if autograd
        cannot differentiate the model, or if the change rounds matrices of experts.

    References:
        P. Molchanov et al., arXiv 1906.10771 (|gradient × activation|). P. Michel et al., arXiv
        1905.10650 (the absolute value is taken in each document).
    """
    find = partial(_find_terms, engine)
    terms = _sum_terms(engine, document, changes, find, partial(_text_loss, engine))
    return {change: abs(term) for change, term in terms.items()}


@dataclass
class _Call:
    """A call of a module, with the gradient of the loss with respect to its output."""

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Tensor
    gradient: Tensor = field(init=False)

    @cached_property
    def weight_gradient(self) -> Tensor:
        """Gradient of the loss with respect to a linear map's weight, in float32."""
        states = input_state(self.args, self.kwargs)
        gradients, inputs = (t.float().flatten(0, -2) for t in (self.gradient, states))
        return gradients.T @ inputs

    @cached_property
    def expert_terms(self) -> dict[Any, float]:
        """The Taylor term for the removal of each expert, by the expert's number."""
        terms: dict[Any, float] = defaultdict(float)
        gradient = self.gradient.float().flatten(0, -2)
        expert_outputs, is_separable = weighted_expert_outputs(
            self.module.forward, self.args, self.kwargs, self.output
        )
        if not is_separable:
            return defaultdict(lambda: math.nan)
        for numbers, gates, outputs in expert_outputs:
            products = -(gates.float() * (outputs.float() * gradient).sum(-1))
            for number, product in zip(numbers.tolist(), products.tolist(), strict=True):
                terms[number] += product
        return terms


_Term = Callable[[_Call], float]
"""Function that computes the Taylor term of a change from the call of a module."""


def measure_kl_gradients(
    engine: Engine, documents: Sequence[Document], changes: Sequence[Change]
) -> list[dict[Change, float]]:
    """Estimate how much of a rounded model's KL divergence each linear map causes.

    In a copy of the model, the linear maps of all layers are rounded to the change's format. The KL
    divergence between the intact model and the copy is summed over the document's tokens. For each
    linear map, the gradient of the divergence with respect to the weights is multiplied by the
    rounding errors of the weights.

    Args:
        engine: The engine with the intact model, whose weights are not offloaded.
        documents: The documents that the model reads.
        changes: Changes that round weights of one layer.

    Returns:
        For each document, a dictionary from each change to the estimated divergence in nats. The
        value is NaN in the same cases as for `measure_taylor`, if the copy does not fit into
        memory, and if the model cannot be rounded to the format.

    References:
        `estimate_sensitivities` of mlx-lm, without its division by the number of weights.
    """
    sums = [dict.fromkeys(changes, math.nan) for _ in documents]
    layers = engine.loaded.layers
    # The copy takes as much memory as the layers: not beside a model that fills the memory.
    if sum(weight.nbytes for weight in layers.parameters()) > engine.budget:
        return sums
    for form, rounded in group_by(changes, lambda change: change.intervention).items():
        everything = [Change(layers=(layer,), intervention=form) for layer in range(len(layers))]
        try:
            copied = engine.ablate(Ablation.from_changes(*everything))
        except CellError:
            continue
        find = partial(_find_kl_terms, engine, copied)
        loss = partial(_kl_divergence, engine, copied)
        for document, terms in zip(documents, sums, strict=True):
            terms |= _sum_terms(copied, document, rounded, find, loss)
        del copied, find, loss  # before the next copy is made
    return sums


def _sum_terms(
    engine: Engine,
    document: Document,
    changes: Sequence[Change],
    find_terms: Callable[[Change], Iterable[tuple[nn.Module, _Term]]],
    compute_loss: Callable[[Sequence[int], int], Tensor],
) -> dict[Change, float]:
    """Sum the first-order Taylor terms of each change over the texts of a document.

    Args:
        engine: The engine of the model whose loss is differentiated.
        document: The document, whose texts are read in turn.
        changes: The changes.
        find_terms: Function that yields (module, term) pairs for a change. `term` computes the
            Taylor term from a call of the module.
        compute_loss: Function that computes the loss from the token ids of a text and the index of
            the first measured token.

    Returns:
        The sum for each change; NaN if a forward or backward pass fails.
    """
    sums = dict.fromkeys(changes, 0.0)
    for tokens, start in measured_texts(document, engine.max_length):
        loss = partial(compute_loss, tokens, start)
        try:
            terms, _ = try_model(partial(_compute_terms, engine, [*sums], find_terms, loss))
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            terms = None
            empty_cache()
        for change in sums:
            sums[change] += terms[change] if terms else math.nan
    return sums


def _find_kl_terms(
    engine: Engine, copied: Engine, change: Change
) -> Iterator[tuple[nn.Module, _Term]]:
    """Yield each linear map that a change rounds, with a function for its Taylor term.

    The maps belong to the rounded model `copied`.
    """
    for path in engine.anatomy.expand_formats(change.layer, [change]):
        exact, rounded = (e.anatomy.get_map(change.layer, path) for e in (engine, copied))
        # The change from the exact weight to the rounded weight, at the rounded weight.
        yield rounded.module, partial(_rounding_term, exact, partial(getattr, rounded, "weight"))


def _kl_divergence(engine: Engine, copied: Engine, tokens: Sequence[int], start: int) -> Tensor:
    """Sum the KL divergence between the intact model and a changed copy over a text."""
    with torch.no_grad():
        log_p = _text_logits(engine, tokens, start).float().log_softmax(-1)
    log_q = _text_logits(copied, tokens, start).float().log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum()


def _compute_terms(
    engine: Engine,
    changes: Sequence[Change],
    find_terms: Callable[[Change], Iterable[tuple[nn.Module, _Term]]],
    compute_loss: Callable[[], Tensor],
) -> dict[Change, float]:
    """Compute the Taylor term of each change in a text.

    Raises RefusalError if autograd cannot compute the gradients.
    """
    terms_of: dict[nn.Module, list[tuple[Change, _Term]]] = {}
    for change in changes:
        for module, term in find_terms(change):
            terms_of.setdefault(module, []).append((change, term))
    calls: dict[nn.Module, _Call] = {}
    repeated: set[nn.Module] = set()

    def record(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        if module in calls:
            repeated.add(module)
        calls[module] = _Call(module, args, kwargs, first_output(output))
        # A copy, because the layer may change the output in place.
        return replace_first_output(output, first_output(output).clone())

    def require_gradient(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return output.detach().requires_grad_().clone()

    with torch.inference_mode(False), torch.enable_grad(), ExitStack() as stack:
        embedding = engine.loaded.model.get_input_embeddings()
        stack.enter_context(embedding.register_forward_hook(require_gradient))
        for module in terms_of:
            stack.enter_context(module.register_forward_hook(record, with_kwargs=True))
        loss = compute_loss()
        outputs = [call.output for call in calls.values()]
        gradients = _gradients(loss, outputs) if outputs else ()
        for call, gradient in zip(calls.values(), gradients, strict=True):
            call.gradient = gradient
    sums = dict.fromkeys(changes, 0.0)
    with torch.no_grad():
        # Gradients of weights take much memory: they are freed after each module.
        for module, terms in terms_of.items():
            module_call = calls.pop(module, None)  # None for an expert without tokens
            for change, term in terms:
                if module in repeated:
                    sums[change] = math.nan
                elif module_call is not None:
                    sums[change] += term(module_call)
    return sums


def _find_terms(engine: Engine, change: Change) -> Iterator[tuple[nn.Module, _Term]]:
    """Yield the modules that a change modifies, each with a function for its Taylor term."""
    anatomy, number = engine.anatomy, change.layer
    layer, component = engine.loaded.layers[number], change.component
    if change.intervention != "remove":
        for path, form in anatomy.expand_formats(number, [change]).items():
            linear = anatomy.get_map(number, path)
            get_weight = partial(anatomy.weights.get_weight, number, path, linear, form)
            yield linear.module, partial(_rounding_term, linear, get_weight)
    elif issubclass(kind := PART_CLASSES[component], ProjectionColumns):
        part = anatomy.get_part(kind, number)
        columns = part.columns(change, anatomy.layer_name(number))
        yield layer.get_submodule(part.projection), partial(_columns_term, columns)
    elif component == "expert":
        holder = layer.get_submodule(anatomy.get_part(Experts, number).holder)
        yield holder, lambda call: call.expert_terms[change.part]
    elif component == "shared_expert":
        for path in anatomy.get_part(SharedExperts, number).paths:
            yield layer.get_submodule(path), _removal_term
    else:
        yield _added_modules(anatomy)[number][component], _removal_term


def _added_modules(anatomy: LayerAnatomy) -> Sequence[dict[str, nn.Module]]:
    """Find for each layer the `attention` and `mlp` modules that update the residual stream.

    A module is the sublayer itself, or a norm that reads the sublayer's output, as in Gemma.
    """
    numbers = {layer: number for number, layer in enumerate(anatomy.layers)}

    def follow(module: nn.Module, calls: Sequence[ModuleCall]) -> nn.Module:
        call = next(call for call in calls if call.module is module)
        output = first_output(call.output)
        if neutral_output(module, call.args, call.kwargs, output, len(output)).any():
            return module  # it adds its input itself
        for other in calls:
            is_norm = all(parameter.ndim < 2 for parameter in other.module.parameters())
            if is_norm and any(value is output for value in other.arguments):
                module, output = other.module, first_output(other.output)
        return module

    def find(layer: nn.Module, calls: Sequence[ModuleCall]) -> dict[str, nn.Module]:
        sublayers = anatomy.get_part(Sublayers, numbers[layer])
        return {name: follow(sublayers.module(name), calls) for name in ("attention", "mlp")}

    key = "added modules"
    if key not in anatomy.parts:
        anatomy.find(Sublayers)  # before the model runs here
        with anatomy.exclusive_use():
            anatomy.parts[key] = anatomy.probe(Sublayers, SUBLAYER_TEXT_TOKENS, find)
    modules: Sequence[dict[str, nn.Module]] = anatomy.parts[key]
    return modules


def _rounding_term(linear: LinearMap, get_weight: Callable[[], Tensor], call: _Call) -> float:
    """Compute the Taylor term of a quantised weight; NaN for matrices of experts."""
    if linear.experts:
        return math.nan
    return float((call.weight_gradient * (get_weight().float() - linear.weight.float())).sum())


def _columns_term(columns: Columns, call: _Call) -> float:
    """Compute the Taylor term of removing input columns of an output projection."""
    weight = map_of_module(call.module).weight[:, columns]
    return -float((call.weight_gradient[:, columns] * weight.float()).sum())


def _removal_term(call: _Call) -> float:
    """Compute the Taylor term of removing a sublayer or a shared expert."""
    neutral = neutral_output(call.module, call.args, call.kwargs, call.output, len(call.output))
    return float(((neutral.float() - call.output.float()) * call.gradient.float()).sum())


def gate_gradient(engine: Engine, tokens: Sequence[int], start: int) -> Tensor:
    """Compute the derivatives of a text's loss with respect to a factor on each layer's update."""
    layers = engine.loaded.layers
    with torch.inference_mode(False), torch.enable_grad(), ExitStack() as stack:
        gates = torch.ones(len(layers), device=engine.loaded.device, requires_grad=True)
        for gate, layer in zip(gates, layers, strict=True):
            gated_forward = partial(_apply_gate, layer, layer.forward, gate)
            stack.enter_context(replaced_forward(layer, gated_forward))
        (gradient,) = _gradients(_text_loss(engine, tokens, start), [gates])
    return gradient.cpu().double()


def _apply_gate(
    layer: nn.Module, forward: Callable[..., Any], gate: Tensor, *args: Any, **kwargs: Any
) -> Any:
    """Run a layer, and multiply the layer's update of the residual stream by `gate`."""
    inputs, output = call_protected(layer, forward, args, kwargs)
    outputs = first_output(output)
    update = (outputs - inputs.to(outputs.device)).detach()
    return replace_first_output(output, outputs + (gate.to(outputs) - 1) * update)


def _text_logits(engine: Engine, tokens: Sequence[int], start: int) -> Tensor:
    """Compute the logits [positions, vocabulary] that predict the tokens of a text.

    The first predicted token is the token at `start`.
    """
    engine.restore_state()
    ids = torch.tensor([tokens], device=engine.loaded.device)
    return compute_logits(engine.loaded.model, ids)[0, max(start, 1) - 1 : len(tokens) - 1]


def _text_loss(engine: Engine, tokens: Sequence[int], start: int) -> Tensor:
    """Compute the negative log-likelihood of the tokens from `start` to the text's end."""
    logits = _text_logits(engine, tokens, start)
    next_ids = torch.tensor(tokens[max(start, 1) :], device=logits.device)[:, None]
    return -logits.float().log_softmax(-1).gather(1, next_ids).sum()


def _gradients(loss: Tensor, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Return the gradients of a loss; raise RefusalError if autograd cannot compute them."""
    try:
        return torch.autograd.grad(loss, tensors)
    except RuntimeError as error:
        if is_out_of_memory(error) or is_device_lost(error):
            raise
        raise RefusalError(f"it cannot be differentiated: {error}") from None

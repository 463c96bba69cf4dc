"""Measure the errors of quantised linear maps, to help choose the bits per weight.

The embedding and the output head also count as linear maps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity
from torch.nn.functional import linear as apply

from tracker.engine.scoring.head import LOGITS_BYTES
from tracker.engine.scoring.rows import measured_texts
from tracker.engine.scoring.sweep import Engine
from tracker.models.parts.experts import single_expert_outputs
from tracker.models.parts.linear_maps import LinearMap, copy_with_weights
from tracker.models.parts.probe import integer_tables
from tracker.schema.changes import Change
from tracker.schema.documents import Document
from tracker.schema.errors import CellError
from tracker.schema.grouping import group_by
from tracker.schema.proxies import to_double


def compare_embeddings(
    engine: Engine, tokens: Sequence[int], start: int, maps: Sequence[Change]
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Compute outputs of the embedding and the output head, with exact and quantised weights.

    Args:
        engine: The engine of the model that reads the tokens.
        tokens: Token ids of the text.
        start: Index of the first token whose outputs are yielded.
        maps: Changes that quantise one linear map each. Only changes of the embedding and the
            output head are used.

    Yields:
        (Index in `maps`, exact output [tokens, …], output with quantised weights). The output
        head's logits are those before scaling or soft-capping.
    """
    numbers = [number for number, change in enumerate(maps) if change.is_outer]
    if not numbers:
        return
    embeddings = engine.embeddings
    calls: list[tuple[Any, Tensor]] = []

    def record_call(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        calls.append((args[0], output))

    def compare_formats(name: str) -> Iterator[tuple[int, Tensor, Tensor]]:
        module_input, exact = calls.pop()
        for number in numbers:
            if maps[number].path == name:
                with embeddings.temporary_format(name, maps[number].intervention):
                    rounded = embeddings[name].module.forward(module_input)
                yield number, exact.flatten(0, -2), rounded.flatten(0, -2)

    with embeddings.embedding.module.register_forward_hook(record_call):
        output = engine.run_text(tokens)
    for number, exact, rounded in compare_formats("embedding"):
        yield number, exact[start:], rounded[start:]
    if all(maps[number].path != "lm_head" for number in numbers):
        return
    size = max(1, LOGITS_BYTES // (8 * len(embeddings.lm_head.weight)))
    for states in output.last_hidden_state[:, start:].split(size, dim=1):
        with embeddings.lm_head.module.register_forward_hook(record_call):
            engine.head.logits(output, states)
        yield from compare_formats("lm_head")


_MapIndices = dict[tuple[int, str], list[int]]
"""(layer, path) of a linear map → indices of the map among the requested maps."""


@torch.inference_mode()
def weight_errors(engine: Engine, maps: Sequence[Change]) -> Tensor:
    """Compute the relative error of quantised weights.

    Args:
        engine: The engine of the model.
        maps: Changes that round a single linear map to a format.

    Returns:
        Squared norm of the error divided by squared norm of the weight, for each map, in float64.
    """
    errors = torch.zeros(len(maps), dtype=torch.float64)
    weights = engine.anatomy.weights
    for index, change in enumerate(maps):
        path, form = change.path, change.intervention
        if change.is_outer:
            linear = engine.embeddings[path]
            weight = engine.embeddings.rounded_weight(path, form)
        else:
            linear = engine.anatomy.get_map(change.layer, path)
            weight = weights.get_weight(change.layer, path, linear, form)
        # One expert after the other: all at once may take much memory.
        exact, rounded = (w if w.ndim == 3 else w[None] for w in (linear.weight, weight))
        pairs = [*zip(exact, rounded, strict=True)]
        error = sum(float((x.float() - y.float()).square().sum()) for x, y in pairs)
        errors[index] = error / sum(float(x.float().square().sum()) for x, _ in pairs)
    return errors


@torch.inference_mode()
def rounding_errors(
    engine: Engine, document: Document, maps: Sequence[Change]
) -> dict[str, Tensor]:
    """Measure the output errors of quantised linear maps, with inputs from the intact model.

    Args:
        engine: The engine of the model that reads the document.
        document: The document that is read: context and gold continuation, or the windows of a
            rolling text.
        maps: Changes that round a single linear map to a format.

    Returns:
        Sums over the document's tokens, in float64. `tokens` is the number of tokens. The following
        tensors contain one sum per linear map. `output_error`: squared distance of the exact and
        the quantised output. `output_size`: squared norm of the exact output. `output_angle`: 1
        minus the cosine similarity of the exact and the quantised output. In a mixture of experts,
        each expert's output is compared before the router's weight is applied.

    Raises:
        CellError: The model's code does not allow computing the output of a single expert.
    """
    inner = [index for index, change in enumerate(maps) if not change.is_outer]
    indices = group_by(inner, lambda index: (maps[index].layer, maps[index].path))
    names = ("output_error", "output_size", "output_angle")
    sums = {name: torch.zeros(len(maps), dtype=torch.float64) for name in names}
    sums["tokens"] = torch.zeros((), dtype=torch.float64)
    weights = engine.anatomy.weights

    def add_error(index: int, exact: Tensor, rounded: Tensor, share: float = 1) -> None:
        sums["output_error"][index] += float((rounded.float() - exact.float()).square().sum())
        sums["output_size"][index] += float(exact.float().square().sum())
        angles = 1 - cosine_similarity(to_double(rounded), to_double(exact), dim=-1)
        sums["output_angle"][index] += share * float(angles.sum())

    def compare(layer: int, path: str, linear: LinearMap, module: nn.Module, *call: Any) -> None:
        compute_outputs = _expert_outputs if linear.experts else _map_outputs
        for index in indices[layer, path]:
            weight = weights.get_weight(layer, path, linear, maps[index].intervention)
            pairs = [*compute_outputs(linear, weight, start, *call)]
            for exact, rounded in pairs:
                add_error(index, exact, rounded, 1 / len(pairs))

    for tokens, start in measured_texts(document, engine.max_length):
        with _hook_maps(engine, indices, compare):
            engine.run_text(tokens)
        for index, exact, rounded in compare_embeddings(engine, tokens, start, maps):
            add_error(index, exact, rounded)
        sums["tokens"] += len(tokens) - start
    return sums


_Pairs = Iterator[tuple[Tensor, Tensor]]
"""Output of a map or an expert [tokens, width], and its output with the quantised weight."""


def _map_outputs(linear: LinearMap, weight: Tensor, start: int, *call: Any) -> _Pairs:
    args, _, output = call
    states, exact = (tensor.flatten(0, -2)[start:] for tensor in (args[0], output))
    yield exact, apply(states, weight, linear.module.bias)  # type: ignore[arg-type]


def _expert_outputs(linear: LinearMap, weight: Tensor, start: int, *call: Any) -> _Pairs:
    """Compute the selected experts' outputs, with exact and quantised weights.

    `call` contains the arguments, keyword arguments and output of the experts' module.
    """
    args, kwargs, _ = call
    if not integer_tables((*args, *kwargs.values())):
        raise CellError(
            f"the inputs of {type(linear.module).__name__} do not name the experts of each token, "
            "so no single expert's output can be computed; do not measure experts' rounding errors"
        )
    expert_weight = linear.to_module_layout(weight, linear.parameter)
    modules = linear.module, copy_with_weights(linear.module, {linear.name: expert_weight})
    outputs = (single_expert_outputs(module.forward, args, kwargs) for module in modules)
    for (numbers, _, exact), (_, _, rounded) in zip(*outputs, strict=True):
        is_counted = torch.arange(len(numbers), device=numbers.device) >= start
        if linear.expert is not None:
            is_counted &= numbers == linear.expert
        yield exact[is_counted], rounded[is_counted]


@contextmanager
def _hook_maps(
    engine: Engine, map_paths: _MapIndices, visit: Callable[..., None]
) -> Iterator[None]:
    """Call `visit` whenever one of the linear maps has run in a `with` block."""
    with ExitStack() as stack:
        for layer, path in map_paths:
            linear = engine.anatomy.get_map(layer, path)
            hook = partial(visit, layer, path, linear)
            stack.enter_context(linear.module.register_forward_hook(hook, with_kwargs=True))
        yield

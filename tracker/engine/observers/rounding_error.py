"""Errors of linear maps in a format, from which tools choose bits.

The embedding and the output head are linear maps too.
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

from tracker.core.changes import Change
from tracker.core.documents import Document
from tracker.core.errors import CellError
from tracker.core.grouping import grouped
from tracker.core.proxies import widened
from tracker.engine.scoring.head import LOGITS_BYTES
from tracker.engine.scoring.rows import measured_texts
from tracker.engine.scoring.sweep import Engine
from tracker.models.parts.experts import single_outputs
from tracker.models.parts.linear_maps import LinearMap, holding
from tracker.models.parts.probe import integer_tables


def at_ends(
    engine: Engine, tokens: Sequence[int], measured: int, maps: Sequence[Change]
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Run the intact model, and its embedding and head again in a format.

    Args:
        engine: The engine, whose model reads the tokens.
        tokens: The tokens.
        measured: Index of the first token that counts.
        maps: Linear maps with formats; only the embedding and the head are measured.

    Yields:
        The index of a map in `maps`, the module's output for some tokens [tokens, …], and its
        output in the format. For an embedding these are the looked-up rows, for a head its logits
        before any further step.
    """
    numbers = [number for number, change in enumerate(maps) if change.is_end]
    if not numbers:
        return
    ends = engine.ends
    seen: list[tuple[Any, Tensor]] = []

    def look(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        seen.append((args[0], output))

    def compared(name: str) -> Iterator[tuple[int, Tensor, Tensor]]:
        given, before = seen.pop()
        for number in numbers:
            if maps[number].path == name:
                with ends.having(name, maps[number].intervention):
                    after = ends[name].module.forward(given)
                yield number, before.flatten(0, -2), after.flatten(0, -2)

    with ends.embedding.module.register_forward_hook(look):
        output = engine.run(tokens)
    for number, *both in compared("embedding"):
        before, after = (change[measured:] for change in both)
        yield number, before, after
    if all(maps[number].path != "lm_head" for number in numbers):
        return
    size = max(1, LOGITS_BYTES // (8 * len(ends.lm_head.weight)))
    for states in output.last_hidden_state[:, measured:].split(size, dim=1):
        with ends.lm_head.module.register_forward_hook(look):
            engine.head.logits(output, states)
        yield from compared("lm_head")


_Places = dict[tuple[int, str], list[int]]
"""Layer and path of a linear map → its indices among the requested maps."""


@torch.inference_mode()
def weight_errors(engine: Engine, maps: Sequence[Change]) -> Tensor:
    """Measure the relative error of weights in a format, independent of any text.

    Args:
        engine: The engine.
        maps: Single linear maps with their formats.

    Returns:
        Squared distance over squared size of each map [maps], float64.
    """
    found = torch.zeros(len(maps), dtype=torch.float64)
    for place, each in enumerate(maps):
        if each.is_end:
            linear = engine.ends[each.path]
            weight = engine.ends.weight(each.path, each.intervention)
        else:
            linear = engine.anatomy.map_at(each.layer, each.path)
            weight = engine.anatomy.weights.of(each.layer, each.path, linear, each.intervention)
        # One expert after the other: all at once may take much memory.
        own, rounded = (one if one.ndim == 3 else one[None] for one in (linear.weight, weight))
        pairs = [*zip(own, rounded, strict=True)]
        apart = sum(float((one.float() - other.float()).square().sum()) for one, other in pairs)
        found[place] = apart / sum(float(one.float().square().sum()) for one, _ in pairs)
    return found


@torch.inference_mode()
def rounding_errors(
    engine: Engine, document: Document, maps: Sequence[Change]
) -> dict[str, Tensor]:
    """Measure the output errors of linear maps of the intact model in a format.

    Args:
        engine: The engine, whose model reads the document.
        document: The document: context and gold continuation, or the windows of a rolling text.
        maps: Single linear maps with their formats.

    Returns:
        Sums, float64. `tokens` []: the number of tokens of the document. The others are per map
        [maps], over tokens. `output_error` and `output_size`: squared distance of its outputs, and
        their squared size. `output_angle`: 1 minus the cosine of the two outputs. For experts' maps
        they are the outputs of the experts before weighting: summed over all experts of a token,
        and averaged for the angle.

    Raises:
        CellError: Its experts cannot be called one by one.
    """
    of_layers = [place for place, each in enumerate(maps) if not each.is_end]
    places = grouped(of_layers, lambda place: (maps[place].layer, maps[place].path))
    names = ("output_error", "output_size", "output_angle")
    found = {name: torch.zeros(len(maps), dtype=torch.float64) for name in names}
    found["tokens"] = torch.zeros((), dtype=torch.float64)
    kept = engine.anatomy.weights

    def compare(place: int, before: Tensor, after: Tensor, share: float = 1) -> None:
        found["output_error"][place] += float((after.float() - before.float()).square().sum())
        found["output_size"][place] += float(before.float().square().sum())
        turned = 1 - cosine_similarity(widened(after), widened(before), dim=-1)
        found["output_angle"][place] += share * float(turned.sum())

    def look(layer: int, path: str, linear: LinearMap, module: nn.Module, *call: Any) -> None:
        for place in places[layer, path]:
            weight = kept.of(layer, path, linear, maps[place].intervention)
            pairs = [*(_of_experts if linear.experts else _of_map)(linear, weight, measured, *call)]
            for before, after in pairs:
                compare(place, before, after, 1 / len(pairs))

    for tokens, measured in measured_texts(document, engine.max_length):
        with _watched(engine, places, look):
            engine.run(tokens)
        for place, before, after in at_ends(engine, tokens, measured, maps):
            compare(place, before, after)
        found["tokens"] += len(tokens) - measured
    return found


_Pairs = Iterator[tuple[Tensor, Tensor]]
"""Output of a map or an expert [tokens, width], and its output with another weight."""


def _of_map(
    linear: LinearMap,
    weight: Tensor,
    measured: int,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    output: Tensor,
) -> _Pairs:
    states, before = (each.flatten(0, -2)[measured:] for each in (args[0], output))
    yield before, apply(states, weight, linear.module.bias)  # type: ignore[arg-type]


def _of_experts(
    linear: LinearMap,
    weight: Tensor,
    measured: int,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    output: Tensor,
) -> _Pairs:
    """Yield the outputs of the experts, one expert of each token after the other."""
    if not integer_tables((*args, *kwargs.values())):
        raise CellError(
            f"{type(linear.module).__name__} is not told which tokens go to which experts, so what "
            "one of them gives cannot be seen; leave the errors of its maps out"
        )
    own = linear.laid_out(weight, linear.parameter)
    rounded = holding(linear.module, {linear.name: own})
    both = (single_outputs(each.forward, args, kwargs) for each in (linear.module, rounded))
    for (numbers, _, before), (_, _, after) in zip(*both, strict=True):
        mine = torch.arange(len(numbers), device=numbers.device) >= measured
        if linear.expert is not None:
            mine &= numbers == linear.expert
        yield before[mine], after[mine]


@contextmanager
def _watched(engine: Engine, asked: _Places, look: Callable[..., None]) -> Iterator[None]:
    """Call `look` with linear maps of layers, and the inputs and outputs of their modules."""
    with ExitStack() as stack:
        for layer, path in asked:
            linear = engine.anatomy.map_at(layer, path)
            seen = partial(look, layer, path, linear)
            stack.enter_context(linear.module.register_forward_hook(seen, with_kwargs=True))
        yield

"""Errors of linear maps in a format, by which tools choose bits.

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
        engine: The engine, whose model reads.
        tokens: What it reads.
        measured: From which token on it counts.
        maps: What has formats; only what is the embedding or the head is looked at.

    Yields:
        The number of a map among `maps`, and of some tokens [tokens, …] what the module gives, and
        what it gives in the format: of an embedding the rows that are looked up, of a head its
        logits, before anything else is done with them.
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
"""Layer and path of a linear map → where among the maps that are asked for it stands."""


@torch.inference_mode()
def weight_errors(engine: Engine, maps: Sequence[Change]) -> Tensor:
    """Measure how far weights are from themselves in a format, whatever is read.

    Args:
        engine: The engine.
        maps: Single linear maps with their formats.

    Returns:
        Of each map [maps] the squared distance over the squared size, float64.
    """
    found = torch.zeros(len(maps), dtype=torch.float64)
    for place, each in enumerate(maps):
        if each.is_end:
            linear = engine.ends[each.path]
            weight = engine.ends.weight(each.path, each.intervention)
        else:
            linear = engine.anatomy.map_at(each.layer, each.path)
            weight = engine.anatomy.weights.of(each.layer, each.path, linear, each.intervention)
        # One expert after the other: they may take much room.
        own, rounded = (one if one.ndim == 3 else one[None] for one in (linear.weight, weight))
        pairs = [*zip(own, rounded, strict=True)]
        apart = sum(float((one.float() - other.float()).square().sum()) for one, other in pairs)
        found[place] = apart / sum(float(one.float().square().sum()) for one, _ in pairs)
    return found


@torch.inference_mode()
def rounding_errors(
    engine: Engine, document: Document, maps: Sequence[Change]
) -> dict[str, Tensor]:
    """Measure how far linear maps of the intact model are from themselves in a format.

    Args:
        engine: The engine, whose model reads.
        document: What it reads: context and gold continuation, or the windows of a rolling text.
        maps: Single linear maps with their formats.

    Returns:
        Sums, float64. `tokens` []: how many tokens the document has. Of each map [maps], over
        tokens: `output_error` and `output_size`, the squared distance of its outputs and their
        squared size; and `output_angle`, 1 minus the cosine of the two outputs. Of experts' maps
        it is the outputs of the experts, before they are weighed: of all to which a token goes, and
        of the angle their mean.

    Raises:
        CellError: Its experts cannot be asked one by one.
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
"""What a map, or an expert, gives [tokens, width], and what it gives with another weight."""


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
    """Ask the experts again, one of each token after the other."""
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
    """Show linear maps of layers, each with what their modules are given and what they make."""
    with ExitStack() as stack:
        for layer, path in asked:
            linear = engine.anatomy.map_at(layer, path)
            seen = partial(look, layer, path, linear)
            stack.enter_context(linear.module.register_forward_hook(seen, with_kwargs=True))
        yield

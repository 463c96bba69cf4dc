"""How far linear maps in a format are from what they were: the errors that tools choose bits by."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, linear

from tracker.core.ablations import Rounded
from tracker.core.documents import Document
from tracker.core.kinds import ENDS
from tracker.engine.observers.end_errors import at_ends
from tracker.engine.scoring.rows import measured_texts
from tracker.engine.scoring.sweep import Engine
from tracker.models.ends import find_ends
from tracker.models.quantised import outputs_first

_Places = dict[tuple[int, str], list[int]]
"""Layer and path of a linear map → where among the maps that are asked for it stands."""


@torch.inference_mode()
def weight_errors(engine: Engine, maps: Sequence[Rounded]) -> Tensor:
    """Measure how far weights are from themselves in a format, whatever is read.

    Args:
        engine: The engine.
        maps: Single linear maps with their formats.

    Returns:
        Of each map [maps] the squared distance over the squared size, float64.
    """
    found = torch.zeros(len(maps), dtype=torch.float64)
    for place, each in enumerate(maps):
        module = _module(engine, each.layer, each.which)
        own = outputs_first(module).float()
        weight = engine.rounded_weights.of(each.layer, each.which, module, each.format).float()
        found[place] = float((weight - own).square().sum() / own.square().sum())
    return found


@torch.inference_mode()
def rounding_errors(
    engine: Engine, document: Document, maps: Sequence[Rounded]
) -> dict[str, Tensor]:
    """Measure how far linear maps of the intact model are from themselves in a format.

    Args:
        engine: The engine, whose model reads.
        document: What it reads: context and gold continuation, or the windows of a rolling text.
        maps: Single linear maps with their formats.

    Returns:
        Sums, float64. `tokens` []: how many tokens the document has. Of each map [maps], over
        tokens: `output_error` and `output_size`, the squared distance of its outputs and their
        squared size; and `output_angle`, 1 minus the cosine of the two outputs.
    """
    places: _Places = {}
    for place, each in enumerate(maps):
        if not each.is_end:
            places.setdefault((each.layer, each.which), []).append(place)
    names = ("output_error", "output_size", "output_angle")
    found = {name: torch.zeros(len(maps), dtype=torch.float64) for name in names}
    found["tokens"] = torch.zeros((), dtype=torch.float64)
    kept = engine.rounded_weights

    def compare(place: int, before: Tensor, after: Tensor) -> None:
        apart = (after.float() - before.float()).square().sum()
        found["output_error"][place] += float(apart)
        found["output_size"][place] += float(before.float().square().sum())
        turned = 1 - cosine_similarity(after.double(), before.double(), dim=-1)
        found["output_angle"][place] += float(turned.sum())

    def look(layer: int, path: str, module: nn.Module, given: Tensor, made: Tensor) -> None:
        states, before = (each.flatten(0, -2)[measured:] for each in (given, made))
        for place in places[layer, path]:
            weight = kept.of(layer, path, module, maps[place].format)
            compare(place, before, linear(states, weight, module.bias))  # type: ignore[arg-type]

    for tokens, measured in measured_texts(document, engine.max_length):
        engine.put_back()
        with _watched(engine.loaded.layers, places, look):
            ids = torch.tensor([tokens], device=engine.loaded.device)
            engine.head.base(input_ids=ids, use_cache=False)
        for place, before, after in at_ends(engine, tokens, measured, maps):
            compare(place, before, after)
        found["tokens"] += len(tokens) - measured
    return found


def _module(engine: Engine, layer: int, path: str) -> nn.Module:
    if path in ENDS:
        return find_ends(engine.loaded.model).module(path)
    return engine.loaded.layers[layer].get_submodule(path)


@contextmanager
def _watched(layers: nn.ModuleList, asked: _Places, look: Callable[..., None]) -> Iterator[None]:
    """Show linear maps of layers, each with what it is given and what it makes."""

    def hook(layer: int, path: str) -> Callable[..., None]:
        def seen(module: nn.Module, args: Any, output: Any) -> None:
            look(layer, path, module, args[0], output)

        return seen

    with ExitStack() as stack:
        for layer, path in asked:
            module = layers[layer].get_submodule(path)
            stack.enter_context(module.register_forward_hook(hook(layer, path)))
        yield

"""Which layers of a model rest elsewhere, because not all weights fit where they are used."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tracker.core.errors import ModelError
from tracker.models.devices import free_memory
from tracker.models.layers import find_layers
from tracker.models.offloaded import AT_ONCE, ROOM

FITS = 0.9
"""Share of the free memory up to which weights that fit are loaded as they are."""
RESIDENT = 0.6
"""Share of the free memory that weights take where they do not fit: the rest is for what the layers
compute."""

TRIED = 2**29
"""Bytes that are read to see how fast they come."""


@dataclass(frozen=True)
class Placement:
    """Where the parts of a model rest.

    Attributes:
        elsewhere: The layers that are brought in when they are needed.
        parts: Each part of the model → whether it is one of those layers.
        total: Bytes of all weights.
        moving: Bytes of those layers.
    """

    elsewhere: tuple[int, ...]
    parts: dict[str, bool]
    total: int
    moving: int


def placed(model: nn.Module, free: int, limit: int | None, every: bool = False) -> Placement | None:
    """Say which layers have to rest elsewhere.

    They are as evenly spread as can be, so that one is read while others are computed with.

    Args:
        model: The model, on the meta device.
        free: Bytes that are free where it is computed.
        limit: Bytes that its weights may take there; None = as many as fit.
        every: Whether all layers are to rest elsewhere.

    Returns:
        Where its parts rest; None where all weights fit.

    Raises:
        ModelError: Not even two layers fit beside the embeddings and the head.
    """
    layers = find_layers(model)
    sizes = [weight_bytes(layer) for layer in layers]
    total = weight_bytes(model)
    if not every and total <= (FITS * free if limit is None else limit):
        return None
    most, least = int(RESIDENT * free) if limit is None else limit, least_bytes(model)
    if most < least:
        raise ModelError(
            f"its embeddings, its head and {ROOM} of its layers take {least / 2**30:.1f} GiB, and "
            f"weights may take {most / 2**30:.1f} GiB; give them more with --weights, or use a "
            "smaller dtype"
        )
    staying = 0 if every else min((most - least) // max(sizes), len(sizes) - ROOM)
    moving = len(sizes) - staying
    # The k-th of so many, spread over all.
    elsewhere = tuple(k * len(sizes) // moving for k in range(moving))
    parts = dict(_parts(model, layers, "", {*elsewhere}))
    return Placement(elsewhere, parts, total, sum(sizes[layer] for layer in elsewhere))


def read_rate(files: Sequence[Path]) -> float | None:
    """Measure how many bytes of files are read in a second, by the beginning of the largest one.

    None where there is none. What the system has kept of it comes faster than the rest would.
    """
    if not files:
        return None
    began, size = time.perf_counter(), 0
    with max(files, key=lambda path: path.stat().st_size).open("rb", buffering=0) as file:
        while size < TRIED and (part := file.read(AT_ONCE)):
            size += len(part)
    return size / (time.perf_counter() - began)


def least_free(model: nn.Module, device: torch.device) -> int:
    """Say how many bytes are free on the fullest device of a model: its inputs', its weights'."""
    return min(map(free_memory, {device, *(p.device for p in model.parameters() if not p.is_meta)}))


def devices_for(weights: int, free: int, devices: int) -> int:
    """Say over how many devices a model is to be spread.

    Args:
        weights: Bytes of its weights.
        free: Bytes that are free on the fullest device.
        devices: How many there are.

    Returns:
        As many as leave room for what the layers compute. One where the weights fit on it, and
        where they do not even fit on all: then layers rest elsewhere.
    """
    if weights <= FITS * free:
        return 1
    needed = math.ceil(weights / (RESIDENT * free))
    return needed if needed <= devices else 1


def least_bytes(model: nn.Module, staying: int = 0) -> int:
    """Count the bytes that a model takes with some layers in place, and room for others."""
    sizes = [weight_bytes(layer) for layer in find_layers(model)]
    return weight_bytes(model) - sum(sizes) + (ROOM + staying) * max(sizes)


def weight_bytes(module: nn.Module) -> int:
    """Count the bytes of a module's weights, tied ones once."""
    return sum(each.numel() * each.itemsize for each in module.parameters())


def _parts(module: nn.Module, layers: nn.ModuleList, path: str, elsewhere: set[int]) -> Any:
    """List the largest parts that hold no layer, and the layers; each with whether it moves."""
    for name, held in [*module._parameters.items(), *module._buffers.items()]:
        if held is not None:
            yield f"{path}{name}", False
    for name, child in module.named_children():
        if child is layers:
            for number in range(len(layers)):
                yield f"{path}{name}.{number}", number in elsewhere
        elif any(each is layers for each in child.modules()):
            yield from _parts(child, layers, f"{path}{name}.", elsewhere)
        else:
            yield f"{path}{name}", False

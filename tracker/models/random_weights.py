"""A model of a given shape with random weights: to time what is not here yet.

The numbers say nothing; layers, sizes, tokens and calls are those of the real model.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from safetensors.torch import save_file
from torch import Tensor, nn

from tracker.core.errors import ModelError
from tracker.models.sources import ModelSource

STD = 0.02
"""Standard deviation of the weights, as most configurations have it."""
SHARD = 2 * 2**30
"""Bytes of a file of weights, about: so many are in memory while they are drawn."""
_INDEX = "model.safetensors.index.json"


def write_weights(source: ModelSource, model: nn.Module) -> None:
    """Write random weights into a shape's folder, once.

    Args:
        source: The shape.
        model: Its model on the meta device, in the dtype in which the weights are written.

    Raises:
        ModelError: The disk has no room for them.
    """
    folder = Path(source.location)
    with FileLock(folder / "lock"):
        if (folder / _INDEX).is_file():
            return
        size = sum(p.numel() * p.itemsize for p in model.parameters())
        free = shutil.disk_usage(folder).free
        if size > free:
            raise ModelError(
                f"{source.source} takes {size / 1e9:.0f} GB in {folder}, and {free / 1e9:.0f} are "
                f"free; take fewer layers ({source.source.partition('@')[0]}@4), or set "
                "XDG_CACHE_HOME to a larger disk"
            )
        places: dict[str, str] = {}
        for number, shard in enumerate(_shards(model)):
            file = f"model-{number:05}.safetensors"
            save_file(shard, folder / file, {"format": "pt"})
            places |= dict.fromkeys(shard, file)
        index = {"metadata": {"total_size": size}, "weight_map": places}
        (folder / _INDEX).write_text(json.dumps(index))


@torch.inference_mode()
def _shards(model: Any) -> Iterator[dict[str, Tensor]]:
    """Draw the weights, a file at a time: matrices of a normal distribution, vectors of ones."""
    generator = torch.Generator().manual_seed(0)
    shard: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        weight = torch.empty(parameter.shape, dtype=parameter.dtype)
        is_matrix = parameter.ndim > 1
        shard[name] = weight.normal_(0, STD, generator=generator) if is_matrix else weight.fill_(1)
        if sum(each.nbytes for each in shard.values()) > SHARD:
            yield shard
            shard = {}
    if shard:
        yield shard

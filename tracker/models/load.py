"""Load a causal language model and its tokenizer with transformers.

For measuring run times without a download, the module can create random weights with the shapes of
a real model.
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
from typing import TYPE_CHECKING, Any

import torch
from filelock import FileLock
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor, nn

from tracker.ledger.cache import private_folder
from tracker.models.devices import accelerators, default_device, free_memory
from tracker.models.gguf_file import cached_gguf_parsing
from tracker.models.hooks import TRANSFORMERS_LOCK
from tracker.models.layers import find_extra_layers, find_layers
from tracker.models.offloaded import (
    OffloadedWeights,
    Placement,
    place_layers,
    take_over_loading,
    weight_bytes,
)
from tracker.models.sources import (
    BITSANDBYTES_ARGUMENTS,
    ModelSource,
    read_config,
    read_tokenizer,
    reading_error,
    require_package,
)
from tracker.schema.errors import ModelError, first_line, translate_errors
from tracker.schema.identities import ModelIdentity
from tracker.schema.provenance import content_hash

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

WEIGHT_STD = 0.02
"""Standard deviation of random weights, the default of most configurations."""
MAX_SHARD_BYTES = 2 * 2**30
"""Maximum size of a file of random weights in bytes; one file is in memory while it is drawn."""
_INDEX_FILE = "model.safetensors.index.json"


@torch.inference_mode()
def write_weights(source: ModelSource, model: nn.Module) -> None:
    """Write random weights into the folder of a `shape:` model, unless the files exist.

    Args:
        source: The source of the `shape:` model; `location` is the path of the model's folder.
        model: The model on the meta device, with the shapes and the dtype of the weights to write.

    Raises:
        ModelError: The disk has no room for the weights.
    """
    folder = Path(source.location)
    with FileLock(folder / "lock"):
        if (folder / _INDEX_FILE).is_file():
            return
        parameters: dict[str, Tensor] = dict(model.named_parameters())
        shards = split_torch_state_dict_into_shards(parameters, max_shard_size=MAX_SHARD_BYTES)
        size, free = shards.metadata["total_size"], shutil.disk_usage(folder).free
        if size > free:
            raise ModelError(
                f"{source.source} takes {size / 1e9:.0f} GB in {folder}, but only "
                f"{free / 1e9:.0f} GB are free; use fewer layers, such as "
                f"{source.source.partition('@')[0]}@4, or set XDG_CACHE_HOME to a larger disk"
            )
        generator = torch.Generator().manual_seed(0)
        for file, names in shards.filename_to_tensors.items():
            weights = {name: _draw_weight(parameters[name], generator) for name in names}
            save_file(weights, folder / file, {"format": "pt"})
        index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
        (folder / _INDEX_FILE).write_text(json.dumps(index))


def _draw_weight(parameter: Tensor, generator: torch.Generator) -> Tensor:
    """Draw normally distributed values for a weight; return ones if it is one-dimensional."""
    if parameter.ndim < 2:
        return torch.ones(parameter.shape, dtype=parameter.dtype)
    weight = torch.empty(parameter.shape, dtype=parameter.dtype)
    return weight.normal_(0, WEIGHT_STD, generator=generator)


log = logging.getLogger(__name__)

SPREAD, ALL_DEVICES = "spread", "all"
SMALL_FILE_SHARE = 0.2
"""Share of the free memory below which weight files fit in any dtype."""
MAX_HOST_SHARE = 0.6
"""Maximum share of the host's free memory for offloaded layers."""
_QUANTISERS = {
    "awq": "gptqmodel",
    "bitsandbytes": "bitsandbytes",
    "compressed-tensors": "compressed_tensors",
    "gptq": "gptqmodel",
}
"""Packages that read quantised checkpoints, by the method of quantisation."""


@dataclass(frozen=True)
class LoadedModel:
    """A loaded model with its tokenizer, layers and identity.

    Attributes:
        model: The causal language model, in evaluation mode, without gradients.
        tokenizer: The model's tokenizer.
        layers: The model's decoder layers, in order.
        identity: Source, fingerprint, architecture and size of the model.
        device: The device on which the model expects its inputs.
        offloaded: The weights that are offloaded until a layer needs them; None if no weights are
            offloaded.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    layers: nn.ModuleList
    identity: ModelIdentity
    device: torch.device
    offloaded: OffloadedWeights | None = None


@cached_gguf_parsing()
def load_model(
    source: ModelSource,
    dtype: str = "auto",
    device: str = "auto",
    weights: int | None = None,
    offload: str = "device",
) -> LoadedModel:
    """Load a model, and offload layers that do not fit on the device.

    Args:
        source: Where the model is loaded from, such as the hub or a folder.
        dtype: `auto` (the checkpoint's dtype), `float32`, `bfloat16` or `float16`.
        device: A torch device, `auto` (the accelerator if there is one), or `spread` (all
            accelerators).
        weights: Maximum bytes of weights on the computing device; None = all free memory.
        offload: Where offloaded layers are stored. `device` offloads only layers that do not fit on
            the device. `host` and `disk` offload all layers if `weights` is None.

    Returns:
        The loaded model.

    Raises:
        ModelError: The model cannot be read, is not a decoder-only language model, or its layers
            cannot be identified.
    """
    config = read_config(source)
    quantiser = _quantisation_method(source, config)
    _check_loadable(source, config, quantiser)
    if source.is_shape:
        write_weights(source, build_hollow(source, "auto"))
    compute_device, placement = find_device(device), None
    is_spread = device == SPREAD and len(accelerators()) > 1
    if not is_spread:
        build_shape = partial(build_hollow, source, dtype)
        placement = choose_placement(source, build_shape, compute_device, weights, offload)
    options: dict[str, Any] = {}
    if is_spread:
        options = {"device_map": "auto"}
    elif quantiser:  # moving such weights later may corrupt them
        options = {"device_map": {"": str(compute_device)}}
    elif placement:
        # For weights that no file holds as they are used, such as those of experts.
        folder = TemporaryDirectory(dir=private_folder("offloaded"))
        options = _device_map(placement, compute_device, offload) | {"offload_folder": folder.name}
    tokenizer, model = _load_tokenizer_and_model(source, dtype, options)
    layers, offloaded = find_layers(model), None
    if placement:
        offloaded = take_over_loading(model, layers, compute_device, folder)
    elif is_spread:
        compute_device = model.get_input_embeddings().weight.device
    elif not quantiser:
        model = model.to(compute_device)
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
    return LoadedModel(model, tokenizer, layers, identity, compute_device, offloaded)


def _check_loadable(source: ModelSource, config: PreTrainedConfig, quantiser: str | None) -> None:
    """Raise ModelError if a model is not decoder-only or its quantisation package is missing."""
    is_encoder_decoder = getattr(config, "is_encoder_decoder", False)
    if is_encoder_decoder or any("MaskedLM" in name for name in config.architectures or []):
        raise ModelError(
            f"{source.source} is an {'encoder-decoder' if is_encoder_decoder else 'encoder'} "
            f"({config.model_type}); tracker measures decoder-only language models"
        )
    if quantiser is not None:
        require_package(_QUANTISERS[quantiser], f"the {quantiser} checkpoint {source.source}")


def _load_tokenizer_and_model(
    source: ModelSource, dtype: str, options: Mapping[str, Any]
) -> tuple[Any, Any]:
    """Load the tokenizer and the model, including the model's adapter.

    Raises ModelError if weights are missing, or if there are weights of additional layers.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    arguments = source.load_arguments()
    with translate_errors(partial(reading_error, source)):
        tokenizer = AutoTokenizer.from_pretrained(source.location, **arguments)
        if not source.gguf_file and not source.trust_remote_code:
            arguments["use_safetensors"] = True
        arguments |= {**options, **_weight_settings(source.arguments)}
        # transformers fills missing weights with random numbers, so its report is checked below.
        with TRANSFORMERS_LOCK:
            model, loading_info = AutoModelForCausalLM.from_pretrained(
                source.location, dtype=dtype, output_loading_info=True, **arguments
            )
            model = _add_adapter(model, source, tokenizer)
    if missing := loading_info["missing_keys"]:
        raise ModelError(
            f"{source.source} lacks weights that its configuration requires, such as {min(missing)}"
        )
    if extra := find_extra_layers(model, loading_info["unexpected_keys"]):
        total = len(find_layers(model))
        raise ModelError(
            f"{source.source} holds weights of layer {max(extra)}, but its configuration has "
            f"{total} layers, numbered 0 to {total - 1}; correct num_hidden_layers in config.json. "
            "To measure a model without some layers, use the key 'removed' or tracker export"
        )
    return tokenizer, model


def choose_placement(
    source: ModelSource,
    build_shape: Callable[[], nn.Module],
    device: torch.device,
    weights: int | None = None,
    offload: str = "device",
) -> Placement | None:
    """Choose which layers of a model to offload.

    Args:
        source: Where the model is loaded from, such as the hub or a folder.
        build_shape: Function that builds the model on the meta device.
        device: The device that computes the forward pass.
        weights: Maximum bytes of weights on the computing device, as for `load_model`.
        offload: Location of offloaded layers, as for `load_model`.

    Returns:
        The offloaded layers and their sizes; None if no weights are offloaded.

    Raises:
        ModelError: Offloading is requested but impossible for this model (e.g. a GGUF file), or the
            weights do not fit.
    """
    free_bytes = free_memory(device)
    is_requested = weights is not None or offload != "device"
    if offload == "host" and device.type == "cpu":
        raise ModelError("on a CPU, layers are already in the host's memory; use --offload disk")
    origins = {
        "a GGUF file": source.gguf_file,
        "quantised weights": getattr(read_config(source), "quantization_config", None),
        "an adapter": source.adapter,
        "bitsandbytes": _weight_settings(source.arguments).get("quantization_config"),
    }
    if origin := next((name for name, value in origins.items() if value), None):
        if is_requested:
            raise ModelError(
                f"{source.source}: its weights are computed from {origin} on loading, so they "
                "cannot be offloaded. Use safetensors, or leave --weights and --offload out"
            )
        return None
    # Small files fit in any dtype; this spares building the model without weights.
    is_known = source.is_local and not source.is_shape
    file_bytes = sum(path.stat().st_size for path in source.files())
    if not is_requested and is_known and file_bytes < SMALL_FILE_SHARE * free_bytes:
        return None
    all_layers = is_requested and weights is None
    return place_layers(build_shape(), free_bytes, weights, all_layers)


def _device_map(placement: Placement, device: torch.device, offload: str) -> dict[str, Any]:
    """Return transformers' `device_map` argument, which places a model's parts on devices."""
    is_on_disk = offload == "disk"
    if offload == "device":
        host_bytes = MAX_HOST_SHARE * free_memory(torch.device("cpu"))
        is_on_disk = device.type == "cpu" or placement.offloaded_bytes >= host_bytes
    location = "disk" if is_on_disk else "cpu"
    parts = placement.parts.items()
    return {"device_map": {n: location if moves else str(device) for n, moves in parts}}


def _weight_settings(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Select the model arguments that determine how transformers loads weights.

    Arguments of bitsandbytes are combined into a single `quantization_config`.
    """
    settings = {name: v for name, v in arguments.items() if name == "attn_implementation"}
    bits = {name: v for name, v in arguments.items() if name.startswith(BITSANDBYTES_ARGUMENTS)}
    if bits.get("load_in_4bit") or bits.get("load_in_8bit"):
        from transformers import BitsAndBytesConfig

        settings["quantization_config"] = BitsAndBytesConfig(**bits)
    return settings


def _quantisation_method(source: ModelSource, config: PreTrainedConfig) -> str | None:
    """Return the method by which a model's weights are quantised, a key of `_QUANTISERS`.

    Returns None if no additional package is needed to read the weights.
    """
    if _weight_settings(source.arguments).keys() & {"quantization_config"}:
        return "bitsandbytes"
    method = (getattr(config, "quantization_config", None) or {}).get("quant_method")
    return method if method in _QUANTISERS else None


def _add_adapter(
    model: PreTrainedModel, source: ModelSource, tokenizer: PreTrainedTokenizerBase
) -> Any:
    """Add an adapter to a model without merging it into the weights."""
    if source.adapter is None:
        return model
    from peft import PeftConfig, PeftModel, PeftType

    location = source.adapter.location
    config = PeftConfig.from_pretrained(location)
    if config.is_prompt_learning or config.peft_type == PeftType.ADAPTION_PROMPT:
        raise ModelError(
            f"model_args: the adapter {source.adapter.source} of the kind "
            f"{config.peft_type.value} adds tokens to the prompt; use an adapter that changes "
            "only weights, such as LoRA"
        )
    if model.get_input_embeddings().num_embeddings != len(tokenizer):
        model.resize_token_embeddings(len(tokenizer))
    return PeftModel.from_pretrained(model, location).get_base_model()


@cached_gguf_parsing()
def build_for_planning(source: ModelSource, dtype: str) -> tuple[Any, Any]:
    """Build a model on the meta device without reading weights, and load its tokenizer.

    Raises ModelError if the configuration or the tokenizer cannot be read.
    """
    model = build_hollow(source, dtype)
    return model, read_tokenizer(source, content_hash(source.stamp()))


def bytes_to_load(source: ModelSource, dtype: str) -> int | None:
    """Return the bytes that a model's weights will take in memory.

    Returns None for a checkpoint with quantised weights.

    Raises ModelError if the configuration cannot be read.
    """
    if _quantisation_method(source, read_config(source)) is not None:
        return None
    return weight_bytes(build_hollow(source, dtype))


def build_hollow(source: ModelSource, dtype: str) -> Any:
    """Build a model on the meta device from its configuration, without reading weights.

    Raises ModelError if the configuration cannot be read.
    """
    from transformers import AutoModelForCausalLM

    # transformers writes the dtype into the given configuration, which is read once per process.
    config = copy.deepcopy(read_config(source))
    torch_dtype = getattr(torch, dtype) if dtype != "auto" else getattr(config, "dtype", None)
    with translate_errors(partial(reading_error, source)), TRANSFORMERS_LOCK, torch.device("meta"):
        return AutoModelForCausalLM.from_config(
            config, dtype=torch_dtype or torch.float32, trust_remote_code=source.trust_remote_code
        )


def find_device(name: str) -> torch.device:
    """Return the torch device with the given name.

    The names `auto`, `spread` and `all` mean the first accelerator, or the CPU if there is no
    accelerator. Raises ModelError if the machine does not have the device.
    """
    if name in ("auto", SPREAD, ALL_DEVICES):
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

"""Load the offloaded weights of each layer to the device when the layer is needed.

The function `place_layers` chooses the layers to offload.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from accelerate.hooks import remove_hook_from_submodules
from accelerate.utils import PrefixedDataset
from torch import Tensor, nn

from tracker.models.devices import allocate_pinned, can_pin, free_memory, stream_module
from tracker.models.hooks import Args, replaced_attributes
from tracker.models.layers import find_layers
from tracker.schema.errors import CellError, ModelError

ALIGNMENT = 64
"""Alignment of weights in a buffer in bytes, as in allocators."""
READ_CHUNK_BYTES = 16 * 2**20
"""Number of bytes of each read request."""
LAYER_SLOTS = 2
"""Number of layers that fit on the device: one is used while the next one is read."""


@dataclass(frozen=True)
class FileSlice:
    """Position of a tensor's bytes in a safetensors file, with the file's size and time stamp.

    The file is not mapped into memory: if a mapped file is truncated, the operating system ends the
    process.
    """

    path: Path
    offset: int
    size: int
    dtype: torch.dtype
    stamp: tuple[int, int]

    def read_tensor(self, shape: torch.Size) -> Tensor:
        """Read the bytes into a new tensor of the given shape."""
        raw_bytes = torch.empty(self.size, dtype=torch.uint8)
        self.read(raw_bytes)
        return raw_bytes.view(self.dtype).view(shape)

    def read(self, target: Tensor) -> None:
        """Read the bytes into a uint8 tensor on the CPU.

        Raises CellError if the file has changed or is truncated.
        """
        view, start = memoryview(target.numpy().data), 0
        with self.path.open("rb", buffering=0) as file:
            if _file_stamp(file.fileno()) != self.stamp:
                raise CellError(
                    f"{self.path} has changed while the model was measured. Results from before "
                    "the change are kept; run the same command again to measure the changed model"
                )
            while start < self.size:
                chunk = view[start : start + READ_CHUNK_BYTES]
                n_read = os.preadv(file.fileno(), [chunk], self.offset + start)
                if not n_read:
                    raise CellError(f"{self.path} is truncated; copy the file again")
                start += n_read


def _file_stamp(descriptor: int) -> tuple[int, int]:
    status = os.fstat(descriptor)
    return status.st_size, status.st_mtime_ns


@cache
def _read_header(path: Path, stamp: tuple[int, int]) -> tuple[int, dict[str, Any]]:
    """Return the header of a safetensors file and the offset of its tensor data."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        return 8 + length, json.loads(file.read(length))


def find_slice(path: Path, name: str) -> FileSlice:
    """Return the position of a tensor's bytes in a safetensors file."""
    from transformers.modeling_utils import str_to_torch_dtype

    with path.open("rb") as file:
        stamp = _file_stamp(file.fileno())
    base, header = _read_header(path, stamp)
    start, stop = header[name]["data_offsets"]
    dtype = str_to_torch_dtype[header[name]["dtype"]]
    return FileSlice(path, base + start, stop - start, dtype, stamp)


WeightSource = FileSlice | Tensor
"""Location of the values of a weight: in a file, or in the host's memory."""


@dataclass(frozen=True)
class _Weight:
    """An offloaded parameter of a layer, and the file or tensor that holds its values.

    `placeholder` has the shape and dtype of the parameter. The offset of the parameter in the
    layer's buffer is `start`.
    """

    parameter: nn.Parameter
    source: WeightSource
    placeholder: Tensor
    start: int

    @property
    def stop(self) -> int:
        """Offset in the layer's buffer where the weight ends."""
        return self.start + self.placeholder.numel() * self.placeholder.itemsize

    def view(self, buffer: Tensor) -> Tensor:
        """Return the part of a buffer that holds the weight, in the weight's shape and dtype."""
        part, like = buffer[self.start : self.stop], self.placeholder
        return part.view(like.dtype).view(like.shape)


@dataclass(frozen=True)
class _LayerWeights:
    """The offloaded weights of one layer, and their positions in a buffer.

    Attributes:
        weights: Offloaded parameters of the layer, in the order of the buffer.
        pinned_parts: All weights in pinned host memory; empty if the weights are not pinned.
    """

    weights: Sequence[_Weight]
    pinned_parts: Sequence[Tensor] = ()

    @property
    def size(self) -> int:
        """Size of the layer's buffer in bytes."""
        return max(self.weights[-1].stop, sum(map(len, self.pinned_parts)))

    def list_copies(self, buffer: Tensor) -> Iterable[tuple[WeightSource, Tensor]]:
        """List what to copy into a buffer, so that the buffer contains the layer's weights.

        Returns pairs: a tensor or a part of a file, and the part of `buffer` to overwrite.
        """
        if not self.pinned_parts:
            return [(weight.source, weight.view(buffer)) for weight in self.weights]
        views = torch.split(buffer[: self.size], [*map(len, self.pinned_parts)])
        return zip(self.pinned_parts, views, strict=True)

    def with_pinned_memory(self) -> _LayerWeights:
        """Copy the weights to pinned memory; return `self` if some weights are on disk."""
        if not all(isinstance(weight.source, Tensor) for weight in self.weights):
            return self
        pinned_parts = allocate_pinned(self.size)
        sizes = [*map(len, pinned_parts)]
        buffer = torch.empty(sum(sizes), dtype=torch.uint8)
        for source, view in self.list_copies(buffer):
            _copy_values(source, view)
        for part, values in zip(pinned_parts, torch.split(buffer, sizes), strict=True):
            part.copy_(values)
        weights = [replace(weight, source=weight.placeholder) for weight in self.weights]
        return _LayerWeights(weights, pinned_parts)


@dataclass
class _Slot:
    """Device memory for one layer, and the number of this layer."""

    buffer: Tensor
    layer: int | None = None
    arrival: Future[Any] | None = None


class OffloadedWeights:
    """Layers that are stored in host memory or on disk, and loaded to the device when needed.

    While one offloaded layer is used, the next one is read. The parameters of a layer contain NaN
    as long as the layer is not loaded.

    Attributes:
        device: The device that computes with the weights.
        wait: Function that is called with a layer's number when the layer is needed.
        load_counts: Number of times that each layer was loaded, by layer.
        wait_seconds: Seconds spent waiting for weights.
        load_callbacks: Callbacks without arguments, called when a layer has been loaded.

    Args:
        device: The device that computes with the weights.
        sources: Layer → (parameter, file or tensor with the parameter's values). The constructor
            empties the dictionary `sources`.
        folder: Temporary folder with some of the weights, deleted together with this object.
    """

    def __init__(
        self,
        device: torch.device,
        sources: dict[int, list[tuple[nn.Parameter, WeightSource]]],
        folder: TemporaryDirectory[str],
    ) -> None:
        self.device = device
        self.wait: Callable[[int], None] = self.load_layer
        self.load_counts = dict.fromkeys(sorted(sources), 0)
        self.wait_seconds = 0.0
        self.load_callbacks: list[Callable[[], None]] = []
        self._layers: dict[int, _LayerWeights] = {}
        for number in self.load_counts:
            # Popped, so that only one layer at a time is in memory twice.
            layer = _LayerWeights([*_assign_offsets(sources.pop(number))])
            self._layers[number] = layer.with_pinned_memory() if can_pin(device) else layer
        largest = max(layer.size for layer in self._layers.values())
        new_buffer = partial(torch.empty, largest, dtype=torch.uint8, device=device)
        self._slots = [_Slot(new_buffer()) for _ in range(LAYER_SLOTS)]
        self._folder = folder  # kept alive as long as this object
        self._reader = ThreadPoolExecutor(1, "weights")
        self._stream_module = stream_module(device)
        self._stream = self._stream_module.Stream(device)

    def __deepcopy__(self, memo: dict[int, Any]) -> OffloadedWeights:
        """Return this object itself."""
        return self

    @property
    def read_bytes(self) -> int:
        """Number of bytes that have been loaded so far."""
        return sum(self._layers[layer].size * times for layer, times in self.load_counts.items())

    @property
    def bytes(self) -> int:
        """Number of bytes of all offloaded layers together."""
        return sum(layer.size for layer in self._layers.values())

    def __str__(self) -> str:
        """Describe the offloaded layers for messages."""
        layers = [*self.load_counts]
        names = ", ".join(map(str, layers[:3])) + (", …" if len(layers) > 3 else "")
        return (
            f"{len(layers)} layers ({names}) are offloaded to the host's memory or to disk; each "
            f"pass through these layers reads {self.bytes / 1e9:.1f} GB"
        )

    def load_layer(self, layer: int) -> None:
        """Load a layer if necessary, and start reading the next offloaded layer.

        Raises CellError if a file with weights has changed or cannot be read.
        """
        slot = self._find_slot(layer) or self._start_loading(layer, self._slots[0])
        assert slot.arrival is not None
        start_time = time.perf_counter()
        try:
            event = slot.arrival.result()
        except BaseException as error:
            slot.layer = None
            if isinstance(error, OSError):
                raise CellError(f"the weights of layer {layer} cannot be read: {error}") from None
            raise
        self.wait_seconds += time.perf_counter() - start_time
        self._stream_module.current_stream(self.device).wait_event(event)
        with torch.inference_mode(False):  # some devices refuse inference tensors as parameters
            for weight in self._layers[layer].weights:
                weight.parameter.data = weight.view(slot.buffer)
        # The slot in use comes last, so that the first one is overwritten next.
        self._slots.sort(key=lambda each_slot: each_slot is slot)
        later_layers = (number for number in self.load_counts if number > layer)
        next_layer = next(later_layers, None)
        if next_layer is not None and self._find_slot(next_layer) is None:
            self._start_loading(next_layer, self._slots[0])
        for callback in self.load_callbacks:
            callback()

    def sequential_passes(self) -> AbstractContextManager[None]:
        """Until the context exits, make forward passes load each layer when it is needed."""
        return replaced_attributes(self, wait=self.load_layer)

    def _find_slot(self, layer: int) -> _Slot | None:
        return next((slot for slot in self._slots if slot.layer == layer), None)

    def _start_loading(self, layer: int, slot: _Slot) -> _Slot:
        """Start copying a layer's weights into the device memory `slot`; return `slot`."""
        if slot.arrival is not None:
            wait([slot.arrival])
        if slot.layer is not None:
            for weight in self._layers[slot.layer].weights:
                weight.parameter.data = weight.placeholder
        # Computations with the old weights end before new ones overwrite them.
        self._stream.wait_stream(self._stream_module.current_stream(self.device))
        slot.layer = layer
        slot.arrival = self._reader.submit(self._read_layer, layer, slot.buffer)
        self.load_counts[layer] += 1
        return slot

    def _read_layer(self, layer: int, buffer: Tensor) -> Any:
        """Copy a layer's weights into a buffer; return a device event that marks the copy's end."""
        with self._stream_module.stream(self._stream):
            for source, view in self._layers[layer].list_copies(buffer):
                _copy_values(source, view)
            return self._stream.record_event()


def _assign_offsets(sources: Iterable[tuple[nn.Parameter, WeightSource]]) -> Iterator[_Weight]:
    """Yield each weight of a layer with its offset in the layer's buffer."""
    start = 0
    for parameter, source in sources:
        weight = _Weight(parameter, source, parameter.data, start)
        yield weight
        start = -(-weight.stop // ALIGNMENT) * ALIGNMENT


def _copy_values(source: WeightSource, view: Tensor) -> None:
    """Copy values into a part of a buffer, asynchronously if possible."""
    if isinstance(source, Tensor):
        view.copy_(source, non_blocking=True)
    elif view.device.type == "cpu" and source.dtype == view.dtype:
        source.read(view.view(-1).view(torch.uint8))
    else:
        view.copy_(source.read_tensor(view.shape))


def take_over_loading(
    model: nn.Module, layers: nn.ModuleList, device: torch.device, folder: TemporaryDirectory[str]
) -> OffloadedWeights | None:
    """Replace accelerate's hooks, which load offloaded weights, with `OffloadedWeights`.

    Args:
        model: A model as `from_pretrained` returns it, with some layers in the host's memory or on
            disk.
        layers: The model's decoder layers.
        device: The device that computes the forward pass.
        folder: Temporary folder with weights that transformers has converted.

    Returns:
        The offloaded weights; None if no weights are offloaded.

    Raises:
        ModelError: A weight that belongs to no decoder layer is offloaded.
    """
    index = _disk_index(model)
    remove_hook_from_submodules(model)
    sources: defaultdict[int, list[tuple[nn.Parameter, WeightSource]]] = defaultdict(list)
    paths = {id(module): path for path, module in model.named_modules()}
    for number, layer in enumerate(layers):
        for module in layer.modules():
            for name, value in list(module._parameters.items()):
                if value is None or value.device == device:
                    continue
                # Computing with an absent weight gives NaN.
                placeholder = torch.zeros(1, dtype=value.dtype, device=device)
                if value.is_floating_point():
                    placeholder.fill_(torch.nan)
                parameter = nn.Parameter(placeholder.expand(value.shape), requires_grad=False)
                module._parameters[name] = parameter
                source: WeightSource = value.data
                if value.is_meta:
                    path = f"{paths[id(module)]}.{name}"
                    if (entry := index.get(path)) is None:
                        raise ModelError(
                            f"transformers cannot tell in which file the weight {path} is"
                        )
                    source = find_slice(Path(entry["safetensors_file"]), entry["weight_name"])
                sources[number].append((parameter, source))
    if stray := next((path for path, p in model.named_parameters() if p.is_meta), None):
        raise ModelError(
            f"{stray} does not fit into memory, and it cannot be offloaded, because it does not "
            "belong to a single layer; use a machine with more memory, or a smaller dtype"
        )
    if not sources:
        return None
    weights = OffloadedWeights(device, sources, folder)
    for number in weights.load_counts:
        layers[number].register_forward_pre_hook(partial(_wait_for_layer, weights, number))
    return weights


def is_absent(weight: Tensor) -> bool:
    """Return whether a weight is offloaded and currently not loaded."""
    return bool(weight.untyped_storage().nbytes() < weight.numel() * weight.itemsize)


ModuleAttribute = tuple[nn.Module, str]
"""A module, and the name of a parameter or submodule of this module."""


def replace_attributes(
    layer: nn.Module,
    attributes: Iterable[ModuleAttribute],
    make_values: Callable[[], Mapping[ModuleAttribute, Tensor | nn.Module]],
    during_calls: bool = False,
) -> None:
    """Replace parameters or submodules of a layer.

    If a parameter is offloaded and not loaded, all attributes are replaced only during calls of the
    layer. Otherwise, the replacement is permanent unless `during_calls` is true.

    Args:
        layer: The layer.
        attributes: The parameters or submodules to replace.
        make_values: Function that returns the new value of each attribute.
        during_calls: Whether to replace the attributes only during calls of the layer.
    """
    old_values = {attribute: getattr(*attribute) for attribute in attributes}

    def set_new_values(*_: object) -> None:
        for (module, name), value in make_values().items():
            if isinstance(value, Tensor):
                value = nn.Parameter(value, requires_grad=False)
            setattr(module, name, value)

    def set_old_values(*_: object) -> None:
        for (module, name), value in old_values.items():
            setattr(module, name, value)

    # Offloaded weights get their values when the layer is called, so new ones are made then.
    tensors = (value for value in old_values.values() if isinstance(value, Tensor))
    if during_calls or any(map(is_absent, tensors)):
        layer.register_forward_pre_hook(set_new_values)
        layer.register_forward_hook(set_old_values, always_call=True)
    else:
        set_new_values()


def _disk_index(model: nn.Module) -> Mapping[str, Any]:
    """Return accelerate's index of the model's weights on disk.

    For each weight, the index contains the file and the name of the tensor in the file. The index
    is empty if no weights are on disk.
    """
    for module in model.modules():
        weights = getattr(getattr(module, "_hf_hook", None), "weights_map", None)
        if isinstance(weights, PrefixedDataset):
            index: Mapping[str, Any] = weights.dataset.index
            return index
    return {}


def _wait_for_layer(weights: OffloadedWeights, layer: int, module: nn.Module, args: Args) -> None:
    """Wait until a layer's weights are loaded; a forward pre-hook of the layer."""
    if not getattr(module.forward, "is_weightless", False):  # such a forward needs no weights
        weights.wait(layer)


FITTING_SHARE = 0.9
"""Maximum share of the free memory that weights may take without offloading."""
RESIDENT_SHARE = 0.6
"""Share of the free memory for weights if some are offloaded; the rest is for intermediate results
of the layers."""

RATE_SAMPLE_BYTES = 2**29
"""Number of bytes that are read to measure the read rate."""


@dataclass(frozen=True)
class Placement:
    """The offloaded layers of a model, and their sizes.

    Attributes:
        offloaded_layers: Numbers of the offloaded layers.
        parts: True for offloaded layers and False for other parts, by module path.
        total_bytes: Bytes of all weights.
        offloaded_bytes: Bytes of the offloaded layers.
    """

    offloaded_layers: tuple[int, ...]
    parts: dict[str, bool]
    total_bytes: int
    offloaded_bytes: int


def place_layers(
    model: nn.Module, free_bytes: int, max_bytes: int | None, all_layers: bool = False
) -> Placement | None:
    """Choose which layers of a model to offload.

    The function spreads the offloaded layers evenly over the model.

    Args:
        model: The model, on the meta device.
        free_bytes: Free bytes on the device that computes the forward pass.
        max_bytes: Maximum bytes of weights on the computing device; None = as many as fit.
        all_layers: Whether to offload all layers.

    Returns:
        The offloaded layers and their sizes; None if all weights fit on the device.

    Raises:
        ModelError: The embeddings, the output head and two layers do not fit on the device.
    """
    layers = find_layers(model)
    sizes = [weight_bytes(layer) for layer in layers]
    total = weight_bytes(model)
    if not all_layers and total <= (FITTING_SHARE * free_bytes if max_bytes is None else max_bytes):
        return None
    budget = int(RESIDENT_SHARE * free_bytes) if max_bytes is None else max_bytes
    minimum = min_weight_bytes(model)
    if budget < minimum:
        raise ModelError(
            f"the embeddings, output head and {LAYER_SLOTS} layers of the model need "
            f"{minimum / 2**30:.1f} GiB; the memory limit for weights is "
            f"{budget / 2**30:.1f} GiB. Raise this limit (--weights), or use a smaller dtype"
        )
    n_staying = 0 if all_layers else min((budget - minimum) // max(sizes), len(sizes) - LAYER_SLOTS)
    n_moving = len(sizes) - n_staying
    # The k-th of the moving layers, spread over all.
    indices = tuple(k * len(sizes) // n_moving for k in range(n_moving))
    parts = dict(_placed_parts(model, layers, "", {*indices}))
    return Placement(indices, parts, total, sum(sizes[layer] for layer in indices))


def measure_read_rate(files: Sequence[Path]) -> float | None:
    """Measure a disk's read rate in bytes per second by reading a part of the largest file.

    Returns None if there are no files. If the operating system has cached the file, the measured
    rate is too high.
    """
    if not files:
        return None
    start_time, n_read = time.perf_counter(), 0
    with max(files, key=lambda path: path.stat().st_size).open("rb", buffering=0) as file:
        while n_read < RATE_SAMPLE_BYTES and (chunk := file.read(READ_CHUNK_BYTES)):
            n_read += len(chunk)
    return n_read / (time.perf_counter() - start_time)


def min_free_memory(model: nn.Module, device: torch.device) -> int:
    """Return the smallest number of free bytes among the devices of a model."""
    return min(map(free_memory, {device, *(p.device for p in model.parameters() if not p.is_meta)}))


def devices_needed(n_bytes: int, free_bytes: int, n_devices: int) -> int:
    """Return the number of devices over which to spread a model.

    Args:
        n_bytes: Bytes of the model's weights.
        free_bytes: Free bytes on the device with the least free memory.
        n_devices: Number of available devices.

    Returns:
        The smallest sufficient number of devices; 1 if all devices together are too small, because
        the model is then not spread but offloaded.
    """
    if n_bytes <= FITTING_SHARE * free_bytes:
        return 1
    n_needed = math.ceil(n_bytes / (RESIDENT_SHARE * free_bytes))
    return n_needed if n_needed <= n_devices else 1


def min_weight_bytes(model: nn.Module, n_staying: int = 0) -> int:
    """Compute the device memory that a model's weights need if layers are offloaded.

    The device holds `n_staying` layers permanently, and two offloaded layers at a time. The size of
    the largest layer is assumed for each layer.
    """
    sizes = [weight_bytes(layer) for layer in find_layers(model)]
    return weight_bytes(model) - sum(sizes) + (LAYER_SLOTS + n_staying) * max(sizes)


def weight_bytes(module: nn.Module) -> int:
    """Count the bytes of a module's weights; tied weights count once."""
    return sum(parameter.numel() * parameter.itemsize for parameter in module.parameters())


def _placed_parts(
    module: nn.Module, layers: nn.ModuleList, path: str, offloaded: set[int]
) -> Iterator[tuple[str, bool]]:
    """Yield each part of a model as a pair: its path, and whether the part is offloaded.

    Parts are the layers, and the modules and tensors outside the layers. `path` is the path of
    `module` in the model. `offloaded` contains the indices of offloaded layers.
    """
    for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
        if tensor is not None:
            yield f"{path}{name}", False
    for name, child in module.named_children():
        if child is layers:
            for number in range(len(layers)):
                yield f"{path}{name}.{number}", number in offloaded
        elif any(module_inside is layers for module_inside in child.modules()):
            yield from _placed_parts(child, layers, f"{path}{name}.", offloaded)
        else:
            yield f"{path}{name}", False

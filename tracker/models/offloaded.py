"""Offloaded weights: each layer is loaded to the device when it is needed.

transformers and accelerate load such a model and record where each weight is. The order of loading
is tracker's own (`engine.lockstep`), since otherwise each pass would read all weights again. This
module also decides which layers are offloaded.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from accelerate.hooks import remove_hook_from_submodules
from accelerate.utils import PrefixedDataset
from torch import Tensor, nn

from tracker.core.errors import CellError, ModelError
from tracker.models.devices import can_pin, free_memory, pinned, streams
from tracker.models.layers import find_layers

ALIGNED = 64
"""Alignment of weights in a buffer in bytes, as in allocators."""
AT_ONCE = 16 * 2**20
"""Bytes per read request."""
ROOM = 2
"""Number of layers that fit on the device: one is used while the next one is read."""


@dataclass(frozen=True)
class Slice:
    """A tensor's bytes in a safetensors file, with the state of the file when it was opened.

    They are read, and not mapped as safetensors does. If a mapped file is truncated, a signal ends
    the process, and mapped pages count as this process's memory.
    """

    path: Path
    offset: int
    size: int
    dtype: torch.dtype
    stamp: tuple[int, int]

    def tensor(self, shape: torch.Size) -> Tensor:
        """Read the bytes as a new tensor."""
        raw = torch.empty(self.size, dtype=torch.uint8)
        self.read(raw)
        return raw.view(self.dtype).view(shape)

    def read(self, into: Tensor) -> None:
        """Read the bytes into a uint8 CPU tensor; raise CellError if the file has changed."""
        view, start = memoryview(into.numpy().data), 0
        with self.path.open("rb", buffering=0) as file:
            if _stamp(file.fileno()) != self.stamp:
                raise CellError(
                    f"{self.path} has changed while the model was measured. What was measured "
                    "before is kept; run the same command again to measure the model as it is now"
                )
            while start < self.size:
                got = os.preadv(file.fileno(), [view[start : start + AT_ONCE]], self.offset + start)
                if not got:
                    raise CellError(f"{self.path} ends before its weights do; copy it again")
                start += got


def _stamp(descriptor: int) -> tuple[int, int]:
    about = os.fstat(descriptor)
    return about.st_size, about.st_mtime_ns


@cache
def _header(path: Path, stamp: tuple[int, int]) -> tuple[int, dict[str, Any]]:
    """Return the offset of a safetensors file's tensors, and its header with their positions."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        return 8 + length, json.loads(file.read(length))


def slice_of(path: Path, name: str) -> Slice:
    """Find a tensor in a safetensors file."""
    from transformers.modeling_utils import str_to_torch_dtype

    with path.open("rb") as file:
        stamp = _stamp(file.fileno())
    base, header = _header(path, stamp)
    start, stop = header[name]["data_offsets"]
    return Slice(path, base + start, stop - start, str_to_torch_dtype[header[name]["dtype"]], stamp)


@dataclass(frozen=True)
class _Weight:
    """One parameter of a layer, and the source of its values: a file, or the host's memory.

    `absent` has its shape and dtype but no values; `start` is its offset in a layer's buffer.
    """

    parameter: nn.Parameter
    source: Slice | Tensor
    absent: Tensor
    start: int

    @property
    def stop(self) -> int:
        """The end of the weight in the buffer."""
        return self.start + self.absent.numel() * self.absent.itemsize

    def view(self, buffer: Tensor) -> Tensor:
        """Return the weight's part of a buffer in the weight's shape and dtype."""
        return buffer[self.start : self.stop].view(self.absent.dtype).view(self.absent.shape)


@dataclass(frozen=True)
class _Layer:
    """The weights of one layer.

    Attributes:
        weights: Its parameters, in the order of a buffer.
        image: The buffer's bytes in pinned memory of the host, part by part; empty if each weight
            is read from its own source.
    """

    weights: Sequence[_Weight]
    image: Sequence[Tensor] = ()

    @property
    def size(self) -> int:
        """The size of a buffer for the layer in bytes."""
        return max(self.weights[-1].stop, sum(map(len, self.image)))

    def parts(self, buffer: Tensor) -> Iterable[tuple[Slice | Tensor, Tensor]]:
        """Pair each source of bytes with the part of a buffer that it fills."""
        if not self.image:
            return [(weight.source, weight.view(buffer)) for weight in self.weights]
        views = torch.split(buffer[: self.size], [*map(len, self.image)])
        return zip(self.image, views, strict=True)

    def pinned(self) -> _Layer:
        """Return the layer with weights in the host's memory moved to pinned memory."""
        if not all(isinstance(weight.source, Tensor) for weight in self.weights):
            return self
        image = pinned(self.size)
        buffer = torch.empty(sum(map(len, image)), dtype=torch.uint8)
        for source, view in self.parts(buffer):
            _copy(source, view)
        for part, filled in zip(image, torch.split(buffer, [*map(len, image)]), strict=True):
            part.copy_(filled)
        return _Layer([replace(weight, source=weight.absent) for weight in self.weights], image)


@dataclass
class _Slot:
    """Device memory for one layer, and the layer that it holds or that is being read into it."""

    buffer: Tensor
    layer: int | None = None
    arrival: Future[Any] | None = None


class OffloadedWeights:
    """The layers of a model whose weights are not on the device that computes with them.

    One layer is used while the next one is read: there is room for two. A copy of the model shares
    its parameters, so that a loaded layer is available to all copies. Parameters of an absent layer
    have their shapes, and their values are NaN.

    Attributes:
        device: The device that computes with the weights.
        wait: Called with a layer whose weights are needed now; lockstep execution of many passes
            replaces it.
        times: Layer → how often it was loaded.
        waited: Seconds spent waiting for weights.
        heard: Callbacks without arguments, called when a layer has been loaded.

    Args:
        device: The device that computes with the weights.
        rests: Layer → its parameters, with the source of each; it is emptied.
        folder: Temporary folder with some of the weights; it is deleted with this object.
    """

    def __init__(
        self,
        device: torch.device,
        rests: dict[int, list[tuple[nn.Parameter, Slice | Tensor]]],
        folder: TemporaryDirectory[str],
    ) -> None:
        self.device = device
        self.wait: Callable[[int], None] = self.bring
        self.times = dict.fromkeys(sorted(rests), 0)
        self.waited = 0.0
        self.heard: list[Callable[[], None]] = []
        self._layers: dict[int, _Layer] = {}
        for number in self.times:  # popped, so that only one layer at a time is in memory twice
            layer = _Layer([*_placed(rests.pop(number))])
            self._layers[number] = layer.pinned() if can_pin(device) else layer
        largest = max(layer.size for layer in self._layers.values())
        self._slots = [
            _Slot(torch.empty(largest, dtype=torch.uint8, device=device)) for _ in range(ROOM)
        ]
        self._folder = folder  # kept alive as long as this object
        self._reader = ThreadPoolExecutor(1, "weights")
        self._streams = streams(device)
        self._stream = self._streams.Stream(device)

    def __deepcopy__(self, memo: dict[int, Any]) -> OffloadedWeights:
        """Return this object, since copies of a model share the weights."""
        return self

    @property
    def read_bytes(self) -> int:
        """The number of bytes loaded so far."""
        return sum(self._layers[layer].size * times for layer, times in self.times.items())

    @property
    def bytes(self) -> int:
        """The number of bytes loaded when each layer is loaded once."""
        return sum(layer.size for layer in self._layers.values())

    def __str__(self) -> str:
        """Describe the offloaded layers for messages."""
        some = [*self.times]
        named = ", ".join(map(str, some[:3])) + (", …" if len(some) > 3 else "")
        return (
            f"{len(some)} layers ({named}) rest in the host's memory or on disk; each time that "
            f"they come past, {self.bytes / 1e9:.1f} GB are read"
        )

    def bring(self, layer: int) -> None:
        """Load a layer, if it is absent, and begin to read the next one.

        Raises CellError if its file has changed or cannot be read.
        """
        here = self._find(layer) or self._start(layer, self._slots[0])
        assert here.arrival is not None
        began = time.perf_counter()
        try:
            arrived = here.arrival.result()
        except BaseException as error:
            here.layer = None
            if isinstance(error, OSError):
                raise CellError(f"the weights of layer {layer} cannot be read: {error}") from None
            raise
        self.waited += time.perf_counter() - began
        self._streams.current_stream(self.device).wait_event(arrived)
        with torch.inference_mode(False):  # some devices refuse inference tensors as parameters
            for weight in self._layers[layer].weights:
                weight.parameter.data = weight.view(here.buffer)
        # The slot in use comes last, so that the first one is overwritten next.
        self._slots.sort(key=lambda slot: slot is here)
        behind = next((other for other in self.times if other > layer), None)
        if behind is not None and self._find(behind) is None:
            self._start(behind, self._slots[0])
        for hear in self.heard:
            hear()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Run passes one after the other until exit, each loading the layers that it needs."""
        before, self.wait = self.wait, self.bring
        try:
            yield
        finally:
            self.wait = before

    def _find(self, layer: int) -> _Slot | None:
        return next((slot for slot in self._slots if slot.layer == layer), None)

    def _start(self, layer: int, slot: _Slot) -> _Slot:
        """Begin to read a layer into a slot, and evict the slot's own layer."""
        if slot.arrival is not None:
            wait([slot.arrival])
        if slot.layer is not None:
            for weight in self._layers[slot.layer].weights:
                weight.parameter.data = weight.absent
        # Computations with the old weights end before new ones overwrite them.
        self._stream.wait_stream(self._streams.current_stream(self.device))
        slot.layer = layer
        slot.arrival = self._reader.submit(self._read, layer, slot.buffer)
        self.times[layer] += 1
        return slot

    def _read(self, layer: int, buffer: Tensor) -> Any:
        """Read a layer, and return the event that signals its arrival."""
        with self._streams.stream(self._stream):
            for source, view in self._layers[layer].parts(buffer):
                _copy(source, view)
            return self._stream.record_event()


def _placed(rests: Sequence[tuple[nn.Parameter, Slice | Tensor]]) -> Iterator[_Weight]:
    """Assign each of a layer's weights its offset in a buffer."""
    start = 0
    for parameter, source in rests:
        weight = _Weight(parameter, source, parameter.data, start)
        yield weight
        start = -(-weight.stop // ALIGNED) * ALIGNED


def _copy(source: Slice | Tensor, view: Tensor) -> None:
    """Copy the values of a source into a part of a buffer, without waiting if possible."""
    if isinstance(source, Tensor):
        view.copy_(source, non_blocking=True)
    elif view.device.type == "cpu" and source.dtype == view.dtype:
        source.read(view.view(-1).view(torch.uint8))
    else:
        view.copy_(source.tensor(view.shape))


def take_over(
    model: nn.Module, layers: nn.ModuleList, device: torch.device, folder: TemporaryDirectory[str]
) -> OffloadedWeights | None:
    """Replace accelerate's loading of weights in each call by `OffloadedWeights`.

    Args:
        model: A model as `from_pretrained` returns it, on one device, with whole layers on disk or,
            if the device is an accelerator, in the host's memory.
        layers: Its decoder layers.
        device: The device that computes.
        folder: The folder to which transformers has written weights that no file holds as used.

    Returns:
        The weights, which each layer requests when it is called; None if all are in place.

    Raises:
        ModelError: Something other than a layer's own weights is offloaded.
    """
    index = _index(model)
    remove_hook_from_submodules(model)
    rests: dict[int, list[tuple[nn.Parameter, Slice | Tensor]]] = {}
    names = {id(module): name for name, module in model.named_modules()}
    for number, layer in enumerate(layers):
        for module in layer.modules():
            for own, held in list(module._parameters.items()):
                if held is None or held.device == device:
                    continue
                # Computing with an absent weight gives NaN.
                nothing = torch.zeros(1, dtype=held.dtype, device=device)
                if held.is_floating_point():
                    nothing.fill_(torch.nan)
                parameter = nn.Parameter(nothing.expand(held.shape), requires_grad=False)
                module._parameters[own] = parameter
                source: Slice | Tensor = held.data
                if held.is_meta:
                    name = f"{names[id(module)]}.{own}"
                    if (about := index.get(name)) is None:
                        raise ModelError(f"transformers does not say where {name} is on disk")
                    source = slice_of(Path(about["safetensors_file"]), about["weight_name"])
                rests.setdefault(number, []).append((parameter, source))
    if elsewhere := [name for name, p in model.named_parameters() if p.is_meta]:
        raise ModelError(
            f"{elsewhere[0]} is no layer's own weight, and there is no memory for it; use a "
            "machine with more, or a smaller dtype"
        )
    if not rests:
        return None
    weights = OffloadedWeights(device, rests, folder)
    for number in weights.times:
        layers[number].register_forward_pre_hook(partial(_wait, weights, number))
    return weights


def is_absent(weight: Tensor) -> bool:
    """Return whether a weight is offloaded at the moment."""
    return bool(weight.untyped_storage().nbytes() < weight.numel() * weight.itemsize)


Attribute = tuple[nn.Module, str]
"""A module and the name of a parameter or a module in it."""


def replace_attributes(
    layer: nn.Module,
    attributes: Iterable[Attribute],
    make: Callable[[], Mapping[Attribute, Tensor | nn.Module]],
    briefly: bool = False,
) -> None:
    """Give a layer other parameters or modules; with `briefly` only while it is called.

    The same holds if its own are offloaded, and loaded when it is called.

    Args:
        layer: The layer.
        attributes: The parameters or modules to replace.
        make: Function that makes the replacements.
        briefly: Whether the layer has them only while it is called.
    """
    before = {attribute: getattr(*attribute) for attribute in attributes}

    def give(*_: object) -> None:
        for (module, name), value in make().items():
            other = nn.Parameter(value, requires_grad=False) if isinstance(value, Tensor) else value
            setattr(module, name, other)

    def take_back(*_: object) -> None:
        for (module, name), value in before.items():
            setattr(module, name, value)

    tensors = (value for value in before.values() if isinstance(value, Tensor))
    if briefly or any(map(is_absent, tensors)):
        layer.register_forward_pre_hook(give)
        layer.register_forward_hook(take_back, always_call=True)
    else:
        give()


def _index(model: nn.Module) -> Mapping[str, Any]:
    """Return transformers' index of the weights on disk: parameter → file and name in it."""
    for module in model.modules():
        weights = getattr(getattr(module, "_hf_hook", None), "weights_map", None)
        if isinstance(weights, PrefixedDataset):
            index: Mapping[str, Any] = weights.dataset.index
            return index
    return {}


def _wait(weights: OffloadedWeights, layer: int, module: nn.Module, args: tuple[Any, ...]) -> None:
    """Wait for a layer's weights: the hook of a layer and of each copy of it."""
    if not getattr(module.forward, "is_weightless", False):  # such a forward needs no weights
        weights.wait(layer)


FITS = 0.9
"""Share of the free memory up to which weights are loaded without offloading."""
RESIDENT = 0.6
"""Share of the free memory that weights take if they do not fit: the rest is for intermediate
results of the layers."""

TRIED = 2**29
"""Bytes that are read to measure the rate of reading."""


@dataclass(frozen=True)
class Placement:
    """The locations of the parts of a model.

    Attributes:
        elsewhere: The offloaded layers.
        parts: Each part of the model → whether it is one of those layers.
        total: Bytes of all weights.
        moving: Bytes of the offloaded layers.
    """

    elsewhere: tuple[int, ...]
    parts: dict[str, bool]
    total: int
    moving: int


def placed(model: nn.Module, free: int, limit: int | None, every: bool = False) -> Placement | None:
    """Decide which layers are offloaded.

    They are spread as evenly as possible, so that one is read while others are used.

    Args:
        model: The model, on the meta device.
        free: Free bytes on the device that computes.
        limit: Maximum bytes of weights there; None = as many as fit.
        every: Whether to offload all layers.

    Returns:
        The placement; None if all weights fit.

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
    # The k-th of `moving` layers, spread over all.
    elsewhere = tuple(k * len(sizes) // moving for k in range(moving))
    parts = dict(_parts(model, layers, "", {*elsewhere}))
    return Placement(elsewhere, parts, total, sum(sizes[layer] for layer in elsewhere))


def read_rate(files: Sequence[Path]) -> float | None:
    """Measure the bytes per second at which files are read, on the beginning of the largest one.

    None if there are no files. Parts in the system's cache are read faster than the rest.
    """
    if not files:
        return None
    began, size = time.perf_counter(), 0
    with max(files, key=lambda path: path.stat().st_size).open("rb", buffering=0) as file:
        while size < TRIED and (part := file.read(AT_ONCE)):
            size += len(part)
    return size / (time.perf_counter() - began)


def least_free(model: nn.Module, device: torch.device) -> int:
    """Return the free bytes on the fullest device of a model: its inputs' or weights'."""
    return min(map(free_memory, {device, *(p.device for p in model.parameters() if not p.is_meta)}))


def devices_for(weights: int, free: int, devices: int) -> int:
    """Return the number of devices over which to spread a model.

    Args:
        weights: Bytes of its weights.
        free: Free bytes on the fullest device.
        devices: Number of devices.

    Returns:
        As many as leave room for intermediate results. One if the weights fit on it, or if they do
        not even fit on all: then layers are offloaded.
    """
    if weights <= FITS * free:
        return 1
    needed = math.ceil(weights / (RESIDENT * free))
    return needed if needed <= devices else 1


def least_bytes(model: nn.Module, staying: int = 0) -> int:
    """Count the bytes of a model with `staying` layers in place, and room for offloaded ones."""
    sizes = [weight_bytes(layer) for layer in find_layers(model)]
    return weight_bytes(model) - sum(sizes) + (ROOM + staying) * max(sizes)


def weight_bytes(module: nn.Module) -> int:
    """Count the bytes of a module's weights, tied ones once."""
    return sum(parameter.numel() * parameter.itemsize for parameter in module.parameters())


def _parts(module: nn.Module, layers: nn.ModuleList, path: str, elsewhere: set[int]) -> Any:
    """Yield the layers and the largest parts without layers, each with whether it is offloaded."""
    for name, held in [*module._parameters.items(), *module._buffers.items()]:
        if held is not None:
            yield f"{path}{name}", False
    for name, child in module.named_children():
        if child is layers:
            for number in range(len(layers)):
                yield f"{path}{name}.{number}", number in elsewhere
        elif any(inner is layers for inner in child.modules()):
            yield from _parts(child, layers, f"{path}{name}.", elsewhere)
        else:
            yield f"{path}{name}", False

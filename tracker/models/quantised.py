"""Linear maps whose weights are those of a format: rounded, and made numbers again.

Integers are symmetric and rounded to nearest, as torchao's weight-only configurations do it, by
torch's own `fake_quantize_per_channel_affine`; in float32 the weights are those of torchao 0.18's
`IntxWeightOnlyConfig` to the bit. What a GGUF file holds is rounded by the package gguf or by
llama.cpp's own library, and read back by gguf. Activations are left as they are.
"""

from __future__ import annotations

import copy
import ctypes
import importlib.util
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tracker.core.changes import Ablation, Change
from tracker.core.distribution import install_extra
from tracker.core.errors import CellError, ExperimentError
from tracker.core.kinds import MAPS
from tracker.core.weight_formats import FORMATS, WeightFormat
from tracker.models.linear_maps import LinearMap, linear_maps, map_at
from tracker.models.offloaded import Place, lend
from tracker.models.sublayers import Sublayers

_INTEGERS = {"int8": (-128, 127), "int4": (-8, 7)}
_LARGEST_FP8 = torch.finfo(torch.float8_e4m3fn).max
_PACKAGES = ("llama_cpp_py_sync", "bitsandbytes")
_TINY = torch.finfo(torch.float32).eps


def in_format(weight: Tensor, name: str) -> Tensor:
    """Make of a weight what a format gives back.

    Args:
        weight: [outputs, inputs], or of experts [experts, outputs, inputs].
        name: One of `FORMATS`.

    Returns:
        The weight, in its own dtype.

    Raises:
        CellError: Its rows have no whole blocks of the format.
    """
    inputs = weight.shape[-1]
    form = FORMATS[name].for_rows(inputs)
    if form is None:
        raise CellError(
            f"{name} keeps {FORMATS[name].block} inputs together, and a weight has rows of "
            f"{inputs}; take another format, or leave such maps out"
        )
    if weight.ndim == 3:  # one after the other: all at once would take several times the room
        found = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
        for own, each in zip(found, weight, strict=True):
            own.copy_(in_format(each, name))
        return found
    return _maker(form)(weight.detach().float()).reshape(weight.shape).to(weight.dtype)


def _maker(form: WeightFormat) -> Callable[[Tensor], Tensor]:
    if form.round is not None:
        return form.round
    word, _, _ = form.name.partition("_")
    if word in _INTEGERS:
        return partial(_integers, group=form.block, levels=_INTEGERS[word])
    if form.name == "fp8":
        return _fp8
    return _nf4 if form.name == "nf4" else partial(_gguf, form=form)


def _integers(rows: Tensor, group: int, levels: tuple[int, int]) -> Tensor:
    parts = rows.reshape(-1, group or rows.shape[1])
    low, high = levels
    # torchao's: the largest weight of a group is half of the levels away from 0.
    scale = (parts.abs().amax(1) / ((high - low) / 2)).clamp_min(_TINY)
    zero = torch.zeros_like(scale, dtype=torch.int32)
    return torch.fake_quantize_per_channel_affine(parts, scale, zero, 0, low, high)


def _fp8(rows: Tensor) -> Tensor:
    scale = (rows.abs().amax(1, keepdim=True) / _LARGEST_FP8).clamp_min(_TINY)
    return (rows / scale).to(torch.float8_e4m3fn).float() * scale


def _nf4(rows: Tensor) -> Tensor:
    from bitsandbytes import functional

    kept, state = functional.quantize_4bit(rows.contiguous(), blocksize=64, quant_type="nf4")
    found: Tensor = functional.dequantize_4bit(kept, state)
    return found


def _gguf(rows: Tensor, form: WeightFormat) -> Tensor:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants

    kind = GGMLQuantizationType[form.label]
    given = np.ascontiguousarray(rows.cpu().numpy())
    if not form.extra:
        kept = quants.quantize(given, kind)
    else:
        block, size = GGML_QUANT_SIZES[kind]
        kept = np.empty((len(given), given.shape[1] // block * size), np.uint8)
        place = given.ctypes.data, kept.ctypes.data
        made = _llama_cpp()(int(kind), *place, 0, *given.shape, None)
        assert made == kept.size
    return torch.from_numpy(quants.dequantize(kept, kind)).to(rows.device)


@cache
def _llama_cpp() -> Any:
    """Find what rounds rows in llama.cpp's library (ggml.h, `ggml_quantize_chunk`)."""
    import llama_cpp_py_sync

    library = next(Path(llama_cpp_py_sync.__file__).parent.glob("*ggml-base*"))
    quantise = ctypes.CDLL(str(library)).ggml_quantize_chunk
    quantise.restype = ctypes.c_size_t
    quantise.argtypes = [ctypes.c_int, *[ctypes.c_void_p] * 2, *[ctypes.c_int64] * 3]
    quantise.argtypes += [ctypes.c_void_p]
    return quantise


class RoundedWeights:
    """Weights in a format, which are kept as far as they fit: many rows want the same ones.

    Args:
        most: So many bytes are kept, those that were wanted last.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._kept: OrderedDict[tuple[int, str, str], Tensor] = OrderedDict()
        self._bytes = 0

    def of(self, layer: int, path: str, linear: LinearMap, name: str) -> Tensor:
        """Give the weight of a linear map of a layer in a format, its outputs first."""
        key = (layer, path, name)
        found = self._kept.get(key)
        if found is None:
            found = self._kept[key] = in_format(linear.weight, name)
            self._bytes += found.nbytes
        self._kept.move_to_end(key)
        while self._bytes > self._most and len(self._kept) > 1:  # that one is used now
            self._bytes -= self._kept.popitem(last=False)[1].nbytes
        return found


def weights_in(
    maps: Mapping[str, LinearMap],
    formats: Mapping[str, str],
    of: Callable[[str, LinearMap, str], Tensor],
) -> dict[Place, Tensor]:
    """Make the parameters of maps that are in formats, laid out as modules hold them.

    Args:
        maps: Linear maps of a layer by their paths.
        formats: Path of each that is rounded → format; one expert's goes before that of all.
        of: Makes the weight, outputs first, of a path, its map and a format.

    Returns:
        Each parameter with what stands in its place.
    """
    found: dict[Place, Tensor] = {}
    for path in sorted(formats, key=lambda path: maps[path].expert is not None):
        own = maps[path]
        place = (own.module, own.name)
        beside = found.get(place, own.parameter)
        found[place] = own.laid_out(of(path, own, formats[path]), beside)
    return found


def holding(module: nn.Module, weights: Mapping[str, Tensor]) -> nn.Module:
    """Copy a module with other weights among its own parameters; all else it shares."""
    twin = copy.copy(module)
    own = vars(twin)
    own.pop("forward", None)  # what somebody put in the place of the class's own
    own["_parameters"] = dict(module._parameters)
    for name, weight in weights.items():
        own["_parameters"][name] = nn.Parameter(weight, requires_grad=False)
    return twin


def quantise(
    layer: nn.Module,
    formats: Mapping[str, str],
    name: str,
    number: int = 0,
    kept: RoundedWeights | None = None,
) -> None:
    """Give linear maps of a layer weights in formats.

    Args:
        layer: The layer.
        formats: Path of a map → format.
        name: What the layer is called in messages.
        number: Which layer it is.
        kept: Where its weights are kept while it is not called, as far as they fit: then it has
            them only while it is called. None = it has them for good.
    """
    every = linear_maps(layer, name)
    maps = {path: map_at(every, path, name) for path in formats}
    of = partial(RoundedWeights(0).of if kept is None else kept.of, number)
    places = {(each.module, each.name) for each in maps.values()}
    lend(layer, places, partial(weights_in, maps, formats, of), briefly=kept is not None)


def refuse_formats(
    ablations: Sequence[Ablation],
    layers: nn.ModuleList,
    sublayers: Callable[[], Sequence[Sublayers]],
) -> None:
    """Refuse formats that these layers cannot be in, before anything is measured: ExperimentError.

    `sublayers` finds the layers' attentions and MLPs, and is asked where a whole one is meant.
    """
    asked = {
        change
        for ablation in ablations
        for change in ablation.rounded
        if not change.is_end and change.layer < len(layers)
    }
    both = sublayers() if any(each.path in MAPS for each in asked) else None
    for each in sorted(asked):
        form, layer, name = FORMATS[each.intervention], layers[each.layer], f"layer {each.layer}"
        refuse_uninstalled(form)
        own = both[each.layer] if both else None
        try:
            maps = linear_maps(layer, name)
            paths = formats_of(layer, [each], own, name)
        except CellError as error:
            raise ExperimentError(str(error)) from None
        for path in paths:
            inputs = map_at(maps, path, name).shape[1]
            if form.for_rows(inputs) is None:
                raise ExperimentError(
                    f"{form.name} keeps {form.block} inputs together, and {path} of {name} has "
                    f"rows of {inputs}; take another format, or name other linear maps by 'map'"
                )


def refuse_uninstalled(form: WeightFormat) -> None:
    """Refuse a format whose makers' code is not installed: ExperimentError."""
    if form.extra and importlib.util.find_spec(_PACKAGES[form.name == "nf4"]) is None:
        raise ExperimentError(
            f"{form.name} is rounded by its makers' code, which is not installed. Type: "
            f"{install_extra('quantise')}"
        )


def formats_of(
    layer: nn.Module, rounded: Sequence[Change], sublayers: Sublayers | None, name: str
) -> dict[str, str]:
    """Say which linear maps of a layer have weights in a format: path → format.

    Args:
        layer: The layer.
        rounded: What is rounded of it.
        sublayers: Its attention and MLP; needed where either is meant as a whole.
        name: What the layer is called in messages.

    Returns:
        Those that are rounded; of a map that is named twice the last format.

    Raises:
        CellError: It has no such map, or holds other matrices, or weights that are quantised.
    """
    maps = linear_maps(layer, name)
    found: dict[str, str] = {}
    for each in rounded:
        if each.path in MAPS:
            assert sublayers is not None
            inside = {*getattr(sublayers, each.path).modules()}
            some = [path for path, own in maps.items() if own.module in inside]
        else:
            some = [each.path] if each.path else [*maps]
        for path in some or [each.path]:
            map_at(maps, path, name)
        found |= dict.fromkeys(some, each.intervention)
    return found

"""Accelerators of any make: the only module that calls torch's device functions.

torch has one module for each type of device (`torch.cuda`, `torch.xpu`, `torch.npu`, …) with the
same functions. Apple's MPS differs: it has no streams, and other names for its memory.

Indexing with a list creates a tensor on the host that is copied to the accelerator, which waits for
it: `take` and `put` index by slices alone.
"""

from __future__ import annotations

import ctypes
import os
import platform
import resource
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

ROUNDED = 2**20
"""Bytes to which pinned memory is rounded up."""
_VISIBLE = {
    "hpu": "HABANA_VISIBLE_MODULES",
    "npu": "ASCEND_RT_VISIBLE_DEVICES",
    "xpu": "ZE_AFFINITY_MASK",
}
_RESET = Path("/proc/self/clear_refs")
_host_shares = 1
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4
"""Parameters of glibc's `mallopt(3)`."""


def keep_freed_memory() -> None:
    """Keep freed memory in this process instead of returning it to the system after each use.

    By default glibc maps every large block anew, and the first touch of new memory costs several
    times as much as reuse. Does nothing without glibc.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    mallopt = ctypes.CDLL(None).mallopt
    mallopt(_MMAP_MAX, 0)
    mallopt(_TRIM_THRESHOLD, 2**31 - 1)
    mallopt(_TOP_PAD, 64 * 2**20)


def default_device() -> torch.device:
    """Return the first accelerator of this machine, or its CPU."""
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is None or not torch.accelerator.is_available():
        return torch.device("cpu")
    return torch.empty(0, device=accelerator).device  # with its index, as tensors have it


def accelerators() -> list[torch.device]:
    """List the accelerators visible to this process."""
    device_type = default_device().type
    return [torch.device(device_type, n) for n in range(torch.accelerator.device_count())]


def visible_variable() -> str:
    """Return the environment variable that limits the accelerators visible to a process."""
    built_for = torch.accelerator.current_accelerator()
    device_type = "hip" if torch.version.hip else built_for.type if built_for else "cuda"
    return _VISIBLE.get(device_type, f"{device_type.upper()}_VISIBLE_DEVICES")


def visible_accelerators() -> list[str]:
    """Return the accelerators visible to this process, as written in `visible_variable`."""
    names = os.environ.get(visible_variable())
    if torch.version.hip and not names:  # HIP obeys it too
        names = os.environ.get("CUDA_VISIBLE_DEVICES")
    indices = [str(device.index) for device in accelerators()]
    return names.split(",")[: len(indices)] if names else indices


def describe(device: torch.device) -> dict[str, str]:
    """Describe a device for the provenance of results."""
    if device.type == "cpu":
        return {"device": str(device)}
    get_name = getattr(_module(device), "get_device_name", None)
    return {"device": str(device), "accelerator": get_name(device) if get_name else device.type}


def hardware(device: torch.device) -> str:
    """Return the name of the hardware of a device, without its index."""
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{device.type} {describe(device).get('accelerator', capability)}"


def runtime_versions() -> dict[str, str]:
    """Return the versions that torch was built for, and of the driver if available."""
    built = {name: getattr(torch.version, name, None) for name in ("cuda", "hip", "xpu")}
    versions = {name: str(version) for name, version in built.items() if version}
    if torch.version.cuda and accelerators():
        number = torch._C._cuda_getDriverVersion()  # type: ignore[attr-defined]
        versions["driver"] = f"CUDA {number // 1000}.{number % 1000 // 10}"
    return versions


def share_memory(processes: int) -> None:
    """Divide the host's free memory by the number of processes that share it."""
    global _host_shares
    _host_shares = processes


def free_memory(device: torch.device) -> int:
    """Return how many bytes this process can still take on a device.

    Memory that torch has reserved and does not use counts as free.
    """
    module = _module(device)
    if device.type == "cpu":
        return int(psutil.virtual_memory().available) // _host_shares
    if device.type == "mps":
        return int(module.recommended_max_memory() - module.current_allocated_memory())
    unused = module.memory_reserved(device) - module.memory_allocated(device)
    return int(module.mem_get_info(device)[0] + unused)


def total_memory(device: torch.device) -> int:
    """Return the total bytes of a device's memory."""
    if device.type == "cpu":
        return int(psutil.virtual_memory().total)
    return int(_module(device).mem_get_info(device)[1])


def peak_memory(device: torch.device) -> int:
    """Return the peak bytes that this process has taken on a device."""
    if device.type == "cpu":
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return int(peak if platform.system() == "Darwin" else peak * 1024)
    module = _module(device)
    if device.type == "mps":  # the peak is not counted, and the driver gives little back
        return int(module.driver_allocated_memory())
    return int(module.max_memory_allocated(device))


def reset_peak_memory(device: torch.device) -> None:
    """Reset the peak memory of a device, if possible."""
    if device.type == "cpu":
        if _RESET.exists():
            _RESET.write_text("5", encoding="ascii")
    elif device.type != "mps":
        _module(device).reset_peak_memory_stats(device)


def empty_cache() -> None:
    """Release memory that torch has reserved on the accelerator and does not use."""
    device = default_device()
    if device.type != "cpu":
        _module(device).empty_cache()


def synchronize() -> None:
    """Wait until the accelerator has computed everything that was launched."""
    _module(default_device()).synchronize()


def streams(device: torch.device) -> Any:
    """Return the module with `Stream`, `stream` and `current_stream` for a device.

    For a device without streams it is that of the CPU, whose streams do nothing.
    """
    module = _module(device)
    return module if hasattr(module, "Stream") else torch.cpu


def pinned(size: int) -> list[Tensor]:
    """Return tensors of uint8 with `size` bytes in all, from which copies do not block.

    torch rounds pinned memory up to powers of two, so these are several such powers.
    """
    blocks = -(-size // ROUNDED)
    powers = [1 << bit for bit in reversed(range(blocks.bit_length())) if blocks >> bit & 1]
    return [torch.empty(n * ROUNDED, dtype=torch.uint8, pin_memory=True) for n in powers]


def can_pin(device: torch.device) -> bool:
    """Return whether copies from pinned memory to a device need not block."""
    return device.type not in ("cpu", "mps")


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor from the host to a device, without waiting if possible."""
    if not can_pin(device):
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def fetch(tensor: Tensor) -> Callable[[], Tensor]:
    """Begin to copy a tensor to the host; return a function that waits for this copy only."""
    device = tensor.device
    if not can_pin(device):
        return tensor.cpu
    copied = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    copied.copy_(tensor, non_blocking=True)
    event = streams(device).current_stream(device).record_event()

    def wait() -> Tensor:
        event.synchronize()
        return copied

    return wait


def _module(device: torch.device) -> Any:
    return torch.get_device_module(device.type)


def neighbours(indices: Sequence[int]) -> list[slice]:
    """Split indices into runs of consecutive ones: [0, 1, 2, 0] into 0:3 and 0:1."""
    starts = [n for n, index in enumerate(indices) if not n or index != indices[n - 1] + 1]
    return [slice(indices[a], indices[b - 1] + 1) for a, b in pairwise([*starts, len(indices)])]


def take(tensor: Tensor, indices: Sequence[int], axis: int = 0) -> Tensor:
    """Copy some entries of a tensor, in the order of their indices along an axis."""
    along = tensor.movedim(axis, 0)
    parts = [along[run].movedim(0, axis) for run in neighbours(indices)]
    return torch.cat(parts, axis) if parts else tensor.narrow(axis, 0, 0)


def split(packed: Tensor, shapes: Sequence[torch.Size]) -> list[Tensor]:
    """Split a tensor of one axis into tensors of some shapes, one after the other."""
    parts = torch.split(packed, [shape.numel() for shape in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


def put(tensor: Tensor, indices: Sequence[int], values: Tensor) -> None:
    """Write values over some entries of a tensor's first axis, in the order of their indices."""
    runs = neighbours(indices)
    parts = torch.split(values, [run.stop - run.start for run in runs])
    for run, part in zip(runs, parts, strict=True):
        tensor[run] = part

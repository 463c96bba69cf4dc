"""Access accelerators of any vendor.

Other modules call this module instead of modules such as `torch.cuda`.

torch has one module for each type of device (`torch.cuda`, `torch.xpu`, `torch.npu`, …) with the
same functions. Apple's MPS is different: it has no streams, and its memory functions have other
names.

The functions `take_entries` and `put_entries` index tensors with slices. torch would first copy a
list of indices to the accelerator.
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

PINNED_BLOCK = 2**20
"""Bytes to which pinned memory is rounded up."""
_VISIBLE_VARIABLES = {
    "hpu": "HABANA_VISIBLE_MODULES",
    "npu": "ASCEND_RT_VISIBLE_DEVICES",
    "xpu": "ZE_AFFINITY_MASK",
}
_PEAK_RESET_FILE = Path("/proc/self/clear_refs")
_host_shares = 1
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4
"""Parameters of glibc's `mallopt(3)`."""


def keep_freed_memory() -> None:
    """Keep freed memory in this process instead of returning it to the system after each use.

    Reusing memory is several times faster than requesting it from the system. The function does
    nothing without glibc.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    mallopt = ctypes.CDLL(None).mallopt
    mallopt(_MMAP_MAX, 0)
    mallopt(_TRIM_THRESHOLD, 2**31 - 1)
    mallopt(_TOP_PAD, 64 * 2**20)


def default_device() -> torch.device:
    """Return the first accelerator of this machine, or the CPU if there is no accelerator."""
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is None or not torch.accelerator.is_available():
        return torch.device("cpu")
    return torch.empty(0, device=accelerator).device  # with its index, as tensors have it


def accelerators() -> list[torch.device]:
    """List the accelerators visible to this process."""
    device_type = default_device().type
    return [torch.device(device_type, index) for index in range(torch.accelerator.device_count())]


def visible_variable() -> str:
    """Return the name of the environment variable that selects a process's visible accelerators."""
    built_type = torch.accelerator.current_accelerator()
    device_type = "hip" if torch.version.hip else built_type.type if built_type else "cuda"
    return _VISIBLE_VARIABLES.get(device_type, f"{device_type.upper()}_VISIBLE_DEVICES")


def visible_accelerators() -> list[str]:
    """List the names of the accelerators that are visible to this process.

    The names are read from an environment variable such as `CUDA_VISIBLE_DEVICES`. If the variable
    is not set, the names are the numbers of the accelerators.
    """
    names = os.environ.get(visible_variable())
    if torch.version.hip and not names:  # HIP obeys it too
        names = os.environ.get("CUDA_VISIBLE_DEVICES")
    indices = [str(device.index) for device in accelerators()]
    return names.split(",")[: len(indices)] if names else indices


def describe_device(device: torch.device) -> dict[str, str]:
    """Return a dictionary with the torch name and the hardware name of a device.

    The keys are `device` and `accelerator`; a CPU has only the key `device`.
    """
    if device.type == "cpu":
        return {"device": str(device)}
    get_name = getattr(_device_module(device), "get_device_name", None)
    return {"device": str(device), "accelerator": get_name(device) if get_name else device.type}


def hardware_name(device: torch.device) -> str:
    """Return the type and the hardware name of a device."""
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{device.type} {describe_device(device).get('accelerator', capability)}"


def runtime_versions() -> dict[str, str]:
    """Return the versions of the accelerator software for which torch is built.

    The key of a version is `cuda`, `hip` or `xpu`. If a CUDA driver is available, the key `driver`
    contains the CUDA version of the driver.
    """
    built_versions = {name: getattr(torch.version, name, None) for name in ("cuda", "hip", "xpu")}
    versions = {name: str(version) for name, version in built_versions.items() if version}
    if torch.version.cuda and accelerators():
        driver_number = torch._C._cuda_getDriverVersion()  # type: ignore[attr-defined]
        versions["driver"] = f"CUDA {driver_number // 1000}.{driver_number % 1000 // 10}"
    return versions


def share_memory(n_processes: int) -> None:
    """Set the number of processes that share the host's memory.

    For a CPU, `free_memory` divides the free memory by `n_processes`.
    """
    global _host_shares
    _host_shares = n_processes


def free_memory(device: torch.device) -> int:
    """Return the number of bytes that this process can still allocate on a device.

    Memory that torch has reserved but does not use counts as free.
    """
    module = _device_module(device)
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
    return int(_device_module(device).mem_get_info(device)[1])


def peak_memory(device: torch.device) -> int:
    """Return the peak number of bytes that this process has allocated on a device."""
    if device.type == "cpu":
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return int(peak if platform.system() == "Darwin" else peak * 1024)
    module = _device_module(device)
    if device.type == "mps":  # the peak is not counted, and the driver gives little back
        return int(module.driver_allocated_memory())
    return int(module.max_memory_allocated(device))


def reset_peak_memory(device: torch.device) -> None:
    """Reset the recorded peak memory of a device, if possible."""
    if device.type == "cpu":
        if _PEAK_RESET_FILE.exists():
            _PEAK_RESET_FILE.write_text("5", encoding="ascii")
    elif device.type != "mps":
        _device_module(device).reset_peak_memory_stats(device)


def empty_cache() -> None:
    """Release memory that torch has reserved on the accelerator but does not use."""
    device = default_device()
    if device.type != "cpu":
        _device_module(device).empty_cache()


def synchronize() -> None:
    """Wait until the accelerator has finished all launched computations."""
    _device_module(default_device()).synchronize()


def stream_module(device: torch.device) -> Any:
    """Return the torch module for the streams of a device, such as `torch.cuda`.

    For a device without streams, the function returns `torch.cpu`, whose streams do nothing.
    """
    module = _device_module(device)
    return module if hasattr(module, "Stream") else torch.cpu


def allocate_pinned(size: int) -> list[Tensor]:
    """Allocate pinned memory for asynchronous copies.

    Returns uint8 tensors with at least `size` bytes in total. The size of each tensor is a power of
    two, because torch rounds up pinned memory to powers of two.
    """
    blocks = -(-size // PINNED_BLOCK)
    powers = [1 << bit for bit in reversed(range(blocks.bit_length())) if blocks >> bit & 1]
    return [torch.empty(n * PINNED_BLOCK, dtype=torch.uint8, pin_memory=True) for n in powers]


def can_pin(device: torch.device) -> bool:
    """Return whether a device supports asynchronous copies from pinned host memory."""
    return device.type not in ("cpu", "mps")


def copy_to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor from the host to a device, asynchronously if the device supports it."""
    if not can_pin(device):
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def start_host_copy(tensor: Tensor) -> Callable[[], Tensor]:
    """Start copying a tensor to the host.

    The returned function waits until the copy is complete, and returns the copied tensor.
    """
    device = tensor.device
    if not can_pin(device):
        return tensor.cpu
    host_copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    host_copy.copy_(tensor, non_blocking=True)
    event = stream_module(device).current_stream(device).record_event()

    def wait() -> Tensor:
        event.synchronize()
        return host_copy

    return wait


def _device_module(device: torch.device) -> Any:
    return torch.get_device_module(device.type)


def consecutive_slices(indices: Sequence[int]) -> list[slice]:
    """Split indices into slices of consecutive indices.

    For example, [0, 1, 2, 0] is split into the slices 0:3 and 0:1.
    """
    run_starts = [n for n, index in enumerate(indices) if not n or index != indices[n - 1] + 1]
    return [slice(indices[a], indices[b - 1] + 1) for a, b in pairwise([*run_starts, len(indices)])]


def take_entries(tensor: Tensor, indices: Sequence[int], axis: int = 0) -> Tensor:
    """Copy the entries at some indices along a tensor's axis, in the order of `indices`."""
    entries = tensor.movedim(axis, 0)
    parts = [entries[run].movedim(0, axis) for run in consecutive_slices(indices)]
    return torch.cat(parts, axis) if parts else tensor.narrow(axis, 0, 0)


def split_packed(packed_tensor: Tensor, shapes: Sequence[torch.Size]) -> list[Tensor]:
    """Split a one-dimensional tensor into consecutive tensors of the given shapes."""
    parts = torch.split(packed_tensor, [shape.numel() for shape in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


def put_entries(tensor: Tensor, indices: Sequence[int], values: Tensor) -> None:
    """Overwrite the entries at some indices of a tensor's first axis."""
    runs = consecutive_slices(indices)
    parts = torch.split(values, [run.stop - run.start for run in runs])
    for run, part in zip(runs, parts, strict=True):
        tensor[run] = part

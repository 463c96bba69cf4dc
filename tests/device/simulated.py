"""A simulated accelerator for torch: devices sim:0 and sim:1 on the CPU, built from `device.cpp`.

Importing this module registers it. Environment variables, read when it is imported or used:
SIM_DEVICES (2), SIM_MEMORY (bytes of each device, 4 GiB), SIM_NO_FLOAT64=1 (as Apple's MPS),
SIM_VISIBLE_DEVICES (as CUDA_VISIBLE_DEVICES).
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sysconfig
import types
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import torch
from torch.utils import cpp_extension

SOURCE = Path(__file__).with_name("device.cpp")
BUILT = Path(__file__).parents[2] / "build" / "simulated" / f"{torch.__version__}.so"


def build() -> Path:
    """Build the extension for the installed torch unless that was done before."""
    if BUILT.exists() and BUILT.stat().st_mtime > SOURCE.stat().st_mtime:
        return BUILT
    BUILT.parent.mkdir(parents=True, exist_ok=True)
    folders = [*cpp_extension.include_paths(), sysconfig.get_path("include")]
    options = ["-shared", "-fPIC", "-std=c++20", "-O1", "-w", "-DTORCH_EXTENSION_NAME=simulated"]
    options += [f"-isystem{folder}" for folder in folders]
    libraries = [f"-L{folder}" for folder in cpp_extension.library_paths()]
    libraries += ["-ltorch", "-ltorch_cpu", "-lc10", "-ltorch_python"]
    with NamedTemporaryFile(dir=BUILT.parent, suffix=".so", delete=False) as file:
        subprocess.run(["g++", *options, str(SOURCE), "-o", file.name, *libraries], check=True)
    os.replace(file.name, BUILT)  # noqa: PTH105  atomic: processes may build side by side
    return BUILT


_spec: Any = importlib.util.spec_from_file_location("simulated", build())
counters: Any = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(counters)
"""The extension: counters of launches, copies, waits and races, and of memory."""


def _index(device: Any = None) -> int:
    index = device if isinstance(device, int) else device and torch.device(device).index
    return int(counters.current_device()) if index is None else int(index)


def _register() -> None:
    """Register the device with torch, with the functions that torch.cuda has."""

    def memory(index: int) -> Callable[..., int]:
        return lambda device=None: counters.memory(_index(device))[index]

    module = types.ModuleType("torch.sim")
    vars(module).update(
        Stream=torch.Stream,
        device_count=counters.device_count,
        is_available=lambda: counters.device_count() > 0,
        _is_in_bad_fork=lambda: False,
        mem_get_info=lambda device=None: counters.mem_get_info(_index(device)),
        memory_allocated=memory(0),
        memory_reserved=memory(1),
        max_memory_allocated=memory(2),
        reset_peak_memory_stats=lambda device=None: counters.reset_peak(_index(device)),
        empty_cache=counters.empty_cache,
        synchronize=lambda device=None: torch.accelerator.synchronize(_index(device)),
        current_stream=lambda device=None: torch.accelerator.current_stream(_index(device)),
        get_device_name=lambda device=None: "simulated",
        manual_seed_all=lambda seed: None,
        stream=lambda stream: nullcontext() if stream is None else stream,
    )
    torch.utils.rename_privateuse1_backend("sim")
    torch._register_device_module("sim", module)
    torch.utils.generate_methods_for_privateuse1_backend(for_storage=True)


def _histc(values: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """Count integers too, as on CUDA; on the CPU torch does not."""
    counted = values if values.device.type == "cpu" else values.float()
    return _torch_histc(counted, *args, **kwargs).to(values.dtype)


_register()
_torch_histc, torch.histc = torch.histc, _histc
torch.__future__.set_swap_module_params_on_conversion(True)  # else tied parameters come apart

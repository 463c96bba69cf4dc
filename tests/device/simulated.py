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
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
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
    includes = [*cpp_extension.include_paths(), sysconfig.get_path("include")]
    libraries = cpp_extension.library_paths()
    with NamedTemporaryFile(dir=BUILT.parent, suffix=".so", delete=False) as file:
        command = ["g++", "-shared", "-fPIC", "-std=c++20", "-O1", "-w"]
        command += ["-DTORCH_EXTENSION_NAME=simulated", *(f"-isystem{path}" for path in includes)]
        command += [str(SOURCE), "-o", file.name, *(f"-L{path}" for path in libraries)]
        command += ["-ltorch", "-ltorch_cpu", "-lc10", "-ltorch_python"]
        subprocess.run(command, check=True)
    os.replace(file.name, BUILT)  # noqa: PTH105  atomic: processes may build side by side
    return BUILT


_spec: Any = importlib.util.spec_from_file_location("simulated", build())
counters: Any = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(counters)
"""The extension: counters of launches, copies, waits and races, and of memory."""


def _index(device: Any = None) -> int:
    index = device if isinstance(device, int) else device and torch.device(device).index
    return int(counters.current_device()) if index is None else int(index)


@contextmanager
def _device(device: Any) -> Iterator[None]:
    before = counters.current_device()
    counters.set_device(_index(device))
    try:
        yield
    finally:
        counters.set_device(before)


def _register() -> None:
    """Register the device with torch, with the functions that torch.cuda has."""

    def memory(index: int) -> Callable[..., int]:
        return lambda device=None: counters.memory(_index(device))[index]

    properties = types.SimpleNamespace(name="simulated", major=9, minor=0)
    module = types.ModuleType("torch.sim")
    vars(module).update(
        Stream=torch.Stream,
        Event=torch.Event,
        device_count=counters.device_count,
        is_available=lambda: counters.device_count() > 0,
        is_initialized=lambda: True,
        _is_in_bad_fork=lambda: False,
        current_device=counters.current_device,
        mem_get_info=lambda device=None: counters.mem_get_info(_index(device)),
        memory_allocated=memory(0),
        memory_reserved=memory(1),
        max_memory_allocated=memory(2),
        reset_peak_memory_stats=lambda device=None: counters.reset_peak(_index(device)),
        empty_cache=counters.empty_cache,
        synchronize=lambda device=None: torch.accelerator.synchronize(_index(device)),
        current_stream=lambda device=None: torch.accelerator.current_stream(_index(device)),
        get_device_name=lambda device=None: properties.name,
        device=_device,
        get_rng_state=lambda device=None: torch.get_rng_state(),
        set_rng_state=lambda state, device=None: None,
        get_amp_supported_dtype=lambda: [torch.bfloat16, torch.float16],
        manual_seed=lambda seed: None,
        manual_seed_all=lambda seed: None,
        stream=lambda stream: nullcontext() if stream is None else stream,
    )
    torch.utils.rename_privateuse1_backend("sim")
    torch._register_device_module("sim", module)
    torch.utils.generate_methods_for_privateuse1_backend(for_storage=True)


def _counting_integers(histc: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Make `histc` count integers, as on CUDA; on the CPU it does not."""

    def count(values: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        counted = values if values.device.type == "cpu" else values.float()
        return histc(counted, *args, **kwargs).to(values.dtype)

    return count


_register()
torch.histc = _counting_integers(torch.histc)
torch.__future__.set_swap_module_params_on_conversion(True)  # else tied parameters come apart

if __name__ == "__main__":
    print(BUILT)  # noqa: T201

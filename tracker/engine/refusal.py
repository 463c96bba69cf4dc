"""Distinguish what a model cannot do from errors of tracker."""

from __future__ import annotations

import re
from collections.abc import Callable
from traceback import walk_tb
from types import TracebackType
from typing import TypeVar

import torch
from torch import nn

_Made = TypeVar("_Made")


class RefusalError(Exception):
    """A model is not built the way that some sharing needs; the message gives the reason."""


# MPS and drivers of CUDA and HIP; MPS, for one tensor; cuBLAS and rocBLAS; XPU; the host.
OUT_OF_MEMORY = re.compile(
    "out of memory|Invalid buffer size|_STATUS_ALLOC_FAILED|_OUT_OF_(DEVICE|HOST)_MEMORY"
    "|DefaultCPUAllocator"
)
"""Messages of out-of-memory errors for which torch has no class."""


def device_is_lost(error: Exception) -> bool:
    """Return whether the device is unusable for the rest of this process."""
    if is_out_of_memory(error):
        return False
    kind = getattr(torch, "AcceleratorError", None)  # since torch 2.8
    return (kind is not None and isinstance(error, kind)) or str(error).startswith("CUDA error")


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether the error means that the device or the host ran out of memory."""
    is_told = isinstance(error, RuntimeError) and OUT_OF_MEMORY.search(str(error))
    return isinstance(error, torch.OutOfMemoryError) or bool(is_told)


def refused(error: Exception) -> str | None:
    """Return why a model cannot be run in some way.

    Args:
        error: The exception raised while the engine ran the model.

    Returns:
        One line; None if the model is not the cause, so that the error must propagate: memory ran
        out, the device is lost, or tracker's own code raised it.
    """
    if is_out_of_memory(error) or device_is_lost(error):
        return None
    if not isinstance(error, RefusalError) and _raised_by_us(error.__traceback__):
        return None
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]


def tried(make: Callable[[], _Made]) -> tuple[_Made | None, str | None]:
    """Call a function that runs a model; return its result, or the reason why the model fails.

    Errors that the model does not cause propagate.
    """
    try:
        return make(), None
    except Exception as error:  # the code of a model raises anything
        why = refused(error)
        if why is None:
            raise
        return None, why


def _raised_by_us(traceback: TracebackType | None) -> bool:
    """Return whether tracker's code raised the error, with no module of the model below it."""
    ours = True
    for frame, _ in walk_tb(traceback):
        if str(frame.f_globals.get("__name__", "")).startswith("tracker."):
            ours = True
        elif isinstance(frame.f_locals.get("self"), nn.Module):
            ours = False
    return ours

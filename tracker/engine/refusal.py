"""Distinguish errors caused by a model from errors of tracker."""

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
    """Error for a model that does not support a computation, with the reason."""


# MPS and drivers of CUDA and HIP; MPS, for one tensor; cuBLAS and rocBLAS; XPU; the host.
OUT_OF_MEMORY = re.compile(
    "out of memory|Invalid buffer size|_STATUS_ALLOC_FAILED|_OUT_OF_(DEVICE|HOST)_MEMORY"
    "|DefaultCPUAllocator"
)
"""Messages of out-of-memory errors for which torch has no class."""


def is_device_lost(error: Exception) -> bool:
    """Return whether an error leaves the GPU unusable for the rest of this process."""
    if is_out_of_memory(error):
        return False
    error_class = getattr(torch, "AcceleratorError", None)  # since torch 2.8
    is_lost = error_class is not None and isinstance(error, error_class)
    return is_lost or str(error).startswith("CUDA error")


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error means that the device or the host ran out of memory."""
    has_message = isinstance(error, RuntimeError) and OUT_OF_MEMORY.search(str(error))
    return isinstance(error, torch.OutOfMemoryError) or bool(has_message)


def refusal_reason(error: Exception) -> str | None:
    """Return the reason for an error that the model caused; None for other errors.

    Args:
        error: The exception raised while the engine ran the model.

    Returns:
        The reason in one line. None if memory ran out, the device is lost, or tracker's own code
        raised the exception.
    """
    if is_out_of_memory(error) or is_device_lost(error):
        return None
    if not isinstance(error, RefusalError) and _is_raised_by_tracker(error.__traceback__):
        return None
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]


def try_model(compute: Callable[[], _Made]) -> tuple[_Made | None, str | None]:
    """Call `compute`; return (result, None), or (None, reason) if the model causes an error.

    Other exceptions are not caught.
    """
    try:
        return compute(), None
    except Exception as error:  # the code of a model raises anything
        reason = refusal_reason(error)
        if reason is None:
            raise
        return None, reason


def _is_raised_by_tracker(traceback: TracebackType | None) -> bool:
    """Return whether an error was raised by code of this package.

    An error in a module of the model gives False.
    """
    is_ours = True
    for frame, _ in walk_tb(traceback):
        if str(frame.f_globals.get("__name__", "")).startswith("tracker."):
            is_ours = True
        elif isinstance(frame.f_locals.get("self"), nn.Module):
            is_ours = False
    return is_ours

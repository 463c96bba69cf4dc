"""Telling what a model cannot do from what is wrong with tracker."""

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
    """A model is not built the way that some sharing needs; says what was found."""


# MPS and drivers of CUDA and HIP; MPS, of one tensor; cuBLAS and rocBLAS; XPU; the host.
OUT_OF_MEMORY = re.compile(
    "out of memory|Invalid buffer size|_STATUS_ALLOC_FAILED|_OUT_OF_(DEVICE|HOST)_MEMORY"
    "|DefaultCPUAllocator"
)
"""Messages of errors for which torch has no class."""


def device_is_lost(error: Exception) -> bool:
    """Return whether nothing can be computed on the device in this process any more."""
    if is_out_of_memory(error):
        return False
    kind = getattr(torch, "AcceleratorError", None)  # since torch 2.8
    return (kind is not None and isinstance(error, kind)) or str(error).startswith("CUDA error")


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether there was too little memory on the device that computed."""
    is_told = isinstance(error, RuntimeError) and OUT_OF_MEMORY.search(str(error))
    return isinstance(error, torch.OutOfMemoryError) or bool(is_told)


def refused(error: Exception) -> str | None:
    """Say why a model cannot be run in some way.

    Args:
        error: What was raised while the engine ran the model.

    Returns:
        One line; None where the error is not the model's: memory ran out, the device is lost, or it
        was raised in tracker's own code, and must go up.
    """
    if is_out_of_memory(error) or device_is_lost(error):
        return None
    if not isinstance(error, RefusalError) and _raised_by_us(error.__traceback__):
        return None
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]


def tried(make: Callable[[], _Made]) -> tuple[_Made | None, str | None]:
    """Make something that runs a model: it, or else why the model does not run.

    What is not the model's error goes up.
    """
    try:
        return make(), None
    except Exception as error:  # the code of a model raises anything
        why = refused(error)
        if why is None:
            raise
        return None, why


def _raised_by_us(traceback: TracebackType | None) -> bool:
    """Whether no module of the model ran below the deepest code of tracker."""
    ours = True
    for frame, _ in walk_tb(traceback):
        if str(frame.f_globals.get("__name__", "")).startswith("tracker."):
            ours = True
        elif isinstance(frame.f_locals.get("self"), nn.Module):
            ours = False
    return ours

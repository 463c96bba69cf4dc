"""Telling what a model cannot do from what is wrong with tracker."""

from __future__ import annotations

from types import TracebackType

import torch

_LIBRARIES = ("torch", "accelerate", "contextlib", "functools")
"""Code between the engine and a model's own."""


class Refusal(Exception):
    """A model is not built the way that some sharing needs; says what was found."""


def refused(error: Exception) -> str | None:
    """Say why a model cannot be run in some way.

    Args:
        error: What was raised while the engine ran the model.

    Returns:
        One line; None where the error is not the model's: memory ran out, or it was raised in
        tracker's own code, and must go up.
    """
    if isinstance(error, torch.OutOfMemoryError):
        return None
    if not isinstance(error, Refusal) and _raised_by_us(error.__traceback__):
        return None
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]


def _raised_by_us(traceback: TracebackType | None) -> bool:
    """Whether tracker's code stands deepest, that of the libraries below it not counted."""
    ours = True
    while traceback is not None:
        module = str(traceback.tb_frame.f_globals.get("__name__", ""))
        if module.partition(".")[0] not in _LIBRARIES:
            ours = module.startswith("tracker.")
        traceback = traceback.tb_next
    return ours

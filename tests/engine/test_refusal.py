"""Whose error it is: a model's is a reason to share less, ours and a full memory are raised."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from tracker.engine.refusal import RefusalError, is_device_lost, is_out_of_memory, refusal_reason

ENGINE: dict[str, Any] = {"__name__": "tracker.engine.made_here"}
exec("def ours(call):\n    return call()", ENGINE)
ours = ENGINE["ours"]
"""Calls something from a module of tracker."""


class Layer(nn.Module):
    """A model's module that runs what it is given."""

    def forward(self, call: Callable[[], Any]) -> Any:
        return call()


MODEL = Layer()


def raise_below(error: Exception, *callers: Callable[[Callable[[], Any]], Any]) -> Exception:
    """Raise an error below some callers, the last one nearest to it, and return it."""

    def call() -> None:
        raise error

    for caller in reversed(callers):
        call = partial(caller, call)
    with pytest.raises(type(error)):
        call()
    return error


@pytest.mark.parametrize(
    ("callers", "is_the_models"),
    [
        ((ours, MODEL), True),
        ((MODEL, ours, MODEL), True),
        ((ours,), False),
        ((MODEL, ours), False),
        ((ours, MODEL, ours), False),
        ((), False),
    ],
)
def test_whose_error_it_is_the_deepest_caller_decides(callers, is_the_models):
    """A model's is a reason to share less; ours, and what neither raised, goes up."""
    assert refusal_reason(raise_below(KeyError("mask"), *callers)) == (
        "'mask'" if is_the_models else None
    )


def test_a_refusal_of_ours_is_the_models_wherever_it_is_raised():
    assert refusal_reason(ValueError("never raised")) is None
    assert refusal_reason(RefusalError("its layers return nothing")) == "its layers return nothing"
    assert refusal_reason(raise_below(RefusalError("so"), ours)) == "so"


KINDS = [RuntimeError, torch.OutOfMemoryError, getattr(torch, "AcceleratorError", RuntimeError)]


@pytest.mark.parametrize(
    "message",
    [
        "MPS backend out of memory (MPS allocated: 8.90 GiB, max allowed: 9.07 GiB)",
        "Invalid buffer size: 12.00 GiB",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "CUDA error: out of memory",
        "CUDA out of memory",
        "HIP out of memory. Tried to allocate 2.00 GiB",
        "Native API failed. UR_RESULT_ERROR_OUT_OF_DEVICE_MEMORY",
        "[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory",
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_memory_that_runs_out_is_known_by_its_message(kind, message):
    """torch raises these, and no device is lost by them."""
    full = raise_below(kind(message), MODEL)
    assert is_out_of_memory(full)
    assert not is_device_lost(full)
    assert refusal_reason(full) is None


@pytest.mark.parametrize(
    ("message", "line"),
    [("\n first\nsecond ", "first"), ("", "RefusalError"), (" \n", "RefusalError")],
)
def test_it_is_told_in_one_line(message, line):
    assert refusal_reason(RefusalError(message)) == line


def test_it_is_told_shortly():
    assert refusal_reason(RefusalError("ab" * 100)) == "ab" * 80


def test_a_device_that_is_lost_is_no_models_refusal():
    lost = RuntimeError("CUDA error: unspecified launch failure\nCUDA kernel errors might be …")
    assert is_device_lost(raise_below(lost, MODEL))
    assert refusal_reason(lost) is None

"""Whose error it is: a model's is a reason to share less, ours and a full memory are raised."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from tracker.engine.refusal import RefusalError, device_is_lost, is_out_of_memory, refused

ENGINE: dict[str, Any] = {"__name__": "tracker.engine.made_here"}
exec("def ours(call):\n    return call()", ENGINE)
ours = ENGINE["ours"]
"""Calls something from a module of tracker."""


def fail(error: Exception) -> None:
    raise error


class Layer(nn.Module):
    """A model's module that runs what it is given."""

    def forward(self, call: Callable[[], Any]) -> Any:
        return call()


RAISED = (RuntimeError, ValueError, KeyError, TypeError, RefusalError)


def caught(call: Callable[[], Any]) -> Exception:
    with pytest.raises(RAISED) as found:
        call()
    return found.value


def test_what_a_model_raises_is_its_own():
    below = caught(lambda: ours(lambda: Layer()(lambda: fail(ValueError("no such mask")))))
    assert refused(below) == "no such mask"


def test_what_tracker_raises_goes_up_also_from_within_a_model():
    assert refused(caught(lambda: ours(lambda: fail(KeyError("typo"))))) is None
    within = caught(lambda: Layer()(lambda: ours(lambda: fail(TypeError("four arguments")))))
    assert refused(within) is None
    again = caught(lambda: ours(lambda: Layer()(lambda: ours(lambda: fail(TypeError("four"))))))
    assert refused(again) is None
    deepest = caught(lambda: Layer()(lambda: ours(lambda: Layer()(lambda: fail(ValueError("x"))))))
    assert refused(deepest) == "x"


def test_what_neither_raised_is_no_models():
    assert refused(ValueError("never raised")) is None
    assert refused(caught(lambda: fail(ValueError("from elsewhere")))) is None


def test_a_refusal_of_ours_is_the_models_wherever_it_is_raised():
    assert refused(RefusalError("its layers return nothing")) == "its layers return nothing"
    assert refused(caught(lambda: ours(lambda: fail(RefusalError("so"))))) == "so"


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
    full = caught(lambda: Layer()(lambda: fail(kind(message))))
    assert is_out_of_memory(full)
    assert not device_is_lost(full)
    assert refused(full) is None


@pytest.mark.parametrize(
    ("message", "line"),
    [("\n first\nsecond ", "first"), ("", "RefusalError"), (" \n", "RefusalError")],
)
def test_it_is_told_in_one_line(message, line):
    assert refused(RefusalError(message)) == line


def test_it_is_told_shortly():
    assert refused(RefusalError("ab" * 100)) == "ab" * 80


def test_a_device_that_is_lost_is_no_models_refusal():
    lost = RuntimeError("CUDA error: unspecified launch failure\nCUDA kernel errors might be …")
    found = caught(lambda: Layer()(lambda: fail(lost)))
    assert device_is_lost(found)
    assert refused(found) is None

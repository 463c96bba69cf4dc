"""The simulated device, as torch's accelerator in this process, and engines on it."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.device.simulated import counters
from tests.helpers.engines import MAX_LENGTH, wrap_model
from tests.helpers.families import tiny_model
from tracker.engine.scoring.sweep import Engine

DEVICE = torch.device("sim:0")


@pytest.fixture(autouse=True)
def no_races() -> Iterator[None]:
    """Count from zero, and fail a test in which streams raced unless it has read that."""
    torch.set_num_threads(1)
    gc.collect()  # what earlier tests left on the device
    counters.reset()
    yield
    assert not counters.races()


@pytest.fixture
def engines() -> Callable[..., tuple[Engine, Engine]]:
    """Make engines for a family's tiny model on the CPU and on the device."""

    def make(family: str, **settings: Any) -> tuple[Engine, Engine]:
        model = tiny_model(family)
        settings = {"row_tokens": 40, "row_multiple": 8, "memory": 2**28, **settings}
        models = wrap_model(model), wrap_model(copy.deepcopy(model).to(DEVICE))
        on_device = replace(models[1], device=DEVICE)
        return Engine(models[0], MAX_LENGTH, **settings), Engine(on_device, MAX_LENGTH, **settings)

    return make

"""Every example in a docstring of a statistic gives what it says."""

from __future__ import annotations

import doctest
from importlib import import_module
from pkgutil import iter_modules

import numpy as np
import pytest
import torch

from tracker import metrics


@pytest.mark.parametrize("name", sorted(each.name for each in iter_modules(metrics.__path__)))
def test_examples(name: str) -> None:
    module = import_module(f"tracker.metrics.{name}")
    assert doctest.testmod(module, extraglobs={"np": np, "torch": torch}).failed == 0

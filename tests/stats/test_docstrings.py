"""Every example in a docstring of a statistic, a proxy or a question gives what it says."""

from __future__ import annotations

import doctest
from importlib import import_module
from pkgutil import walk_packages

import numpy as np
import pytest
import torch

from tracker import stats

NAMES = [module.name for module in walk_packages(stats.__path__, "tracker.stats.")]


@pytest.mark.parametrize("name", [*NAMES, "tracker.schema.proxies", "tracker.schema.questions"])
def test_examples(name: str) -> None:
    module = import_module(name)
    assert doctest.testmod(module, extraglobs={"np": np, "torch": torch}).failed == 0

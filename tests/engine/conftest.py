from __future__ import annotations

import pytest
import torch

from tests.engine.families import FAMILIES


@pytest.fixture
def tiny_model():
    """Makes a random model of a family, with weights large enough that layers matter."""

    def make(family: str) -> torch.nn.Module:
        return FAMILIES[family].model()

    return make

"""The sweep that most tests compute."""

from __future__ import annotations

from collections.abc import Iterable

from tracker.core.ablations import INTACT, Ablation


def single_layers(layers: Iterable[int]) -> list[Ablation]:
    """The baseline, then the ablation of each layer alone."""
    return [INTACT, *(Ablation((layer,)) for layer in layers)]

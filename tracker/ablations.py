"""Ablations: the sets of layers that are skipped, and their names."""

from __future__ import annotations

from dataclasses import dataclass

from tracker.records import BASELINE


@dataclass(frozen=True)
class Ablation:
    """A set of layers whose output is their input.

    Attributes:
        layers: The removed layers, 0-based, ascending; none for the baseline.
    """

    layers: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        """The name in the ledger: `baseline`, `layer:3` or `layers:3,17`."""
        if not self.layers:
            return BASELINE
        numbers = ",".join(map(str, self.layers))
        return f"layer:{numbers}" if len(self.layers) == 1 else f"layers:{numbers}"


INTACT = Ablation()
"""The baseline: nothing is removed."""


def single_layers(layers: tuple[int, ...]) -> list[Ablation]:
    """List the baseline and the ablation of each layer alone.

    Args:
        layers: 0-based layers.

    Returns:
        The baseline first, then one ablation a layer in the given order.
    """
    return [INTACT, *(Ablation((layer,)) for layer in layers)]

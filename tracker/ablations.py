"""Ablations: the sets of layers and sublayers that are skipped, and their names."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import Enum
from itertools import product

from tracker.config import CellRequest, Component
from tracker.records import BASELINE, RunIdentity


class Action(Enum):
    """What an ablation does at one layer."""

    PASS = "pass"
    SKIP = "skip"
    NO_ATTENTION = "no attention"
    NO_MLP = "no mlp"


@dataclass(frozen=True)
class Ablation:
    """A set of layers whose output is their input, and of sublayers that add nothing.

    Attributes:
        layers: The removed layers, 0-based, ascending; none for the baseline.
        attention: Layers whose attention adds nothing to the residual stream.
        mlp: Layers whose MLP adds nothing to the residual stream.
    """

    layers: tuple[int, ...] = ()
    attention: tuple[int, ...] = ()
    mlp: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        """The name in the ledger: `baseline`, `layer:3`, `layers:3,17`, `layers:3,17+mlp:5`."""
        parts = [
            f"{component}:{','.join(map(str, numbers))}"
            for component, numbers in (
                ("layer" if len(self.layers) == 1 else "layers", self.layers),
                ("attention", self.attention),
                ("mlp", self.mlp),
            )
            if numbers
        ]
        return "+".join(parts) or BASELINE

    @property
    def has_sublayers(self) -> bool:
        """Whether it removes less than whole layers somewhere."""
        return bool(self.attention or self.mlp)

    def at(self, layer: int) -> Action:
        """Say what it does at a layer."""
        attention, mlp = layer in self.attention, layer in self.mlp
        if layer in self.layers or (attention and mlp):
            return Action.SKIP
        if attention:
            return Action.NO_ATTENTION
        return Action.NO_MLP if mlp else Action.PASS


INTACT = Ablation()
"""The baseline: nothing is removed."""


def ablate(component: Component, layers: Iterable[int], removed: Iterable[int] = ()) -> Ablation:
    """Make an ablation of one component of some layers, besides `removed` layers; all 0-based."""
    beneath = set(removed)
    chosen = set(layers) - beneath
    whole = beneath | chosen if component == "layer" else beneath
    return Ablation(
        layers=tuple(sorted(whole)),
        attention=tuple(sorted(chosen)) if component == "attention" else (),
        mlp=tuple(sorted(chosen)) if component == "mlp" else (),
    )


def ablation_of(run: RunIdentity, removed: Iterable[int]) -> Ablation:
    """Say what a run removes, where some layers are removed as a whole besides."""
    return ablate(run.component, range(run.layer, run.layer + run.span), removed)


def removals(request: CellRequest, layers: int) -> Iterator[RunIdentity]:
    """List the runs of a cell: components outermost, then spans, then layers.

    A span that reaches beyond the last layer, one that holds a layer which is removed already, and
    one that would leave no layer at all, is no run and is left out.
    """
    only = None if request.only is None else set(request.only)
    for component, span, layer in product(request.components, request.spans, request.layers):
        whole = range(layer, layer + span)
        run = RunIdentity(component=component, layer=layer, span=span)
        asked = only is None or (component, span, layer) in only
        fits = asked and whole.stop <= layers and not set(whole) & set(request.removed)
        if fits and len(ablation_of(run, request.removed).layers) < layers:
            yield run


def ablations_of(request: CellRequest, layers: int) -> list[Ablation]:
    """List what a cell is measured under: baseline, `removed` alone, every run; none twice."""
    runs = (ablation_of(run, request.removed) for run in removals(request, layers))
    return list(dict.fromkeys([INTACT, ablate("layer", request.removed), *runs]))

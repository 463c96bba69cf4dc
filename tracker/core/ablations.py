"""Ablations: what is done to which layers and sublayers, and their names."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, product

from tracker.core.config import CellRequest
from tracker.core.kinds import Action, Component, Intervention
from tracker.core.records import BASELINE, RunIdentity


@dataclass(frozen=True)
class Ablation:
    """A set of layers whose output is their input, and of parts that are changed otherwise.

    Attributes:
        layers: The removed layers, 0-based, ascending; none for the baseline.
        attention: Layers whose attention adds nothing to the residual stream.
        mlp: Layers whose MLP adds nothing to the residual stream.
        replaced: What else is done to which layers: pairs of an intervention and a layer.
    """

    layers: tuple[int, ...] = ()
    attention: tuple[int, ...] = ()
    mlp: tuple[int, ...] = ()
    replaced: tuple[tuple[Intervention, int], ...] = ()

    @property
    def name(self) -> str:
        """The name in the ledger: `baseline`, `layer:3`, `layers:3,17`, `layers:3,17+mean:5`."""
        parts = [
            f"{component}:{','.join(map(str, numbers))}"
            for component, numbers in (
                ("layer" if len(self.layers) == 1 else "layers", self.layers),
                ("attention", self.attention),
                ("mlp", self.mlp),
                *((done, (layer,)) for done, layer in self.replaced),
            )
            if numbers
        ]
        return "+".join(parts) or BASELINE

    @property
    def has_sublayers(self) -> bool:
        """Whether it removes less than whole layers somewhere."""
        return bool(self.attention or self.mlp)

    @property
    def repeated(self) -> tuple[int, ...]:
        """The layers that are passed twice."""
        return tuple(at for done, at in self.replaced if Action(done) is Action.REPEAT)

    def at(self, layer: int) -> Action:
        """Say what it does at a layer."""
        attention, mlp = layer in self.attention, layer in self.mlp
        if layer in self.layers or (attention and mlp):
            return Action.SKIP
        if attention:
            return Action.NO_ATTENTION
        if mlp:
            return Action.NO_MLP
        return next((Action(done) for done, at in self.replaced if at == layer), Action.PASS)

    @property
    def is_fitted(self) -> bool:
        """Whether something that was fitted stands in for a layer."""
        return any(Action(done).is_fitted for done, _ in self.replaced)


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
    """Say what a run does, where some layers are removed as a whole besides."""
    if run.intervention != "remove":
        return Ablation(tuple(sorted(removed)), replaced=((run.intervention, run.layer),))
    return ablate(run.component, range(run.layer, run.layer + run.span), removed)


def first_run(request: CellRequest) -> RunIdentity:
    """Say which run a request for one run asks for, whether there is such a run or not."""
    return RunIdentity(
        component=request.components[0],
        layer=request.layers[0],
        span=request.spans[0],
        intervention=request.interventions[0],
    )


def removals(request: CellRequest, layers: int) -> Iterator[RunIdentity]:
    """List the runs of a cell: components outermost, then interventions, spans, layers.

    A span that reaches beyond the last layer, one that holds a layer which is removed already, one
    that would leave no layer at all, and anything but a whole single layer that is to be replaced,
    is no run and is left out.
    """
    only = None if request.only is None else set(request.only)
    grid = (request.components, request.interventions, request.spans, request.layers)
    for component, done, span, layer in product(*grid):
        whole = range(layer, layer + span)
        run = RunIdentity(component=component, layer=layer, span=span, intervention=done)
        asked = only is None or (component, span, layer, done) in only
        possible = done == "remove" or (component, span) == ("layer", 1)
        fits = possible and whole.stop <= layers and not set(whole) & set(request.removed)
        if asked and fits and len(ablation_of(run, request.removed).layers) < layers:
            yield run


def ablations_of(request: CellRequest, layers: int) -> list[Ablation]:
    """List what a cell is measured under: baseline, `removed` alone, every run; none twice."""
    runs = (ablation_of(run, request.removed) for run in removals(request, layers))
    return list(dict.fromkeys([INTACT, ablate("layer", request.removed), *runs]))


def all_ablations(requests: Iterable[CellRequest], layers: int) -> list[Ablation]:
    """List what several requests are measured under together; none twice."""
    each = (ablations_of(request, layers) for request in requests)
    return list(dict.fromkeys(chain.from_iterable(each)))

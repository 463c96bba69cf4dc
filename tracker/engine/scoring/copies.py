"""Changed copies: models from which an ablation is really taken out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

from torch import nn

from tracker.core.changes import Ablation
from tracker.core.errors import ModelError
from tracker.core.kinds import Action
from tracker.engine.scoring.model import EngineModel
from tracker.models.hooks import returning
from tracker.models.layers import find_layers
from tracker.models.load import LoadedModel
from tracker.models.parts.embeddings import round_embeddings
from tracker.models.parts.linear_maps import RoundedWeights
from tracker.models.pruned import pruned
from tracker.models.reloaded import as_loaded


def changed_copy(model: EngineModel, ablation: Ablation, briefly: bool = False) -> LoadedModel:
    """Copy a model and really change the copy, as an ablation says.

    The copy shares the weights; sublayers stay where they are and add nothing.

    Args:
        model: The model.
        ablation: The changes.
        briefly: Whether the copy is for a few calls: with several layers in formats it holds no
            more of their weights than fit, and a layer has them while it is called.

    Returns:
        The copy.
    """
    model.put_back()
    few = briefly and sum(bool(at.rounded) for at in ablation.by_layer.values()) > 1
    cache = RoundedWeights(model.cached_weights) if few else None
    loaded, quirks = model.loaded, model.quirks
    make = partial(
        pruned,
        loaded.model,
        ablation.removed(),
        quirks.first,
        changes=[*_changes(model, ablation, cache)],
        repeated=ablation.repeated,
    )
    copied = make(stay=quirks.stay and not quirks.loaded)
    if quirks.loaded:
        try:
            as_loaded(loaded.model, copied, model.left(ablation))
        except ModelError:  # of such layers there is no checkpoint
            copied = make(stay=quirks.stay)
    round_embeddings(copied, ablation.ends)
    return replace(loaded, model=copied, layers=find_layers(copied))


def _changes(
    model: EngineModel, ablation: Ablation, cache: RoundedWeights | None
) -> Iterator[tuple[int, Callable[[nn.Module], object]]]:
    """List the changes of layers that an ablation neither removes nor repeats.

    With each layer comes the function that changes a copy of it: its weights, or its output.
    `cache` is as for `round_layer`.
    """
    for change in ablation.replaced:
        # The layer still runs; its output is dropped.
        make = partial(model.replacements[change.layer].change, change.action)
        yield change.layer, partial(returning, make=make)
    if any(c.action.enters and c.action is not Action.REPEAT for c in ablation.changes):
        yield from model.anatomy.changes(ablation, cache)

"""The linear maps of a model's layers by its configuration: their names and shapes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tracker.core.changes import Ablation
from tracker.core.errors import CellError, ModelError
from tracker.core.provenance import content_hash, package_versions
from tracker.ledger.cache import keep, recall
from tracker.models.ends import refuse_ends
from tracker.models.layers import find_layers
from tracker.models.linear_maps import linear_maps
from tracker.models.load import hollow
from tracker.models.quantised import refuse_formats
from tracker.models.sources import ModelSource
from tracker.models.sublayers import Sublayers

Shape = tuple[int, int]
"""Outputs, of experts those of all, and inputs."""
_KEPT = "linear_maps"


def maps_of(source: ModelSource, trust_remote_code: bool = False) -> tuple[dict[str, Shape], ...]:
    """List the linear maps of each layer, or recall those of files that are the same.

    Args:
        source: The model; no weight is read.
        trust_remote_code: Whether code from the download may run.

    Returns:
        Of each layer the path of each map within it → its shape.

    Raises:
        ModelError: The configuration cannot be read, or a layer holds other matrices.
    """
    stamp = source.stamp() if source.is_local else None
    key = content_hash([stamp, package_versions()["transformers"], trust_remote_code])
    kept = recall(_KEPT, key) if stamp is not None else {}
    if "maps" not in kept:
        layers = find_layers(hollow(source, "auto", trust_remote_code))
        try:
            maps = [linear_maps(layer, f"layer {number}") for number, layer in enumerate(layers)]
        except CellError as error:  # nothing is measured yet
            raise ModelError(f"{source.source}: {error}") from None
        kept = {"maps": [{name: [*each.shape] for name, each in own.items()} for own in maps]}
        if stamp is not None:
            keep(_KEPT, key, kept)
    return tuple(
        {name: (shape[0], shape[1]) for name, shape in layer.items()} for layer in kept["maps"]
    )


def refuse_misfits(
    ablations: Sequence[Ablation],
    model: Any,
    sublayers: Callable[[], Sequence[Sublayers]] | None = None,
) -> None:
    """Refuse formats that a model cannot be in, as far as that is seen.

    Args:
        ablations: What is asked for.
        model: The model; its weights may be on the meta device.
        sublayers: Finds the layers' attentions and MLPs, which takes a model that runs; None leaves
            those that are meant as a whole for later.

    Raises:
        ExperimentError: A map has no whole blocks of a format, or is not there.
    """
    seen = [each for each in ablations if sublayers or not each.has_groups_of_maps]
    refuse_formats(seen, find_layers(model), sublayers or (lambda: ()))
    refuse_ends(ablations, model)

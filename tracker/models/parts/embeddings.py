"""The two matrices outside of a model's layers: its embedding, and its output head."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from tracker.core.errors import CellError, ExperimentError
from tracker.core.kinds import ENDS
from tracker.models.parts.linear_maps import LinearMap
from tracker.models.rounding import in_format


@dataclass(frozen=True)
class Embeddings:
    """A model's embedding and output head.

    Attributes:
        embedding: Its weight has a row for each token that is read.
        lm_head: Its weight has a row for each token that is predicted.
    """

    embedding: LinearMap
    lm_head: LinearMap

    def __getitem__(self, name: str) -> LinearMap:
        """Return one of them by its name."""
        linear: LinearMap = getattr(self, name)
        return linear

    @property
    def is_tied(self) -> bool:
        """Check whether both weights are one tensor."""
        return self.embedding.parameter is self.lm_head.parameter


def find_embeddings(model: Any) -> Embeddings:
    """Find a model's embedding and head; CellError where one has no weights that could be rounded.

    The model's weights may be on the meta device.
    """
    maps = []
    class_name = type(model).__name__
    getters = ("get_input_embeddings", "get_output_embeddings")
    for name, getter in zip(ENDS, getters, strict=True):
        try:
            module = getattr(model, getter)()
        except (AttributeError, NotImplementedError):  # code of a download need not say
            module = None
        weight = None if module is None else module._parameters.get("weight")
        if weight is None or weight.ndim != 2:
            raise CellError(
                f"{class_name} has no {name} that is one matrix; leave {name} out of 'map'"
            )
        if not weight.is_floating_point():
            raise CellError(f"{name} of {class_name} is quantised already; leave it out of 'map'")
        maps.append(LinearMap(module))
    return Embeddings(*maps)


def embedding_shapes(model: Any) -> dict[str, tuple[int, int]]:
    """List a model's embedding and head with their shapes; where both are one, the embedding.

    ExperimentError where one has no weights that could be rounded.
    """
    try:
        embeddings = find_embeddings(model)
    except CellError as error:
        raise ExperimentError(str(error)) from None
    return {name: embeddings[name].shape for name in (ENDS[:1] if embeddings.is_tied else ENDS)}


def round_embeddings(model: Any, formats: Mapping[str, str]) -> None:
    """Give a copied model's embedding and head weights of their own: name → format."""
    if not formats:
        return
    embeddings = find_embeddings(model)
    for name, form in formats.items():
        weight = nn.Parameter(in_format(embeddings[name].weight, form), requires_grad=False)
        # One tensor for both stays one.
        for end in ENDS if embeddings.is_tied else [name]:
            embeddings[end].module.weight = weight

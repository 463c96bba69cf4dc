"""The two matrices outside of a model's layers: its embedding, and its head."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from tracker.core.changes import Ablation
from tracker.core.errors import CellError, ExperimentError
from tracker.core.kinds import ENDS
from tracker.core.weight_formats import FORMATS
from tracker.models.quantised import in_format, refuse_uninstalled


@dataclass(frozen=True)
class Ends:
    """A model's embedding and head.

    Attributes:
        embedding: Has a row of its weight for each token that is read.
        lm_head: Has one for each token that is predicted.
        tied: Whether both weights are one tensor.
    """

    embedding: nn.Module
    lm_head: nn.Module
    tied: bool

    def module(self, which: str) -> nn.Module:
        """Find one of them by its name."""
        found: nn.Module = getattr(self, which)
        return found

    def weight(self, which: str) -> Tensor:
        """Give the weight of one of them [tokens, width]."""
        found: Tensor = self.module(which).weight  # type: ignore[assignment]
        return found


def find_ends(model: Any) -> Ends:
    """Find a model's embedding and head; CellError where one has no weights that could be rounded.

    The model's weights may be on the meta device.
    """
    found = []
    asked = ("get_input_embeddings", "get_output_embeddings")
    for which, ask in zip(ENDS, asked, strict=True):
        try:
            module = getattr(model, ask)()
        except (AttributeError, NotImplementedError):  # code of a download need not say
            module = None
        weight = None if module is None else module._parameters.get("weight")
        if weight is None or weight.ndim != 2:
            raise CellError(
                f"{type(model).__name__} has no {which} that is one matrix; leave {which} out of "
                "'map'"
            )
        if not weight.is_floating_point():
            raise CellError(
                f"{which} of {type(model).__name__} is quantised already; leave it out of 'map'"
            )
        found.append(module)
    embedding, lm_head = found
    return Ends(embedding, lm_head, embedding.weight is lm_head.weight)


def refuse_ends(ablations: Sequence[Ablation], model: Any) -> None:
    """Refuse formats that a model's embedding and head cannot be in: ExperimentError.

    Nothing is computed; the model's weights may be on the meta device.
    """
    asked = {each for ablation in ablations for each in ablation.rounded if each.is_end}
    if not asked:
        return
    try:
        ends = find_ends(model)
    except CellError as error:
        raise ExperimentError(str(error)) from None
    name = type(model).__name__
    for each in sorted(asked):
        form = FORMATS[each.intervention]
        refuse_uninstalled(form)
        if ends.tied and each.path == "lm_head":
            raise ExperimentError(
                f"the head of this {name} is its embedding, one tensor for both; name it by 'map' "
                "as embedding, which rounds it at both ends"
            )
        inputs = ends.weight(each.path).shape[1]
        if form.for_rows(inputs) is None:
            raise ExperimentError(
                f"{form.name} keeps {form.block} inputs together, and {each.path} of {name} has "
                f"rows of {inputs}; take another format, or leave {each.path} out of "
                "'map'"
            )


def shapes_of_ends(model: Any) -> dict[str, tuple[int, int]]:
    """List a model's embedding and head with their shapes; where both are one, the embedding.

    ExperimentError where one has no weights that could be rounded.
    """
    try:
        ends = find_ends(model)
    except CellError as error:
        raise ExperimentError(str(error)) from None
    shapes = {name: ends.weight(name).shape for name in (ENDS[:1] if ends.tied else ENDS)}
    return {name: (shape[0], shape[1]) for name, shape in shapes.items()}


def round_ends(model: Any, formats: Mapping[str, str]) -> None:
    """Give a model's embedding and head weights of their own: which of `ENDS` → format."""
    if not formats:
        return
    ends = find_ends(model)
    for which, form in formats.items():
        own = nn.Parameter(in_format(ends.weight(which), form), requires_grad=False)
        # One tensor for both stays one.
        for module in [ends.embedding, ends.lm_head] if ends.tied else [ends.module(which)]:
            module.weight = own

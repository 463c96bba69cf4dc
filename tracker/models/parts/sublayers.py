"""Attention and MLP of a decoder layer, found by structure and verified by their effect."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from tracker.core.changes import Change
from tracker.core.errors import ModelError
from tracker.models import hooks
from tracker.models.parts.probe import PartFinder, text

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TOKENS = 6
"""Length of the text for the verification."""


@dataclass(frozen=True)
class Sublayers:
    """The modules whose outputs a layer adds to the residual stream.

    Attributes:
        attention: The module that mixes tokens.
        mlp: The module that processes each token alone; the last one if there are several.
    """

    KIND: ClassVar[str] = "attention and MLP"
    COMPONENTS: ClassVar[str] = "attention and mlp"
    NEEDS: ClassVar[str] = ""

    attention: nn.Module
    mlp: nn.Module

    def module(self, name: str) -> nn.Module:
        """Return one of them by its name."""
        return self.attention if name == "attention" else self.mlp

    @classmethod
    def find(cls, finder: PartFinder) -> list[Sublayers]:
        """Find the attention and the MLP of every layer.

        They are the first and the last child that holds a matrix. This is verified on a short text.
        Without both, every layer returns its input. Without attention anywhere, no token sees
        another; without MLPs they still do.

        Args:
            finder: The model and its layers.

        Returns:
            One entry per layer.

        Raises:
            ModelError: The layers are not built of two such sublayers; the message lists their
                parts.
        """
        sublayers = []
        for layer in finder.layers:
            if (pair := cls._of(layer)) is None:
                raise _not_divided(finder.model, layer, "there are no two parts with matrices")
            sublayers.append(pair)
        _prove(finder, sublayers)
        return sublayers

    @classmethod
    def _of(cls, layer: nn.Module) -> Sublayers | None:
        """Return the first and the last child with a matrix; None if there are no two."""
        parts = [part for part in layer.children() if any(p.ndim > 1 for p in part.parameters())]
        return cls(parts[0], parts[-1]) if len(parts) > 1 else None

    def remove(self, layer: nn.Module, parts: Sequence[Change], name: str) -> None:
        """Silence some sublayers of a copied layer: they add nothing to the residual stream."""
        sublayers = self._of(layer)
        assert sublayers is not None
        for part in parts:
            sublayers.module(part.component).register_forward_hook(
                hooks.add_nothing, with_kwargs=True
            )


@torch.inference_mode()
def _prove(finder: PartFinder, sublayers: Sequence[Sublayers]) -> None:
    """Raise ModelError if layers add more to the stream than the outputs of their sublayers."""
    model, layers = finder.model, finder.layers
    attention = [pair.attention for pair in sublayers]
    mlp = [pair.mlp for pair in sublayers]
    ids = text(TOKENS, finder.device)
    other = ids.clone()
    other[0, 0] += 1
    unchanged: list[bool] = []

    def compare(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        # Not `call_protected`: with silent parts, a layer that writes seems only to read.
        before = hooks.state_of(args, kwargs).clone()
        output = forward(*args, **kwargs)
        unchanged.append(torch.equal(before, hooks.first_of(output).to(before.device)))
        return output

    compared = (hooks.replaced_forward(layer, partial(compare, layer.forward)) for layer in layers)
    with hooks.silenced([*attention, *mlp]), hooks.all_of(compared):
        model(ids, use_cache=False)
    if not all(unchanged):
        layer = layers[unchanged.index(False)]
        raise _not_divided(
            model, layer, "without both its first and last part it changes its input"
        )

    def effect() -> Tensor:
        """Measure how much the last token's logits depend on the first token."""
        before, after = (model(tokens, use_cache=False).logits[0, -1] for tokens in (ids, other))
        distance: Tensor = (before - after).norm()
        return distance

    # Experts get their tokens in other groups, so equal inputs may differ by rounding.
    rounding = 1e-2 * effect()

    with hooks.silenced(attention):
        if effect() > rounding:
            raise _not_divided(model, layers[0], "its first part is not all that mixes tokens")
    with hooks.silenced(mlp):
        if not effect() > rounding:
            raise _not_divided(model, layers[0], "its first part does not mix tokens")


def _not_divided(model: PreTrainedModel, layer: nn.Module, why: str) -> ModelError:
    parts = ", ".join(f"{name} ({type(child).__name__})" for name, child in layer.named_children())
    return ModelError(
        f"{type(model).__name__}: attention and MLP of {type(layer).__name__} cannot be told "
        f"apart, {why}; its parts: {parts}. Use component: {{value: layer}}"
    )

"""Find the attention and the MLP of a decoder layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from tracker.models import hooks
from tracker.models.parts.probe import PartFinder, probe_text
from tracker.schema.changes import Change
from tracker.schema.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SUBLAYER_TEXT_TOKENS = 6
"""Number of tokens of the text for the verification."""


@dataclass(frozen=True)
class Sublayers:
    """The attention and the MLP of a layer, whose outputs are added to the residual stream.

    Attributes:
        attention: The module that mixes tokens.
        mlp: The module that processes each token separately.
    """

    KIND: ClassVar[str] = "attention and MLP"
    COMPONENTS: ClassVar[str] = "attention and mlp"
    NEEDS: ClassVar[str] = ""

    attention: nn.Module
    mlp: nn.Module

    def module(self, name: str) -> nn.Module:
        """Return the attention or the MLP by its name."""
        return self.attention if name == "attention" else self.mlp

    @classmethod
    def find(cls, finder: PartFinder) -> list[Sublayers]:
        """Find the attention and the MLP of every layer.

        The attention is the layer's first child module that holds a matrix, and the MLP is the
        last. The method tests both modules on a short text. Without attention and MLP, every layer
        must return its input. Without attention, a token's logits must not depend on other tokens.

        Args:
            finder: The model and its layers.

        Returns:
            The sublayers of each layer.

        Raises:
            ModelError: A layer does not consist of one attention and one MLP; the message lists the
                layer's modules.
        """
        sublayers = []
        for layer in finder.layers:
            if (pair := cls.first_and_last(layer)) is None:
                raise _division_error(
                    finder.model, layer, "the layer has fewer than two modules with weight matrices"
                )
            sublayers.append(pair)
        _verify_sublayers(finder, sublayers)
        return sublayers

    @classmethod
    def first_and_last(cls, layer: nn.Module) -> Sublayers | None:
        """Return the first and last child module with a matrix; None if fewer than two exist."""
        parts = [part for part in layer.children() if any(p.ndim > 1 for p in part.parameters())]
        return cls(parts[0], parts[-1]) if len(parts) > 1 else None

    def remove(self, layer: nn.Module, parts: Sequence[Change], name: str) -> None:
        """Remove sublayers of a copied layer.

        The removed modules stay in the layer, but add nothing to the residual stream.
        """
        sublayers = self.first_and_last(layer)
        assert sublayers is not None
        for part in parts:
            module = sublayers.module(part.component)
            module.register_forward_hook(hooks.silence_output, with_kwargs=True)


@torch.inference_mode()
def _verify_sublayers(finder: PartFinder, sublayers: Sequence[Sublayers]) -> None:
    """Test the assumed attention and MLP on a short text; raise ModelError on failure."""
    model, layers = finder.model, finder.layers
    attentions, mlps = ([pair.module(name) for pair in sublayers] for name in ("attention", "mlp"))
    ids = probe_text(SUBLAYER_TEXT_TOKENS, finder.device)
    other_ids = ids.clone()
    other_ids[0, 0] += 1
    is_unchanged: list[bool] = []

    def compare(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        # Not `call_protected`: with silent parts, a layer that writes seems only to read.
        state = hooks.input_state(args, kwargs).clone()
        output = forward(*args, **kwargs)
        is_unchanged.append(torch.equal(state, hooks.first_output(output).to(state.device)))
        return output

    wrapped = (hooks.replaced_forward(layer, partial(compare, layer.forward)) for layer in layers)
    with hooks.silenced_sublayers([*attentions, *mlps]), hooks.enter_all(wrapped):
        model(ids, use_cache=False)
    if not all(is_unchanged):
        problem = "the layer changes its input even if attention and MLP are removed"
        raise _division_error(model, layers[is_unchanged.index(False)], problem)

    def measure_effect() -> Tensor:
        """Measure how much the last token's logits depend on the first token."""
        logits, others = (model(text, use_cache=False).logits[0, -1] for text in (ids, other_ids))
        distance: Tensor = (logits - others).norm()
        return distance

    # Experts get their tokens in other groups, so equal inputs may differ by rounding.
    tolerance = 1e-2 * measure_effect()

    with hooks.silenced_sublayers(attentions):
        if measure_effect() > tolerance:
            problem = "tokens affect each other even without the attention"
            raise _division_error(model, layers[0], problem)
    with hooks.silenced_sublayers(mlps):
        if not measure_effect() > tolerance:
            raise _division_error(
                model, layers[0], "tokens do not affect each other without the supposed MLP"
            )


def _division_error(model: PreTrainedModel, layer: nn.Module, problem: str) -> ModelError:
    parts = ", ".join(f"{name} ({type(child).__name__})" for name, child in layer.named_children())
    return ModelError(
        f"{type(model).__name__}: attention and MLP of {type(layer).__name__} cannot be "
        f"distinguished, because {problem}. Modules: {parts}. Use component: {{value: layer}}"
    )

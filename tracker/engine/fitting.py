"""Fit functions that replace layers, by least squares over tokens of calibration text.

The fit ignores the first token of a text, because the token's hidden state is often unusually
large. If a text begins with the same tokens as the previous text, these tokens are ignored too.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from tracker.engine.forward.layer import FittedReplacement, ForwardPass
from tracker.engine.scoring.model import EngineModel
from tracker.engine.scoring.rows import count_common_tokens
from tracker.schema.changes import INTACT


@dataclass
class _Sums:
    """Sums over tokens, for fitting a layer's output as a function of the layer's input."""

    width: int
    linear: bool

    def __post_init__(self) -> None:
        self.tokens = 0
        self.updates = torch.zeros(self.width, dtype=torch.float64)
        self.dot_product = self.squared_norm = 0.0
        size = self.width + 1 if self.linear else 0
        self.gram = torch.zeros(size, size, dtype=torch.float64)
        self.cross_products = torch.zeros(size, self.width, dtype=torch.float64)

    def add(self, inputs: Tensor, outputs: Tensor) -> None:
        """Add a text's hidden states before and after the layer to the sums.

        `inputs` and `outputs` have the shape [tokens, width].
        """
        inputs, outputs = inputs.cpu().double(), outputs.cpu().double()
        self.tokens += len(inputs)
        self.updates += (outputs - inputs).sum(0)
        self.dot_product += float((inputs * outputs).sum())
        self.squared_norm += float((inputs * inputs).sum())
        if self.linear:
            augmented = torch.cat([inputs, inputs.new_ones(len(inputs), 1)], 1)
            self.gram += augmented.T @ augmented
            self.cross_products += augmented.T @ outputs

    def fit_replacement(self) -> FittedReplacement:
        """Fit functions that approximate the layer, by least squares.

        The functions add the mean update, multiply by a factor, or apply a linear map (only if
        `linear` is true).
        """
        linear = None
        if self.linear:
            # The minimum-norm solution where inputs do not span all dimensions.
            solution = torch.linalg.lstsq(self.gram, self.cross_products, driver="gelsd").solution
            linear = solution[:-1].T.float().contiguous(), solution[-1].float()
        mean = (self.updates / self.tokens).float()
        return FittedReplacement(mean, self.dot_product / self.squared_norm, linear)


@torch.inference_mode()
def fit_replacements(
    model: EngineModel, texts: Sequence[Sequence[int]], layers: Collection[int], linear: bool
) -> dict[int, FittedReplacement]:
    """Fit functions that approximate layers on calibration texts, by least squares.

    Args:
        model: The intact model.
        texts: Token ids of the calibration texts, at least two tokens per text.
        layers: Numbers of the layers to fit, 0-based.
        linear: Whether to also fit a linear map for each layer.

    Returns:
        The fitted replacements, by layer number.
    """
    sums: dict[int, _Sums] = {}
    plan = model.plan([INTACT])
    for text, start in zip(texts, first_fitted_tokens(texts), strict=True):

        def observe(layer: int, inputs: Tensor, outputs: Tensor, start: int = start) -> None:
            if layer in layers:
                x, y = (state[0, start:].flatten(1) for state in (inputs, outputs))
                sums.setdefault(layer, _Sums(x.shape[1], linear)).add(x, y)

        with ForwardPass(model.loaded.layers, plan, observe=observe).install():
            ids = torch.tensor([list(text)], device=model.loaded.device)
            model.head.base(input_ids=ids, use_cache=False)
    return {layer: layer_sums.fit_replacement() for layer, layer_sums in sums.items()}


def first_fitted_tokens(texts: Sequence[Sequence[int]]) -> list[int]:
    """Return for each text the index of the first token that the fit uses."""
    pairs = pairwise([(), *texts])
    # The last token of a text is never left out.
    return [max(1, count_common_tokens(previous, text[:-1])) for previous, text in pairs]

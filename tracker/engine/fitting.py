"""Fit replacements of layers on calibration text, by least squares over its tokens.

A text's first token is left out, because its state is often a hundred times as long as all others
and would dominate the fit. A beginning shared with the text before is left out too.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tracker.core.changes import INTACT
from tracker.engine.forward.layer import FittedReplacement, ForwardPass
from tracker.engine.scoring.model import EngineModel
from tracker.engine.scoring.rows import alike


@dataclass
class _Sums:
    """Sums over tokens of one layer's input x and output y, in float64."""

    width: int
    linear: bool

    def __post_init__(self) -> None:
        self.tokens = 0
        self.update = torch.zeros(self.width, dtype=torch.float64)
        self.along = self.length = 0.0
        size = self.width + 1 if self.linear else 0
        self.squares = torch.zeros(size, size, dtype=torch.float64)
        self.products = torch.zeros(size, self.width, dtype=torch.float64)

    def add(self, before: Tensor, after: Tensor) -> None:
        """Add the states of tokens before and after the layer [tokens, width]."""
        before, after = before.cpu().double(), after.cpu().double()
        self.tokens += len(before)
        self.update += (after - before).sum(0)
        self.along += float((before * after).sum())
        self.length += float((before * before).sum())
        if self.linear:
            more = torch.cat([before, before.new_ones(len(before), 1)], 1)
            self.squares += more.T @ more
            self.products += more.T @ after

    def fitted(self) -> FittedReplacement:
        """Return the least-squares fits of y from x."""
        linear = None
        if self.linear:
            # The minimum-norm solution where inputs do not span all dimensions.
            solved = torch.linalg.lstsq(self.squares, self.products, driver="gelsd").solution
            linear = solved[:-1].T.float().contiguous(), solved[-1].float()
        return FittedReplacement(
            (self.update / self.tokens).float(), self.along / self.length, linear
        )


@torch.inference_mode()
def fit(
    model: EngineModel, texts: Sequence[Sequence[int]], layers: Collection[int], linear: bool
) -> dict[int, FittedReplacement]:
    """Fit the replacements of some layers of an intact model.

    Args:
        model: The model.
        texts: Token ids of the calibration texts, at least two per text.
        layers: The layers to fit, 0-based.
        linear: Whether to fit linear maps too.

    Returns:
        Layer → its replacement.
    """
    sums: dict[int, _Sums] = {}
    plan = model.plan([INTACT])
    starts = first_tokens(texts)
    for text, start in zip(texts, starts, strict=True):

        def observe(layer: int, before: Tensor, after: Tensor, start: int = start) -> None:
            if layer in layers:
                x, y = (state[0, start:].flatten(1) for state in (before, after))
                sums.setdefault(layer, _Sums(x.shape[1], linear)).add(x, y)

        with ForwardPass(model.loaded.layers, plan, observe=observe).installed():
            ids = torch.tensor([list(text)], device=model.loaded.device)
            model.head.base(input_ids=ids, use_cache=False)
    return {layer: each.fitted() for layer, each in sums.items()}


def first_tokens(texts: Sequence[Sequence[int]]) -> list[int]:
    """Return each text's first token to fit: behind its own first and any repeated beginning."""
    before = [(), *texts]
    # The last token of a text is never left out.
    return [max(1, alike(last, text[:-1])) for last, text in zip(before, texts, strict=False)]

"""Embeddings and heads in formats: what streams begin with, and the head that each passes.

The model's own modules run with other weights in them, so that what a class does besides (a factor,
positions, soft-capping) is done as ever.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from tracker.engine.refusal import RefusalError
from tracker.models.ends import Ends
from tracker.models.linear_maps import map_of
from tracker.models.quantised import RoundedWeights
from tracker.models.slices import put, take
from tracker.models.sublayers import replaced_forward, state_of


@dataclass(frozen=True)
class RoundedEnds:
    """A model's embedding and head, and what makes their weights in formats."""

    ends: Ends
    weights: RoundedWeights

    def weight(self, which: str, form: str) -> Tensor:
        """Give the weight of one of them in a format [tokens, width]."""
        name = "embedding" if self.ends.tied else which
        return self.weights.of(0, name, map_of(self.ends.module(which)), form)

    @contextmanager
    def having(self, which: str, form: str | None) -> Iterator[None]:
        """Let one of them have weights in a format until exit; None for its own.

        No other pass of the model may run meanwhile: it would meet them.
        """
        if form is None:
            yield
            return
        module = self.ends.module(which)
        own, rounded = module.weight, self.weight(which, form)
        module.weight = nn.Parameter(rounded, requires_grad=False)
        try:
            yield
        finally:
            module.weight = own

    @contextmanager
    def by_row(self, which: str, formats: Sequence[str | None]) -> Iterator[None]:
        """Let one of them have weights of their own for each row of a batch, until exit."""
        if not any(formats):
            yield
            return
        module = self.ends.module(which)
        with replaced_forward(module, _RowFork(which, formats, self, module.forward)):
            yield


@dataclass(frozen=True)
class _RowFork:
    """An embedding or a head over the rows of a batch, some of which have weights in a format."""

    which: str
    formats: Sequence[str | None]
    ends: RoundedEnds
    forward: Callable[..., Any]

    def __call__(self, given: Tensor) -> Tensor:
        """Take and return what the module does."""
        output: Tensor = self.forward(given)
        if len(given) != len(self.formats):
            raise RefusalError(f"its {self.which} is not called with a row a text")
        for form in dict.fromkeys(form for form in self.formats if form is not None):
            rows = [row for row, mine in enumerate(self.formats) if mine == form]
            with self.ends.having(self.which, form):
                put(output, rows, self.forward(take(given, rows)))
        return output


class _ReachedError(Exception):
    """The first layer was called."""


def first_states(
    base: Any, first: nn.Module, ends: RoundedEnds, formats: Sequence[str], inputs: dict[str, Any]
) -> list[Tensor]:
    """Find what the first layer is given where the embedding has a format; no layer runs.

    Args:
        base: What runs the layers.
        first: The first of them.
        ends: The embedding.
        formats: Its formats.
        inputs: What the base is called with.

    Returns:
        For each format the states [rows, tokens, …].
    """
    states: list[Tensor] = []

    def reached(*args: Any, **kwargs: Any) -> Any:
        states.append(state_of(args, kwargs))
        raise _ReachedError

    reached.is_weightless = True  # type: ignore[attr-defined]
    for form in formats:
        with ends.having("embedding", form), replaced_forward(first, reached):
            try:
                base(**inputs)
            except _ReachedError:
                continue
        raise RefusalError("its first layer does not run on plain text")
    return states

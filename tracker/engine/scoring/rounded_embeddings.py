"""Embeddings and heads in formats: what streams begin with, and the head that each passes.

The model's own modules run with other weights in them, so that what a class does besides (a factor,
positions, soft-capping) is done as ever.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from tracker.core.grouping import grouped
from tracker.engine.refusal import RefusalError
from tracker.models.hooks import replaced_forward, state_of
from tracker.models.parts.embeddings import Embeddings
from tracker.models.parts.linear_maps import RoundedWeights
from tracker.models.slices import put, take


@dataclass(frozen=True)
class RoundedEmbeddings:
    """A model's embedding and head, and what makes their weights in formats."""

    matrices: Embeddings
    weights: RoundedWeights

    def weight(self, which: str, form: str) -> Tensor:
        """Return the weight of one of them in a format [tokens, width]."""
        name = "embedding" if self.matrices.is_tied else which
        return self.weights.of(0, name, self.matrices[which], form)

    @contextmanager
    def having(self, which: str, form: str | None) -> Iterator[None]:
        """Give one of them weights in a format until exit; None for its own.

        No other pass of the model may run meanwhile: it would meet them.
        """
        if form is None:
            yield
            return
        module = self.matrices[which].module
        own, rounded = module.weight, self.weight(which, form)
        module.weight = nn.Parameter(rounded, requires_grad=False)
        try:
            yield
        finally:
            module.weight = own

    def by_row(self, which: str, formats: Sequence[str | None]) -> AbstractContextManager[None]:
        """Give one of them weights of their own for each row of a batch, until exit."""
        module = self.matrices[which].module
        forward: Callable[[Tensor], Tensor] = module.forward
        rows_of = grouped(range(len(formats)), lambda row: formats[row])

        def by_format(given: Tensor) -> Tensor:
            output = forward(given)
            if len(given) != len(formats):
                raise RefusalError(f"its {which} is not called with a row a text")
            for form, rows in rows_of.items():
                if form is not None:
                    with self.having(which, form):
                        put(output, rows, forward(take(given, rows)))
            return output

        return replaced_forward(module, by_format) if any(formats) else nullcontext()


class _ReachedError(Exception):
    """The first layer was called."""


def first_states(
    base: Any,
    first: nn.Module,
    ends: RoundedEmbeddings,
    formats: Sequence[str],
    inputs: dict[str, Any],
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

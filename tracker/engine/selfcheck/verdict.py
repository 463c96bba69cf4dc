"""What a check on a miniature has shown of an architecture."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tracker.engine.scoring.rows import Lengths
from tracker.engine.scoring.sharing import Quirks, Sharing
from tracker.engine.selfcheck.quirks import Path
from tracker.models.pruned import remember
from tracker.models.shrinking import numbers


@dataclass(frozen=True)
class Verdict:
    """What a check on a miniature has shown of an architecture.

    Attributes:
        sharing: As much as is exact.
        lost: One line that says which sharing was lost and why; None when none was.
        difference: The largest difference that was left, in nats.
        compared: Log-likelihoods behind it.
        unsteady: How many of them differ by more, while the model itself moves as far by rounding.
        lengths: Numbers of the configuration at which the length of a call matters, with whether
            beyond it every length is another; the empty path for a model to which it always does.
        leftovers: Names of attributes that one call leaves changed for the next.
        first: Where in the model is what the first call changes for good: module, attribute.
        stay: Whether removed layers stay in their places, because the model cannot be cut.
        loaded: Whether copies get what their class computes when they are loaded without layers.
        which: One line that says where the numbers are those of no checkpoint; None where all are.
        tried_on: `a miniature`, or `the model` where none can be built.
        switches: Lengths of a call at which it matters too, found by trying; True as in `lengths`.
    """

    sharing: Sharing
    lost: str | None = None
    difference: float = 0.0
    compared: int = 0
    unsteady: int = 0
    lengths: tuple[tuple[Path, bool], ...] = ()
    leftovers: tuple[str, ...] = ()
    first: tuple[tuple[str, str], ...] = ()
    stay: bool = False
    loaded: bool = False
    which: str | None = None
    tried_on: str = "a miniature"
    switches: tuple[tuple[int, bool], ...] = ()

    def quirks(self, model: Any) -> Quirks:
        """Say what the engine must know of such a model, one that no call has changed yet."""
        values = dict(numbers(model.config.get_text_config()))
        thresholds = (
            *(int(values[path]) for path, _ in self.lengths if path in values),
            *(tokens for tokens, _ in self.switches),
        )
        first = remember(model, {name for _, name in self.first})
        return Quirks(
            lengths=Lengths(
                thresholds, each=any(each for _, each in (*self.lengths, *self.switches))
            ),
            leftovers=remember(model, self.leftovers),
            first={place: first[place] for place in self.first if place in first},
            stay=self.stay,
            loaded=self.loaded,
        )

"""What the ablations of a model share, and what calling the model does beside its answer."""

from __future__ import annotations

from dataclasses import dataclass, field

from tracker.engine.scoring.rows import ANY_LENGTH, Lengths
from tracker.models.pruned import State


@dataclass(frozen=True)
class Sharing:
    """What the ablations of a model share, exactly.

    Attributes:
        depth: Layers below the removed one are computed once for all ablations.
        tokens: Tokens that the requests of a row have in common are computed once.
        prefix: What all documents begin with is computed once for all rows.
        calls: Texts of one length share a call, of which only what predicts something passes the
            head. Otherwise each request is a call of the model as it is, with all of its logits.
    """

    depth: bool = True
    tokens: bool = True
    prefix: bool = True
    calls: bool = True

    def __str__(self) -> str:
        """Name what is shared, as it stands in the ledger and on the page."""
        names = ("depth", "tokens", "prefix")
        return ", ".join(name for name in names if getattr(self, name)) or "nothing"


FULL = Sharing()


NO_PREFIX = Sharing(prefix=False)


DEPTH_ONLY = Sharing(tokens=False, prefix=False)


PLAIN = Sharing(depth=False, tokens=False, prefix=False)


ONE_BY_ONE = Sharing(depth=False, tokens=False, prefix=False, calls=False)
"""The truth itself."""


ALONE = DEPTH_ONLY
"""How one model by itself is scored: there is no second stream to share depth with."""


@dataclass(frozen=True)
class Quirks:
    """What calling a model does beside its answer; the check finds it out.

    Attributes:
        lengths: Which calls it computes alike.
        leftovers: What one call leaves changed for the next, as it was before.
        first: What the first call changes for good, weights among it, as it was before.
        stay: Whether a removed layer stays in its place and hands on its input, because the model
            cannot be cut there.
        loaded: Whether a copy without layers gets what its class computes when it is loaded, where
            it can be; otherwise the layers stay in their places, if `stay` says so.
    """

    lengths: Lengths = ANY_LENGTH
    leftovers: State = field(default_factory=dict, compare=False)
    first: State = field(default_factory=dict, compare=False)
    stay: bool = False
    loaded: bool = False


NO_HABITS = Quirks()

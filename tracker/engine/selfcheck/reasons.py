"""Why a model shares no more than it does, in one sentence for people.

Which experiment failed says why; what the model's own code raised then goes to the log.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from tracker.engine.refusal import RefusalError
from tracker.engine.scoring.rows import Lengths
from tracker.engine.scoring.sharing import (
    DEPTH_ONLY,
    FULL,
    NO_PREFIX,
    ONE_BY_ONE,
    PLAIN,
    Quirks,
    Sharing,
)
from tracker.engine.scoring.sweep import Engine
from tracker.engine.selfcheck.quirks import Path
from tracker.engine.selfcheck.reference import Comparison
from tracker.models.miniature import numbers
from tracker.models.pruned import remember


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

    @property
    def is_clean(self) -> bool:
        """Return whether all is shared and no length matters, so that shorter texts are alike."""
        special = (self.unsteady, self.lengths, self.switches, self.leftovers, self.first)
        return self.sharing == FULL and not any(special)

    def quirks(self, model: Any) -> Quirks:
        """Say what the engine must know of such a model, one that no call has changed yet."""
        values = dict(numbers(model.config.get_text_config()))
        thresholds = (
            *(int(values[path]) for path, _ in self.lengths if path in values),
            *(tokens for tokens, _ in self.switches),
        )
        first = remember(model, {name for _, name in self.first})
        is_each = any(each for _, each in (*self.lengths, *self.switches))
        return Quirks(
            lengths=Lengths(thresholds, is_each),
            leftovers=remember(model, self.leftovers),
            first={place: first[place] for place in self.first if place in first},
            stay=self.stay,
            loaded=self.loaded,
        )


log = logging.getLogger(__name__)
LEFT = {
    NO_PREFIX: "shared over depth and tokens, and not what documents begin with",
    DEPTH_ONLY: "shared over depth alone, and not over tokens or documents",
    PLAIN: "nothing is shared",
    ONE_BY_ONE: "nothing is shared, and each request is asked alone",
}
"""What is left, and what is not."""
REFUSED = {
    FULL: "it does not go on from a beginning that was read before: its cache cannot be rewound",
    NO_PREFIX: "it refuses a row of several texts with a mask of their own",
    DEPTH_ONLY: "its layers refuse the states of several ablations as one batch",
    PLAIN: "it refuses several texts in one call",
}
"""What a way of sharing asks of a model, where its own code refused."""
STATE = "it keeps a state of its own for each text"
MOVED = {PLAIN: "a call of several texts"}
"""What moves an answer, where it is not the sharing itself."""


def less(before: str | None, sharing: Sharing, why: str | None) -> str | None:
    """Say what is shared less, and why; what was said `before` where nothing more was lost."""
    if why is None:
        return before
    said = f"{LEFT[sharing]}, because {why}"
    # What was lost later is more, and its reason holds for what was lost before.
    if before is None or before.startswith(tuple(LEFT.values())):
        return said
    return f"{before}; {said}"


def in_words(error: Exception, way: Sharing, name: str) -> str:
    """Say what a model refuses, in words of ours; what its own code said goes to the log."""
    log.debug("%s, shared over %s: %s", name, way, error)
    return str(error) if isinstance(error, RefusalError) else REFUSED[way]


def of_refusal(way: Sharing, said: str, engine: Engine) -> str:
    """Say why a model runs in no such way; a copy of it is called to see that."""
    return STATE if way == NO_PREFIX and keeps_a_state(engine.copy()) else said


def of_difference(way: Sharing, found: Comparison, engine: Engine) -> str:
    """Say why what a model says in some way is not what it is to say."""
    said = (
        f"{MOVED.get(way, 'sharing more')} changes a log-likelihood by {found.difference:.3g} nats"
    )
    if found.unsteady:
        return f"{said}, mostly where the model is discontinuous ({found.unsteady} answers)"
    return f"{STATE}: {said}" if way == NO_PREFIX and keeps_a_state(engine.copy()) else said


@torch.inference_mode()
def keeps_a_state(model: Any) -> bool:
    """Whether a model keeps something of a text whose size does not grow with it.

    Keys and values do; what recurrent layers and convolutions keep does not, and there each token
    writes over what others have left: texts in one row would too.
    """
    kept = []
    for tokens in (2, 3):
        ids = torch.arange(tokens, device=model.device)[None] + 3
        try:
            said = model(input_ids=ids, use_cache=True)
        except Exception as error:  # noqa: BLE001  it is asked only to tell why it refused before
            log.debug("%s keeps nothing: %s", type(model).__name__, error)
            return False
        kept.append(list(_shapes(said if isinstance(said, dict) else {})))
    return len(kept[0]) == len(kept[1]) and any(
        one == other and len(one) > 2 and 0 not in one for one, other in zip(*kept, strict=True)
    )


def _shapes(kept: Any) -> Iterator[torch.Size]:
    """The shapes of all tensors in what a call returns, and in caches among it."""
    if isinstance(kept, Tensor):
        yield kept.shape
    elif isinstance(kept, dict):
        yield from _shapes([value for name, value in kept.items() if name != "logits"])
    elif isinstance(kept, (list, tuple)):
        yield from chain.from_iterable(map(_shapes, kept))
    elif type(kept).__module__.startswith("transformers."):
        yield from _shapes(vars(kept))

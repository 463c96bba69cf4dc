"""Define the questions of `until`, which end a measurement early."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Literal

from tracker.core.errors import did_you_mean
from tracker.core.safe_yaml import short

Kind = Literal["drop", "top", "prune", "sign"]

EXAMPLES: Mapping[Kind, str] = {
    "drop": "drop within 2 pp",
    "top": "top 5",
    "prune": "prune 8",
    "sign": "sign",
}
"""Kind of question → an example; `within 1 pp` and `at 99 %` may follow."""

CONFIDENCE = 0.95
"""Default probability that all statements about a cell's runs hold."""

_NUMBER = r"(\d+(?:\.\d+)?)"
_REST = re.compile(rf"(?: within {_NUMBER} ?pp)?(?: at {_NUMBER} ?%)?")


@dataclass(frozen=True)
class Question:
    """Question about a cell's runs.

    Attributes:
        kind: `drop`: how large each drop is. `top`: which drops are the largest. `prune`: which
            are the smallest. `sign`: which are not 0.
        count: Number of runs that `top` and `prune` choose; None for the other kinds.
        within: Tolerance as a fraction. For `drop`, the largest distance of a drop from the middle
            of its bounds; for `top` and `prune`, that of a chosen run from the last chosen one
            (None = no tolerance).
        level: Probability that the answer is right, and that all bounds of drops hold together.
    """

    kind: Kind
    count: int | None = None
    within: float | None = None
    level: float = CONFIDENCE

    def __str__(self) -> str:
        words = [str(self.kind)]
        if self.count is not None:
            words.append(str(self.count))
        if self.within is not None:
            words.append(f"within {100 * self.within:.10g} pp")
        if self.level != CONFIDENCE:
            words.append(f"at {100 * self.level:.10g} %")
        return " ".join(words)

    def fits(self, runs: int) -> bool:
        """Check whether this number of runs can answer the question."""
        return self.count is None or self.count < runs

    def refuse(self, runs: int) -> None:
        """Raise ValueError if this number of runs cannot answer the question."""
        if not self.fits(runs):
            fit = f"; ask for {runs - 1} at most" if runs > 1 else ""
            raise ValueError(
                f"{self.kind} {self.count} of {runs} run{'' if runs == 1 else 's'} chooses "
                f"nothing{fit}"
            )


def question(text: str) -> Question:
    """Read a question in the notation of experiment files.

    Args:
        text: `drop within 2 pp`, `top 5`, `top 5 within 1 pp`, `prune 8` or `sign`, with
            `at 99 %` after it for another confidence than 95 %.

    Returns:
        The question.

    Raises:
        ValueError: The text is no known question.

    Examples:
        >>> question("top 5 within 1 pp")
        Question(kind='top', count=5, within=0.01, level=0.95)
        >>> str(question("drop  within 0.5pp at 99%"))
        'drop within 0.5 pp at 99 %'
    """
    word, _, rest = " ".join(text.split()).partition(" ")
    kind, count = next((kind for kind in EXAMPLES if kind == word), None), None
    if kind is None:
        near, known = did_you_mean(word, EXAMPLES), ", ".join(map(repr, EXAMPLES.values()))
        raise ValueError(f"no question begins with {short(word)}.{near} Known are {known}")
    if kind in ("top", "prune"):
        number, _, rest = rest.partition(" ")
        if not re.fullmatch(r"[1-9]\d{0,5}", number):
            raise ValueError(f"{short(text)}: how many? Write for instance '{EXAMPLES[kind]}'")
        count = int(number)
    found = _REST.fullmatch(f" {rest}" if rest else "")
    if found is None:
        raise ValueError(
            f"{short(text)}: {short(rest)} is not understood. After {word!r} may come "
            f"'within 1 pp' and 'at 99 %', in this order"
        )
    within, level = (float(Decimal(number) / 100) if number else None for number in found.groups())
    if kind == "sign" and within is not None:
        raise ValueError(
            f"{short(text)}: a sign has no size. Write 'sign', or '{EXAMPLES['drop']}'"
        )
    if kind == "drop" and within is None:
        raise ValueError(f"{short(text)}: how exactly? Write for instance '{EXAMPLES[kind]}'")
    if within is not None and not 0 < within < 1:
        raise ValueError(f"{short(text)}: 'within' takes more than 0 and less than 100 pp")
    if level is not None and not 0.5 <= level < 1:
        raise ValueError(f"{short(text)}: 'at' takes 50 % or more, and less than 100 %")
    return Question(kind, count, within, CONFIDENCE if level is None else level)

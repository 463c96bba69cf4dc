"""Define the questions of the setting `until`, which ends a measurement."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Literal

from tracker.schema.errors import did_you_mean
from tracker.schema.safe_yaml import short_text

QuestionKind = Literal["drop", "top", "prune", "sign"]

QUESTION_EXAMPLES: Mapping[QuestionKind, str] = {
    "drop": "drop within 2 pp",
    "top": "top 5",
    "prune": "prune 8",
    "sign": "sign",
}
"""Kind of question → an example; `within 1 pp` and `at 99 %` may follow."""

DEFAULT_CONFIDENCE = 0.95
"""Default probability that all statements about the runs of a cell are true."""

_NUMBER = r"(\d+(?:\.\d+)?)"
_QUALIFIERS = re.compile(rf"(?: within {_NUMBER} ?pp)?(?: at {_NUMBER} ?%)?")


@dataclass(frozen=True)
class Question:
    """A question about the accuracy drops of all runs of a model.

    Attributes:
        kind: Kind of the question. The answer to a `drop` question is the size of each accuracy
            drop. The answer to a `top` question is the list of the runs with the largest drops. The
            answer to a `prune` question is the list of the runs with the smallest drops. The answer
            to a `sign` question is the list of the runs whose drop is not 0.
        count: Number of runs to find for `top` and `prune`; None for `drop` and `sign`.
        within: Tolerance as a fraction; None for no tolerance. In a `drop` question, the tolerance
            is the maximum half width of an interval. If the drops of two runs differ by at most the
            tolerance, the answer to a `top` or `prune` question may contain either run.
        level: Confidence level, the probability that the answer is right.
    """

    kind: QuestionKind
    count: int | None = None
    within: float | None = None
    level: float = DEFAULT_CONFIDENCE

    def __str__(self) -> str:
        words = [str(self.kind)]
        if self.count is not None:
            words.append(str(self.count))
        if self.within is not None:
            words.append(f"within {100 * self.within:.10g} pp")
        if self.level != DEFAULT_CONFIDENCE:
            words.append(f"at {100 * self.level:.10g} %")
        return " ".join(words)

    def fits(self, runs: int) -> bool:
        """Return whether there are enough runs for the question, e.g. at least 6 for `top 5`."""
        return self.count is None or self.count < runs

    def check_runs(self, runs: int) -> None:
        """Raise ValueError if there are too few runs for the question, e.g. 5 for `top 5`."""
        if self.count is not None and not self.fits(runs):
            question, min_runs = f"{self.kind} {self.count}", self.count + 1
            suggestion = f"; write at most '{self.kind} {runs - 1}'" if runs > 1 else ""
            raise ValueError(
                f"the question '{question}' needs at least {min_runs} runs, not {runs}{suggestion}"
            )


def parse_question(text: str) -> Question:
    """Parse a question of the setting `until`.

    Args:
        text: Text such as `drop within 2 pp`, `top 5`, `top 5 within 1 pp`, `prune 8` or `sign`. A
            final `at 99 %` sets the confidence (default: 95 %).

    Returns:
        The parsed question.

    Raises:
        ValueError: The text is not a valid question.

    Examples:
        >>> parse_question("top 5 within 1 pp")
        Question(kind='top', count=5, within=0.01, level=0.95)
        >>> str(parse_question("drop  within 0.5pp at 99%"))
        'drop within 0.5 pp at 99 %'
    """
    word, _, rest = " ".join(text.split()).partition(" ")
    kind, count = next((kind for kind in QUESTION_EXAMPLES if kind == word), None), None
    if kind is None:
        near, examples = did_you_mean(word, QUESTION_EXAMPLES), QUESTION_EXAMPLES.values()
        listing = ", ".join(map(repr, examples))
        raise ValueError(f"invalid question {short_text(text)}.{near} Examples: {listing}")
    quoted, example = short_text(text), QUESTION_EXAMPLES[kind]
    if kind in ("top", "prune"):
        number, _, rest = rest.partition(" ")
        if not re.fullmatch(r"[1-9]\d{0,5}", number):
            raise ValueError(f"{quoted} does not give the number of runs; write e.g. '{example}'")
        count = int(number)
    match = _QUALIFIERS.fullmatch(f" {rest}" if rest else "")
    if match is None:
        endings = "A question can end with 'within 1 pp' and 'at 99 %', in this order"
        raise ValueError(f"{quoted} has the invalid ending {short_text(rest)}. {endings}")
    within, level = (float(Decimal(number) / 100) if number else None for number in match.groups())
    if kind == "sign" and within is not None:
        drop_example = QUESTION_EXAMPLES["drop"]
        raise ValueError(
            "the question 'sign' allows no tolerance such as 'within 1 pp'. "
            f"Instead of {quoted}, write 'sign' or '{drop_example}'"
        )
    if kind == "drop" and within is None:
        raise ValueError(f"{quoted} does not give the tolerance; write e.g. '{example}'")
    if within is not None and not 0 < within < 1:
        raise ValueError(
            f"invalid tolerance in {quoted}; expected more than 0 and less than 100 pp"
        )
    if level is not None and not 0.5 <= level < 1:
        raise ValueError(
            f"invalid confidence in {quoted}; expected at least 50 % and less than 100 %"
        )
    return Question(kind, count, within, DEFAULT_CONFIDENCE if level is None else level)

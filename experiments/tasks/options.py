"""Find the answer options of multiple-choice questions in generated texts."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any


def find_options(
    texts: Iterable[Sequence[str]], documents: Iterable[Mapping[str, Any]]
) -> Iterator[list[str]]:
    """Yield the option that each document's texts name, as a filter of lm-eval."""
    for responses, document in zip(texts, documents, strict=True):
        yield [find_option(response, list_options(document)) for response in responses]


def list_options(document: Mapping[str, Any]) -> list[str]:
    """List the options of a document of capitals or sciq."""
    if "cities" in document:
        return list(document["cities"])
    names = ("distractor1", "distractor2", "distractor3", "correct_answer")
    return [document[name] for name in names]


def find_option(text: str, options: Sequence[str]) -> str:
    """Return the option that a text names first; "" if it names none.

    An option counts only as a whole word or phrase. Of two options at the same position, the longer
    one is returned.
    """
    matches = []
    for option in options:
        pattern = rf"(?<!\w){re.escape(option.strip())}(?!\w)"
        if match := re.search(pattern, text, re.IGNORECASE):
            matches.append((match.start(), -len(option), match[0]))
    return min(matches)[2] if matches else ""

"""Making text fit to be shown: no password in it, and nothing that a terminal or a page obeys."""

from __future__ import annotations

import re
from collections.abc import Sequence
from urllib.parse import quote, unquote

_OBEYED = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f"  # control characters but tab and newline
    "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"  # what turns the direction of reading
    "\u2028\u2029\ud800-\udfff]"  # other line ends, and halves of characters
)


def harmless(text: str) -> str:
    """Replace the characters that a terminal, a page or a file obeys instead of showing them.

    Args:
        text: Any text, e.g. a name that somebody else chose.

    Returns:
        The text with U+FFFD for each of them; tabs and newlines stay.
    """
    return _OBEYED.sub("\ufffd", text)


def masked(text: str, secrets: Sequence[str | None] = ()) -> str:
    """Hide passwords before a text is shown or kept.

    Args:
        text: What a user typed or a library said.
        secrets: What must not be seen, as it is and as it is quoted in an address.

    Returns:
        The text without them, and without what looks like a password in an address.
    """
    for secret in filter(None, secrets):
        for form in (secret, unquote(secret), quote(secret, safe="")):
            text = text.replace(form, "***")
    text = re.sub(r"://\S*@", "://***@", text)
    return re.sub(r"(?i)\b(password|token)=[^&\s]+", r"\1=***", text)

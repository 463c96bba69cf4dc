"""Making text fit to be shown: no password in it, and nothing that a terminal or a page obeys."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from urllib.parse import quote, unquote

_OBEYED = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f"  # control characters but tab and newline
    "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"  # what turns the direction of reading
    "\u2028\u2029\ud800-\udfff]"  # other line ends, and halves of characters
)


def harmless(text: str) -> str:
    """Replace what a terminal, a page or a file obeys instead of showing by U+FFFD.

    Tabs and newlines stay.
    """
    return _OBEYED.sub("\ufffd", text)


def capital(text: str) -> str:
    """Begin a text with a capital letter."""
    return text[:1].upper() + text[1:]


HALF = "half of a character; write the character itself"
"""What is said of a text that is not writable."""


def is_writable(text: str) -> bool:
    """Say whether a text can be written and hashed: it holds no half of a character."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


_MARKUP = re.compile(r"[\\`\[\]|]|:(?=//)|(?<=www)\.", re.IGNORECASE)


def as_markdown(text: str) -> str:
    """Write a text so that Markdown shows it: no HTML, code, link or image, no end of a cell."""
    return _MARKUP.sub(r"\\\g<0>", html.escape(" ".join(text.split()), quote=False))


def as_code(text: str) -> str:
    """Write a text as code in Markdown, which no backtick within it ends."""
    return f"`{' '.join(text.split()).replace('`', '')}`"


def as_cell(text: str) -> str:
    """Write a text so that a spreadsheet shows it instead of computing it as a formula."""
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t", "\r", "\n")) else text


_SECRET = re.compile(
    r"(?i)((?:\b(?:password|token)|[?&;](?:sig|[\w.-]*"
    r"(?:key|token|secret|passw|pwd|auth|signature|credential)[\w.-]*))=)"
    r"[^&\s]+?(?=['\"]?(?:[&\s]|$))"
)
"""A secret in a setting or in the query of an address, up to the quote that may close it."""


def masked(text: str, secrets: Sequence[str | None] = ()) -> str:
    """Hide passwords before a text is shown or kept.

    `secrets` must not be seen, as they are and as they are quoted in an address; nor must what
    looks like a password in an address.
    """
    for secret in filter(None, secrets):
        for form in (secret, unquote(secret), quote(secret, safe="")):
            text = text.replace(form, "***")
    text = re.sub(r"://\S*@", "://***@", text)
    return _SECRET.sub(r"\1***", text)

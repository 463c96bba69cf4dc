"""Escape text for terminals, Markdown and CSV files, and mask passwords in text."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from urllib.parse import quote, unquote

_CONTROL_CHARACTERS = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f"  # control characters but tab and newline
    "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"  # marks of the direction of reading
    "\u2028\u2029\ud800-\udfff]"  # other line ends, and surrogates
)


def replace_controls(text: str) -> str:
    """Replace control characters by U+FFFD (�).

    Tabs and newlines are not replaced.
    """
    return _CONTROL_CHARACTERS.sub("\ufffd", text)


def capitalise(text: str) -> str:
    """Return a text with its first letter in upper case."""
    return text[:1].upper() + text[1:]


HALF_CHARACTER = "the text contains an unpaired surrogate; write the character itself"
"""Error message for a text that cannot be encoded (see `is_writable`)."""


def is_writable(text: str) -> bool:
    """Return whether a text can be encoded as UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


_MARKUP = re.compile(r"[\\`\[\]|]|:(?=//)|(?<=www)\.", re.IGNORECASE)


def escape_markdown(text: str) -> str:
    """Escape a text so that Markdown shows it literally, without HTML, links or code."""
    return _MARKUP.sub(r"\\\g<0>", html.escape(" ".join(text.split()), quote=False))


def markdown_code(text: str) -> str:
    """Format a text as inline code in Markdown, and remove backticks from the text."""
    return f"`{' '.join(text.split()).replace('`', '')}`"


def escape_cell(text: str) -> str:
    """Escape a text so that spreadsheet programs do not execute it as a formula."""
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t", "\r", "\n")) else text


_SECRET = re.compile(
    r"(?i)((?:\b(?:password|token)|[?&;](?:sig|[\w.-]*"
    r"(?:key|token|secret|passw|pwd|auth|signature|credential)[\w.-]*))=)"
    r"[^&\s]+?(?=['\"]?(?:[&\s]|$))"
)
"""Pattern of a secret in a setting or in the query of a URL, without a closing quotation mark."""


def mask_secrets(text: str, secrets: Sequence[str | None] = ()) -> str:
    """Replace the texts in `secrets`, and passwords in URLs, by `***`."""
    for secret in filter(None, secrets):
        for variant in (secret, unquote(secret), quote(secret, safe="")):
            text = text.replace(variant, "***")
    text = re.sub(r"://\S*@", "://***@", text)
    return _SECRET.sub(r"\1***", text)

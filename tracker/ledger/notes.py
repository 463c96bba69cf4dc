"""Small JSON files that state a digest of what they say: a flipped bit or an edit is noticed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from tracker.core.provenance import content_hash
from tracker.ledger.files import write_text

_DIGEST = "digest"


def sealed(content: Mapping[str, Any]) -> str:
    """Write a note's text: anything that JSON can hold without a `digest`, which is added."""
    return json.dumps({**content, _DIGEST: content_hash(content)}, indent=2)


def unsealed(text: str | bytes) -> dict[str, Any]:
    """Read a note's text; ValueError if it is no note, or not what was written."""
    try:
        content = json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(content, dict):
        raise ValueError("it holds no JSON object")
    if content.pop(_DIGEST, None) != content_hash(content):
        raise ValueError("its digest is not that of what it says: it was edited or damaged")
    return content


def write_note(path: Path, content: Mapping[str, Any]) -> None:
    """Write a note atomically."""
    write_text(path, sealed(content))


def read_note(path: Path) -> dict[str, Any]:
    """Read a note that can be made again: empty when missing or damaged."""
    try:
        return unsealed(path.read_bytes())
    except (OSError, ValueError):
        return {}


def reason(error: OSError | ValueError) -> str:
    """Say in a few words why a file cannot be used."""
    if isinstance(error, ValidationError):
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"]))
        return f"{place}: {first['msg']}" if place else first["msg"]
    if isinstance(error, UnicodeDecodeError):
        return "it is no UTF-8 text"
    if isinstance(error, OSError):
        return error.strerror or str(error)
    return str(error).splitlines()[0]

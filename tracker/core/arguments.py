"""Settings in somebody else's words: what lm-eval, transformers and chat templates are told.

They are kept as canonical JSON, which can be compared and hashed.
"""

from __future__ import annotations

import ast
import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator

from tracker.core.text import HALF, is_writable

FORM = "write {key: value, …}, or key=value,key=value as for lm-eval"


def _canonical(given: object) -> object:
    """Read settings as YAML gives them, as W&B passes them on, or as lm-eval's users type them."""
    if isinstance(given, str):
        given = _typed(given)
    if not isinstance(given, dict) or not all(isinstance(key, str) for key in given):
        raise ValueError(f"it is no set of settings; {FORM}")
    try:
        said = json.dumps(given, sort_keys=True, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError):
        raise ValueError("it holds what JSON cannot say; write texts, numbers, lists") from None
    if not is_writable(said):
        raise ValueError(f"it holds {HALF}")
    return said


def _typed(text: str) -> Any:
    # `${args_json}` gives JSON, `${args}` the repr of a dict.
    for read in (json.loads, ast.literal_eval):
        with suppress(ValueError, SyntaxError, RecursionError):
            if isinstance(found := read(text), dict):
                return found
    pairs = [part.partition("=") for part in text.split(",") if part.strip()]
    if not pairs or not all(sign and key.strip() for key, sign, _ in pairs):
        raise ValueError(f"it is no set of settings; {FORM}")
    return {key.strip(): _value(value.strip()) for key, _, value in pairs}


def _value(text: str) -> Any:
    """Read a value as lm-eval does."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        with suppress(ValueError):
            return kind(text)
    return text


Arguments = Annotated[str, BeforeValidator(_canonical)]


def expanded(path: str | Path) -> Path:
    """Return a path with its ~ replaced by a home folder, or unchanged if there is none."""
    return Path(os.path.expanduser(path))  # noqa: PTH111  Path.expanduser raises RuntimeError


def decoded(arguments: str | None) -> dict[str, Any]:
    """Give settings as what they say; nothing said is an empty dict."""
    found: dict[str, Any] = json.loads(arguments) if arguments else {}
    return found

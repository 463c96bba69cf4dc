"""What the engine may take of the memory, and keeping it once it is taken."""

from __future__ import annotations

import ctypes
import platform
from typing import Any

from tracker.core.model_parts import experts_of_a_token

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4
"""Parameters of glibc's `mallopt(3)`."""


def keep_freed_memory() -> None:
    """Let this process keep freed memory instead of returning it to the system after each use.

    By default glibc maps every large block anew, and the first touch of new memory costs several
    times a reuse. Elsewhere than on glibc this does nothing.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    mallopt = ctypes.CDLL(None).mallopt
    mallopt(_MMAP_MAX, 0)
    mallopt(_TRIM_THRESHOLD, 2**31 - 1)
    mallopt(_TOP_PAD, 64 * 2**20)


def stream_bytes(model: Any) -> int:
    """Estimate how many bytes one token of one stream takes at most, inside a layer.

    A mixture holds a token once for each expert that it goes to: before, inside and behind it.
    """
    config = model.config.get_text_config()

    def width(name: str, otherwise: int) -> int:
        found = getattr(config, name, None) or otherwise
        return found if isinstance(found, int) else max(found)

    between = width("intermediate_size", 4 * config.hidden_size)
    of_expert = 2 * config.hidden_size + 3 * width("moe_intermediate_size", between)
    wide = 6 * config.hidden_size + max(3 * between, experts_of_a_token(config) * of_expert)
    return int(wide * model.dtype.itemsize)

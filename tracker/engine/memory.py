"""Keeping freed memory: on a CPU the engine's time goes into large short-lived tensors."""

from __future__ import annotations

import ctypes
import platform

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

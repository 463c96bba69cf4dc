"""What a reader needs to repeat a measurement: hashes, versions, the machine."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from tracker.core.distribution import __version__

PACKAGES = ("torch", "transformers", "tokenizers", "lm-eval", "datasets", "numpy")
"""The packages besides tracker itself that can change a number, as pip calls them."""
_HARDWARE = ("platform", "device", "accelerator")
_STACK = ("tracker", *(name for name in PACKAGES if name != "tokenizers"), *_HARDWARE)
"""What else can: tracker, the kind of the processor, the device and its make; tokens have
digests."""

SAME_VERSIONS = "the same versions"
_READERS = ("transformers", "tokenizers", "lm-eval")
"""What decides as which tokens a text is read."""

WEIGHTS = "weights"
"""Under this it stands in which format of fewer bits the checkpoint keeps them; where it does."""
TOKENISATION = "tokenisation"
"""The digest of a text's tokens, which is equal where texts are read as the same tokens."""


def package_versions() -> dict[str, str]:
    """Look up the versions of the packages that can change a number; `not installed` if none."""
    return {"tracker": __version__, **{name: _version(name) for name in PACKAGES}}


@cache
def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def machine() -> dict[str, str]:
    """Describe the machine in words that identify nobody."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "cores": str(cores),
    }


def united(found: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """Put together who measured the parts of something: where they differ, every value."""
    names = dict.fromkeys(name for each in found for name in each)
    return {n: ", ".join(sorted({each[n] for each in found if n in each})) for n in names}


def differences(found: Sequence[Mapping[str, str]]) -> str:
    """Say in what, that can change a number, the parts of something were measured differently.

    For example `torch 2.12.0, 2.13.0; device cpu, cuda`; empty where nothing differs.
    """
    parts = [{n: each.get(n, "unknown").partition(":")[0] for n in _STACK} for each in found]
    differing = (n for n in _STACK if len({part[n] for part in parts}) > 1)
    return "; ".join(f"{n} {united(parts)[n]}" for n in differing)


def readers(stack: Mapping[str, str], other: Mapping[str, str]) -> str:
    """Name the versions of what reads texts, of those that differ from another measurement's."""
    differing = [n for n in _READERS if n in stack and stack[n] != other.get(n)]
    return ", ".join(f"{n} {stack[n]}" for n in differing) or SAME_VERSIONS


def reads_otherwise(stack: Mapping[str, str], other: Mapping[str, str]) -> bool:
    """Check whether two measurements state that they read one text as different tokens."""
    return len({stack.get(TOKENISATION), other.get(TOKENISATION)} - {None}) > 1


def content_hash(value: object) -> str:
    """Hash a value's canonical JSON to SHA-256 in hexadecimal; other objects count by `str`."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def file_hash(paths: Iterable[Path]) -> str:
    """Hash files in any order, by bytes and the last part of each name; SHA-256 in hexadecimal."""
    digest = hashlib.sha256()
    for name, content in sorted((path.name, _digest(path)) for path in paths):
        digest.update(name.encode() + b"\0" + content)
    return digest.hexdigest()


def _digest(path: Path) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def file_stamp(paths: Iterable[Path | os.DirEntry[str]]) -> list[tuple[str, int, int]]:
    """Describe files without reading them: enough to notice that one has changed.

    (path, size in bytes, modification time in ns) of each, sorted.
    """
    stats = [(path, path.stat()) for path in paths]
    return sorted((os.fspath(path), stat.st_size, stat.st_mtime_ns) for path, stat in stats)

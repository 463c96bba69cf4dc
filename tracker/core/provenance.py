"""Record hashes, versions and the machine of a measurement."""

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
"""Packages besides tracker that can change a number, under their names for pip."""
_HARDWARE = ("platform", "device", "accelerator")
_STACK = ("tracker", *(name for name in PACKAGES if name != "tokenizers"), *_HARDWARE)
"""Everything that can change a number: packages, processor, device and its make. Tokenizers are
compared by digests of tokens instead."""

SAME_VERSIONS = "the same versions"
_READERS = ("transformers", "tokenizers", "lm-eval")
"""Packages that decide the tokens of a text."""

WEIGHTS = "weights"
"""Key of the checkpoint's quantised format, where it has one."""
TOKENISATION = "tokenisation"
"""Key of the digest of a text's tokens, which is equal for equal tokens."""


def package_versions() -> dict[str, str]:
    """Return the versions of tracker and `PACKAGES`; `not installed` for absent ones."""
    return {"tracker": __version__, **{name: _version(name) for name in PACKAGES}}


@cache
def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def machine() -> dict[str, str]:
    """Return Python version, platform and cores, which identify no person or host."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "cores": str(cores),
    }


def united(found: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """Merge the provenances of several parts; values that differ are all listed."""
    names = dict.fromkeys(name for each in found for name in each)
    return {n: ", ".join(sorted({each[n] for each in found if n in each})) for n in names}


def differences(found: Sequence[Mapping[str, str]]) -> str:
    """List the differences between provenances that can change a number.

    For example `torch 2.12.0, 2.13.0; device cpu, cuda`; empty if nothing differs.
    """
    parts = [{n: each.get(n, "unknown").partition(":")[0] for n in _STACK} for each in found]
    differing = (n for n in _STACK if len({part[n] for part in parts}) > 1)
    return "; ".join(f"{n} {united(parts)[n]}" for n in differing)


def readers(stack: Mapping[str, str], other: Mapping[str, str]) -> str:
    """List the tokenising packages whose versions differ from another measurement's."""
    differing = [n for n in _READERS if n in stack and stack[n] != other.get(n)]
    return ", ".join(f"{n} {stack[n]}" for n in differing) or SAME_VERSIONS


def reads_otherwise(stack: Mapping[str, str], other: Mapping[str, str]) -> bool:
    """Check whether two measurements record different tokens for the same text."""
    return len({stack.get(TOKENISATION), other.get(TOKENISATION)} - {None}) > 1


def content_hash(value: object) -> str:
    """Return the SHA-256 of a value's canonical JSON in hexadecimal; objects use `str`."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def file_hash(paths: Iterable[Path]) -> str:
    """Return the SHA-256 of files' names and contents in hexadecimal, in any order."""
    digest = hashlib.sha256()
    for name, content in sorted((path.name, _digest(path)) for path in paths):
        digest.update(name.encode() + b"\0" + content)
    return digest.hexdigest()


def _digest(path: Path) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def file_stamp(paths: Iterable[Path | os.DirEntry[str]]) -> list[tuple[str, int, int]]:
    """Return path, size in bytes and modification time in ns of each file, sorted.

    This suffices to notice a changed file without reading it.
    """
    stats = [(path, path.stat()) for path in paths]
    return sorted((os.fspath(path), stat.st_size, stat.st_mtime_ns) for path, stat in stats)

"""Record file hashes, package versions and the machine of a measurement."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from tracker.schema.distribution import __version__

RECORDED_PACKAGES = ("torch", "transformers", "tokenizers", "lm-eval", "datasets", "numpy")
"""Names (for pip) of other packages whose versions can change a result."""
_HARDWARE = ("platform", "device", "accelerator")
_STACK = ("tracker", *(name for name in RECORDED_PACKAGES if name != "tokenizers"), *_HARDWARE)
"""Keys of everything that can change a result: packages, processor and device. The package
`tokenizers` is excluded, because digests of tokens are compared instead."""

SAME_VERSIONS = "the same versions"
_TOKENISING_PACKAGES = ("transformers", "tokenizers", "lm-eval")
"""Packages whose version can change the tokens of a text."""

WEIGHTS_KEY = "weights"
"""Key of the format of a quantised checkpoint; absent for other checkpoints."""
TOKENISATION_KEY = "tokenisation"
"""Key of the digest of a text's tokens, which is equal for equal tokens."""


def package_versions() -> dict[str, str]:
    """Return the versions of tracker and of the packages in `RECORDED_PACKAGES`."""
    return {"tracker": __version__, **{name: _version(name) for name in RECORDED_PACKAGES}}


@cache
def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def describe_machine() -> dict[str, str]:
    """Return Python version, platform and number of cores, without user names or host names."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    system = f"{platform.system()} {platform.machine()}"
    return {"python": platform.python_version(), "platform": system, "cores": str(cores)}


def merge_provenances(stacks: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """Merge provenance records; several values of a key are listed with commas."""
    names = dict.fromkeys(name for stack in stacks for name in stack)
    return {n: ", ".join(sorted({stack[n] for stack in stacks if n in stack})) for n in names}


def list_differences(stacks: Sequence[Mapping[str, str]]) -> str:
    """List differences between provenance records that can change a result.

    The result is a text such as `torch 2.12.0, 2.13.0; device cpu, cuda`; empty without
    differences.
    """
    parts = [{n: stack.get(n, "unknown").partition(":")[0] for n in _STACK} for stack in stacks]
    names = (n for n in _STACK if len({part[n] for part in parts}) > 1)
    return "; ".join(f"{n} {merge_provenances(parts)[n]}" for n in names)


def tokeniser_differences(stack: Mapping[str, str], other: Mapping[str, str]) -> str:
    """List tokenisation packages whose versions differ between two measurements.

    The text gives the versions in `stack`, such as `transformers 5.0.0`. If no versions differ, the
    text is `SAME_VERSIONS`.
    """
    names = [n for n in _TOKENISING_PACKAGES if n in stack and stack[n] != other.get(n)]
    return ", ".join(f"{n} {stack[n]}" for n in names) or SAME_VERSIONS


def has_other_tokens(stack: Mapping[str, str], other: Mapping[str, str]) -> bool:
    """Return whether two measurements split the same text into different tokens.

    `stack` and `other` contain digests of the tokens. If a digest is missing, the result is False.
    """
    return len({stack.get(TOKENISATION_KEY), other.get(TOKENISATION_KEY)} - {None}) > 1


def content_hash(value: object) -> str:
    """Return the SHA-256 hash (hex) of a value's sorted JSON."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def file_hash(paths: Iterable[Path]) -> str:
    """Return the SHA-256 hash (hex) of the names and contents of files."""
    digest = hashlib.sha256()
    for name, content in sorted((path.name, _digest(path)) for path in paths):
        digest.update(name.encode() + b"\0" + content)
    return digest.hexdigest()


def _digest(path: Path) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def file_stamp(paths: Iterable[Path | os.DirEntry[str]]) -> list[tuple[str, int, int]]:
    """Return the path, size (bytes) and modification time (ns) of each file."""
    stats = [(path, path.stat()) for path in paths]
    return sorted((os.fspath(path), stat.st_size, stat.st_mtime_ns) for path, stat in stats)

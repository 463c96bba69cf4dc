"""Load extensions of other Python packages by their entry points."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Collection
from importlib.metadata import EntryPoint, entry_points
from typing import TypeVar

Extension = TypeVar("Extension")
log = logging.getLogger(__name__)
EXTENSION_KINDS = ("proxies", "studies", "tracking", "formats", "sources", "executors")
"""Kinds of extensions; the entry points of a kind are in the group `layer_tracker.KIND`."""
_VALID_NAME = re.compile(r"[a-z][a-z0-9_]*")


def load_extensions(
    group: str, check: Callable[[object], Extension], reserved: Collection[str] = ()
) -> dict[str, Extension]:
    """Load the extensions of one entry-point group; skip broken extensions with a warning.

    Args:
        group: Entry-point group after `layer_tracker.`, such as `tracking`.
        check: Function that converts a loaded object to an extension, and raises TypeError or
            ValueError if the object is invalid.
        reserved: Names of tracker's own objects, which extensions must not use.

    Returns:
        The extensions, keyed by the name of their entry point.
    """
    extensions: dict[str, Extension] = {}
    for point in sorted(entry_points(group=f"layer_tracker.{group}"), key=_sort_key):
        try:
            if point.name in reserved or point.name in extensions:
                raise ValueError(f"the name {point.name!r} is taken")
            if not _VALID_NAME.fullmatch(point.name):
                raise ValueError(
                    "a name consists of lower-case letters, digits and _, and begins with a letter"
                )
            extension = check(point.load())
            if (name := getattr(extension, "name", point.name)) != point.name:
                raise ValueError(
                    f"the extension is named {name!r}; give its entry point the same name"
                )
            extensions[point.name] = extension
        except (Exception, SystemExit) as error:  # any code may run there
            log.warning("%s", describe_failure(point, error))
            log.debug("%s", point.value, exc_info=True)
    return extensions


def list_extensions() -> list[tuple[str, str]]:
    """List the installed extensions as pairs (kind, names separated by commas).

    Kinds without an installed extension are left out.
    """
    points = entry_points()
    kinds_and_names = []
    for kind in EXTENSION_KINDS:
        group = sorted(points.select(group=f"layer_tracker.{kind}"), key=_sort_key)
        names = (f"{p.name} ({p.dist.name} {p.dist.version})" if p.dist else p.name for p in group)
        if group:
            kinds_and_names.append((kind, ", ".join(names)))
    return kinds_and_names


def _sort_key(point: EntryPoint) -> tuple[str, str]:
    return point.name, point.dist.name if point.dist else ""


def describe_failure(point: EntryPoint, error: BaseException) -> str:
    """Return a one-line message with an extension's name, its package and the error."""
    package = f" of {point.dist.name} {point.dist.version}" if point.dist else ""
    lines = str(error).splitlines() or [""]
    reason = f"{type(error).__name__}: {lines[0]}"
    return f"the extension {point.name!r} ({point.group}){package} is left out: {reason}"

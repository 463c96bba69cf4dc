"""Render sentences from templates, separate from the code that computes their figures."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from tracker.core import formats
from tracker.core.text import capital

WRITERS: tuple[Callable[..., str], ...] = (
    capital,
    formats.counted,
    formats.fixed,
    formats.interval,
    formats.level_text,
    formats.listed,
    formats.nats,
    formats.p_value,
    formats.points,
    formats.three_digits,
    formats.two_digits,
    formats.with_interval,
)
"""The functions that write figures in templates, under their names."""


class TextTemplate:
    """Texts of a template; each macro renders figures.

    Line breaks of a macro become spaces in its text; a line of three dashes separates two texts.

    Args:
        package: Package whose folder `templates` has the template.
        name: Name of the template.
        **names: Names that the template may use, besides `WRITERS`.
    """

    def __init__(self, package: str, name: str, **names: Any) -> None:
        self._package, self._name, self._names = package, name, names

    def all(self, macro: str, *figures: Any) -> list[str]:
        """Render the texts of a macro; empty if it writes nothing."""
        template = _environment(self._package).get_template(f"{self._name}.j2", None, self._names)
        rendered = str(getattr(template.module, macro)(*figures))
        return [*filter(None, map(_joined, re.split(r"(?m)^---$", rendered)))]

    def one(self, macro: str, *figures: Any) -> str:
        """Render a macro of one text; "" if it writes nothing."""
        return " ".join(self.all(macro, *figures))


def _joined(lines: str) -> str:
    """Join the lines of a text, without a space before punctuation."""
    return re.sub(r" (?=[.,;:)]+( |$))", "", re.sub(r"[ \n]+", " ", lines).strip(" "))


@cache
def _environment(package: str) -> Environment:
    environment = templates_of(package)
    environment.globals |= {write.__name__: write for write in WRITERS}
    environment.filters |= {write.__name__: write for write in WRITERS}
    environment.filters["thousands"] = "{:,}".format
    return environment


def templates_of(package: str, **options: Any) -> Environment:
    """Open the templates of a package, where an undefined name is an error."""
    return Environment(
        loader=PackageLoader(package),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        **options,
    )

"""Texts of templates: what is said of figures, apart from the code that computes them."""

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
    """The texts of a template, each a macro that renders figures.

    Line breaks of a macro are spaces in its text; a line of three dashes separates two texts.

    Args:
        package: The package whose folder `templates` has the template.
        name: The template's name.
        **names: What the template calls by these names, besides `WRITERS`.
    """

    def __init__(self, package: str, name: str, **names: Any) -> None:
        self._package, self._name, self._names = package, name, names

    def all(self, macro: str, *figures: Any) -> list[str]:
        """Render the texts of a macro; none where it says nothing."""
        template = _environment(self._package).get_template(f"{self._name}.j2", None, self._names)
        rendered = str(getattr(template.module, macro)(*figures))
        return [*filter(None, map(_joined, re.split(r"(?m)^---$", rendered)))]

    def one(self, macro: str, *figures: Any) -> str:
        """Render a macro of one text; empty where it says nothing."""
        return " ".join(self.all(macro, *figures))


def _joined(lines: str) -> str:
    """Put the lines of a text behind each other; no space before a sign that ends a clause."""
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

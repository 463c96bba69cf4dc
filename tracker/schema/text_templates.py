"""Render sentences from templates."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any

from tracker.schema import formats
from tracker.schema.text import capitalise, escape_markdown, markdown_code

if TYPE_CHECKING:
    from jinja2 import Environment

FIGURE_WRITERS: tuple[Callable[..., object], ...] = (
    capitalise,
    escape_markdown,
    markdown_code,
    formats.count_text,
    formats.fixed_point,
    formats.interval_text,
    formats.level_text,
    formats.metric_format,
    formats.named_interval,
    formats.join_words,
    formats.nats_text,
    formats.p_value,
    formats.points,
    formats.round_count,
    formats.three_digits,
    formats.two_digits,
    formats.time_text,
    formats.figure_text,
)
"""Functions that format values; all templates can call these functions by their names."""


class TextTemplate:
    """Jinja template with macros that each render one or more texts.

    Line breaks in a macro become spaces in the text. A line of three dashes in a macro separates
    two texts.

    Args:
        package: Package whose folder `templates` contains the template.
        name: Name of the template.
        **names: Additional values and functions that the template can use by name.
    """

    def __init__(self, package: str, name: str, **names: Any) -> None:
        self._package, self._name, self._names = package, name, names

    def render_all(self, macro: str, *arguments: Any, **named: Any) -> list[str]:
        """Render a macro and return its texts; the list is empty if there is no text."""
        template = _environment(self._package).get_template(f"{self._name}.j2", None, self._names)
        rendered = str(getattr(template.module, macro)(*arguments, **named))
        return [*filter(None, map(_join_lines, re.split(r"(?m)^---$", rendered)))]

    def render(self, macro: str, *arguments: Any, **named: Any) -> str:
        """Render a macro and return its texts, joined by spaces; the result can be empty."""
        return " ".join(self.render_all(macro, *arguments, **named))


def _join_lines(lines: str) -> str:
    """Join the lines of a text with spaces, and remove spaces before punctuation."""
    return re.sub(r" (?=[.,;:)]+( |$))", "", re.sub(r"[ \n]+", " ", lines).strip(" "))


@cache
def _environment(package: str) -> Environment:
    environment = open_templates(package)
    environment.globals |= {write.__name__: write for write in FIGURE_WRITERS}
    environment.filters |= {write.__name__: write for write in FIGURE_WRITERS}
    environment.filters["thousands"] = "{:,}".format
    return environment


def open_templates(package: str, **options: Any) -> Environment:
    """Return a Jinja environment for the templates of a package.

    Rendering raises an error if a template uses an undefined name.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    return Environment(
        loader=PackageLoader(package),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        **options,
    )

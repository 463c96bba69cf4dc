"""Render the comparison of two or more models as a self-contained HTML page."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup

from tracker.schema.tables import Table, entry_text, heading_text
from tracker.schema.text_templates import open_templates


def render_comparison(sentences: Sequence[str], table: Table, details: Sequence[Table]) -> str:
    """Return the HTML text of the page.

    Args:
        sentences: The main results.
        table: Table of all differences.
        details: Tables of lost documents.

    Returns:
        The page; all texts are escaped.
    """
    environment = open_templates("tracker.report.page", autoescape=True)
    environment.globals |= {"entry_text": entry_text, "heading_text": heading_text}
    assert environment.loader is not None
    style = Markup(environment.loader.get_source(environment, "report.css")[0])
    template = environment.get_template("comparison.html.j2")
    return template.render(sentences=sentences, table=table, details=details, style=style)

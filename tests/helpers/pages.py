"""Read the tables of a page."""

from __future__ import annotations

import re
from types import SimpleNamespace
from xml.etree import ElementTree

HOSTILE = "<script>alert(1)</script>"


def read_page(page: str) -> SimpleNamespace:
    """Find every table by its id: its `headers`, and in `tables` its body as [text, reason]."""
    contents = SimpleNamespace(headers={}, tables={})
    for text in re.findall(r"<table.*?</table>", page, re.DOTALL):
        table = ElementTree.fromstring(text)
        name, (heads, *rows) = table.attrib["id"], table.iter("tr")
        contents.headers[name] = ["".join(head.itertext()).strip() for head in heads]
        contents.tables[name] = [[_read_entry(entry) for entry in row] for row in rows]
    return contents


def _read_entry(entry: ElementTree.Element) -> list[str]:
    abbr = entry.find(".//abbr")
    return ["".join(entry.itertext()).strip(), "" if abbr is None else abbr.attrib["title"]]


def parse_number(text: str) -> float:
    return float(text.replace("−", "-"))

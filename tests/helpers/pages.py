"""Read the tables of a page."""

from __future__ import annotations

import re
from types import SimpleNamespace
from xml.etree import ElementTree

HOSTILE = "<script>alert(1)</script>"


def read(page: str) -> SimpleNamespace:
    """Find every table by its id: its `headers`, and in `tables` its body as [text, reason]."""
    found = SimpleNamespace(headers={}, tables={})
    for text in re.findall(r"<table.*?</table>", page, re.DOTALL):
        table = ElementTree.fromstring(text)
        name, (heads, *rows) = table.attrib["id"], table.iter("tr")
        found.headers[name] = ["".join(head.itertext()).strip() for head in heads]
        found.tables[name] = [
            [
                [
                    "".join(entry.itertext()).strip(),
                    abbr.attrib["title"] if abbr is not None else "",
                ]
                for entry in row
                for abbr in [entry.find(".//abbr")]
            ]
            for row in rows
        ]
    return found


def number(text: str) -> float:
    return float(text.replace("−", "-"))

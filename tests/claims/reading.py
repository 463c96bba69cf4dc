"""What people read of a results folder, and which layers it names."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Mapping
from contextlib import redirect_stdout
from html.parser import HTMLParser
from pathlib import Path

from click.testing import CliRunner

from tracker import api
from tracker.cli import main
from tracker.cli.printing import print_cell

_UNREAD = {"script", "style", "table", "svg", "template", "button"}
_BLOCKS = {"p", "li", "h1", "h2", "h3", "h4", "figcaption", "summary", "div", "section", "td"}
_NUMBERS = r"\d+(?:–\d+)?"
_NAMED = re.compile(rf"\blayers? ({_NUMBERS}(?:(?:, | and | or ){_NUMBERS})*)")


class _Prose(HTMLParser):
    """Collects the text of a page that is no table: a line a block."""

    def __init__(self) -> None:
        super().__init__()
        self.lines = [""]
        self._unread = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._unread += tag in _UNREAD
        if tag in _BLOCKS:
            self.lines.append("")

    def handle_endtag(self, tag: str) -> None:
        self._unread -= tag in _UNREAD
        if tag in _BLOCKS:
            self.lines.append("")

    def handle_data(self, data: str) -> None:
        if not self._unread:
            self.lines[-1] += data


def sentences(text: str) -> Iterator[str]:
    """Take a text apart."""
    for line in text.splitlines():
        yield from (each for each in re.split(r"(?<=[.]) ", " ".join(line.split())) if each)


def named(sentence: str) -> set[int]:
    """Find the layers that a sentence names by number."""
    found: set[int] = set()
    for numbers in _NAMED.findall(sentence):
        for each in re.findall(_NUMBERS, numbers):
            first, _, last = each.partition("–")
            found |= set(range(int(first), int(last or first) + 1))
    return found


def read(results: Path) -> dict[str, list[str]]:
    """Read everything that is said of a results folder: where it is said → sentences."""
    page = _Prose()
    page.feed(api.report(results=results).files[0].read_text())
    runner = CliRunner()
    board = runner.invoke(main, ["leaderboard", "--results", str(results)])
    listed = runner.invoke(main, ["ls", "--results", str(results)])
    assert (board.exit_code, listed.exit_code) == (0, 0), board.output + listed.output
    terminal = io.StringIO()
    with redirect_stdout(terminal):
        for cell in api.ls(results):
            print_cell(cell)
    texts = {
        "page": "\n".join(page.lines),
        "leaderboard": board.output,
        "list": listed.output,
        "terminal": terminal.getvalue(),
    }
    return {where: [*sentences(text)] for where, text in texts.items()}


def false_statements(said: list[str], costs: Mapping[int, float]) -> list[str]:
    """List the sentences that name a layer which does not matter, as if it did.

    Which layers lose the same documents is another question, also where they lose by chance: the
    documents on which a model is undecided are the same ones for all.
    """
    return [
        sentence
        for sentence in said
        if named(sentence) - {*costs} and not sentence.startswith("These break the same documents")
    ]

from __future__ import annotations

import ast
from itertools import chain
from pathlib import Path

import pytest

from tests.tools import language

LONG = " ".join(["word"] * 31)


@pytest.mark.parametrize(
    ("code", "kinds"),
    [
        ('def load(path):\n    """Load a file."""\n    lines = path.read()\n', []),
        ("def load(path, kept=None):\n    pass\n", ["name"]),
        ("for each in range(3):\n    found = each\n", ["name", "name"]),
        ("class Cell:\n    places: int\n\n    def size(self, found): ...\n", ["name"]),
        ('def size():\n    """What it takes."""\n', ["docstring"]),
        ('class Costs:\n    """What does it take?"""\n', []),
        (f"MESSAGE = '{LONG}.'\n", ["long sentence"]),
        (f"'{LONG}.'\n", []),
        (f"MESSAGE = f'{LONG[:70]} {{size:,}} {LONG[70:]}.'\n", ["long sentence"]),
        (f"MESSAGE = '{LONG[:60]}. {LONG[60:].capitalize()}.'\n", []),
        (f'MESSAGE = """Examples:\n\n\b\n  {LONG}"""\n', []),
    ],
)
def test_a_module_breaks_the_rules(code: str, kinds: list[str]) -> None:
    tree = ast.parse(code)
    checks = (language.name_breaches, language.docstring_breaches, language.message_breaches)
    rows = chain.from_iterable(check(tree, "a.py") for check in checks)
    assert [row.kind for row in rows] == kinds


def test_a_name_has_one_meaning_in_a_package() -> None:
    codes = {
        "a.py": "DRAWS = 1\nlog = 2\n_OWN = 1\ndef size(): ...\n",
        "b.py": "DRAWS: int = 2\nlog = 2\n_OWN = 2\ndef size(): ...\ndef run(): ...\n",
        "tracker/api.py": "def run(): ...\n",  # a command, named like what it calls
    }
    rows = language.shared_names((name, ast.parse(code)) for name, code in codes.items())
    assert [(row.text, row.where) for row in rows] == [
        ("DRAWS", "a.py, b.py"),
        ("size", "a.py, b.py"),
    ]


def test_an_unknown_commit_is_refused() -> None:
    """Was: a traceback of git's exit code."""
    with pytest.raises(SystemExit, match="invalid commit '0000000'"):
        language.main(["0000000"])


def test_tables_and_headings_are_no_sentences() -> None:
    text = f"# {LONG}\n\n| {LONG} |\n| {LONG} |\n\n- Short.\n- {LONG}.\n"
    assert [*language.long_sentences(text)] == [f"{LONG}."]


def test_code_of_a_page_is_no_sentence(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(f"```\n{LONG}\n```\n\n    {LONG}\n\n{LONG}.\n")
    (tmp_path / "CONTRIBUTING.md").touch()
    (row,) = language.breaches(tmp_path)
    assert (row.kind, row.where, row.text) == ("long sentence", "README.md", f"{LONG}.")

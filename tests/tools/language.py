"""Check names, docstrings, sentences and commit subjects: `python -m tests.tools.language`.

With a commit as argument, the subjects of the commits since then are checked as well.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

ROOT = Path(__file__).parents[2]
NAMES = {
    *("found", "asked", "said", "told", "each", "one", "known", "kept", "there", "own", "some"),
    *("place", "places", "which", "what", "wanted", "tried", "meant", "begun", "beneath"),
    *("besides", "beside"),
}
"""Names of locals and parameters that are no noun of their type."""
BAD_STARTS = ("Say", "Tell", "What", "Whether", "How", "Let ")
"""Beginnings of a docstring that describe nothing."""
SHARED_NAMES = {"log", "main", "T", "P", "Array", "Layers"}
"""Names that mean the same in each module that defines them."""
HELP_MODULES = ("tracker/cli/", "tracker/schema/config.py", "tracker/search/settings.py")
"""Modules whose docstrings are the help of commands and options."""
COMMANDS = ("tracker/api.py", "tracker/cli/")
"""Modules whose functions are commands, named like what they call."""
MAX_WORDS = 30
MAX_SUBJECT = 72
_CODE = re.compile(r"^(`{3,}|~{3,}).*?^\1|^ {4}.*?$", re.DOTALL | re.MULTILINE)
"""Code of a page: between fences, or indented."""
_BLOCK = re.compile(r"\n\s*\n|\n\s*(?:[-*]|\d+\.)\s|\n(?=[|#>])|\n +[*\w]+: ")
_END = re.compile(r"[.!?][*)”’]*\s+(?=[^a-z])")
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass(frozen=True)
class Breach:
    """A breach of the language guide.

    Attributes:
        kind: The rule.
        where: The file and the line, or the page.
        text: The name or the text.
    """

    kind: str
    where: str
    text: str


def long_sentences(text: str) -> Iterator[str]:
    """Yield the sentences of a text that have too many words; tables have none."""
    for block in _BLOCK.split(text):
        if not block.lstrip().startswith(("|", "#", "<", "[", "\b")):
            yield from (s for s in _END.split(block.strip()) if len(s.split()) > MAX_WORDS)


def name_breaches(tree: ast.Module, where: str) -> Iterator[Breach]:
    """Yield the locals and parameters of a module that are no nouns.

    Fields of classes are left out: they are the keys of files that users have.
    """
    classes = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    fields = {id(n.target) for node in classes for n in node.body if isinstance(n, ast.AnnAssign)}
    for node in ast.walk(tree):
        if id(node) in fields:
            continue
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            name = node.id
        elif isinstance(node, ast.arg):
            name = node.arg
        else:
            continue
        if name in NAMES:
            yield Breach("name", f"{where}:{node.lineno}", name)


def docstring_breaches(tree: ast.Module, where: str) -> Iterator[Breach]:
    """Yield the docstrings of a module that begin with no verb of what is done."""
    for node in ast.walk(tree):
        if isinstance(node, (*_FUNCTIONS, ast.ClassDef, ast.Module)):
            first_line = (ast.get_docstring(node) or "").partition("\n")[0]
            is_question = first_line.endswith("?")  # as of a study
            if first_line.startswith(BAD_STARTS) and not is_question:
                yield Breach("docstring", f"{where}:{getattr(node, 'lineno', 1)}", first_line)


def message_breaches(tree: ast.Module, where: str) -> Iterator[Breach]:
    """Yield the sentences of a module's messages that are too long, and of help in docstrings."""
    for line, text in code_texts(tree, with_docstrings=where.startswith(HELP_MODULES)):
        for sentence in long_sentences(text):
            yield Breach("long sentence", f"{where}:{line}", sentence)


def code_texts(tree: ast.Module, with_docstrings: bool = False) -> Iterator[tuple[int, str]]:
    """Yield line and text of each string of a module, with `{…}` for what is filled in."""
    nodes = [*ast.walk(tree)]
    skipped = {
        id(part) for node in nodes if isinstance(node, ast.JoinedStr) for part in node.values
    }
    if not with_docstrings:
        skipped |= {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
    for node in nodes:
        if isinstance(node, ast.JoinedStr):
            parts = (v.value if isinstance(v, ast.Constant) else "{…}" for v in node.values)
            yield node.lineno, "".join(map(str, parts))
        elif (
            isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and id(node) not in skipped
        ):
            yield node.lineno, node.value


def shared_names(trees: Iterable[tuple[str, ast.Module]]) -> Iterator[Breach]:
    """Yield classes, constants and functions that several modules of a package define."""
    owners: dict[str, list[str]] = defaultdict(list)
    for where, tree in trees:
        for node in tree.body:
            if isinstance(node, ast.ClassDef) or (
                isinstance(node, _FUNCTIONS) and not where.startswith(COMMANDS)
            ):
                owners[node.name].append(where)
            elif isinstance(node, ast.Assign | ast.AnnAssign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                for target in targets:
                    if isinstance(target, ast.Name):
                        owners[target.id].append(where)
    for name, modules in sorted(owners.items()):
        if len(modules) > 1 and not name.startswith("_") and name not in SHARED_NAMES:
            yield Breach("shared name", ", ".join(modules), name)


def subject_breaches(base: str) -> Iterator[Breach]:
    """Yield the subjects since a commit that are too long."""
    command = ["git", "log", "--format=%h %s", f"{base}..HEAD"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if result.returncode:
        sys.exit(f"invalid commit {base!r}; give one that this checkout has")
    for commit, _, subject in (line.partition(" ") for line in result.stdout.splitlines()):
        if len(subject) > MAX_SUBJECT:
            yield Breach("commit subject", commit, subject)


def breaches(root: Path = ROOT) -> Iterator[Breach]:
    """Yield the breaches of a checkout."""
    folders = (root / "tracker", root / "tests")
    paths = sorted(chain.from_iterable(folder.rglob("*.py") for folder in folders))
    trees = [
        (str(path.relative_to(root)), ast.parse(path.read_text(encoding="utf-8"))) for path in paths
    ]
    package = [(where, tree) for where, tree in trees if where.startswith("tracker")]
    for where, tree in trees:
        yield from name_breaches(tree, where)
        yield from docstring_breaches(tree, where)
    for where, tree in package:
        yield from message_breaches(tree, where)
    yield from shared_names(package)
    for page in (root / "README.md", root / "CONTRIBUTING.md", *sorted(root.glob("docs/**/*.md"))):
        for sentence in long_sentences(_CODE.sub("", page.read_text(encoding="utf-8"))):
            yield Breach("long sentence", str(page.relative_to(root)), sentence)


def main(arguments: list[str]) -> int:
    """Print the breaches; return 1 if there are any."""
    rows = [*chain.from_iterable(map(subject_breaches, arguments)), *breaches()]
    for row in rows:
        print(f"{row.where}: {row.kind}: {' '.join(row.text.split())[:200]}")  # noqa: T201
    for kind, count in Counter(row.kind for row in rows).items():
        print(f"{count} × {kind}")  # noqa: T201
    return 1 if rows else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Draw texts and names at random to be judged out of context: `python -m tests.tools.readability`.

Readers who do not know the project mark each sentence plain, second reading or author needed, and
each name guessable or not.
"""

from __future__ import annotations

import argparse
import ast
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.tools.language import ROOT, code_texts

Function = ast.FunctionDef | ast.AsyncFunctionDef
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
MIN_WORDS, MAX_WORDS = 5, 80


def split_sentences(text: str) -> Iterator[str]:
    """Yield the sentences of a paragraph."""
    text = re.sub(r"\s+", " ", text).strip()
    for sentence in re.split(r"(?<=[.!?])\s+(?=[A-Z`\"*])", text):
        if MIN_WORDS <= len(sentence.split()) <= MAX_WORDS and re.search(r"[a-z]{3}", sentence):
            yield sentence.strip()


def trees(root: Path) -> Iterator[tuple[str, ast.Module]]:
    """Yield the modules of the package."""
    for path in sorted((root / "tracker").rglob("*.py")):
        yield str(path.relative_to(root)), ast.parse(path.read_text(encoding="utf-8"))


def functions(root: Path) -> Iterator[tuple[str, str, Function]]:
    """Yield path, qualified name and definition of each function and method."""

    def walk(body: list[ast.stmt], owner: str) -> Iterator[tuple[str, Function]]:
        for node in body:
            if isinstance(node, ast.ClassDef):
                yield from walk(node.body, f"{owner}{node.name}.")
            elif isinstance(node, Function):
                yield owner + node.name, node

    for path, tree in trees(root):
        for name, node in walk(tree.body, ""):
            yield path, name, node


def heads(root: Path) -> list[str]:
    """List the heads of functions with a docstring and at least five lines."""
    drawn = []
    for path, name, node in functions(root):
        docstring = ast.get_docstring(node)
        lines = (node.end_lineno or 0) - node.lineno + 1
        if docstring and not name.split(".")[-1].startswith("__") and 6 <= lines <= 60:
            returned = f" -> {ast.unparse(node.returns)}" if node.returns else ""
            drawn.append(f"{path} :: {name}({ast.unparse(node.args)}){returned}\n{docstring}")
    return drawn


def local_names(root: Path) -> list[str]:
    """List the names that each longer function assigns, besides its parameters."""
    drawn = []
    for path, name, node in functions(root):
        parameters = {arg.arg for arg in ast.walk(node.args) if isinstance(arg, ast.arg)}
        stored = (n.id for n in ast.walk(node) if isinstance(n, ast.Name) and is_stored(n))
        names = [name for name in dict.fromkeys(stored) if name not in {*parameters, "_"}]
        if len(names) >= 4 and (node.end_lineno or 0) - node.lineno >= 10:
            drawn.append(f"{path} :: {name}: {' '.join(names)}")
    return drawn


def is_stored(name: ast.Name) -> bool:
    """Return whether a name is assigned where it stands."""
    return isinstance(name.ctx, ast.Store)


def docs(root: Path) -> list[str]:
    """List the sentences of the pages, without code, tables and headings."""
    sentences: set[str] = set()
    for page in (root / "README.md", *root.glob("docs/**/*.md")):
        text = re.sub(r"(?ms)^(`{3,}|~~~).*?^\1", "", page.read_text(encoding="utf-8"))
        for block in re.split(r"\n\s*\n|^\s*(?:[-*+]|\d+\.)\s+", text, flags=re.MULTILINE):
            if not re.search(r"^\s*(\||#|<|!\[|:\w)|^ {4}", block, re.MULTILINE):
                sentences.update(split_sentences(block))
    return sorted(sentences)


def docstrings(root: Path) -> list[str]:
    """List the sentences of the docstrings, without their sections."""
    sentences: set[str] = set()
    for _, tree in trees(root):
        for node in ast.walk(tree):
            if isinstance(node, DOCUMENTED) and (docstring := ast.get_docstring(node)):
                text = re.split(
                    r"\n\s*(?:Args|Returns|Yields|Raises|Attributes|Modules):", docstring
                )
                for paragraph in re.split(r"\n\s*\n", text[0]):
                    sentences.update(split_sentences(paragraph))
    return sorted(sentences)


def messages(root: Path) -> list[str]:
    """List the texts of at least six words in code, with `{…}` for what is filled in."""
    texts: set[str] = set()
    for _, tree in trees(root):
        for _, text in code_texts(tree):
            text = re.sub(r"\s+", " ", text).strip()
            is_code = len(text) >= 600 or re.search(r"</|function\(|=>|;\s*\w+:", text)
            if len(re.findall(r"\b[A-Za-z][a-z']*\b", text)) >= 6 and not is_code:
                texts.add(text)
    return sorted(texts)


KINDS: dict[str, Callable[[Path], list[str]]] = {
    "docs": docs,
    "messages": messages,
    "docstrings": docstrings,
    "heads": heads,
    "locals": local_names,
}


def main() -> None:
    """Print the drawn items of one kind, numbered."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--n", type=int, default=40, help="number of items (locals: 20 bodies)")
    parser.add_argument("--root", type=Path, default=ROOT, help="checkout to draw from")
    arguments = parser.parse_args()
    items = KINDS[arguments.kind](arguments.root)
    drawn = random.Random(arguments.seed).sample(items, min(arguments.n, len(items)))
    for number, item in enumerate(drawn, 1):
        print(f"{number}. {item}")  # noqa: T201


if __name__ == "__main__":
    main()

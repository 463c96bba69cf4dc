"""Print the size of the code base as a Markdown table: `python -m tests.tools.size`.

Lines are lines of code: without docstrings, comments and blank lines.
"""

from __future__ import annotations

import ast
import io
import re
import sys
import tokenize
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).parents[2]
MAX_IMPORTS = 25
"""A module that imports more of ours is counted."""
DOCUMENTED_NODES = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
NO_CODE_TOKENS = {
    *(tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE),
    *(tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER),
}


def count_lines(code: str) -> int:
    """Count the lines of code of a module."""
    docstrings: set[int] = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, DOCUMENTED_NODES):
            for text in filter(_is_text, node.body):
                docstrings |= {*range(text.lineno, text.end_lineno + 1)}
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(code).readline):
        if token.type not in NO_CODE_TOKENS:
            lines |= {*range(token.start[0], token.end[0] + 1)}
    return len(lines - docstrings)


def _is_text(statement: ast.stmt) -> bool:
    """Return whether a statement is a docstring, of its block or of the name before it."""
    value = statement.value if isinstance(statement, ast.Expr) else None
    return isinstance(value, ast.Constant) and isinstance(value.value, str)


def imported_modules(code: str, modules: set[str]) -> set[str]:
    """Find which of some modules a module imports, wherever in it."""
    imported = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            imported |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            for name in node.names:
                submodule = f"{node.module}.{name.name}"
                imported.add(submodule if submodule in modules else node.module)
    return imported & modules


def measure_size(root: Path = ROOT) -> dict[str, int]:
    """Measure a checkout: what is counted → how often."""
    codes = {path: path.read_text(encoding="utf-8") for path in (root / "tracker").rglob("*.py")}
    tests = [p for p in (root / "tests").rglob("*.py") if root / "tests/tools" not in p.parents]
    parts = {path: path.relative_to(root).with_suffix("").parts for path in codes}
    names = {path: ".".join(part for part in parts[path] if part != "__init__") for path in codes}
    imports = [imported_modules(code, {*names.values()}) for code in codes.values()]
    return {
        "lines of `tracker`": sum(map(count_lines, codes.values())),
        "files of `tracker`": len(codes),
        "lines of `tests` without `tests/tools`": sum(
            count_lines(path.read_text(encoding="utf-8")) for path in tests
        ),
        f"modules that import more than {MAX_IMPORTS} others of ours": sum(
            len(modules) > MAX_IMPORTS for modules in imports
        ),
        "`except Exception`": _occurrences(r"except Exception\b", codes.values()),
        "lines with `: Any`": _occurrences(r"^.*: Any\b.*$", codes.values()),
    }


def _occurrences(pattern: str, codes: Iterable[str]) -> int:
    return sum(len(re.findall(pattern, code, re.MULTILINE)) for code in codes)


if __name__ == "__main__":
    rows = [f"| {name} | {count:,} |" for name, count in measure_size().items()]
    sys.stdout.write("\n".join(["| | count |", "|---|---|", *rows, ""]))

"""Names: one for each thing, and in tests only of what they may import."""

from __future__ import annotations

import ast
import tomllib
from collections import defaultdict
from pathlib import Path

import tracker

PACKAGE = Path(tracker.__file__).parent


def test_no_two_public_classes_have_one_name():
    """Was: three `Measured`. A study's class is named by its folder, as `Prune`."""
    modules_by_class: dict[str, list[str]] = defaultdict(list)
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                modules_by_class[node.name].append(str(path.relative_to(PACKAGE)))
    assert len(modules_by_class) > 200
    assert {name: modules for name, modules in modules_by_class.items() if len(modules) > 1} == {}


def test_the_table_of_mutants_names_existing_files():
    """Was: seven modules' tests were in a file that had gone, and 27 modules had none."""
    root = PACKAGE.parent
    settings = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))
    table = settings["tool"]["tracker"]["mutants"]
    for module, tests in table.items():
        assert (root / module).exists(), module
        for test in tests:
            file, *nodes = test.split("::")
            code = (root / file).read_text(encoding="utf-8") if nodes else ""
            assert (root / file).exists(), test
            assert all(node.partition("[")[0] in code for node in nodes), test


PRIVATE = {
    *("tools/test_survey.py", "ledger/test_shown.py", "models/test_miniature.py"),
    *("models/test_sources.py", "runner/test_until.py"),
    *("studies/test_precision.py", "studies/test_prune.py"),
    *("studies/test_snowball.py", "tracking/test_wandb.py"),
}
"""Tests that import private names yet; no others may."""


def test_no_test_imports_another_test_or_a_private_name():
    """Shared helpers are in `tests/helpers`."""
    tests = PACKAGE.parent / "tests"
    importers, private = set(), set()
    for path in tests.rglob("*.py"):
        test = str(path.relative_to(tests))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                package, *parts = (node.module or "").split(".")
                names = [name.name for name in node.names]
                if node.level or package == "tests":
                    importers |= {test for n in (package, *parts, *names) if n.startswith("test_")}
                if package == "tracker":
                    private |= {test for n in names if n[0] == "_" != n[1]}
    assert importers == set()
    assert private <= PRIVATE

"""Commands in the documentation are understood by the program."""

from __future__ import annotations

import ast
import builtins
import re
import shlex
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import click
import pytest
import yaml

from tests.conftest import printed
from tracker.cli import main
from tracker.schema.experiment_input import is_search_file, load_experiment
from tracker.search.request import load_searches

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCED = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
INDENTED = re.compile(r"(?:^ {4}.*\n)+", re.MULTILINE)


def blocks(page: Path) -> Iterator[tuple[str, str]]:
    """List the blocks of code of a page: (language or nothing, text)."""
    text = page.read_text()
    yield from FENCED.findall(text)
    for block in INDENTED.findall(FENCED.sub("", text)):
        yield "", re.sub(r"^ {4}", "", block, flags=re.MULTILINE)


def commands() -> Iterator[tuple[str, str]]:
    """List the commands of `tracker` that the pages show: (page, command)."""
    for page in PAGES:
        for language, text in blocks(page):
            if language in ("", "bash", "sh"):
                joined = re.sub(r"\\\n\s*", " ", text)
                yield from (
                    (page.name, line) for line in joined.splitlines() if line.startswith("tracker ")
                )


@pytest.mark.parametrize(("page", "command"), sorted(commands()))
def test_a_command_is_understood(page, command):
    words = shlex.split(command, comments=True)[1:]
    # With the settings of `main`: click keeps the first help option that a command is asked for.
    group = click.Context(main, info_name="tracker", **main.context_settings)
    if words == ["--help"]:
        return
    name, subcommand, arguments = main.resolve_command(group, words)
    assert subcommand is not None
    # Raises what the program would say of an option that is not there.
    context = click.Context(subcommand, info_name=name, parent=group)
    subcommand.make_parser(context).parse_args(arguments)


def test_there_are_commands():
    assert len(list(commands())) > 40


def blocks_in(language: str) -> list[tuple[str, str]]:
    return [(page.name, text) for page in PAGES for name, text in blocks(page) if name == language]


@pytest.mark.parametrize(("page", "text"), blocks_in("yaml"))
def test_an_experiment_is_valid(page, text, tmp_path):
    raw = yaml.safe_load(text)
    if "parameters" not in raw:
        # A key or two, to be put beside those of an experiment.
        raw = yaml.safe_load((ROOT / "experiments/demo.yaml").read_text()) | {
            "parameters": {
                "model": {"value": "m"},
                "benchmark": {"value": "b"},
                "layer": {"value": 0},
                **raw,
            }
        }
    path = tmp_path / "experiment.yaml"
    path.write_text(yaml.safe_dump(raw))
    (load_searches if is_search_file(raw) else load_experiment)(path)


def test_the_tutorial_quotes_its_file():
    quoted, *_ = [yaml.safe_load(text) for page, text in blocks_in("yaml") if page == "tutorial.md"]
    assert quoted.items() <= yaml.safe_load((ROOT / "experiments/demo.yaml").read_text()).items()


def programs() -> Iterator[tuple[str, str]]:
    """List the Python of the pages, as blocks and behind `python -c`: (page, program)."""
    for page in PAGES:
        for language, text in blocks(page):
            if language == "python":
                yield page.name, text
            scripts = re.findall(r"python - <<'END'\n(.*?)\nEND", text, re.DOTALL)
            yield from ((page.name, program) for program in scripts if "layer_scan" not in program)
            for program in re.findall(r'python -c "(.*?)"', text, re.DOTALL):
                yield page.name, re.sub(r"\\\n\s*", "", program).lstrip("\n")


@pytest.mark.parametrize(("page", "program"), list(programs()))
def test_python_uses_names_that_exist(page, program):
    tree = ast.parse(program)
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    names: dict[str, Any] = {"__name__": page}
    exec(compile(ast.Module(imports, []), page, "exec"), names)
    defined = {
        node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.arg):
            defined.add(node.arg)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            defined.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            module = names.get(node.value.id)
            assert module is None or hasattr(module, node.attr)
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    assert used <= defined | set(names) | set(dir(builtins))


NOT_RUN = (
    *("import tracker\n", "lm_eval", "load_dataset", "tests.", "find_switches", "curve_of"),
    *("Ledger", "coqa.txt", "StudySettings"),
)
"""Parts of programs that need results or the internet, or take more than a second."""


@pytest.mark.parametrize(
    ("page", "program"),
    [
        case
        for case in programs()
        if case[0] != "extending.md" and not any(part in case[1] for part in NOT_RUN)
    ],
)
def test_a_program_prints_the_figures_of_its_page(page, program, capsys):
    exec(compile(program, page, "exec"), {})
    figures = re.findall(r"[\d.]+", capsys.readouterr().out)
    assert figures
    text = next(path for path in PAGES if path.name == page).read_text()
    assert [f for f in figures if f"{float(f):,.10g}" not in text] == []


PACKAGE = ROOT / "tracker"
GUIDE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
STEPS = re.findall(r"^\d+\. `([\w/]+\.py):([\w.]+)`", GUIDE, re.MULTILINE)
"""Functions that a run calls in this order: (path in `tracker/`, qualified name)."""


def submodules(folder: Path) -> set[str]:
    """List the modules and packages in a package's folder."""
    modules = {path.stem for path in folder.glob("*.py")} - {"__init__"}
    return modules | {path.parent.name for path in folder.glob("*/__init__.py")}


def section(page: str, title: str) -> str:
    """Return the text under a heading of the second level."""
    return page.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def test_the_guide_for_contributors_is_short():
    assert len(GUIDE.split()) <= 1200
    (diagram,) = re.findall(r"```text\n(.*?)```", section(GUIDE, "Layers"), re.DOTALL)
    assert len(diagram.splitlines()) <= 12
    terms = re.findall(r"^\| (\w+) \| ", section(GUIDE, "Glossary"), re.MULTILINE)
    assert terms == ["term", "cell", "run", "ledger", "view", "row", "stream"]


def test_the_diagram_of_layers_agrees_with_the_import_contract():
    (diagram,) = re.findall(r"```text\n(.*?)```", section(GUIDE, "Layers"), re.DOTALL)
    positions = {
        name: match.start()
        for match in re.finditer(r"\w+", diagram)
        if (name := match[0]) in submodules(PACKAGE)
    }
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    (layers,) = [
        [re.findall(r"tracker\.(\w+)", layer) for layer in contract["layers"]]
        for contract in settings["tool"]["importlinter"]["contracts"]
        if contract["type"] == "layers" and "containers" not in contract
    ]
    assert sorted(positions) == sorted(name for layer in layers for name in layer)
    # The two columns stand beside each other, and a line of one says nothing about the other's.
    column = [[name for name in layer if name not in ("report", "tracking")] for layer in layers]
    names = [name for layer in column for name in layer]
    assert sorted(names, key=positions.__getitem__) == names


def test_each_package_has_one_line_with_a_file_that_exists():
    lines = re.findall(r"^\| `.*", section(GUIDE, "Packages"), re.MULTILINE)
    assert [line for line in lines if len(line) > 90] == []
    files = {}
    for line in lines:
        package, file = re.findall(r"`(.*?)`", line)
        files[package] = PACKAGE / file
    packages = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert set(files) == packages
    assert len(lines) == len(packages)
    assert [file for file in files.values() if not file.is_file()] == []


@pytest.mark.parametrize(
    "folder",
    [
        path.parent
        for path in sorted(PACKAGE.rglob("__init__.py"))
        # A study's folder is described by its study.
        if path.parent != PACKAGE and path.parent.parent != PACKAGE / "studies"
    ],
    ids=lambda folder: str(folder.relative_to(PACKAGE)),
)
def test_the_docstring_of_a_package_lists_its_modules(folder):
    docstring = ast.get_docstring(ast.parse((folder / "__init__.py").read_text(encoding="utf-8")))
    listed = re.findall(r"^    (\w+): [A-Z].*\.$", docstring or "", re.MULTILINE)
    assert sorted(listed) == sorted(submodules(folder))


def test_a_run_calls_the_functions_of_the_guide_in_its_order(tiny_llama, experiment, tmp_path):
    keys = {(str(PACKAGE / file), name): (file, name) for file, name in STEPS}
    calls: list[tuple[str, str]] = []

    def trace(frame: FrameType, event: str, _: object) -> None:
        step = keys.get((frame.f_code.co_filename, frame.f_code.co_qualname))
        if event == "call" and step is not None:
            calls.append(step)

    file = experiment(tiny_llama(), limit=4, layer=[1])
    before = sys.gettrace()
    sys.settrace(trace)
    try:
        printed("run", file, "--track", "none", "--results", tmp_path / "results")
    finally:
        sys.settrace(before)
    assert len(STEPS) == 10
    assert [step for step in STEPS if step not in calls] == []
    # Each step is searched for behind the one before it.
    remaining = iter(calls)
    assert [step for step in STEPS if step not in remaining] == []


def modules_named(page: str) -> list[str]:
    """List the modules and tests that a page names by their paths."""
    return re.findall(r"`((?:[\w-]+/)+\w+\.\w+)`", page)


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "docs/extending.md"])
def test_files_that_a_page_for_developers_names_exist(page):
    paths = modules_named((ROOT / page).read_text(encoding="utf-8"))
    assert len(paths) > 10
    assert [p for p in paths if not ((PACKAGE / p).exists() or (ROOT / p).exists())] == []


def test_private_names_are_used_where_the_page_lists_them():
    page = (ROOT / "docs/dev/private-apis.md").read_text(encoding="utf-8")
    rows = [line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith("| ")]
    assert len(rows) > 30
    for _, names, modules, _ in rows[1:]:
        words = {name.rpartition(".")[2] for name in re.findall(r"`(.*?)`", names)}
        for module in modules_named(modules):
            code = (PACKAGE / module).read_text(encoding="utf-8")
            assert any(word in code for word in words), (names, module)


def test_private_modules_of_other_libraries_are_listed():
    page = (ROOT / "docs/dev/private-apis.md").read_text(encoding="utf-8")
    names = {
        alias.name
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and not (node.module or "").startswith("tracker")
        for alias in node.names
        if re.search(r"(^|\.)_[a-z]", node.module or "") or re.match(r"_[^_]", alias.name)
    }
    assert len(names) > 5
    assert {name for name in names if name not in page} == set()

"""What the pages tell people to type is what the program understands."""

from __future__ import annotations

import ast
import builtins
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

from tracker.cli import main
from tracker.core.experiment_input import is_of_searches, load_experiment
from tracker.pruning.search.request import load_searches

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
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
def test_a_command_is_understood(page: str, command: str) -> None:
    words = shlex.split(command, comments=True)[1:]
    group = click.Context(main, info_name="tracker")
    if words == ["--help"]:
        return
    name, found, rest = main.resolve_command(group, words)
    assert found is not None
    # Raises what the program would say of an option that is not there.
    found.make_parser(click.Context(found, info_name=name, parent=group)).parse_args(rest)


def test_there_are_commands() -> None:
    assert len(list(commands())) > 40


def of_language(language: str) -> list[tuple[str, str]]:
    return [(page.name, text) for page in PAGES for name, text in blocks(page) if name == language]


@pytest.mark.parametrize(("page", "text"), of_language("yaml"))
def test_an_experiment_is_valid(page: str, text: str, tmp_path: Path) -> None:
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
    (load_searches if is_of_searches(raw) else load_experiment)(path)


def test_the_tutorial_quotes_its_file() -> None:
    quoted, *_ = [
        yaml.safe_load(text) for page, text in of_language("yaml") if page == "tutorial.md"
    ]
    assert quoted.items() <= yaml.safe_load((ROOT / "experiments/demo.yaml").read_text()).items()


def programs() -> Iterator[tuple[str, str]]:
    """List the Python of the pages, as blocks and behind `python -c`: (page, program)."""
    for page in PAGES:
        for language, text in blocks(page):
            if language == "python":
                yield page.name, text
            here = re.findall(r"python - <<'END'\n(.*?)\nEND", text, re.DOTALL)
            yield from ((page.name, program) for program in here if "layer_scan" not in program)
            for program in re.findall(r'python -c "(.*?)"', text, re.DOTALL):
                yield page.name, re.sub(r"\\\n\s*", "", program).lstrip("\n")


@pytest.mark.parametrize(("page", "program"), list(programs()))
def test_python_uses_names_that_exist(page: str, program: str) -> None:
    tree = ast.parse(program)
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    names: dict[str, Any] = {"__name__": page}
    exec(compile(ast.Module(imports, []), page, "exec"), names)
    defined = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
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
    *("Ledger", "coqa.txt"),
)
"""Parts of programs that need results or the internet, or take more than a second."""


@pytest.mark.parametrize(
    ("page", "program"),
    [case for case in programs() if not any(part in case[1] for part in NOT_RUN)],
)
def test_a_program_prints_the_figures_of_its_page(
    page: str, program: str, capsys: pytest.CaptureFixture[str]
) -> None:
    exec(compile(program, page, "exec"), {})
    figures = re.findall(r"[\d.]+", capsys.readouterr().out)
    assert figures
    text = next(path for path in PAGES if path.name == page).read_text()
    assert [f for f in figures if f"{float(f):,.10g}" not in text] == []

"""Options are declared once; files, command line, Python and documentation agree."""

from __future__ import annotations

import inspect
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from tracker import api
from tracker.cli.commands import main
from tracker.core.config import IN_THE_FILE, KEYS, CellSettings, cell_request
from tracker.core.errors import RequestError
from tracker.core.experiment import Parameters, Sweep
from tracker.keywords import (
    ExportKeywords,
    FileKeywords,
    RunKeywords,
    SearchKeywords,
    StudyKeywords,
    WorkKeywords,
)
from tracker.measuring.job import Options
from tracker.search.request import SearchParameters, SearchRequest
from tracker.search.settings import OF_CELLS, SearchSettings
from tracker.studies.registry import STUDIES

DOCS = Path(__file__).parents[1] / "docs"
SEARCHED = {*OF_CELLS, *SearchSettings.model_fields}
RUNNING = set(RunKeywords.__annotations__) - {"progress"}
MACHINE = {"device", "memory", "weights", "trust_remote_code"}
ASKED = {"experiment", "changes"}
EXPORTED = {*inspect.signature(api.export).parameters, *WorkKeywords.__annotations__}


def rows(page: str) -> dict[str, str]:
    """Read the tables of keys of a page: key → the row's last column."""
    found, inside = {}, False
    for line in (DOCS / page).read_text().splitlines():
        inside = line.startswith("| key |") or (inside and line.startswith("|"))
        if inside and not line.startswith(("| key |", "|---")):
            first, *_, last = line.strip("|").split(" | ")
            found |= dict.fromkeys(re.findall(r"`(\w+)[`:]", first), last.strip())
    return found


def says(default: object, row: str) -> bool:
    """Return whether a row contains a default, and not only as a part of another value."""
    return bool(re.search(rf"(?<!\w){re.escape(str(default))}(?!\w)", row.replace("`", "")))


def test_the_docs_say_every_key_and_its_default():
    said = rows("experiments.md")
    assert set(said) == set(KEYS) == set(Parameters.model_fields)
    for key, field in KEYS.items():
        about = CellSettings.model_fields[field]
        default = about.default
        if field in IN_THE_FILE and not about.is_required() and default:
            (default,) = default
        if about.is_required():
            assert said[key] == "needed"
        elif not (default is None or default is False or default == ()):
            assert says(default, said[key]), key
    searched = rows("pruning.md")
    assert set(searched) == set(SearchSettings.model_fields)
    for key, about in SearchRequest.model_fields.items():
        if about.default not in (None, ()) and not about.is_required():
            assert says(about.default, searched[key]), key
    assert set(SearchParameters.model_fields) == SEARCHED


def test_the_keywords_of_python_are_the_keys():
    keys = {*KEYS, *Sweep.model_fields}
    assert set(FileKeywords.__annotations__) == keys
    assert set(SearchKeywords.__annotations__) == keys | set(SearchSettings.model_fields)
    settings = {name for study in STUDIES.values() for name in study.model_fields}
    run = keys | set(RunKeywords.__annotations__)
    assert set(StudyKeywords.__annotations__) == run | settings
    assert set(ExportKeywords.__annotations__) >= {*WorkKeywords.__annotations__, "dtype"}
    assert set(ExportKeywords.__annotations__) <= run


def test_each_field_says_what_it_is():
    for model in (CellSettings, SearchSettings):
        assert all(about.description for about in model.model_fields.values())


@pytest.mark.parametrize(
    ("command", "asked"),
    [
        ("evaluate", {*KEYS, "project", *RUNNING}),
        ("run", {*KEYS, *ASKED, "executor", "slurm", *RUNNING}),
        (
            "bench",
            {*KEYS, *ASKED, "components", "against", "checking", "offload", "as_json", *MACHINE}
            - {"component"},
        ),
        ("plan", {*KEYS, *SEARCHED, *ASKED, "gflops", "results", "trust_remote_code"}),
        ("validate", {*KEYS, *SEARCHED, *ASKED, "trust_remote_code"}),
        ("prune", {*SEARCHED, *ASKED, "project", "output", *RUNNING}),
        ("export", EXPORTED - {"settings", "progress"}),
    ],
)
def test_the_command_line_takes_every_key(command, asked):
    taken = {parameter.name for parameter in main.commands[command].params}
    assert asked <= taken
    assert taken - asked <= set(KEYS)
    assert command == "export" or taken == asked


def test_python_and_the_command_line_have_the_same_defaults():
    """Of what says how work is done; what is asked has its defaults in the schema alone."""
    executor = inspect.signature(api.run).parameters["executor"].default
    defaults: dict[str, set[Any]] = {field.name: {field.default} for field in fields(Options)}
    defaults |= {"slurm": {None}, "results": {api.RESULTS}, "track": {None}}
    defaults |= {"publish_documents": {False}, "executor": {Options.executor, executor}}
    for name in ("run", "prune", "evaluate", "export"):
        for option in main.commands[name].params:
            if option.name in defaults:
                default = option.to_info_dict()["default"]
                default = default or (False if getattr(option, "is_flag", False) else None)
                defaults[option.name].add(default)
    assert {name: found for name, found in defaults.items() if len(found) != 1} == {}


@pytest.mark.parametrize(
    "called",
    [
        lambda: api.run("any.yaml", devise="cpu"),
        lambda: api.evaluate(cell_request(model="m", benchmark="b", layers=(0,)), devise="cpu"),
    ],
)
def test_python_refuses_what_nothing_is_called(called):
    with pytest.raises(RequestError, match=r"there is no 'devise'. Did you mean 'device'\?"):
        called()

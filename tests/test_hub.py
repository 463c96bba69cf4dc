"""The hub, or what stands in for it: absent, slow, refusing, limiting, talking nonsense."""

from __future__ import annotations

import os
import socket
import subprocess
from pathlib import Path

import pytest

from tests.conftest import TRACKER, cli, lend_tasks, refused
from tests.hub import GATED, Hub, hub

LINES = 3
"""That any of it may take on the terminal."""


@pytest.fixture
def stand_in():
    with hub() as found:
        yield found


@pytest.fixture
def tracker(tmp_path: Path):
    """Run tracker as on a machine that never saw the hub."""
    lend_tasks(tmp_path / "cache")

    def run(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
        home = {"HF_HOME": str(tmp_path / "hf"), "TRACKER_CACHE": str(tmp_path / "cache")}
        return subprocess.run(
            [str(TRACKER), *map(str, arguments)],
            capture_output=True,
            text=True,
            check=False,
            cwd=tmp_path,
            env={**os.environ, "HF_HUB_OFFLINE": "0", **home, **environment},
        )

    return run


@pytest.fixture
def two_models(experiment) -> Path:
    path = experiment("org/model", benchmark=["arc_easy", "piqa"])
    both = path.read_text().replace("value: 'org/model'", "values: [org/model, org/other]")
    path.write_text(both)
    return path


def after_the_first_word(said: str) -> list[str]:
    """The lines of a refusal, without what a command says before it reads anything."""
    return [line for line in said.splitlines() if line != "reading models and benchmarks"]


def asked(stand_in: Hub, name: str) -> int:
    return sum(name in each for each in stand_in.asked)


@pytest.mark.parametrize(
    ("status", "headers", "said"),
    [
        (404, {"X-Error-Code": "RepoNotFound"}, "the hub has no org/model"),
        (401, {"X-Error-Code": "RepoNotFound"}, "the hub has no public org/model; if it is priv"),
        (403, GATED, "org/model is gated: ask for access at {hub}/org/model, then set HF_TOKEN"),
        (403, {}, "the hub forbids org/model to you; ask for access at {hub}/org/model"),
        (404, {"X-Error-Code": "RevisionNotFound"}, "org/model has no such revision"),
    ],
)
def test_a_model_that_the_hub_refuses(tracker, stand_in, two_models, status, headers, said):
    stand_in.status, stand_in.headers = status, headers
    for command in ("validate", "plan"):
        found = tracker(command, two_models, **stand_in.environment())
        assert found.returncode == 2
        assert said.format(hub=stand_in.address) in found.stderr
        assert len(after_the_first_word(found.stdout + found.stderr)) == 1
    assert asked(stand_in, "org/model/resolve") == 2, "once a process"


@pytest.mark.parametrize(("status", "said"), [(429, "limits how often"), (503, "status 503")])
def test_a_hub_that_refuses_for_now(tracker, stand_in, two_models, status, said):
    """Was: five attempts a name, each said twice, by the library."""
    stand_in.status = status
    found = tracker("validate", two_models, **stand_in.environment())
    assert found.returncode == 0
    assert found.stdout.count("not checked: org/") == 2
    assert said in found.stdout
    assert len((found.stdout + found.stderr).splitlines()) == LINES
    assert asked(stand_in, "org/") == 1
    planned = tracker("plan", two_models, **stand_in.environment())
    assert planned.returncode == 2
    assert said in planned.stderr


def test_a_hub_that_talks_nonsense_or_never_answers(tracker, stand_in, two_models):
    stand_in.status, stand_in.body = 200, b"\x00nonsense"
    found = tracker("validate", two_models, **stand_in.environment())
    assert found.returncode == 2
    assert "what the hub holds cannot be read" in found.stderr
    stand_in.silent, stand_in.asked = True, []
    found = tracker("validate", two_models, **stand_in.environment())
    assert found.returncode == 0
    assert found.stdout.count(f"({stand_in.address} does not answer: timed out)") == 2
    assert len((found.stdout + found.stderr).splitlines()) == LINES
    assert stand_in.asked == ["HEAD /"]


def test_no_hub_at_all(tracker, two_models):
    """Was: 193 seconds and two hundred lines."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        nobody = f"http://127.0.0.1:{server.getsockname()[1]}"
    found = tracker("validate", two_models, HF_ENDPOINT=nobody, NO_PROXY="127.0.0.1")
    assert found.returncode == 0
    assert "Connection refused" in found.stdout
    assert "Offline: copy the model's folder" in found.stdout
    assert len((found.stdout + found.stderr).splitlines()) == LINES


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"status": 404, "headers": {"X-Error-Code": "RepoNotFound"}}, "the hub has no allenai/ai"),
        ({"status": 403, "headers": GATED}, "at {hub}/datasets/allenai/ai2_arc, then set HF_TOKEN"),
        ({"status": 429}, "the hub limits how often it is asked"),
        ({"status": 200, "body": b"\0nonsense"}, "cannot be read from the hub"),
        ({"silent": True}, "{hub} does not answer: timed out"),
    ],
)
def test_data_that_the_hub_does_not_give(
    tracker, stand_in, tiny_llama, experiment, tmp_path, change, said
):
    """Was: up to 400 seconds."""
    for name, value in change.items():
        setattr(stand_in, name, value)
    file = experiment(tiny_llama(), data="hub")
    arguments = ("run", file, "--results", tmp_path / "results", "--track", "none")
    found = tracker(*arguments, **stand_in.environment())
    assert found.returncode == 2
    assert said.format(hub=stand_in.address) in found.stderr
    assert "Offline: where there is internet" in found.stderr
    assert len(found.stderr.splitlines()) == 2
    assert asked(stand_in, "README.md") <= 3  # we, and the client that then fetches it
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize(
    "name", ["my model", "llama-3:8b", "user/repo@main", "C:\\models\\llama", "", " ", "-x", "a--b"]
)
def test_what_is_no_hub_id(experiment, name):
    """Was: a traceback of the hub's client."""
    options = (f"--model={name}", "--benchmark", "arc_easy")
    commands = [("evaluate", *options, "--layer", "0"), ("bench", *options)]
    if name.strip():
        commands += [("validate", experiment(name)), ("plan", experiment(name))]
    for command in commands:
        found = cli(*command)
        refused(found)
        assert len(after_the_first_word(found.output)) == 1
        assert not name.strip() or "a hub id is NAME or OWNER/NAME" in found.output

"""The hub, or what stands in for it: absent, slow, refusing, limiting, talking nonsense."""

from __future__ import annotations

import os
import socket
import subprocess
from pathlib import Path

import pytest

from tests.conftest import TRACKER, cli, lend_tasks, refused
from tests.hub import GATED, hub


class Asked:
    """A command on a machine that never saw the hub, and what that answers.

    Attributes:
        hub: What stands in for it.
        code: What the last command ended with.
        lines: Its lines, without what it says before it reads anything.
    """

    def __init__(self, folder: Path, hub) -> None:
        self.folder, self.hub = folder, hub

    def give(self, *arguments: object, **environment: str) -> str:
        """Give a command; what it prints."""
        home = {"HF_HOME": f"{self.folder}/hf", "TRACKER_CACHE": f"{self.folder}/cache"}
        environment = {**os.environ, **home, **self.hub.environment(), **environment}
        command = [str(TRACKER), *map(str, arguments)]
        out = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        done = subprocess.run(command, cwd=self.folder, env=environment, check=False, **out)
        said = done.stdout.splitlines()
        self.code, self.lines = done.returncode, [line for line in said if line != FIRST]
        return done.stdout

    def times(self, name: str) -> int:
        """How often the hub was asked for something."""
        return sum(name in each for each in self.hub.asked)


FIRST = "reading models and benchmarks"


@pytest.fixture
def asked(tmp_path: Path):
    lend_tasks(tmp_path / "cache")
    with hub() as stand_in:
        yield Asked(tmp_path, stand_in)


@pytest.fixture
def two_models(experiment) -> Path:
    path = experiment("org/model", benchmark=["arc_easy", "piqa"])
    both = path.read_text().replace("value: 'org/model'", "values: [org/model, org/other]")
    path.write_text(both)
    return path


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
def test_a_model_that_the_hub_refuses(asked, two_models, status, headers, said):
    asked.hub.status, asked.hub.headers = status, headers
    for command in ("validate", "plan")[: 2 if status == 401 else 1]:
        assert said.format(hub=asked.hub.address) in asked.give(command, two_models)
        assert (asked.code, len(asked.lines)) == (2, 1)
        assert asked.times("org/model/resolve") == 1, "once a process"
        asked.hub.asked.clear()


@pytest.mark.parametrize(("status", "said"), [(429, "limits how often"), (503, "status 503")])
def test_a_hub_that_refuses_for_now(asked, two_models, status, said):
    """Was: five attempts a name, each said twice, by the library."""
    asked.hub.status = status
    found = asked.give("validate", two_models)
    assert (asked.code, len(asked.lines), asked.times("org/")) == (0, 3, 1)
    assert found.count("not checked: org/") == 2
    assert said in found
    assert said in asked.give("plan", two_models)
    assert asked.code == 2


def test_a_hub_that_talks_nonsense_or_never_answers(asked, two_models):
    asked.hub.status, asked.hub.body = 200, b"\x00nonsense"
    assert "what the hub holds cannot be read" in asked.give("validate", two_models)
    assert asked.code == 2
    asked.hub.silent, asked.hub.asked = True, []
    found = asked.give("validate", two_models)
    assert found.count(f"({asked.hub.address} does not answer: timed out)") == 2
    assert (asked.code, len(asked.lines)) == (0, 3)
    assert asked.hub.asked == ["HEAD /"]


def test_no_hub_at_all(asked, two_models):
    """Was: 193 seconds and two hundred lines."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        nobody = f"http://127.0.0.1:{server.getsockname()[1]}"
    found = asked.give("validate", two_models, HF_ENDPOINT=nobody)
    assert (asked.code, len(asked.lines)) == (0, 3)
    assert "Connection refused" in found
    assert "Without the hub: copy the model's folder" in found


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"status": 404, "headers": {"X-Error-Code": "RepoNotFound"}}, "the hub has no allenai/ai"),
        ({"status": 403, "headers": GATED}, "at {hub}/datasets/allenai/ai2_arc, then set HF_TOKEN"),
        ({"silent": True}, "{hub} does not answer: timed out"),
    ],
)
def test_data_that_the_hub_does_not_give(asked, tiny_llama, experiment, tmp_path, change, said):
    """Was: up to 400 seconds."""
    vars(asked.hub).update(change)
    file = experiment(tiny_llama(), data="hub")
    found = asked.give("run", file, "--results", tmp_path / "results", "--track", "none")
    assert said.format(hub=asked.hub.address) in found
    assert "Offline: where there is internet" in found
    assert (asked.code, len(asked.lines)) == (2, 3)
    assert asked.times("README.md") <= 3  # we, and the client that then fetches it
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
        refused(found, *(["a hub id is NAME or OWNER/NAME"] if name.strip() else []))
        assert len([line for line in found.output.splitlines() if line != FIRST]) == 1

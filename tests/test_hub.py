"""The hub, or what stands in for it: absent, slow, refusing, limiting, talking nonsense."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from pathlib import Path

import pytest

from tests.conftest import TRACKER, cli, lend_tasks, refused
from tests.helpers.forks import forks
from tests.helpers.hub import GATED, Hub, hub

FIRST = "reading models and benchmarks"


class Asked:
    """A machine that never saw the hub, and what that answers.

    Attributes:
        hub: What stands in for it: its address is read when the hub's client is imported.
        code: What the last command ended with.
        lines: Its lines, without what it says before it reads anything.
    """

    def __init__(self, folder: Path, hub: Hub) -> None:
        self.hub, self._own = hub, (folder / "hf", folder / "cache")
        home, cache = map(str, self._own)
        self.environment = {"HF_HOME": home, "TRACKER_CACHE": cache, **hub.environment()}

    def forget(self) -> None:
        """Be a machine that never saw the hub again, and a hub that has no such thing."""
        for folder in self._own:
            shutil.rmtree(folder, ignore_errors=True)
        lend_tasks(self._own[1])
        self.hub.reset()

    def give(self, *arguments: object) -> str:
        """Give a command; what it prints."""
        said, self.code = self.start(*arguments).end()
        self.lines = [line for line in said.splitlines() if line != FIRST]
        return said

    def times(self, name: str) -> int:
        """Return how often a name was requested from the hub."""
        return sum(name in each for each in self.hub.asked)


@pytest.fixture(scope="module")
def machine(tmp_path_factory):
    folder = tmp_path_factory.mktemp("machine")
    with hub() as stand_in:
        asked = Asked(folder, stand_in)
        with forks(folder, asked.environment) as asked.start:
            yield asked


@pytest.fixture
def asked(machine):
    machine.forget()
    return machine


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
    command, there = (
        [str(TRACKER), "validate", two_models],
        {**os.environ, **asked.environment, "HF_ENDPOINT": nobody},
    )
    done = subprocess.run(command, env=there, capture_output=True, text=True, check=True)
    found = done.stdout + done.stderr
    assert len(found.splitlines()) == 3
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

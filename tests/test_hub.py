"""The hub, or what stands in for it: absent, slow, refusing, limiting, talking nonsense."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from pathlib import Path

import pytest

from tests.conftest import TRACKER, cli, copy_task_cache, refused
from tests.helpers.forks import forked_commands
from tests.helpers.hub import GATED, HubDouble, run_hub

FIRST = "reading models and benchmarks"


class FreshMachine:
    """A machine that never saw the hub, and its commands.

    Attributes:
        hub: What stands in for it: its address is read when the hub's client is imported.
        code: What the last command ended with.
        lines: Its lines, without what it says before it reads anything.
    """

    def __init__(self, folder: Path, hub: HubDouble) -> None:
        self.hub, self._own = hub, (folder / "hf", folder / "cache")
        home, cache = map(str, self._own)
        self.environment = {"HF_HOME": home, "TRACKER_CACHE": cache, **hub.environment()}

    def forget(self) -> None:
        """Be a machine that never saw the hub again, and a hub that has no such thing."""
        for folder in self._own:
            shutil.rmtree(folder, ignore_errors=True)
        copy_task_cache(self._own[1])
        self.hub.reset()

    def run(self, *arguments: object) -> str:
        """Run a command, and return its output."""
        output, self.code = self.start(*arguments).finish()
        self.lines = [line for line in output.splitlines() if line != FIRST]
        return output

    def count_requests(self, name: str) -> int:
        """Return how often a name was requested from the hub."""
        return sum(name in request for request in self.hub.requests)


@pytest.fixture(scope="module")
def machine(tmp_path_factory):
    folder = tmp_path_factory.mktemp("machine")
    with run_hub() as fake_hub:
        fresh_machine = FreshMachine(folder, fake_hub)
        with forked_commands(folder, fresh_machine.environment) as fresh_machine.start:
            yield fresh_machine


@pytest.fixture
def commands(machine):
    machine.forget()
    return machine


@pytest.fixture
def two_models(experiment) -> Path:
    path = experiment("org/model", benchmark=["arc_easy", "piqa"])
    text = path.read_text().replace("value: 'org/model'", "values: [org/model, org/other]")
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("status", "headers", "message"),
    [
        (404, {"X-Error-Code": "RepoNotFound"}, "the hub has no org/model"),
        (401, {"X-Error-Code": "RepoNotFound"}, "the hub has no public org/model; if it is priv"),
        (403, GATED, "org/model is gated: ask for access at {hub}/org/model, then set HF_TOKEN"),
        (403, {}, "the hub denies you access to org/model; ask for access at {hub}/org/model"),
        (404, {"X-Error-Code": "RevisionNotFound"}, "org/model has no such revision"),
    ],
)
def test_a_model_that_the_hub_refuses(commands, two_models, status, headers, message):
    commands.hub.status, commands.hub.headers = status, headers
    for command in ("validate", "plan")[: 2 if status == 401 else 1]:
        assert message.format(hub=commands.hub.address) in commands.run(command, two_models)
        assert (commands.code, len(commands.lines)) == (2, 1)
        assert commands.count_requests("org/model/resolve") == 1, "once a process"
        commands.hub.requests.clear()


@pytest.mark.parametrize(
    ("status", "message"), [(429, "limits the rate of requests"), (503, "status 503")]
)
def test_a_hub_that_refuses_for_now(commands, two_models, status, message):
    """Was: five attempts a name, each said twice, by the library."""
    commands.hub.status = status
    output = commands.run("validate", two_models)
    assert (commands.code, len(commands.lines), commands.count_requests("org/")) == (0, 3, 1)
    assert output.count("not checked: org/") == 2
    assert message in output
    assert message in commands.run("plan", two_models)
    assert commands.code == 2


def test_a_hub_that_talks_nonsense_or_never_answers(commands, two_models):
    commands.hub.status, commands.hub.body = 200, b"\x00nonsense"
    assert "its files on the hub cannot be read" in commands.run("validate", two_models)
    assert commands.code == 2
    commands.hub.silent, commands.hub.requests = True, []
    output = commands.run("validate", two_models)
    assert output.count(f"({commands.hub.address} does not answer: timed out)") == 2
    assert (commands.code, len(commands.lines)) == (0, 3)
    assert commands.hub.requests == ["HEAD /"]


def test_commands_work_without_a_hub(commands, two_models):
    """Was: 193 seconds and two hundred lines."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        closed_address = f"http://127.0.0.1:{server.getsockname()[1]}"
    command, environment = (
        [str(TRACKER), "validate", two_models],
        {**os.environ, **commands.environment, "HF_ENDPOINT": closed_address},
    )
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    output = result.stdout + result.stderr
    assert len(output.splitlines()) == 3
    assert "Connection refused" in output
    assert "Without the hub: copy the model's folder" in output


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"status": 404, "headers": {"X-Error-Code": "RepoNotFound"}}, "the hub has no allenai/ai"),
        ({"status": 403, "headers": GATED}, "at {hub}/datasets/allenai/ai2_arc, then set HF_TOKEN"),
        ({"silent": True}, "{hub} does not answer: timed out"),
    ],
)
def test_data_that_the_hub_does_not_give(
    commands, tiny_llama, experiment, tmp_path, change, message
):
    """Was: up to 400 seconds."""
    vars(commands.hub).update(change)
    file = experiment(tiny_llama(), data="hub")
    output = commands.run("run", file, "--results", tmp_path / "results", "--track", "none")
    assert message.format(hub=commands.hub.address) in output
    assert "Offline: on a machine with internet" in output
    assert (commands.code, len(commands.lines)) == (2, 3)
    assert commands.count_requests("README.md") <= 3  # we, and the client that then fetches it
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize(
    "name", ["my model", "llama-3:8b", "user/repo@main", "C:\\models\\llama", "", " ", "-x", "a--b"]
)
def test_invalid_hub_ids_are_refused(experiment, name):
    """Was: a traceback of the hub's client."""
    options = (f"--model={name}", "--benchmark", "arc_easy")
    commands = [("evaluate", *options, "--layer", "0"), ("bench", *options)]
    if name.strip():
        commands += [("validate", experiment(name)), ("plan", experiment(name))]
    for command in commands:
        result = cli(*command)
        refused(result, *(["a hub id is NAME or OWNER/NAME"] if name.strip() else []))
        assert len([line for line in result.output.splitlines() if line != FIRST]) == 1

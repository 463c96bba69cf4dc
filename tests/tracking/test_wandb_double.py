"""The double is as strict as W&B: it refuses what it does not know, and what is too long.

That it serves the real client and CLI is what every other test with it shows.
"""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.helpers.wandb_double import RefusedError, Run, WandbDouble, basic, expand

from .wandb_client import Client

TOO_LONG = """
import wandb
def begin(**label):
    settings = wandb.Settings(x_disable_stats=True, console="off", reinit="create_new")
    return wandb.init(settings=settings, **{"project": "layers", **label})
limits = {"group": 128, "job_type": 64, "name": 128}
for name, limit in limits.items():
    begin(**{name: "x" * limit}).finish()
refused = {name: "x" * (limit + 1) for name, limit in limits.items()}
for name, value in {**refused, "project": "x" * 129, "tags": ["x" * 65]}.items():
    try:
        begin(**{name: value})
    except (wandb.Error, ValueError):
        print(name)
try:
    wandb.Artifact("x" * 129, type="outcomes")
except ValueError:
    print("artifact")
"""


@pytest.fixture
def double() -> Any:
    with WandbDouble() as served:
        yield served


def test_what_is_too_long_is_refused(double: WandbDouble, client: Client) -> None:
    refused = client.python(TOO_LONG, WANDB__GRAPHQL_RETRY_MAX="1").split()
    assert refused == ["group", "job_type", "name", "project", "tags", "artifact"]
    # The rest the client itself refuses.
    said = {line.partition("invalid parameters: ")[2][:-2] for line in double.refused}
    assert said == {
        "128 limit exceeded for groupName",
        "64 limit exceeded for jobType",
        "128 limit exceeded for displayName",
    }
    assert len(double.projects["team", "layers"].runs) == 3


def test_runs_come_in_pages(double: WandbDouble, client: Client) -> None:
    project = double.existing({"project": "layers"}, create=True)
    for number in range(5):
        project.runs[f"run{number}"] = Run(f"run{number}", f"id-{number}", "alike")
    pages = "[r.id for r in api.runs('team/layers', per_page=2, lazy=False)]"
    assert client.read(pages)[0] == [f"run{number}" for number in range(5)]
    assert sum(request.operation == "Runs" for request in double.requests) == 3


@pytest.mark.parametrize("filters", [{"displayName": "shown"}, {"group": {"$ne": "a"}}])
def test_what_it_does_not_know_is_refused(double: WandbDouble, filters: dict[str, Any]) -> None:
    project = double.existing({"project": "layers"}, create=True)
    project.runs["run"] = Run("run", "id", "shown")
    known = {"query": "query Runs { a }", "variables": {"project": "layers"}}
    known["variables"] = {"project": "layers", "filters": json.dumps(filters)}
    for asked, word in (
        ({"query": "mutation LaunchRockets { a }"}, "LaunchRockets"),
        (known, "filter"),
    ):
        body = json.dumps(asked).encode()
        status, answer = double.answer("POST", "/graphql", basic(double.key), body)
        assert status == 400
        assert word in answer.decode()
        assert word in double.refused.pop()


def test_only_a_plain_grid_is_expanded() -> None:
    parameters: dict[str, Any] = {"b": {"min": 3, "max": 4}, "a": {"values": [True, None]}}
    points = expand({"method": "grid", "parameters": parameters | {"c": {"value": "x"}}})
    assert [tuple(point) for point in points] == [("a", "b", "c")] * 4
    assert [(point["a"], point["b"]) for point in points] == [
        (first, second) for first in (True, None) for second in (3, 4)
    ]
    for wrong in (
        {"method": "random", "parameters": parameters},
        {"method": "grid", "parameters": {"a": {"min": 0.5, "max": 1.5}}},
    ):
        with pytest.raises(RefusedError):
            expand(wrong)

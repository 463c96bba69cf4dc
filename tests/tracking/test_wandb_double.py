"""The double is as strict as W&B: it refuses what it does not know, and what is too long.

That it serves the real client and CLI is what every other test with it shows.
"""

from __future__ import annotations

from typing import Any

import pytest

from tests.helpers.wandb_double import Run, WandbDouble

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

"""What W&B's `${args}` makes of lm-eval's settings arrives as what the file says."""

from __future__ import annotations

import shlex
from ast import literal_eval
from typing import Any

import pytest

import tracker.api
from tests.conftest import cli, golden, refused
from tracker.core.config import CellRequest
from tracker.core.errors import RequestError
from tracker.runner import Finished

COMMON = ["evaluate", "--model=m", "--benchmark=b", "--layer=3"]


@pytest.fixture
def asked(monkeypatch) -> list[CellRequest]:
    found: list[CellRequest] = []

    def evaluate(request: CellRequest, **_: Any) -> tuple[None, Finished]:
        found.append(request)
        return None, Finished()

    monkeypatch.setattr(tracker.api, "evaluate", evaluate)
    return found


@pytest.mark.parametrize(("typed", "field", "value"), golden("trial_settings"))
def test_one(asked, typed, field, value):
    result = cli(*COMMON, *shlex.split(typed))
    assert result.exit_code == 0, result.output
    (request,) = asked
    assert getattr(request, field) == literal_eval(value)


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

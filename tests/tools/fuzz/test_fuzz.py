"""A small part of `make fuzz`, the same every time."""

from __future__ import annotations

import pytest

from tests.conftest import save_llama
from tests.tools.fuzz import folders, tried

SEED = 7


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_llama(tmp_path_factory.mktemp("models") / "tiny")


@pytest.mark.parametrize(
    ("kind", "count"), [("experiments", 24), ("command_lines", 60), ("configurations", 10)]
)
def test_whatever_is_typed_ends_in_words(model, tmp_path, kind, count):
    trial = getattr(tried, kind)(model, count, SEED, tmp_path)
    assert not trial.finds, "\n\n".join(trial.finds)
    assert trial.counts[tried.REFUSED] > count / 2
    assert trial.counts[tried.FINE_OUTCOME], "all of it is nonsense, so little is tried"


@pytest.mark.parametrize(("kind", "count"), [("caches", 1), ("months", 1)])
def test_whatever_others_do_to_a_folder_changes_no_figure(model, tmp_path, kind, count):
    trial = getattr(folders, kind)(model, count, SEED, tmp_path)
    assert not trial.finds, "\n\n".join(trial.finds)
    assert trial.counts.total() == count


def test_whatever_happens_to_the_disk_is_noticed(tmp_path):
    for trial in tried.try_ledgers(8, 4, SEED, tmp_path):
        assert not trial.finds, "\n".join(trial.finds)

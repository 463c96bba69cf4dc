"""Test the identities and views that are refused, and the names of views' files."""

from __future__ import annotations

import re

import pytest

from tests.helpers.stored_cells import benchmark_identity, layer_request, model_identity
from tracker.ledger.files import seal_note
from tracker.ledger.views import (
    CellIdentity,
    RequestedView,
    cell_key,
    folder_name,
    request_key,
    view_file_name,
)
from tracker.schema.changes import Change
from tracker.schema.config import cell_request
from tracker.schema.provenance import content_hash
from tracker.schema.views import View


@pytest.mark.parametrize(
    ("name", "stem"),
    [
        ("intact--exact_match,a/b", "intact--exact_match,a%2Fb"),
        ("a" * 100, "a" * 100),
        ("a" * 101, f"{'a' * 80}--{content_hash('a' * 101)[:12]}"),
    ],
)
def test_names_of_view_files_are_stable(name, stem):
    assert view_file_name(name) == stem


def test_an_identity_under_the_key_of_another_is_refused(cell):
    other = cell.identity.model_copy(update={"key": "0" * 64})
    assert CellIdentity.read(cell.identity.to_note()) == cell.identity
    with pytest.raises(
        ValueError, match=r"^the cell's key does not fit the model and benchmark in cell.json$"
    ):
        CellIdentity.read(other.to_note())


@pytest.mark.parametrize(
    ("removed", "run", "metric", "message"),
    [
        ((), {"layer": 2, "span": 2}, "acc", ""),
        ((), {"layer": 3, "span": 2}, "acc", "the model has no layer 4"),
        ((), {"layer": 4}, "acc", "the model has no layer 4"),
        ((2, 4), {"layer": 0}, "acc", "the model has no layer 4"),
        ((), {"layer": 0}, "f1", "the benchmark has no metric 'f1'"),
    ],
)
def test_a_view_shows_layers_of_the_model_and_a_metric_of_the_benchmark(
    cell, removed, run, metric, message
):
    view = View(metric=metric, removed=removed, runs=(Change.from_columns(**run),))
    requested = RequestedView(project="p", view=view)
    text = seal_note(requested.model_dump(mode="json"))
    if not message:
        assert cell.views.read(text) == requested
        return
    with pytest.raises(ValueError, match=f"^{message}$"):
        cell.views.read(text)


def test_a_copy_in_place_of_another_view_is_named(cell):
    """Was: one of two views was gone, and nothing was said."""
    for layer, removed in ((0, ()), (1, (3,))):
        cell.views.add_request(layer_request(layer, removed=removed), "project")
    intact, without = (cell.views.path(name) for name in ("intact", "without-3"))
    without.write_bytes(intact.read_bytes())
    damaged: dict[str, str] = {}
    assert [stored.view.removed for stored in cell.views.read_requested(damaged)] == [()]
    assert "the file is a copy of intact.json" in damaged[str(without)]


def test_requested_layers_replace_equal_controls():
    """Was: two runs of the same layers, in one view, had the same key in trackers."""
    requested, drawn = Change(layers=(0, 2)), Change(layers=(0, 2), drawn=True)
    other = Change(layers=(1, 3), drawn=True)
    first = View(metric="acc", runs=(requested, other), limit=8)
    second = View(metric="acc", runs=(drawn, other), limit=4)
    assert first.merge(second).runs == second.merge(first).runs == (requested, other)
    assert first.shows(second)
    assert not second.model_copy(update={"limit": 9}).shows(first)


ASKED: dict[str, object] = {"model": "m", "benchmark": "b", "layers": (0, 1)}
STAMP = [("model.gguf", 10, 1)]
VERSIONS = {"torch": "2.6", "lm-eval": "0.4"}
PLAIN = cell_key(model_identity(), benchmark_identity())
SAFE = re.compile(r"[A-Za-z0-9._-]+")


class TestCellKey:
    @pytest.mark.parametrize("change", [{"fingerprint": "e" * 64}, {"dtype": "bfloat16"}], ids=str)
    def test_keys_depend_on_the_weights(self, change):
        assert cell_key(model_identity(**change), benchmark_identity()) != PLAIN

    @pytest.mark.parametrize(
        "change",
        [
            *({"num_fewshot": 5}, {"seed": 7}, {"apply_chat_template": True}),
            *({"name": "arc_challenge"}, {"task": {"fingerprint": "b" * 64}}),
            *({"task": {"version": "2.0"}}, {"sizes": {"other": 70}}),
            {"sizes": {"arc_easy": 70, "more": 70}},
        ],
        ids=str,
    )
    def test_keys_depend_on_the_prompts(self, change):
        assert cell_key(model_identity(), benchmark_identity(**change)) != PLAIN

    def test_keys_do_not_depend_on_names_and_places(self):
        moved = model_identity(source="/copy/of/it", name="copy", revision="main")
        shown = {"primary_metric": "acc_norm", "weight_by_size": False}
        key = cell_key(moved, benchmark_identity(data="/copy", **shown))
        assert key == PLAIN
        assert re.fullmatch("[0-9a-f]{64}", key)


class TestRequestKey:
    def key(self, stamp=STAMP, data=None, versions=VERSIONS, **changes) -> str:
        return request_key(cell_request(**ASKED | changes), stamp, data, versions)

    def test_keys_do_not_depend_on_runs_and_documents(self):
        runs = {"layers": (3,), "components": ("mlp",), "spans": (2,)}
        changes = {**runs, "removed": (1,), "limit": 10, "metric": "acc"}
        for name, value in changes.items():
            assert self.key(**{name: value}) == self.key(), name

    def test_keys_depend_on_the_part(self):
        before = "c3af45692282d0599f49f9317d936e600ca7fb8718036803045c61240f1c7f39"
        assert self.key(part=None) == self.key() == before
        assert self.key(versions=dict(reversed(VERSIONS.items()))) == before
        assert len({self.key(part=part) for part in (None, "calibration", "test")}) == 3

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            *{"model": "n", "benchmark": "c", "revision": "main", "dtype": "float16"}.items(),
            *{"num_fewshot": 0, "seed": 0, "apply_chat_template": True, "data": "DATA"}.items(),
            ("stamp", [("model.gguf", 10, 2)]),
            ("data", [("test.arrow", 1, 1)]),
            ("versions", {**VERSIONS, "lm-eval": "0.5"}),
        ],
    )
    def test_keys_depend_on_everything_else(self, name, value):
        assert self.key(**{name: value}) != self.key()


class TestFolderName:
    def test_folder_names_are_readable(self):
        assert folder_name("SmolLM2", "a/b::c d", f"{'12' * 6}0") == f"SmolLM2--a-b-c-d--{'12' * 6}"

    @pytest.mark.parametrize("name", ["a/b::c", "Größe 7", "a\\b:c*?", "../..", "x" * 300])
    def test_folder_names_are_valid_everywhere(self, name):
        folder = folder_name(name, name, "0" * 64)
        assert SAFE.fullmatch(folder)
        assert len(folder) <= 80 + len("--") + 12
        assert folder not in (".", "..")

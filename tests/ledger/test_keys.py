from __future__ import annotations

import re

import pytest

from tracker.core.config import CellRequest
from tracker.ledger.keys import cell_key, folder_name, request_key

ASKED = CellRequest(model="m", benchmark="b", layers=(0, 1))
STAMP = [("model.gguf", 10, 1)]
VERSIONS = {"torch": "2.6", "lm-eval": "0.4"}
SAFE = re.compile(r"[A-Za-z0-9._-]+")


class TestCellKey:
    def test_is_the_same_for_the_same_content(self, model_identity, benchmark_identity) -> None:
        key = cell_key(model_identity(), benchmark_identity())
        assert key == cell_key(model_identity(), benchmark_identity())
        assert re.fullmatch("[0-9a-f]{64}", key)

    @pytest.mark.parametrize(
        "change",
        [
            {"fingerprint": "e" * 64},
            {"dtype": "bfloat16"},
        ],
        ids=str,
    )
    def test_what_decides_the_weights_counts(
        self, model_identity, benchmark_identity, change
    ) -> None:
        assert cell_key(model_identity(**change), benchmark_identity()) != cell_key(
            model_identity(), benchmark_identity()
        )

    @pytest.mark.parametrize(
        "change",
        [
            {"num_fewshot": 5},
            {"seed": 7},
            {"apply_chat_template": True},
            {"name": "arc_challenge"},
            {"task": {"fingerprint": "b" * 64}},
            {"task": {"version": "2.0"}},
            {"sizes": {"other": 70}},
            {"sizes": {"arc_easy": 70, "more": 70}},
        ],
        ids=str,
    )
    def test_what_decides_the_prompts_counts(
        self, model_identity, benchmark_identity, change
    ) -> None:
        assert cell_key(model_identity(), benchmark_identity(**change)) != cell_key(
            model_identity(), benchmark_identity()
        )

    def test_names_and_places_do_not_count(self, model_identity, benchmark_identity) -> None:
        moved = model_identity(source="/copy/of/it", name="copy", revision="main")
        relabelled = benchmark_identity(
            data="/copy", primary_metric="acc_norm", weight_by_size=False
        )
        assert cell_key(moved, relabelled) == cell_key(model_identity(), benchmark_identity())


class TestRequestKey:
    def key(self, stamp=STAMP, data=None, versions=VERSIONS, **changes) -> str:
        return request_key(ASKED.model_copy(update=changes), stamp, data, versions)

    @pytest.mark.parametrize(
        "change",
        [
            {"layers": (3,)},
            {"components": ("mlp",)},
            {"spans": (2,)},
            {"removed": (1,)},
            {"limit": 10},
            {"metric": "acc"},
        ],
        ids=str,
    )
    def test_what_a_cell_grows_by_does_not_count(self, change) -> None:
        assert self.key(**change) == self.key()

    def test_the_part_counts_and_none_leaves_the_keys_of_before(self) -> None:
        before = "c3af45692282d0599f49f9317d936e600ca7fb8718036803045c61240f1c7f39"
        assert self.key(part=None) == self.key() == before
        assert len({self.key(part=part) for part in (None, "calibration", "test")}) == 3

    def test_the_order_of_the_versions_does_not_count(self) -> None:
        assert self.key(versions=dict(reversed(VERSIONS.items()))) == self.key()

    @pytest.mark.parametrize(
        "change",
        [
            {"model": "n"},
            {"benchmark": "c"},
            {"revision": "main"},
            {"dtype": "float16"},
            {"num_fewshot": 0},
            {"seed": 0},
            {"apply_chat_template": True},
            {"data": "DATA"},
            {"stamp": [("model.gguf", 10, 2)]},
            {"data": [("test.arrow", 1, 1)]},
            {"versions": {**VERSIONS, "lm-eval": "0.5"}},
        ],
        ids=str,
    )
    def test_everything_else_counts(self, change) -> None:
        assert self.key(**change) != self.key()


class TestFolderName:
    def test_a_person_finds_it(self) -> None:
        assert folder_name("SmolLM2", "arc_easy", "0123456789abcdef") == (
            "SmolLM2--arc_easy--0123456789ab"
        )

    @pytest.mark.parametrize("name", ["a/b::c", "Größe 7", "a\\b:c*?", "../..", "x" * 300])
    def test_every_file_system_takes_it(self, name: str) -> None:
        made = folder_name(name, name, "0" * 64)
        assert SAFE.fullmatch(made)
        assert len(made) <= 80 + len("--") + 12
        assert made not in (".", "..")

    def test_what_it_does_not_take_becomes_one_dash(self) -> None:
        assert folder_name("a/b::c", "d e", "0" * 64) == "a-b-c--d-e--" + "0" * 12

    def test_names_that_look_alike_stay_apart(self) -> None:
        assert folder_name("a/b", "c", "0" * 64) != folder_name("a:b", "c", "1" * 64)

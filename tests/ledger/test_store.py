from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from filelock import Timeout

from tests.helpers.stored_cells import (
    asks,
    benchmark_identity,
    fill,
    mean,
    measure_all,
    model_identity,
    row,
)
from tracker.analysis.records import cell_record
from tracker.core.distribution import FORMAT, upgrade
from tracker.core.errors import ResultsError
from tracker.core.extent import ALL, Extent, random_order
from tracker.core.records import CellRecord
from tracker.ledger.blocks import Block
from tracker.ledger.cells import CellStore
from tracker.ledger.files import write_note
from tracker.ledger.shards import read_shard, shard_digest
from tracker.ledger.store import Ledger

STRANGE = ["a/b::c", "a%2Fb", "*[x]?", "Größe", "dots.in.00001", ".hidden"]
NAMES = ("baseline", "layer:0", "layer:1")
FIRST = Block("arc_easy", 0)


class TestShards:
    def test_what_is_written_is_read_back(self, cell):
        nothing = cell.read(columns=["task", "doc"])
        assert (list(nothing.columns), len(nothing), len(cell.read())) == (["task", "doc"], 0, 0)
        rows = [row(3), row(3, "layer:0", acc=0.0), row(5, acc=0.5)]
        cell.write(FIRST, rows, {"provenance": {"torch": "2"}, "seconds": "1.5"})
        frame = cell.read()
        (path,) = cell.shards()
        assert read_shard(path.read_bytes()).table.to_pylist() == rows
        assert frame[["doc", "ablation", "metric/acc", "gold", "choices"]].values.tolist() == [
            [3, "baseline", 1.0, 1, 2],
            [3, "layer:0", 0.0, 1, 2],
            [5, "baseline", 0.5, 1, 2],
        ]
        assert set(frame["provenance"]) == {'{"torch": "2"}'}
        metadata = json.loads(pq.read_metadata(path).metadata[b"tracker"])
        assert metadata == {
            "format": FORMAT,
            "key": cell.identity.key,
            "task": "arc_easy",
            "provenance": {"torch": "2"},
            "seconds": "1.5",
            "digest": shard_digest(path.read_bytes()),
        }

    def test_only_the_wanted_blocks_and_columns(self, cell):
        for number, documents in enumerate(([0, 1], [32], [64])):
            fill(cell, Block("arc_easy", number), documents, ["baseline"])
        one = cell.read([Block("arc_easy", 1)], columns=["doc"])
        assert list(one.columns) == ["doc"]
        assert list(one["doc"]) == [32]
        two = cell.read([FIRST, Block("arc_easy", 2)])
        assert sorted(two["doc"]) == [0, 1, 64]
        assert sorted(cell.read()["doc"]) == [0, 1, 32, 64]
        assert not len(cell.read([]))

    def test_a_document_that_was_measured_twice_counts_once(self, cell):
        """Duplicates are removed for any requested columns, and equal shards do not accumulate."""
        for documents in ([0, 1], [1, 2], [1, 2]):
            fill(cell, FIRST, documents, NAMES[:2])
        assert len(cell.shards()) == 2
        for column in ("ablation", "doc", "task", "metric/acc"):
            frame = cell.read(columns=[column])
            assert (list(frame.columns), len(frame)) == ([column], 6)


class TestBlocks:
    def test_the_blocks_hold_every_document_once(self, cell):
        held = [cell.missing(block, ALL, NAMES[:1])[NAMES[:1]] for block in cell.blocks(ALL)]
        assert [doc for documents in held for doc in documents] == list(range(70))
        assert [len(documents) for documents in held] == [32, 32, 6]

    @pytest.mark.parametrize(("limit", "count"), [(1, 1), (32, 1), (33, 2), (70, 3), (999, 3)])
    def test_a_limit_needs_fewer(self, cell, limit, count):
        assert len(cell.blocks(Extent(limit=limit))) == count
        assert cell.counts(Extent(limit=limit)) == {"arc_easy": min(limit, 70)}

    def test_a_limit_is_per_task(self, cell_of):
        cell = cell_of({"a": 40, "b": 3})
        assert cell.counts(Extent(limit=33)) == {"a": 33, "b": 3}
        assert cell.blocks(Extent(limit=33)) == [Block("a", 0), Block("a", 1), Block("b", 0)]

    def test_strange_task_names_stay_apart(self, cell_of):
        blocks = [Block(task, 0) for task in STRANGE]
        cell = cell_of(dict.fromkeys(STRANGE, 2))
        for block in blocks:
            fill(cell, block, [0, 1], ["baseline"])
        assert {path.parent for path in cell.shards()} == {cell.folder / "shards"}
        for number, block in enumerate(blocks, 1):
            assert list(cell.read([block])["task"]) == [block.task] * 2
            assert cell.missing(block, ALL, ["baseline"]) == {}
            with cell.lock(block):
                assert len(list((cell.folder / "locks").glob("*.lock"))) == number
        assert cell.is_complete(ALL, ["baseline"])


def documents_of(cell: CellStore, extent: Extent) -> list[int]:
    return sorted(cell.read_documents(extent, ["task", "doc", "ablation"])["doc"])


class TestSamples:
    SAMPLE = Extent(sample=40)

    def test_it_takes_as_many_blocks_and_shards_as_first_documents(self, cell):
        blocks = cell.blocks(self.SAMPLE)
        assert len(blocks) == len(cell.blocks(Extent(limit=40))) == 2
        assert not {block.name for block in blocks} & {b.name for b in cell.blocks(ALL)}
        measure_all(cell, NAMES[:1], extent=self.SAMPLE)
        assert len(cell.shards()) == 2
        assert cell.is_complete(self.SAMPLE, NAMES[:1])
        assert not cell.is_complete(Extent(limit=40), NAMES[:1])
        assert not cell.is_complete(self.SAMPLE, NAMES)
        assert documents_of(cell, self.SAMPLE) == sorted(
            random_order(1234, "arc_easy", range(70))[:40]
        )

    @pytest.mark.parametrize("before", [Extent(limit=40), Extent(sample=40, seed=7), SAMPLE])
    @pytest.mark.parametrize("after", [ALL, Extent(limit=50), Extent(sample=50), SAMPLE])
    def test_what_another_order_measured_is_not_measured_again(self, cell, before, after):
        measure_all(cell, NAMES[:1], extent=before)
        held = set(documents_of(cell, before))
        wanted = set(after.of("arc_easy", range(70)))
        lacking = [
            document
            for block in cell.blocks(after)
            for documents in cell.missing(block, after, NAMES[:1]).values()
            for document in documents
        ]
        assert sorted(lacking) == sorted(wanted - held)
        assert cell.is_complete(after, NAMES[:1]) is not bool(lacking)
        measure_all(cell, NAMES[:1], extent=after)
        assert cell.is_complete(after, NAMES[:1])
        assert set(documents_of(cell, after)) == wanted
        assert sorted(cell.read()["doc"]) == sorted(held | wanted)


class TestHalves:
    """A cell whose documents are half of a task's, under the numbers that they have in all."""

    NUMBERS = tuple(sorted(random_order(1234, "arc_easy", range(140))[70:]))

    @pytest.fixture
    def cell(self, cell_of) -> CellStore:
        return cell_of(task={"half": {"part": "test", "seed": 1234, "of": 140}})

    def test_its_documents_are_written_and_read(self, ledger, cell):
        assert cell.counts() == {"arc_easy": 70}
        assert cell.wanted(Extent(limit=3)) == {"arc_easy": self.NUMBERS[:3]}
        sample, seen = Extent(sample=40), set()
        for extent in (sample, Extent(limit=40), Extent(sample=40, seed=7), ALL):
            measure_all(cell, NAMES[:1], extent=extent)
            wanted = set(extent.of("arc_easy", self.NUMBERS))
            assert set(documents_of(cell, extent)) == wanted
            assert cell.is_complete(extent, NAMES[:1])
            seen |= wanted
            assert sorted(cell.read()["doc"]) == sorted(seen), "none twice"
        assert wanted == set(self.NUMBERS)
        order = random_order(1234, "arc_easy", range(140))
        assert documents_of(cell, sample) == sorted(order[70:110])
        (found,) = Ledger(ledger.root).cells()
        assert found.identity == cell.identity

    def test_a_document_of_the_other_half_is_none_of_it(self, cell, caplog):
        foreign = min(set(range(140)) - set(self.NUMBERS))
        cell.write(FIRST, [row(foreign)], {})
        cell.write(FIRST, [row(self.NUMBERS[0])], {})
        assert list(cell.read()["doc"]) == [self.NUMBERS[0]]
        assert "the benchmark has no such document" in caplog.text


class TestMissing:
    def test_what_is_no_rectangle(self, cell):
        fill(cell, FIRST, [0, 1, 2], ["baseline"])
        fill(cell, FIRST, [1], ["layer:0", "layer:1"])
        fill(cell, FIRST, [2], ["layer:1"])
        assert cell.missing(FIRST, Extent(limit=4), NAMES) == {
            ("layer:0", "layer:1"): [0],
            ("layer:0",): [2],
            NAMES: [3],
        }


class TestComplete:
    def test_needs_every_document_and_ablation(self, cell):
        assert not cell.is_complete(ALL, NAMES)
        fill(cell, FIRST, range(32), NAMES)
        assert cell.is_complete(Extent(limit=32), NAMES)
        assert cell.is_complete(Extent(limit=10), NAMES)
        assert not cell.is_complete(Extent(limit=33), NAMES)
        assert not cell.is_complete(Extent(limit=32), [*NAMES, "layer:2"])
        fill(cell, Block("arc_easy", 1), range(32, 64), NAMES)
        fill(cell, Block("arc_easy", 2), range(64, 70), NAMES[:2])
        assert not cell.is_complete(ALL, NAMES)
        assert cell.is_complete(ALL, NAMES[:2])
        fill(cell, Block("arc_easy", 2), range(64, 70), NAMES[2:])
        assert cell.is_complete(ALL, NAMES)


def test_who_is_at_a_block_keeps_others_from_it_alone(cell):
    with cell.lock(Block("arc_easy", 1)):
        with pytest.raises(Timeout):
            cell.lock(Block("arc_easy", 1)).acquire(timeout=0)
        with cell.lock(FIRST).acquire(timeout=0):
            pass


class TestLedger:
    def test_nothing_is_made_before_create(self, tmp_path):
        root = tmp_path / "results"
        ledger = Ledger(root)
        assert not root.exists()
        assert ledger.cells() == []
        ledger.create()
        assert json.loads((root / "tracker.json").read_text()) == {"format": FORMAT}
        ledger.create()
        assert Ledger.existing(root).root == root

    def test_what_is_no_results_folder(self, tmp_path):
        with pytest.raises(ResultsError, match="is not a results folder"):
            Ledger.existing(tmp_path)
        (tmp_path / "file").write_text("")
        for name, why in (
            ("nowhere", "nowhere is not a results folder"),
            ("file", "file is a file, not a results folder"),
            ("long" * 100, "long cannot be used: File name too long$"),
        ):
            with pytest.raises(ResultsError, match=why):
                Ledger.existing(tmp_path / name)

    @pytest.mark.parametrize(
        ("other", "why", "what"),
        [
            (FORMAT + 1, "a newer tracker", upgrade()),
            (FORMAT - 1, "an older tracker", "Read it with that one, or choose another --results."),
        ],
    )
    def test_another_format_is_refused(self, ledger, other, why, what):
        (ledger.root / "tracker.json").write_text(json.dumps({"format": other}))
        for opened in (Ledger, Ledger.existing):
            with pytest.raises(ResultsError, match=f"written by {why}") as caught:
                opened(ledger.root)
            assert what in str(caught.value)
            assert caught.value.exit_code == 2

    def test_a_cell_is_made_once(self, ledger, cell, cell_of):
        assert cell.folder.name == f"SmolLM2--arc_easy--{cell.identity.key[:12]}"
        again = ledger.cell(model_identity(name="renamed"), benchmark_identity(), {"numpy": "2"})
        assert cell.identity.provenance == {"numpy": "2.4"}
        assert again.folder == cell.folder, "the same weights by another name are the same cell"
        other = cell_of(model={"fingerprint": "0" * 64})
        assert other.folder != cell.folder
        assert {c.folder for c in ledger.cells()} >= {cell.folder, other.folder}

    @pytest.mark.parametrize("text", ["", "{", "{}", "[]", None])
    def test_a_damaged_cell_is_refused_and_written_anew(self, ledger, cell, cell_of, text):
        """Its outcomes are not measured again, and other cells stay usable."""
        other = cell_of(name="other")
        fill(cell, FIRST, [0], NAMES)
        ledger.remember("0" * 64, cell)
        (cell.folder / "cell.json").unlink()
        if text is not None:
            (cell.folder / "cell.json").write_text(text)
        ((folder, what),) = ledger.contents().damaged.items()
        assert folder == str(cell.folder)
        assert "cell.json cannot be used" in what
        assert [found.folder for found in ledger.cells()] == [other.folder]
        assert ledger.find("0" * 64) is None
        assert len(cell_of().read()) == len(NAMES)

    def test_a_cell_under_the_name_of_another_is_refused(self, ledger, cell):
        moved = cell.folder.rename(cell.folder.with_name("SmolLM2--arc_easy--0123456789ab"))
        assert "it belongs to another folder" in ledger.contents().damaged[str(moved)]

    def test_a_request_is_found_again(self, ledger, cell):
        key = "0123456789abcdef" * 4
        assert ledger.find(key) is None
        ledger.remember(key, cell)
        assert Ledger(ledger.root).find(key).folder == cell.folder
        assert ledger.find("f" * 64) is None
        cell.folder.rename(ledger.root / "moved away")
        assert ledger.find(key) is None

    def test_experiments_are_kept_word_for_word(self, ledger):
        text = "# größe\r\nmethod: grid\n"
        ledger.keep_experiment("b.yaml", "x: 1\n")
        ledger.keep_experiment("a.yaml", text)
        kept = ledger.contents().experiments
        assert list(kept.items()) == [("a.yaml", text), ("b.yaml", "x: 1\n")]
        assert (ledger.root / "experiments" / "a.yaml").read_bytes() == text.encode()

    @pytest.mark.skipif(not Path("/proc/self").exists(), reason="only Linux has /proc")
    @pytest.mark.skipif(not Path("/proc/self").exists(), reason="only Linux has /proc")
    def test_a_folder_that_cannot_be_written_is_refused(self, tmp_path, monkeypatch):
        """Was: an administrator's run in /proc measured everything, and then failed."""
        for root in (tmp_path, tmp_path / "new" / "results"):
            Ledger(root).refuse_unwritable()
        assert not [*tmp_path.iterdir()]
        (tmp_path / "file").write_text("")
        for root, why in (
            (Path("/proc/results"), "/proc/results cannot be written.*--results"),
            (tmp_path / "file" / "results", "cannot be made: .*file is a file"),
        ):
            with pytest.raises(ResultsError, match=why):
                Ledger(root).refuse_unwritable()
        monkeypatch.setattr("os.access", lambda *_: False)
        with pytest.raises(ResultsError, match=f"{tmp_path} is .*'s, and you may not write it"):
            Ledger(tmp_path).refuse_unwritable()


class TestNotes:
    def test_runs_of_one_view_add_up_one_by_one(self, cell):
        """Was: layers, components and spans were united axis by axis, and the runs of their product
        that nobody had asked for were missing for ever."""
        cell.views.ask(asks(3, 0, limit=5, components=("mlp",)), "first")
        cell.views.ask(asks(1, limit=5, spans=(3, 1), metric="acc"), "second")
        (asked,) = cell.views.asked()
        assert asked.project == "second"
        assert (asked.view.limit, asked.view.metric) == (5, "acc")
        assert [run.label() for run in asked.view.runs] == [
            "layer 1", "layers 1–3", "mlp 0", "mlp 3",
        ]  # fmt: skip

    def test_views_are_kept_apart_with_the_intact_model_first(self, cell_of):
        cell = cell_of(model={"layers": 201})
        beneath = [(3, 17), (), (3,), tuple(range(200))]
        for removed in beneath:
            cell.views.ask(asks(1, removed=removed), "project")
        assert [asked.view.removed for asked in cell.views.asked()] == sorted(beneath)
        names = {path.name for path in (cell.folder / "requests").iterdir()}
        assert {"intact.json", "without-3.json", "without-3-17.json"} < names

    def test_metrics_are_views_of_their_own(self, cell_of):
        """Was: the last metric that was asked for replaced the others."""
        metrics = ("acc", "acc_norm", "exact_match,a/b", "..")
        cell = cell_of(metrics=metrics)
        for layer, metric in enumerate((*metrics[1:], None)):
            cell.views.ask(asks(layer, metric=metric), "project")
        assert [a.view.metric for a in cell.views.asked()] == ["acc", "..", "acc_norm", metrics[2]]
        assert [[r.layer for r in a.view.runs] for a in cell.views.asked()] == [[3], [2], [0], [1]]
        assert {path.name for path in (cell.folder / "requests").iterdir()} == {
            "intact.json",
            "intact--...json",
            "intact--acc_norm.json",
            "intact--exact_match,a%2Fb.json",
        }

    def test_processes_that_ask_at_once_lose_nothing(self, cell_of):
        cell = cell_of(model={"layers": 40})

        def ask(layer: int) -> None:
            CellStore(cell.folder, cell.identity).views.ask(asks(layer), "project")

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(ask, range(40)))
        assert [run.layer for run in cell.views.asked()[0].view.runs] == list(range(40))

    def test_a_record_is_recalled_for_the_state_that_it_follows_from(self, cell):
        fill(cell, FIRST, range(3), NAMES)
        record = cell_record(cell, cell.views.ask(asks(0, 1, limit=3), "project"), mean)
        assert cell.derived("state", record.view, CellRecord) is None
        cell.keep("state", record.view, record)
        assert cell.derived("state", record.view, CellRecord) == record
        assert cell.derived("another", record.view, CellRecord) is None
        assert cell.derived("state", "another", CellRecord) is None
        path = cell.folder / "derived" / "intact-limit-3.json"
        path.write_text(path.read_text().replace('"n": 3', '"n": 4'))
        assert cell.derived("state", record.view, CellRecord) is None, "edited"
        write_note(path, {"state": "state", "record": {"key": 1}})
        assert cell.derived("state", record.view, CellRecord) is None
        path.unlink()
        (path / "in the way").mkdir(parents=True)
        cell.keep("state", record.view, record)
        assert cell.derived("state", record.view, CellRecord) is None

    def test_receipts_are_kept_apart(self, cell):
        assert cell.receipt("mlflow") == {}
        cell.add_receipt("mlflow", record="1", location="http://one")
        cell.add_receipt("wandb", record="2", location="http://two")
        cell.add_receipt("mlflow", record="3", location="http://three")
        assert cell.receipt("mlflow") == {"record": "3", "location": "http://three"}
        assert cell.receipt("wandb") == {"record": "2", "location": "http://two"}
        write_note(cell.folder / "receipts" / "wandb.json", {"record": "2"})
        assert cell.receipt("wandb") == {}
        cell.add_receipt("a" * 64, record="1", location="there")
        assert (cell.folder / "receipts" / f"{'a' * 32}.json").exists()

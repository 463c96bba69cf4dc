from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from filelock import Timeout

from tests.helpers.stored_cells import (
    benchmark_identity,
    fill_block,
    layer_request,
    make_row,
    mean,
    measure_all,
    model_identity,
)
from tracker.analysis.records import cell_record
from tracker.ledger.blocks import Block
from tracker.ledger.cells import CellStore
from tracker.ledger.files import write_note
from tracker.ledger.shards import read_shard, shard_digest
from tracker.ledger.store import Ledger
from tracker.schema.distribution import LEDGER_FORMAT, upgrade_command
from tracker.schema.errors import ResultsError
from tracker.schema.extent import ALL_DOCUMENTS, Extent, random_order
from tracker.schema.records import CellRecord

STRANGE = ["a/b::c", "a%2Fb", "*[x]?", "Größe", "dots.in.00001", ".hidden"]
NAMES = ("baseline", "layer:0", "layer:1")
FIRST = Block("arc_easy", 0)


class TestShards:
    def test_what_is_written_is_read_back(self, cell):
        empty = cell.read(columns=["task", "doc"])
        assert (list(empty.columns), len(empty)) == (["task", "doc"], 0)
        assert not len(cell.read())
        rows = [make_row(3), make_row(3, "layer:0", acc=0.0), make_row(5, acc=0.5)]
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
            "format": LEDGER_FORMAT,
            "key": cell.identity.key,
            "task": "arc_easy",
            "provenance": {"torch": "2"},
            "seconds": "1.5",
            "digest": shard_digest(path.read_bytes()),
        }

    def test_only_the_wanted_blocks_and_columns(self, cell):
        for number, documents in enumerate(([0, 1], [32], [64])):
            fill_block(cell, Block("arc_easy", number), documents, ["baseline"])
        block_frame = cell.read([Block("arc_easy", 1)], columns=["doc"])
        assert list(block_frame.columns) == ["doc"]
        assert list(block_frame["doc"]) == [32]
        frame = cell.read([FIRST, Block("arc_easy", 2)])
        assert sorted(frame["doc"]) == [0, 1, 64]
        assert sorted(cell.read()["doc"]) == [0, 1, 32, 64]
        assert not len(cell.read([]))

    def test_a_document_that_was_measured_twice_counts_once(self, cell):
        """Duplicates are removed for any requested columns, and equal shards do not accumulate."""
        for documents in ([0, 1], [1, 2], [1, 2]):
            fill_block(cell, FIRST, documents, NAMES[:2])
        assert len(cell.shards()) == 2
        for column in ("ablation", "doc", "task", "metric/acc"):
            frame = cell.read(columns=[column])
            assert (list(frame.columns), len(frame)) == ([column], 6)


class TestBlocks:
    def test_a_limit_is_per_task(self, cell_of):
        cell = cell_of({"a": 40, "b": 3})
        assert cell.counts(Extent(limit=33)) == {"a": 33, "b": 3}
        assert cell.blocks(Extent(limit=33)) == [Block("a", 0), Block("a", 1), Block("b", 0)]

    def test_strange_task_names_stay_apart(self, cell_of):
        blocks = [Block(task, 0) for task in STRANGE]
        cell = cell_of(dict.fromkeys(STRANGE, 2))
        for block in blocks:
            fill_block(cell, block, [0, 1], ["baseline"])
        assert {path.parent for path in cell.shards()} == {cell.folder / "shards"}
        for number, block in enumerate(blocks, 1):
            assert list(cell.read([block])["task"]) == [block.task] * 2
            assert cell.missing_outcomes(block, ALL_DOCUMENTS, ["baseline"]) == {}
            with cell.lock(block):
                assert len(list((cell.folder / "locks").glob("*.lock"))) == number
        assert cell.is_complete(ALL_DOCUMENTS, ["baseline"])


def documents_of(cell: CellStore, extent: Extent) -> list[int]:
    return sorted(cell.read_documents(extent, ["task", "doc", "ablation"])["doc"])


class TestSamples:
    SAMPLE = Extent(sample=40)

    def test_samples_take_as_few_blocks_as_limits(self, cell):
        blocks = cell.blocks(self.SAMPLE)
        assert len(blocks) == len(cell.blocks(Extent(limit=40))) == 2
        assert not {block.name for block in blocks} & {b.name for b in cell.blocks(ALL_DOCUMENTS)}
        measure_all(cell, NAMES[:1], extent=self.SAMPLE)
        assert len(cell.shards()) == 2
        assert cell.is_complete(self.SAMPLE, NAMES[:1])
        assert not cell.is_complete(Extent(limit=40), NAMES[:1])
        assert not cell.is_complete(self.SAMPLE, NAMES)
        order = random_order(1234, "arc_easy", range(70))
        assert documents_of(cell, self.SAMPLE) == sorted(order[:40])

    @pytest.mark.parametrize("before", [Extent(limit=40), Extent(sample=40, seed=7), SAMPLE])
    @pytest.mark.parametrize("after", [ALL_DOCUMENTS, Extent(limit=50), Extent(sample=50), SAMPLE])
    def test_outcomes_of_other_orders_are_reused(self, cell, before, after):
        measure_all(cell, NAMES[:1], extent=before)
        measured = set(documents_of(cell, before))
        requested = set(after.select("arc_easy", range(70)))
        lacking = [
            document
            for block in cell.blocks(after)
            for documents in cell.missing_outcomes(block, after, NAMES[:1]).values()
            for document in documents
        ]
        assert sorted(lacking) == sorted(requested - measured)
        assert cell.is_complete(after, NAMES[:1]) is not bool(lacking)
        measure_all(cell, NAMES[:1], extent=after)
        assert cell.is_complete(after, NAMES[:1])
        assert set(documents_of(cell, after)) == requested
        assert sorted(cell.read()["doc"]) == sorted(measured | requested)


class TestHalves:
    """A cell whose documents are half of a task's, under the numbers that they have in all."""

    NUMBERS = tuple(sorted(random_order(1234, "arc_easy", range(140))[70:]))

    @pytest.fixture
    def cell(self, cell_of) -> CellStore:
        return cell_of(task={"half": {"part": "test", "seed": 1234, "of": 140}})

    def test_its_documents_are_written_and_read(self, ledger, cell):
        assert cell.counts() == {"arc_easy": 70}
        assert cell.task_documents(Extent(limit=3)) == {"arc_easy": self.NUMBERS[:3]}
        sample, seen = Extent(sample=40), set()
        for extent in (sample, Extent(limit=40), Extent(sample=40, seed=7), ALL_DOCUMENTS):
            measure_all(cell, NAMES[:1], extent=extent)
            requested = set(extent.select("arc_easy", self.NUMBERS))
            assert set(documents_of(cell, extent)) == requested
            assert cell.is_complete(extent, NAMES[:1])
            seen |= requested
            assert sorted(cell.read()["doc"]) == sorted(seen), "none twice"
        assert requested == set(self.NUMBERS)
        order = random_order(1234, "arc_easy", range(140))
        assert documents_of(cell, sample) == sorted(order[70:110])
        (reopened,) = Ledger(ledger.root).cells()
        assert reopened.identity == cell.identity

    def test_documents_of_the_other_half_are_refused(self, cell, caplog):
        foreign = min(set(range(140)) - set(self.NUMBERS))
        cell.write(FIRST, [make_row(foreign)], {})
        cell.write(FIRST, [make_row(self.NUMBERS[0])], {})
        assert list(cell.read()["doc"]) == [self.NUMBERS[0]]
        assert "the benchmark lacks a document that the file contains" in caplog.text


class TestMissing:
    def test_missing_outcomes_are_grouped_by_ablations(self, cell):
        fill_block(cell, FIRST, [0, 1, 2], ["baseline"])
        fill_block(cell, FIRST, [1], ["layer:0", "layer:1"])
        fill_block(cell, FIRST, [2], ["layer:1"])
        assert cell.missing_outcomes(FIRST, Extent(limit=4), NAMES) == {
            ("layer:0", "layer:1"): [0],
            ("layer:0",): [2],
            NAMES: [3],
        }


class TestComplete:
    def test_needs_every_document_and_ablation(self, cell):
        assert not cell.is_complete(ALL_DOCUMENTS, NAMES)
        fill_block(cell, FIRST, range(32), NAMES)
        assert cell.is_complete(Extent(limit=32), NAMES)
        assert cell.is_complete(Extent(limit=10), NAMES)
        assert not cell.is_complete(Extent(limit=33), NAMES)
        assert not cell.is_complete(Extent(limit=32), [*NAMES, "layer:2"])
        fill_block(cell, Block("arc_easy", 1), range(32, 64), NAMES)
        fill_block(cell, Block("arc_easy", 2), range(64, 70), NAMES[:2])
        assert not cell.is_complete(ALL_DOCUMENTS, NAMES)
        assert cell.is_complete(ALL_DOCUMENTS, NAMES[:2])
        fill_block(cell, Block("arc_easy", 2), range(64, 70), NAMES[2:])
        assert cell.is_complete(ALL_DOCUMENTS, NAMES)


def test_blocks_are_locked_one_by_one(cell):
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
        assert json.loads((root / "tracker.json").read_text()) == {"format": LEDGER_FORMAT}
        ledger.create()
        assert Ledger.open_existing(root).root == root

    def test_other_folders_are_refused(self, tmp_path):
        with pytest.raises(ResultsError, match="is not a results folder"):
            Ledger.open_existing(tmp_path)
        (tmp_path / "file").write_text("")
        for name, message in (
            ("nowhere", "nowhere is not a results folder"),
            ("file", "file is a file, not a results folder"),
            ("long" * 100, "long cannot be used: File name too long$"),
        ):
            with pytest.raises(ResultsError, match=message):
                Ledger.open_existing(tmp_path / name)

    @pytest.mark.parametrize(
        ("number", "message", "advice"),
        [
            (LEDGER_FORMAT + 1, "Upgrade tracker", upgrade_command()),
            (
                LEDGER_FORMAT - 1,
                "Read the results with the older version of tracker",
                "that wrote the results. With --results you can choose another results folder.",
            ),
        ],
    )
    def test_another_format_is_refused(self, ledger, number, message, advice):
        (ledger.root / "tracker.json").write_text(json.dumps({"format": number}))
        for open_ledger in (Ledger, Ledger.open_existing):
            with pytest.raises(ResultsError, match=f"has format {number}, .*{message}") as caught:
                open_ledger(ledger.root)
            assert advice in str(caught.value)
            assert caught.value.exit_code == 2

    def test_a_cell_is_made_once(self, ledger, cell, cell_of):
        assert cell.folder.name == f"SmolLM2--arc_easy--{cell.identity.key[:12]}"
        model = model_identity(name="renamed")
        again = ledger.open_cell(model, benchmark_identity(), {"numpy": "2"})
        assert cell.identity.provenance == {"numpy": "2.4"}
        assert again.folder == cell.folder, "the same weights by another name are the same cell"
        other = cell_of(model={"fingerprint": "0" * 64})
        assert other.folder != cell.folder
        assert {c.folder for c in ledger.cells()} >= {cell.folder, other.folder}

    @pytest.mark.parametrize("text", ["", "{", "{}", "[]", None])
    def test_a_damaged_cell_is_refused_and_written_anew(self, ledger, cell, cell_of, text):
        """Its outcomes are not measured again, and other cells stay usable."""
        other = cell_of(name="other")
        fill_block(cell, FIRST, [0], NAMES)
        ledger.index_cell("0" * 64, cell)
        (cell.folder / "cell.json").unlink()
        if text is not None:
            (cell.folder / "cell.json").write_text(text)
        ((folder, problem),) = ledger.contents().damaged.items()
        assert folder == str(cell.folder)
        assert "cell.json cannot be used" in problem
        assert [store.folder for store in ledger.cells()] == [other.folder]
        assert ledger.find("0" * 64) is None
        assert len(cell_of().read()) == len(NAMES)

    def test_a_cell_under_the_name_of_another_is_refused(self, ledger, cell):
        moved = cell.folder.rename(cell.folder.with_name("SmolLM2--arc_easy--0123456789ab"))
        assert "it belongs to another folder" in ledger.contents().damaged[str(moved)]

    def test_a_request_is_found_again(self, ledger, cell):
        key = "0123456789abcdef" * 4
        assert ledger.find(key) is None
        ledger.index_cell(key, cell)
        assert Ledger(ledger.root).find(key).folder == cell.folder
        assert ledger.find("f" * 64) is None
        cell.folder.rename(ledger.root / "moved away")
        assert ledger.find(key) is None

    def test_experiment_files_are_stored_unchanged(self, ledger):
        text = "# größe\r\nmethod: grid\n"
        ledger.write_experiment("b.yaml", "x: 1\n")
        ledger.write_experiment("a.yaml", text)
        experiments = ledger.contents().experiments
        assert list(experiments.items()) == [("a.yaml", text), ("b.yaml", "x: 1\n")]
        assert (ledger.root / "experiments" / "a.yaml").read_bytes() == text.encode()

    @pytest.mark.skipif(not Path("/proc/self").exists(), reason="only Linux has /proc")
    def test_a_folder_that_cannot_be_written_is_refused(self, tmp_path, monkeypatch):
        """Was: an administrator's run in /proc measured everything, and then failed."""
        for root in (tmp_path, tmp_path / "new" / "results"):
            Ledger(root).refuse_unwritable()
        assert not [*tmp_path.iterdir()]
        (tmp_path / "file").write_text("")
        for root, message in (
            (Path("/proc/results"), "/proc/results cannot be written.*--results"),
            (tmp_path / "file" / "results", "cannot be created, because .*file is a file"),
        ):
            with pytest.raises(ResultsError, match=message):
                Ledger(root).refuse_unwritable()
        monkeypatch.setattr("os.access", lambda *_: False)
        with pytest.raises(
            ResultsError, match=f"{tmp_path} belongs to .*, and you have no permission to write it"
        ):
            Ledger(tmp_path).refuse_unwritable()


class TestNotes:
    def test_runs_of_one_view_add_up_one_by_one(self, cell):
        """Was: layers, components and spans were united axis by axis, and the runs of their product
        that nobody had asked for were missing for ever."""
        cell.views.add_request(layer_request(3, 0, limit=5, components=("mlp",)), "first")
        cell.views.add_request(layer_request(1, limit=5, spans=(3, 1), metric="acc"), "second")
        (stored,) = cell.views.read_requested()
        assert stored.project == "second"
        assert (stored.view.limit, stored.view.metric) == (5, "acc")
        assert [run.label() for run in stored.view.runs] == [
            "layer 1", "layers 1–3", "mlp 0", "mlp 3",
        ]  # fmt: skip

    def test_views_are_sorted_with_the_intact_model_first(self, cell_of):
        cell = cell_of(model={"layers": 201})
        removed_sets = [(3, 17), (), (3,), tuple(range(200))]
        for removed in removed_sets:
            cell.views.add_request(layer_request(1, removed=removed), "project")
        views = [stored.view for stored in cell.views.read_requested()]
        assert [view.removed for view in views] == sorted(removed_sets)
        names = {path.name for path in (cell.folder / "requests").iterdir()}
        assert {"intact.json", "without-3.json", "without-3-17.json"} < names

    def test_metrics_are_views_of_their_own(self, cell_of):
        """Was: the last metric that was asked for replaced the others."""
        metrics = ("acc", "acc_norm", "exact_match,a/b", "..")
        cell = cell_of(metrics=metrics)
        for layer, metric in enumerate((*metrics[1:], None)):
            cell.views.add_request(layer_request(layer, metric=metric), "project")
        views = [stored.view for stored in cell.views.read_requested()]
        assert [view.metric for view in views] == ["acc", "..", "acc_norm", metrics[2]]
        assert [[run.layer for run in view.runs] for view in views] == [[3], [2], [0], [1]]
        assert {path.name for path in (cell.folder / "requests").iterdir()} == {
            "intact.json",
            "intact--...json",
            "intact--acc_norm.json",
            "intact--exact_match,a%2Fb.json",
        }

    def test_processes_that_ask_at_once_lose_nothing(self, cell_of):
        cell = cell_of(model={"layers": 40})

        def ask(layer: int) -> None:
            CellStore(cell.folder, cell.identity).views.add_request(layer_request(layer), "project")

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(ask, range(40)))
        assert [run.layer for run in cell.views.read_requested()[0].view.runs] == list(range(40))

    def test_derived_records_are_read_back_for_their_state(self, cell):
        fill_block(cell, FIRST, range(3), NAMES)
        view = cell.views.add_request(layer_request(0, 1, limit=3), "project")
        record = cell_record(cell, view, mean)

        def read(state: str = "state", name: str = record.view) -> CellRecord | None:
            return cell.read_derived(state, name, CellRecord)

        assert read() is None
        cell.write_derived("state", record.view, record)
        assert read() == record
        assert read("another") is read(name="another") is None
        path = cell.folder / "derived" / "intact-limit-3.json"
        path.write_text(path.read_text().replace('"n": 3', '"n": 4'))
        assert read() is None, "edited"
        write_note(path, {"state": "state", "record": {"key": 1}})
        assert read() is None
        path.unlink()
        (path / "in the way").mkdir(parents=True)
        cell.write_derived("state", record.view, record)
        assert read() is None

    def test_receipts_are_stored_by_destination(self, cell):
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
